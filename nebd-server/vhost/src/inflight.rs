//! The inflight record: which chains a device has taken and not answered, in memory that outlives it.
//!
//! Its bytes are those of the vhost-user specification ("Inflight I/O tracking", version 1): made by
//! us, sealed, kept by the hypervisor, and given back by it after a reconnect. Without it the rings do
//! not say enough: what was taken out of order may have been overwritten there.
//!
//! Where the specification leaves room, or a hole:
//! - A record is initialised (its version set) when its queue first starts, with the used index that
//!   the ring has then, not with 0: the ring may come from a migration (SPDK #3766).
//! - All of a batch is found again, not its last chain alone: a chain that was answered and not yet
//!   cleared must not be issued again, for the guest may have reused its descriptors (SPDK #3504).
//! - In a packed record the used position is compared with its wrap counter (a batch may be as long as
//!   the ring), and both are stored in one word, so that no death comes between them (SPDK #3070 is a
//!   neighbour: recovery of packed rings did not work).
//! - A packed batch of which a part was written to the ring before a death leaves descriptors that look
//!   used. The successor makes them look available again before it answers anything; see
//!   `queue/packed.rs`.
//! - Its bytes are as little trusted as the guest's: a record that contradicts itself or its ring is
//!   refused.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use nebd_abi::region::{RegionError, SharedMemory};

use crate::access::Window;

mod packed;
mod split;

pub(crate) use packed::{PackedRecord, Position};
pub(crate) use split::SplitRecord;

/// Queues of a record start at multiples of it.
const ALIGNMENT: u64 = 64;
const PAGE: u64 = 4096;
/// The version of queue regions that we write and read.
const VERSION: u16 = 1;
/// A record of more bytes is nobody's: 64 queues of 32768 entries.
const RECORD_BYTES_MAX: u64 = 65 << 20;

/// How a queue's ring is laid out, and its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Descriptors, available ring, used ring.
    Split,
    /// One ring.
    Packed,
}

impl Layout {
    /// Bytes of the record of a queue.
    pub fn queue_bytes(self, queue_size: u16) -> u64 {
        let (header, entry) = match self {
            Layout::Split => (16, 16),
            Layout::Packed => (32, 32),
        };
        (header + entry * u64::from(queue_size)).next_multiple_of(ALIGNMENT)
    }
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be made or mapped.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// It does not hold what it is said to hold.
    #[error("the inflight record is too small or not aligned for {queues} queues of {queue_size}")]
    Size {
        /// Queues.
        queues: u16,
        /// Entries each.
        queue_size: u16,
    },
    /// Written by something newer.
    #[error("version {0} of the inflight record is unknown")]
    Version(u16),
    /// It has fewer entries than the queue.
    #[error("the inflight record has {0} entries, fewer than the queue")]
    Entries(u16),
    /// It belongs to another life of the ring: more was answered since than the ring holds.
    #[error("the inflight record was written at {record} answers, the ring has {ring}")]
    Stale {
        /// Used index in the record.
        record: u16,
        /// Used index in the ring.
        ring: u16,
    },
    /// Its lists lead out of it, or into each other.
    #[error("the inflight record contradicts itself: {0}")]
    Inconsistent(&'static str),
}

/// The record of all queues of a device.
#[derive(Clone)]
pub struct InflightRecord {
    memory: Arc<SharedMemory>,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl InflightRecord {
    /// A new one, sealed and empty.
    pub fn create(layout: Layout, queues: u16, queue_size: u16) -> Result<Self, RecordError> {
        let bytes = layout.queue_bytes(queue_size) * u64::from(queues);
        let memory = SharedMemory::create("vhost-inflight", bytes.max(1).next_multiple_of(PAGE))?;
        Ok(InflightRecord { memory: Arc::new(memory), offset: 0, queues, queue_size })
    }

    /// Maps one that a hypervisor gave back, or that the descriptor store kept.
    pub fn map(
        fd: OwnedFd,
        offset: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, RecordError> {
        let memory = Arc::new(SharedMemory::map(fd, RECORD_BYTES_MAX)?);
        if offset > memory.size() || !offset.is_multiple_of(ALIGNMENT) {
            return Err(RecordError::Size { queues, queue_size });
        }
        Ok(InflightRecord { memory, offset, queues, queue_size })
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Bytes, as told to the hypervisor.
    pub fn size(&self) -> u64 {
        self.memory.size() - self.offset
    }

    /// Where it starts in its memfd.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Queues.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Entries of each queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The record of one queue.
    pub fn queue(&self, layout: Layout, index: u16) -> Result<QueueRecord, RecordError> {
        let bytes = layout.queue_bytes(self.queue_size);
        let offset = self.offset + bytes * u64::from(index);
        let window = Window::of(&self.memory, offset, bytes);
        let window = window.filter(|_| index < self.queues);
        let (queues, queue_size) = (self.queues, self.queue_size);
        let window = window.ok_or(RecordError::Size { queues, queue_size })?;
        Ok(QueueRecord { window, entries: queue_size })
    }

    /// Forgets everything: the driver has reset its device. To be called while no queue runs.
    pub fn reset(&self) {
        if let Some(all) = Window::of(&self.memory, self.offset, self.size()) {
            for offset in (0..all.length() & !7).step_by(8) {
                all.store_u64(offset, 0, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
}

/// The record of one queue.
pub struct QueueRecord {
    window: Window,
    entries: u16,
}

impl QueueRecord {
    /// One that dies with this process.
    pub fn private(layout: Layout, queue_size: u16) -> QueueRecord {
        let window = Window::private(layout.queue_bytes(queue_size) as usize);
        QueueRecord { window, entries: queue_size }
    }
}
