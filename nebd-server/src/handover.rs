//! How one server hands everything over to the next, from HELLO to RESUME.
//!
//! ```text
//!  owner                                candidate (a child of the owner)
//!  Hello ─────────────────────────────► versions, features, who is attached
//!        ◄───────────────────────────── Welcome, or Refused
//!  Offer + descriptors … Prepare ─────► map, open as an observer, read a little
//!        ◄───────────────────────────── Prepared
//!  (control plane closed) Offer … Prepare ► what changed meanwhile
//!        ◄───────────────────────────── Prepared: READY
//!  (shards sealed) Frozen ────────────► claim the generation: the point of no return
//!        ◄───────────────────────────── Fenced
//!  unlock                               serve
//!        ◄───────────────────────────── Resumed
//!  exit
//! ```
//!
//! At any point before the claim the owner may kill the candidate and go on; the candidate, which
//! may lose its owner at any point, goes away unless it has claimed.

pub mod message;
pub mod wire;
