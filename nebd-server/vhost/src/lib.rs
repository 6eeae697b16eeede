//! The device side of vhost-user-blk, without the server: no threads, no storage, no clock.
//!
//! ```text
//!  hypervisor                                               server
//!  ──── messages, descriptors ──► connection ─► message ─► device (what was agreed on)
//!                                   journal                   │ start a queue
//!  guest memory ◄─ memory ─┐                                  ▼
//!   rings ◄──────────────► queue (split, packed) ─ pop ──► request ─► a backend
//!  inflight record ◄─────► inflight              ◄─ publish, flush ── its answer
//! ```
//!
//! What outlives this process: the guest's memory with the rings, the inflight record (a memfd that
//! the hypervisor holds), the connection and its [`journal`]. [`queue::VirtQueue::start`] goes on from
//! rings and record alone, and [`connection::Connection::resume`] from connection and journal.
//!
//! Everything that a guest or a hypervisor says is copied once and checked. A guest that breaks a
//! rule gets a [`chain::Violation`], and its disk stops.

mod access;
pub mod chain;
pub mod connection;
pub mod device;
pub mod inflight;
pub mod journal;
pub mod memory;
pub mod message;
mod peek_offset;
pub mod queue;
pub mod request;
