//! What crosses shared memory and the control socket between a part client and a part server.
//!
//! ```text
//!   hypervisor process                                  nebd-server process
//!  ┌────────────────────┐      region (sealed memfd)   ┌─────────────────────┐
//!  │ nebd-client        │   ┌──────────────────────┐   │ session             │
//!  │   ring::ClientQueue├──►│ header               │◄──┤   ring::ServerQueue │
//!  │                    │   │ queues: SQ, CQ, slots│   │                     │
//!  │                    │   │ arena (data)         │   │                     │
//!  └─────────┬──────────┘   └──────────────────────┘   └──────────┬──────────┘
//!            │           control socket (SOCK_SEQPACKET)          │
//!            └────────────────── control::Message ────────────────┘
//! ```
//!
//! A request is in flight exactly while its [`layout::Slot`] holds a sequence number that no
//! published completion entry matches. There is no second record to reconcile: a successor of a
//! dead server finds all it needs in the slots and in the completion ring ([`ring`]).
//!
//! Everything here is frozen once released: fields are appended, bits are never renumbered, and
//! every layout ever released stays supported by the server. `docs/formats.md` draws each byte.

#![deny(missing_docs)]

pub mod control;
pub mod epoch;
pub mod host;
pub mod layout;
pub mod name;
pub mod op;
pub mod region;
pub mod ring;
pub mod socket;
pub mod sync;

pub use epoch::{Epoch, Fence, Generation};
pub use name::{VolumeName, VolumeNameError};
pub use op::{Op, OpFlags};

/// Errno value as it travels in a completion: positive, as in `errno.h`.
///
/// A newtype, so that a sign mistake does not compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// `EIO`: the storage failed.
    pub const IO: Errno = Errno(5);
    /// `EINVAL`: the request breaks a rule of its volume (alignment, flags).
    pub const INVAL: Errno = Errno(22);
    /// `ENOSPC`: out of range for a write, or the storage is full.
    pub const NOSPC: Errno = Errno(28);
    /// `EOPNOTSUPP`: the backend cannot do this operation.
    pub const NOTSUP: Errno = Errno(95);
    /// `EROFS`: the volume is attached read-only.
    pub const ROFS: Errno = Errno(30);

    /// The errno of an operating-system error, `EIO` where there is none.
    pub fn from_io(error: &std::io::Error) -> Errno {
        error.raw_os_error().filter(|code| *code > 0).map_or(Errno::IO, Errno)
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        std::io::Error::from_raw_os_error(errno.0)
    }
}
