//! The part client: block IO from inside a hypervisor to a part server that can be replaced, or
//! die, at any time.
//!
//! ```text
//!  host thread          Session / Queue         region (shared)              part server
//!  ───────────          ───────────────         ───────────────              ───────────
//!  read, write, … ────► check, cut to chunks ─► slot, submission ring ─kick► takes, carries out
//!                       (transfer)              completion ring   ◄───────── answers
//!  result ◄──────────── reap: the one who  ◄─── call doorbell
//!                       waits, nebd-complete, or the host itself
//!
//!  nebd-control: connects, attaches again when the server is another, watches for stalls
//! ```
//!
//! A request lives in memory that this process owns until its completion was reaped. When the
//! server dies the request waits: submitting goes on, nothing fails, and the next server finds in
//! the region all it has to do. The control socket is not part of the data path.
//!
//! # In a host process
//! - At most two threads, for all sessions together: `nebd-control`, and `nebd-complete` once there
//!   is a callback, a future or an event to tell. Idle, neither ever wakes up. They block all signals.
//! - No signal handler, no async runtime, no logging, no panic across the API: a panic of a host's
//!   callback ends with the callback.
//! - After a `fork` the child's calls fail ([`errno::FORKED`]) and touch nothing that is shared; the
//!   region is not mapped there. The child may `exec`, or exit.
//!
//! # Example
//! ```no_run
//! use nebd_client::{OpFlags, Options, Session};
//!
//! let session = Session::open("file:disk1", Options::new().queues(2))?;
//! session.write_at(&[7; 4096], 0, OpFlags::FUA)?;
//! let mut block = [0; 4096];
//! session.read_at(&mut block, 0)?;
//! session.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(missing_docs)]

mod arena;
mod attachment;
mod calls;
mod complete;
mod control;
mod core;
mod drive;
mod error;
mod future;
mod io;
mod memory;
mod meter;
mod options;
mod poll;
mod queue;
mod raw;
mod registered;
mod runtime;
mod session;
mod sync;
mod tell;
mod transfer;
mod watch;

pub use arena::Buffer;
pub use error::{CallError, OpenError, SubmitError, errno};
pub use future::IoFuture;
pub use io::{DataRange, Io};
pub use memory::RawIovec;
pub use nebd_abi::control::VolumeInfo;
pub use nebd_abi::layout::SessionId;
pub use nebd_abi::{Epoch, Errno, Generation, Op, OpFlags, VolumeName};
pub use options::{CompletionMode, Event, EventCallback, Options, SOCKET_DEFAULT, SOCKET_ENV};
pub use poll::Queue;
pub use registered::Memory;
pub use session::{Session, Stats};
pub use transfer::Callback;
