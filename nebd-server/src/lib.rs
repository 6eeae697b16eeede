//! The part server: owns the storage client, serves part clients over shared-memory rings, and can
//! be killed or replaced at any instruction.
//!
//! ```text
//!   nebdctl ──gRPC──► admin ─────┐
//!                                ▼
//!   part client ──SEQPACKET──► control ──► server (sessions, volumes) ──► worker threads (open, resize, close)
//!        │                       │
//!        └──ring, doorbells──► shard 0..n ──► nebd_backend
//! ```
//!
//! The control thread owns connections and the lives of sessions; each shard thread owns the
//! queues it serves. They talk by messages.

pub mod admin;
pub mod config;
pub mod failpoint;
pub mod handover;
pub mod metrics;
pub mod registry;
pub mod run;
pub mod session;
pub mod throttle;
pub mod upgrade;
pub mod volume;

mod control;
mod fatal;
mod fd_store;
mod frontend;
mod gate;
mod holdings;
mod hooks;
mod jobs;
mod memory_holder;
mod quarantine;
mod server;
mod service_manager;
mod shard;
mod standby;
mod successor;
mod tenure;
mod vhost;
mod work_sign;
