//! Storage that fences, in a process of its own: the other end of the `fence-test` backend.
//!
//! ```text
//!  server A ──► connection ──► reader ──┬──────────────► admit ─► apply ─► answer
//!                  │ dies               ├─ delayed ─────►   ▲
//!                  ▼                    └─ duplicated ──►   │  refuses lower epochs, and what it
//!             stale frames ─────────────────────────────────┘  has applied already
//!                  re-delivered after each write of server B
//! ```
//!
//! Volumes live in memory and outlive every server. [`fence`] is the fence of the design, [`disk`]
//! a disk with a volatile cache that can lose its power, [`faults`] what goes wrong on the way.

pub mod control;
pub mod disk;
pub mod faults;
pub mod fence;
pub mod server;
