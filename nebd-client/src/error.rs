//! Why an operation of the client failed: one enum an operation, each convertible to an errno for C.

use std::io;
use std::path::PathBuf;

use nebd_abi::region::RegionError;
use nebd_abi::{Errno, VolumeName, VolumeNameError};

/// Errnos that the client itself gives, beside those of the server.
pub mod errno {
    use nebd_abi::Errno;

    /// `ENOMEM`: the arena has no room for a buffer of that size now.
    pub const NOMEM: Errno = Errno(12);
    /// `EBADFD`: the session belongs to the parent of this forked process.
    pub const FORKED: Errno = Errno(77);
    /// `ENOBUFS`: the request needs to be copied through the arena, and the session has none.
    pub const NOBUFS: Errno = Errno(105);
    /// `ESHUTDOWN`: the session was closed.
    pub const CLOSED: Errno = Errno(108);
    /// `ETIMEDOUT`: the request outlived [`Options::io_timeout`](crate::Options::io_timeout).
    pub const TIMEDOUT: Errno = Errno(110);
}

/// Why a volume could not be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The name is not of the form `BACKEND:NAME`.
    #[error(transparent)]
    Name(#[from] VolumeNameError),
    /// The options ask for an impossible region, or it cannot be made.
    #[error("cannot make the region of {volume}")]
    Region {
        /// The volume.
        volume: VolumeName,
        /// Why.
        source: RegionError,
    },
    /// A system call that has nothing to do with the server failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// No server answered within [`Options::connect_timeout`](crate::Options::connect_timeout).
    #[error("no server answered at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the last try met.
        source: io::Error,
    },
    /// The server speaks no layout that this client can make.
    #[error("the server wants region layout {0}, this client makes layout 1")]
    Layout(u32),
    /// The server refused.
    #[error("{volume}: {text} ({errno})")]
    Refused {
        /// The volume.
        volume: VolumeName,
        /// Why, as a number.
        errno: Errno,
        /// Why, in the server's words.
        text: String,
    },
    /// This process was forked from one that has sessions; only that one may use the library.
    #[error("this process was forked from one that uses nebd; open volumes there, or exec first")]
    Forked,
}

impl OpenError {
    /// As an errno.
    pub fn errno(&self) -> Errno {
        match self {
            OpenError::Name(_) => Errno::INVAL,
            OpenError::Region { source: RegionError::System { source, .. }, .. }
            | OpenError::System { source, .. }
            | OpenError::Connect { source, .. } => Errno::from_io(source),
            OpenError::Region { .. } => Errno::INVAL,
            OpenError::Layout(_) => Errno::NOTSUP,
            OpenError::Refused { errno, .. } => *errno,
            OpenError::Forked => errno::FORKED,
        }
    }
}

/// Why a call over the control socket (resize, info, registered memory, close) failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The server refused.
    #[error("{volume}: {text} ({errno})")]
    Refused {
        /// The volume.
        volume: VolumeName,
        /// Why, as a number.
        errno: Errno,
        /// Why, in the server's words.
        text: String,
    },
    /// The server answered with another message than the one that belongs to the call.
    #[error("{volume}: the server gave an answer that does not belong to the question")]
    Answer {
        /// The volume.
        volume: VolumeName,
    },
    /// The session cannot be used any more: closed, failed, or in a forked child.
    #[error("{volume}: the session cannot be used any more ({errno})")]
    Session {
        /// The volume.
        volume: VolumeName,
        /// Why.
        errno: Errno,
    },
    /// The answer did not come within [`Options::io_timeout`](crate::Options::io_timeout).
    #[error("{volume}: the server did not answer in time; the operation may still be carried out")]
    Timeout {
        /// The volume.
        volume: VolumeName,
    },
    /// The memory to be registered is no sealed memfd of that size, or one too many.
    #[error("the memory cannot be registered: {reason}")]
    Memory {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl CallError {
    /// As an errno.
    pub fn errno(&self) -> Errno {
        match self {
            CallError::Refused { errno, .. } | CallError::Session { errno, .. } => *errno,
            CallError::Answer { .. } => Errno::IO,
            CallError::Timeout { .. } => errno::TIMEDOUT,
            CallError::Memory { .. } => Errno::INVAL,
            CallError::System { source, .. } => Errno::from_io(source),
        }
    }
}

/// Why a request was not taken by [`Queue::submit`](crate::Queue::submit).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Every slot is in flight, or the arena is full: reap, then try again.
    #[error("the queue is full")]
    WouldBlock,
    /// The request breaks a rule, or the session cannot be used any more.
    #[error("{0}")]
    Errno(#[from] Errno),
}

impl SubmitError {
    /// As an errno; [`SubmitError::WouldBlock`] is `EAGAIN`.
    pub fn errno(&self) -> Errno {
        match self {
            SubmitError::WouldBlock => Errno(11),
            SubmitError::Errno(errno) => *errno,
        }
    }
}
