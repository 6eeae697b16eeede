//! A virtqueue, seen from its device.
//!
//! ```text
//!  start ─► chains that a dead server left
//!    │
//!    ▼
//!  pop ─► Chain ─► … backend … ─► publish(ticket) ─► flush ─► call_needed? ─► ring the doorbell
//!    │ nothing                    (private)          (a batch becomes visible at once)
//!    ▼
//!  sleep ── true: wait for a kick ─► wake ─► pop
//! ```
//!
//! [`publish`](VirtQueue::publish) keeps an answer to itself; [`flush`](VirtQueue::flush) tells the
//! driver of all of them with one commit. A device that dies in between has told nothing, and its
//! successor issues those chains again, which is sound for every operation of a disk.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::fence;

use crate::chain::{Chain, Ticket, Violation};
use crate::inflight::{Layout, QueueRecord, RecordError};
use crate::memory::GuestMemory;
use crate::request::Status;

mod packed;
mod split;
#[cfg(test)]
mod tests;

use packed::PackedQueue;
use split::SplitQueue;

/// Descriptors that a queue may have.
pub const QUEUE_SIZE_MAX: u16 = 1 << 15;

/// `VIRTIO_F_RING_INDIRECT_DESC`.
pub const F_RING_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_RING_EVENT_IDX`.
pub const F_RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_PACKED`.
pub const F_RING_PACKED: u64 = 1 << 34;

/// What the messages say of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Descriptors.
    pub size: u16,
    /// User address of the descriptor table, or of the packed ring.
    pub descriptors: u64,
    /// User address of the available ring, or of the driver's event suppression.
    pub available: u64,
    /// User address of the used ring, or of the device's event suppression.
    pub used: u64,
    /// Where to begin, if the record does not know better: as in `SET_VRING_BASE`.
    pub base: u32,
    /// Virtio features that were agreed on.
    pub features: u64,
}

impl QueueSetup {
    /// How its ring is laid out.
    pub fn layout(&self) -> Layout {
        if self.features & F_RING_PACKED != 0 { Layout::Packed } else { Layout::Split }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

/// Why a queue cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its size is impossible.
    #[error("a queue of {0} descriptors is impossible")]
    Size(u16),
    /// A ring is not where it is said to be.
    #[error("the {part} at {address:#x} is not in the guest's memory, or not aligned")]
    Ring {
        /// Which part of it.
        part: &'static str,
        /// The user address.
        address: u64,
    },
    /// It begins beyond its ring.
    #[error("a queue cannot begin at {0:#x}")]
    Base(u32),
    /// Its inflight record cannot be used.
    #[error("cannot take up what was in flight")]
    Record(#[from] RecordError),
    /// A chain that was in flight is broken.
    #[error("cannot issue again what was in flight")]
    Chain(#[from] Violation),
}

enum Ring {
    Split(SplitQueue),
    Packed(PackedQueue),
}

/// An answer that the driver has not been told of.
#[derive(Clone, Copy, Debug)]
struct Answer {
    head: u16,
    written: u32,
}

/// The device's side of a queue. One thread at a time.
pub struct VirtQueue {
    ring: Ring,
    setup: QueueSetup,
    memory: Arc<GuestMemory>,
    pending: Vec<Answer>,
    in_flight: u16,
    /// The driver was told of something since it was last called, or may have been by a predecessor.
    call_owed: bool,
    /// The driver may have been told of something that it was not called for.
    call_certain: bool,
    broken: Option<Violation>,
}

impl VirtQueue {
    /// Starts a queue, anew or where a dead server left it; returns what that had in flight, in the
    /// order in which it was taken.
    ///
    /// What a live predecessor has in flight must have ended. Afterwards the ring is to be popped, and
    /// the driver will be called once: the predecessor may have died between the two.
    pub fn start(
        setup: &QueueSetup,
        memory: Arc<GuestMemory>,
        record: QueueRecord,
    ) -> Result<(VirtQueue, Vec<Chain>), StartError> {
        let size = setup.size;
        if size == 0 || size > QUEUE_SIZE_MAX {
            return Err(StartError::Size(size));
        }
        let (ring, chains) = match setup.layout() {
            Layout::Split => {
                let (ring, chains) = SplitQueue::start(setup, &memory, record)?;
                (Ring::Split(ring), chains)
            }
            Layout::Packed => {
                let (ring, chains) = PackedQueue::start(setup, &memory, record)?;
                (Ring::Packed(ring), chains)
            }
        };
        let queue = VirtQueue {
            ring,
            setup: *setup,
            memory,
            pending: Vec::with_capacity(size.into()),
            in_flight: chains.len() as u16,
            call_owed: true,
            call_certain: true,
            broken: None,
        };
        Ok((queue, chains))
    }

    /// The next chain, if the driver made one available.
    ///
    /// After a violation nothing comes any more: the same violation is returned again.
    pub fn pop(&mut self) -> Result<Option<Chain>, Violation> {
        if let Some(violation) = self.broken {
            return Err(violation);
        }
        let popped = match &mut self.ring {
            Ring::Split(ring) => ring.pop(&self.memory, self.in_flight),
            Ring::Packed(ring) => ring.pop(&self.memory),
        };
        match popped {
            Ok(Some(_)) => self.in_flight += 1,
            Ok(None) => {}
            Err(violation) => self.broken = Some(violation),
        }
        popped
    }

    /// Answers a chain that [`pop`](Self::pop) or [`start`](Self::start) returned, of whose data so many
    /// bytes were written. The driver learns of it by the next [`flush`](Self::flush).
    pub fn publish(&mut self, ticket: Ticket, status: Status, written: u32) {
        let is_mine = match &self.ring {
            Ring::Split(ring) => ring.is_in_flight(ticket.head),
            Ring::Packed(ring) => ring.is_in_flight(ticket.head),
        };
        debug_assert!(is_mine, "an answer for a chain of another queue");
        if !is_mine || self.pending.len() == usize::from(self.setup.size) {
            return;
        }
        ticket.status.write(&[status as u8]);
        self.pending.push(Answer { head: ticket.head, written: written.saturating_add(1) });
    }

    /// Tells the driver of all that was published, at once.
    pub fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        match &mut self.ring {
            Ring::Split(ring) => ring.flush(&self.pending),
            Ring::Packed(ring) => ring.flush(&self.pending),
        }
        self.in_flight -= self.pending.len() as u16;
        self.pending.clear();
        self.call_owed = true;
    }

    /// Whether the driver wants to be called for what was flushed since this was last asked.
    pub fn call_needed(&mut self) -> bool {
        if !std::mem::take(&mut self.call_owed) {
            return false;
        }
        // Either the driver sees what was flushed, or we see that it wants to be called.
        fence(SeqCst);
        let wanted = match &mut self.ring {
            Ring::Split(ring) => ring.call_wanted(),
            Ring::Packed(ring) => ring.call_wanted(),
        };
        std::mem::take(&mut self.call_certain) || wanted
    }

    /// Asks for kicks; true if the device may sleep, false if something came meanwhile.
    pub fn sleep(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.want_kicks(),
            Ring::Packed(ring) => ring.want_kicks(),
        }
        // Either the driver sees that, or we see what it has made available.
        fence(SeqCst);
        !self.is_ready()
    }

    /// No kicks are wanted any more.
    pub fn wake(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.want_no_kicks(),
            Ring::Packed(ring) => ring.want_no_kicks(),
        }
    }

    /// Whether a chain waits to be popped.
    pub fn is_ready(&self) -> bool {
        self.broken.is_none()
            && match &self.ring {
                Ring::Split(ring) => ring.is_ready(),
                Ring::Packed(ring) => ring.is_ready(),
            }
    }

    /// Chains that the driver has not been told the answer of.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// As it was set up.
    pub fn setup(&self) -> &QueueSetup {
        &self.setup
    }

    /// Where the next chain will be, as in the answer to `GET_VRING_BASE`: to be asked once nothing is
    /// in flight.
    pub fn base(&self) -> u32 {
        match &self.ring {
            Ring::Split(ring) => ring.base(),
            Ring::Packed(ring) => ring.base(),
        }
    }

    /// The guest's memory has changed. Chains in flight keep what they were found in.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), StartError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.set_memory(&self.setup, &memory)?,
            Ring::Packed(ring) => ring.set_memory(&self.setup, &memory)?,
        }
        self.memory = memory;
        Ok(())
    }
}

/// Finds a part of a ring by its user address.
fn window(
    memory: &Arc<GuestMemory>,
    part: &'static str,
    address: u64,
    bytes: usize,
    alignment: usize,
) -> Result<crate::access::Window, StartError> {
    memory
        .user_window(address, bytes as u64)
        .filter(|window| window.is_aligned_to(alignment))
        .ok_or(StartError::Ring { part, address })
}

/// Whether an index that moved from `old` to `new` has passed `event` (`vring_need_event`).
fn has_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
