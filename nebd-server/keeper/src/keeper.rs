//! The keeper process: one thread that sleeps in epoll and wakes for a reason.
//!
//! ```text
//!   signals ──┐                        ┌─► supervisor: who serves and who stands by; succession: who
//!             │                        │     comes next
//!   mailbox ──┤   events ─► apply ─────┤     watch, backoff: decisions, no clock of their own
//!   knock   ──┤   (epoll)              ├─► store ─► stream to the standby
//!   pidfds  ──┘                        └─► process: fork, exec, waitid
//! ```
//!
//! `launch` holds the three beginnings: from nothing, from the keeper's earlier image after SIGHUP
//! (`image`), and with the living server of a keeper that died (`adopt`).

mod adopt;
mod backoff;
mod config;
mod events;
mod files;
mod image;
mod launch;
mod mailbox;
mod process;
mod sockets;
mod store;
mod stream;
mod succession;
mod supervisor;
mod watch;

pub use config::{KeeperConfig, KeeperError};

/// Keeps a server running until SIGTERM or SIGINT; then stops it and removes sockets and pid files.
///
/// To be called from `main`, before any other thread exists: signals are blocked in this thread, and
/// SIGHUP replaces the whole process by a new image of its program.
pub fn run(config: KeeperConfig) -> Result<(), KeeperError> {
    let mut supervisor = supervisor::Supervisor::begin(config)?;
    supervisor.run()?;
    supervisor.clean_up();
    Ok(())
}
