//! The keeper, and the server's half of what they say to each other.
//!
//! ```text
//!            keeper (one thread, epoll, asleep)
//!   listening sockets   host page   fd store   life pipe
//!        │  LISTEN_FDS from 3 up      ▲ FDSTORE, READY, BARRIER
//!        ▼                            │ datagrams to <state-dir>/notify.sock
//!   nebd-server (serving) ────────────┘
//!        ╎ dies: waitid → drain datagrams → record the cause → successor
//!   nebd-server (standby) ◄── nebd.standby: STORE, REMOVE, SYNC, ACTIVATE
//! ```
//!
//! The server's code is the same under systemd: [`inherit`] reads what `sd_listen_fds` would, and
//! [`notify`] speaks `sd_notify`. What only the keeper offers (the standby channel, the life pipe,
//! registering with a new keeper) shows as an absent descriptor elsewhere.
//!
//! `unsafe` lives in `sys.rs` alone.

#![deny(missing_docs)]

pub mod inherit;
pub mod keeper;
mod name;
pub mod notify;
mod reregister;
pub mod standby;
mod sys;

pub use name::{NAME_BYTES_MAX, is_store_name};

/// Names of the descriptors that a server does not store itself.
pub mod names {
    /// Listening client socket.
    pub const CLIENT: &str = "nebd.client";
    /// Listening admin socket.
    pub const ADMIN: &str = "nebd.admin";
    /// Host page.
    pub const HOST: &str = "nebd.host";
    /// Eventfd that the keeper rings after a ping.
    pub const PROBE: &str = "nebd.probe";
    /// Pidfd of the server before.
    pub const PREDECESSOR: &str = "nebd.pidfd";
    /// Read end of a pipe whose write end only the keeper holds.
    pub const LIFE: &str = "nebd.life";
    /// A standby's channel.
    pub const STANDBY: &str = "nebd.standby";
    /// A memfd with the names of the descriptors after it, where they are too many for the
    /// environment (execve refuses a string of 128 KiB).
    pub(crate) const NAMES: &str = "nebd.names";
    /// What the store's own names must not start with.
    pub(crate) const RESERVED: &str = "nebd.";
}
