//! A split ring.
//!
//! ```text
//!  descriptors  size × { address 8, length 4, flags 2, next 2 }        written by the driver
//!  available    flags 2 │ idx 2 │ ring size × 2 │ used_event 2         by the driver
//!  used         flags 2 │ idx 2 │ ring size × { id 4, length 4 } │ avail_event 2   by the device
//! ```
//!
//! The store of `used.idx` commits a batch.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{
    Answer, F_RING_EVENT_IDX, F_RING_INDIRECT, QueueSetup, StartError, has_passed, window,
};
use crate::access::Window;
use crate::chain::{Builder, Chain, DESCRIPTOR_BYTES, Descriptor, F_INDIRECT, F_NEXT, Violation};
use crate::inflight::{QueueRecord, SplitRecord};
use crate::memory::GuestMemory;

const FLAGS: usize = 0;
const INDEX: usize = 2;
const RING: usize = 4;
/// In the flags of either ring: the other side need not ring.
const NO_NOTIFY: u16 = 1;

struct Rings {
    descriptors: Window,
    available: Window,
    used: Window,
}

impl Rings {
    fn find(setup: &QueueSetup, memory: &Arc<GuestMemory>) -> Result<Rings, StartError> {
        let size = usize::from(setup.size);
        // The event fields are there only if agreed on.
        let event = if setup.has(F_RING_EVENT_IDX) { 2 } else { 0 };
        let available = RING + 2 * size + event;
        let used = RING + 8 * size + event;
        Ok(Rings {
            descriptors: window(
                memory,
                "descriptor table",
                setup.descriptors,
                size * DESCRIPTOR_BYTES,
                16,
            )?,
            available: window(memory, "available ring", setup.available, available, 2)?,
            used: window(memory, "used ring", setup.used, used, 4)?,
        })
    }
}

pub(super) struct SplitQueue {
    rings: Rings,
    record: SplitRecord,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_available: u16,
    /// `idx` of the available ring, as last seen.
    available: u16,
    next_used: u16,
    /// `next_used` when the driver was last called, or found not to want it.
    called_at: u16,
    in_flight: Box<[bool]>,
}

impl SplitQueue {
    pub(super) fn start(
        setup: &QueueSetup,
        memory: &Arc<GuestMemory>,
        record: QueueRecord,
    ) -> Result<(SplitQueue, Vec<Chain>), StartError> {
        let size = setup.size;
        if !size.is_power_of_two() {
            return Err(StartError::Size(size));
        }
        let base = u16::try_from(setup.base).map_err(|_| StartError::Base(setup.base))?;
        let rings = Rings::find(setup, memory)?;
        let used = rings.used.load_u16(INDEX, Acquire);
        let (record, heads) = SplitRecord::open(record, size, used)?;
        // Whatever was taken is answered or in flight: so much is sure, and what a hypervisor
        // remembers may be older. With nothing in flight and a ring of which nothing was answered
        // ahead of it, both agree.
        let taken = used.wrapping_add(heads.len() as u16);
        let next_available = if record.is_new() { base } else { taken };
        let mut queue = SplitQueue {
            rings,
            record,
            size,
            event_idx: setup.has(F_RING_EVENT_IDX),
            indirect: setup.has(F_RING_INDIRECT),
            next_available,
            available: next_available,
            next_used: used,
            called_at: used,
            in_flight: vec![false; size.into()].into(),
        };
        let mut chains = Vec::with_capacity(heads.len());
        for head in heads {
            chains.push(queue.chain(memory, head)?);
            queue.in_flight[usize::from(head)] = true;
        }
        Ok((queue, chains))
    }

    pub(super) fn set_memory(
        &mut self,
        setup: &QueueSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), StartError> {
        self.rings = Rings::find(setup, memory)?;
        Ok(())
    }

    pub(super) fn is_in_flight(&self, head: u16) -> bool {
        self.in_flight.get(usize::from(head)).copied().unwrap_or(false)
    }

    fn ring_index(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    pub(super) fn pop(
        &mut self,
        memory: &Arc<GuestMemory>,
        in_flight: u16,
    ) -> Result<Option<Chain>, Violation> {
        if self.available == self.next_available {
            self.available = self.rings.available.load_u16(INDEX, Acquire);
            if self.available == self.next_available {
                return Ok(None);
            }
            let ahead = self.available.wrapping_sub(self.next_available);
            if u32::from(ahead) + u32::from(in_flight) > u32::from(self.size) {
                return Err(Violation::Ahead(ahead.into()));
            }
        }
        let at = RING + 2 * self.ring_index(self.next_available);
        let head = self.rings.available.load_u16(at, Relaxed);
        if head >= self.size {
            return Err(Violation::Head(head));
        }
        if self.in_flight[usize::from(head)] {
            return Err(Violation::HeadInFlight(head));
        }
        let chain = self.chain(memory, head)?;
        self.record.begin(head);
        self.in_flight[usize::from(head)] = true;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Copies the chain that starts at `head`.
    fn chain(&self, memory: &Arc<GuestMemory>, head: u16) -> Result<Chain, Violation> {
        let mut builder = Builder::new(memory, self.indirect);
        let mut at = head;
        loop {
            let mut bytes = [0; DESCRIPTOR_BYTES];
            self.rings.descriptors.read(usize::from(at) * DESCRIPTOR_BYTES, &mut bytes);
            let descriptor = Descriptor::from_split(&bytes);
            if descriptor.has(F_INDIRECT) {
                builder.push_table(&descriptor, true)?;
            } else {
                // A loop ends at the limit of a chain's length.
                builder.push(&descriptor)?;
            }
            if !descriptor.has(F_NEXT) {
                return builder.finish(head);
            }
            at = descriptor.next_or_id;
            if at >= self.size {
                return Err(Violation::Next(at));
            }
        }
    }

    pub(super) fn flush(&mut self, answers: &[Answer]) {
        let heads = || answers.iter().map(|answer| answer.head);
        self.record.prepare(heads());
        for answer in answers {
            let at = RING + 8 * self.ring_index(self.next_used);
            self.rings.used.store_u32(at, answer.head.into(), Relaxed);
            self.rings.used.store_u32(at + 4, answer.written, Relaxed);
            self.next_used = self.next_used.wrapping_add(1);
            self.in_flight[usize::from(answer.head)] = false;
        }
        self.rings.used.store_u16(INDEX, self.next_used, Release);
        self.record.finish(heads(), self.next_used);
    }

    pub(super) fn call_wanted(&mut self) -> bool {
        let old = std::mem::replace(&mut self.called_at, self.next_used);
        if self.event_idx {
            let event = self.rings.available.load_u16(RING + 2 * usize::from(self.size), Relaxed);
            return has_passed(event, self.next_used, old);
        }
        self.rings.available.load_u16(FLAGS, Relaxed) & NO_NOTIFY == 0
    }

    pub(super) fn want_kicks(&mut self) {
        if self.event_idx {
            let at = RING + 8 * usize::from(self.size);
            self.rings.used.store_u16(at, self.next_available, Relaxed);
        } else {
            self.rings.used.store_u16(FLAGS, 0, Relaxed);
        }
    }

    pub(super) fn want_no_kicks(&mut self) {
        // With event indices the one that has passed already suppresses kicks.
        if !self.event_idx {
            self.rings.used.store_u16(FLAGS, NO_NOTIFY, Relaxed);
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.available != self.next_available
            || self.rings.available.load_u16(INDEX, Acquire) != self.next_available
    }

    pub(super) fn base(&self) -> u32 {
        self.next_available.into()
    }
}
