//! What a part server forwards to.
//!
//! ```text
//!   shard thread                                       backend
//!   ───────────                                        ───────
//!   pop ─► Request ──► Volume::submit(&mut Lane, …) ──► answers at once      (null, mem)
//!                                                   ──► io_uring in the lane (file)
//!                                                   ──► a thread, a network  (file pool, fence-test)
//!   Lane::drain ◄── Done { tag, result } ◄──────────── Request::complete / complete_remote
//! ```
//!
//! A request cannot be forgotten: completing consumes it, and one that is dropped uncompleted is
//! answered with `EIO` and logged as the bug it is.

#[cfg(feature = "test-hooks")]
mod fence_test;
mod file;
mod lane;
mod mem;
mod null;
mod request;
mod store;

use std::path::PathBuf;
use std::sync::Arc;

use nebd_abi::{Errno, Generation, VolumeName};

#[cfg(feature = "test-hooks")]
pub use fence_test::FenceTestBackend;
#[cfg(feature = "test-hooks")]
pub use file::hooks;
pub use file::{FileBackend, FileConfig, FileEngine, FileEngineChoice};
pub use lane::{Done, Lane, LaneConfig, Mailbox, TaskRun, UringRefusal, uring_refusal};
pub use mem::MemBackend;
pub use nebd_abi::Fence;
pub use null::NullBackend;
pub use request::{Request, Segment, Segments};
pub use store::{FdStore, NoStore};

/// What the volume registry knows of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// `BACKEND:NAME`.
    pub name: VolumeName,
    /// Bytes.
    pub size: u64,
    /// 512 or 4096.
    pub block_size: u32,
    /// `file`: the file or block device, if it is not the image that nebd made itself.
    pub path: Option<PathBuf>,
}

/// How a volume is opened.
pub struct OpenContext {
    /// Major epoch under which this host had the volume open before a takeover; `None` at first open.
    pub previous_major: Option<u32>,
    /// For backends whose storage grants no major epoch: one that grows with each boot of the host.
    pub host_major: u32,
    /// The server's generation: the minor epoch.
    pub generation: Generation,
    /// Where descriptors outlive this process.
    pub store: Arc<dyn FdStore>,
}

/// How a volume is prepared.
pub struct PrepareContext {
    /// What the owner keeps beyond its life, as far as it is known yet. It is read only.
    pub store: Arc<dyn FdStore>,
}

/// A volume that was opened as its owner.
pub struct Opened {
    /// The volume.
    pub volume: Arc<dyn Volume>,
    /// Major epoch granted.
    pub major: u32,
    /// The volume's id at its storage, for the fence.
    pub volume_id: u64,
    /// See [`nebd_abi::control::VolumeInfo::incarnation`].
    pub incarnation: u64,
}

/// What a volume is and can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Discards free space.
    pub discard: bool,
    /// Write-zeroes is faster than writing zeroes.
    pub write_zeroes: bool,
    /// Storage checks the fence; otherwise the server spends no effort on `seq` and `oldest`.
    pub fences: bool,
}

/// Why a backend cannot do what it was asked outside the ring.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The volume exists already.
    #[error("volume {0} exists already")]
    Exists(VolumeName),
    /// There is no such volume at the storage.
    #[error("volume {0} does not exist")]
    NotFound(VolumeName),
    /// Another owner holds it.
    #[error("volume {volume} is held by another owner: {detail}")]
    Busy {
        /// Which volume.
        volume: VolumeName,
        /// By whom, as far as known.
        detail: String,
    },
    /// The contents of a volatile volume are gone.
    #[error("volume {0}: its contents were in memory that is gone")]
    Lost(VolumeName),
    /// The backend has no such operation, or not for this volume.
    #[error("volume {volume}: {what} is not supported by its backend")]
    Unsupported {
        /// Which volume.
        volume: VolumeName,
        /// What was asked.
        what: &'static str,
    },
    /// The size is impossible.
    #[error("volume {volume}: {detail}")]
    Size {
        /// Which volume.
        volume: VolumeName,
        /// What is wrong.
        detail: String,
    },
    /// A system call failed.
    #[error("volume {volume}: cannot {action}: {source}")]
    System {
        /// Which volume.
        volume: VolumeName,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl BackendError {
    /// As an errno, for the client socket.
    pub fn errno(&self) -> Errno {
        match self {
            BackendError::Exists(_) => Errno(17),
            BackendError::NotFound(_) => Errno(2),
            BackendError::Busy { .. } => Errno(16),
            BackendError::Lost(_) => Errno(116),
            BackendError::Unsupported { .. } => Errno::NOTSUP,
            BackendError::Size { .. } => Errno::INVAL,
            BackendError::System { source, .. } => Errno::from_io(source),
        }
    }
}

/// A kind of storage. Its methods may block; they never run on a shard thread.
pub trait Backend: Send + Sync {
    /// The part of volume names before the colon.
    fn kind(&self) -> &'static str;

    /// Makes a volume; returns its spec as it really is (a device has its own size).
    fn create(&self, spec: &VolumeSpec) -> Result<VolumeSpec, BackendError>;

    /// Deletes a volume that nobody has open. What was passed to `create` by path is not deleted.
    fn delete(&self, spec: &VolumeSpec) -> Result<(), BackendError>;

    /// Looks at a volume without becoming its owner: exists, is reachable, has this size.
    fn observe(&self, spec: &VolumeSpec) -> Result<u64, BackendError>;

    /// Becomes the owner. Returns only once no earlier owner can change the volume unseen: storage
    /// that fences knows the epoch, a file is locked.
    fn open(&self, spec: &VolumeSpec, context: &OpenContext) -> Result<Opened, BackendError>;

    /// All of [`open`](Self::open) that needs no ownership, while another process owns the volume:
    /// it is reachable, a block of it can be read, its memory is there. Changes nothing that the
    /// owner or a client could see. Like `open` it may block, and hang if the storage does.
    fn prepare(
        &self,
        spec: &VolumeSpec,
        context: &PrepareContext,
    ) -> Result<Box<dyn PreparedVolume>, BackendError>;
}

/// A volume that another process owns, ready to be taken over. Dropped, it leaves no trace.
pub trait PreparedVolume: Send {
    /// Becomes the owner, as [`Backend::open`] would, with its promises and its errors. It looks
    /// again at what [`Backend::prepare`] saw; what has changed since is opened anew. Where nothing
    /// waits it takes tens of microseconds.
    ///
    /// `spec` is the present one: the volume may have been resized since.
    fn open(
        self: Box<Self>,
        spec: &VolumeSpec,
        context: &OpenContext,
    ) -> Result<Opened, BackendError>;
}

/// An open volume.
pub trait Volume: Send + Sync {
    /// Present size in bytes.
    fn size(&self) -> u64;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Starts a request whose range, alignment and permission were checked. Never blocks.
    fn submit(&self, lane: &mut Lane, request: Request);

    /// Changes the size; may block. Returns the new size.
    fn resize(&self, size: u64) -> Result<u64, BackendError>;

    /// The last session is gone and nothing is in flight: give up locks and store entries. A volume
    /// that is dropped without this (a takeover) leaves its store entries to the successor.
    fn close(&self);

    /// This process gives the volume up to a successor, for good: nothing will be submitted, and
    /// nothing is in flight, unless its storage fences; then what is in flight must not touch the
    /// memory of clients once this has returned, and is never answered. Gives up the lock, and leaves store entries to the successor; from here on
    /// `close` does nothing. What is submitted all the same fails where the storage could not tell
    /// it from the successor's. Quick.
    fn relinquish(&self);
}
