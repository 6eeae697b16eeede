//! Where a queue's requests come from, and where its answers go.

use nebd_abi::Errno;
use nebd_abi::ring::{Request, RingViolation, ServerQueue};
use nebd_backend::Segments;

use super::VirtFront;

/// A queue's other side, and what is to be issued again of it.
pub(crate) type Adopted = (Front, Vec<Request>);

/// The other side of a queue.
pub enum Front {
    /// A part client's rings.
    Ring(ServerQueue),
    /// A virtqueue of a guest.
    Virt(Box<VirtFront>),
}

impl Front {
    /// Slots that a request may be in, at present.
    pub(crate) fn slots(&self) -> usize {
        match self {
            Front::Ring(ring) => ring.depth() as usize,
            Front::Virt(front) => front.slots(),
        }
    }

    /// The next request.
    pub(super) fn pop(&mut self) -> Result<Option<Request>, RingViolation> {
        match self {
            Front::Ring(ring) => ring.pop(),
            Front::Virt(front) => Ok(front.pop()),
        }
    }

    /// Where the data is of a request that is about to be dispatched, if this side has found it already.
    pub(super) fn take_data(&mut self, slot: u32) -> Option<Segments> {
        match self {
            Front::Ring(_) => None,
            Front::Virt(front) => Some(front.take_data(slot)),
        }
    }

    /// Whether this request waits for its answer still.
    pub(super) fn holds(&self, request: &Request) -> bool {
        match self {
            Front::Ring(_) => true,
            Front::Virt(front) => front.holds(request.slot, request.seq),
        }
    }

    /// Answers a request.
    pub(super) fn publish(&mut self, slot: u32, seq: u64, result: Result<(), Errno>) {
        match self {
            Front::Ring(ring) => ring.publish(slot, seq, result),
            Front::Virt(front) => front.publish(slot, seq, result),
        }
    }

    /// Whether it answered requests itself since this was last asked.
    pub(super) fn has_answered(&mut self) -> bool {
        match self {
            Front::Ring(_) => false,
            Front::Virt(front) => front.has_answered(),
        }
    }

    /// Whether the other side is to be called for what was published since this was last asked.
    pub(super) fn call_needed(&mut self) -> bool {
        match self {
            Front::Ring(ring) => ring.call_needed(),
            Front::Virt(front) => front.call_needed(),
        }
    }

    /// Asks to be called; true if the queue may sleep, false if something came meanwhile.
    pub(super) fn sleep(&mut self) -> bool {
        match self {
            Front::Ring(ring) => ring.sleep(),
            Front::Virt(front) => front.sleep(),
        }
    }

    /// No calls are wanted any more.
    pub(super) fn wake(&mut self) {
        match self {
            Front::Ring(ring) => ring.wake(),
            Front::Virt(front) => front.wake(),
        }
    }
}
