//! A packed ring.
//!
//! ```text
//!  ring     size × { address 8, length 4, id 2, flags 2 }     written by both
//!  driver   off_wrap 2 │ flags 2                              by the driver: when it wants to be called
//!  device   off_wrap 2 │ flags 2                              by the device: when it wants to be kicked
//! ```
//!
//! Two bits of a descriptor's flags say whose it is, relative to a wrap counter that changes with each
//! lap: available is `AVAIL = wrap, USED = !wrap`, used is both `= wrap`. A chain takes as many places
//! as it has descriptors; its answer is written to the next place that is due, whosever chain was there,
//! and skips as many as its own chain took.
//!
//! A batch is written from its second answer on; the flags of the first, at the place where the driver
//! looks, commit it. If a device dies before, the others have been written to places that the driver
//! must not find used when it gets there by another way: a successor makes them available again
//! ([`PackedQueue::heal`]) before it answers anything.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use super::{Answer, F_RING_EVENT_IDX, F_RING_INDIRECT, QueueSetup, StartError, window};
use crate::access::Window;
use crate::chain::{
    Builder, Chain, DESCRIPTOR_BYTES, Descriptor, F_INDIRECT, F_NEXT, F_WRITE, Violation,
};
use crate::inflight::{PackedRecord, Position, QueueRecord};
use crate::memory::GuestMemory;

const LENGTH: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Event suppression: always, never, at a place.
const EVENTS_ON: u16 = 0;
const EVENTS_OFF: u16 = 1;
const EVENTS_AT: u16 = 2;

/// The two bits of a descriptor that is available in this lap, or used.
fn bits(is_used: bool, wrap: bool) -> u16 {
    match (is_used, wrap) {
        (false, true) => AVAILABLE,
        (false, false) => USED,
        (true, true) => AVAILABLE | USED,
        (true, false) => 0,
    }
}

struct Rings {
    ring: Window,
    driver: Window,
    device: Window,
}

impl Rings {
    fn find(setup: &QueueSetup, memory: &Arc<GuestMemory>) -> Result<Rings, StartError> {
        let bytes = usize::from(setup.size) * DESCRIPTOR_BYTES;
        Ok(Rings {
            ring: window(memory, "descriptor ring", setup.descriptors, bytes, 16)?,
            driver: window(memory, "driver's event suppression", setup.available, 4, 4)?,
            device: window(memory, "device's event suppression", setup.used, 4, 4)?,
        })
    }

    fn flags(&self, index: u16) -> u16 {
        self.ring.load_u16(usize::from(index) * DESCRIPTOR_BYTES + FLAGS, Acquire)
    }

    /// Whether the descriptor there has these two bits.
    fn is(&self, is_used: bool, at: Position) -> bool {
        self.flags(at.index) & (AVAILABLE | USED) == bits(is_used, at.wrap)
    }
}

/// A chain in flight; none if it has no places.
#[derive(Clone, Copy, Default)]
struct InFlight {
    /// Places in the ring.
    count: u16,
    /// Its last entry in the record.
    last: u16,
    id: u16,
}

pub(super) struct PackedQueue {
    rings: Rings,
    record: PackedRecord,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_available: Position,
    /// Where answers went when the driver was last called, or found not to want it.
    called_at: Position,
    /// Places that were answered since then.
    used_since_call: u32,
    /// Places that chains in flight take.
    taken: u16,
    /// By the chain's first entry in the record.
    in_flight: Box<[InFlight]>,
    /// The chain that is being popped.
    scratch: Vec<Descriptor>,
}

fn position(half: u32, size: u16) -> Option<Position> {
    let index = (half & 0x7fff) as u16;
    (index < size).then_some(Position { index, wrap: half & 0x8000 != 0 })
}

fn half(position: Position) -> u32 {
    u32::from(position.index) | u32::from(position.wrap) << 15
}

impl PackedQueue {
    pub(super) fn start(
        setup: &QueueSetup,
        memory: &Arc<GuestMemory>,
        record: QueueRecord,
    ) -> Result<(PackedQueue, Vec<Chain>), StartError> {
        let size = setup.size;
        // Nothing is in flight where a queue begins: the next to be taken is the next to be answered.
        let base = position(setup.base & 0xffff, size).ok_or(StartError::Base(setup.base))?;
        let rings = Rings::find(setup, memory)?;
        let (record, recorded) =
            PackedRecord::open(record, size, base, |old| !rings.is(false, old))?;
        let used = record.used();
        let mut queue = PackedQueue {
            rings,
            record,
            size,
            event_idx: setup.has(F_RING_EVENT_IDX),
            indirect: setup.has(F_RING_INDIRECT),
            next_available: used,
            called_at: used,
            used_since_call: 0,
            taken: 0,
            in_flight: vec![InFlight::default(); size.into()].into(),
            scratch: Vec::with_capacity(size.into()),
        };
        let mut chains = Vec::with_capacity(recorded.len());
        for old in recorded {
            chains.push(queue.chain(memory, &old.descriptors, old.entry)?);
            let count = old.descriptors.len() as u16;
            let id = old.descriptors.last().map_or(0, |last| last.next_or_id);
            queue.in_flight[usize::from(old.entry)] = InFlight { count, last: old.last, id };
            queue.taken += count;
        }
        queue.next_available = used.advance(queue.taken, size);
        queue.heal(used);
        Ok((queue, chains))
    }

    /// Makes the places of chains in flight look available again, where a dead device had begun to
    /// write answers that it did not commit.
    fn heal(&self, used: Position) {
        let mut at = used;
        for _ in 0..self.taken {
            if self.rings.is(true, at) {
                let offset = usize::from(at.index) * DESCRIPTOR_BYTES + FLAGS;
                self.rings.ring.store_u16(offset, bits(false, at.wrap), Relaxed);
            }
            at = at.advance(1, self.size);
        }
        fence(Release);
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
        self.in_flight.get(usize::from(head)).is_some_and(|chain| chain.count > 0)
    }

    pub(super) fn pop(&mut self, memory: &Arc<GuestMemory>) -> Result<Option<Chain>, Violation> {
        if !self.is_ready() {
            return Ok(None);
        }
        self.copy_descriptors()?;
        let count = self.scratch.len() as u16;
        if self.taken + count > self.size {
            return Err(Violation::Ahead(u32::from(self.taken) + u32::from(count)));
        }
        let mut descriptors = std::mem::take(&mut self.scratch);
        let chain = self.take(memory, &descriptors);
        descriptors.clear();
        self.scratch = descriptors;
        chain.map(Some)
    }

    /// Copies the descriptors of the next chain into the scratch.
    fn copy_descriptors(&mut self) -> Result<(), Violation> {
        self.scratch.clear();
        let mut at = self.next_available.index;
        loop {
            let mut bytes = [0; DESCRIPTOR_BYTES];
            self.rings.ring.read(usize::from(at) * DESCRIPTOR_BYTES, &mut bytes);
            let descriptor = Descriptor::from_packed(&bytes);
            self.scratch.push(descriptor);
            if !descriptor.has(F_NEXT) {
                return Ok(());
            }
            if self.scratch.len() == usize::from(self.size) {
                return Err(Violation::TooLong(self.size.into()));
            }
            at = if at + 1 == self.size { 0 } else { at + 1 };
        }
    }

    fn take(
        &mut self,
        memory: &Arc<GuestMemory>,
        descriptors: &[Descriptor],
    ) -> Result<Chain, Violation> {
        // A broken chain leaves no trace in the record.
        let mut chain = self.chain(memory, descriptors, 0)?;
        let count = descriptors.len() as u16;
        let Some((entry, last)) = self.record.begin(descriptors) else {
            return Err(Violation::Ahead(u32::from(self.taken) + u32::from(count)));
        };
        chain.ticket.head = entry;
        let id = descriptors.last().map_or(0, |last| last.next_or_id);
        self.in_flight[usize::from(entry)] = InFlight { count, last, id };
        self.taken += count;
        self.next_available = self.next_available.advance(count, self.size);
        Ok(chain)
    }

    fn chain(
        &self,
        memory: &Arc<GuestMemory>,
        descriptors: &[Descriptor],
        entry: u16,
    ) -> Result<Chain, Violation> {
        let mut builder = Builder::new(memory, self.indirect);
        for descriptor in descriptors {
            if descriptor.has(F_INDIRECT) {
                builder.push_table(descriptor, false)?;
            } else {
                builder.push(descriptor)?;
            }
        }
        builder.finish(entry)
    }

    pub(super) fn flush(&mut self, answers: &[Answer]) {
        let size = self.size;
        let chain = |answer: &Answer| self.in_flight[usize::from(answer.head)];
        let count: u16 = answers.iter().map(|answer| chain(answer).count).sum();
        let used = self.record.used().advance(count, size);
        let first = self
            .record
            .prepare(answers.iter().map(|answer| (answer.head, chain(answer).last)), used);
        let mut at = first;
        for (index, answer) in answers.iter().enumerate() {
            let chain = self.in_flight[usize::from(answer.head)];
            self.write_answer(at, chain.id, answer.written, index > 0);
            at = at.advance(chain.count, size);
        }
        // The commit: the driver looks at the first, and finds the others behind it.
        if let Some(answer) = answers.first() {
            self.write_flags(first, answer.written);
        }
        self.record.finish(answers.iter().map(|answer| answer.head));
        for answer in answers {
            self.in_flight[usize::from(answer.head)] = InFlight::default();
        }
        self.taken -= count;
        self.used_since_call = self.used_since_call.saturating_add(count.into());
    }

    fn write_answer(&self, at: Position, id: u16, written: u32, with_flags: bool) {
        let offset = usize::from(at.index) * DESCRIPTOR_BYTES;
        self.rings.ring.store_u32(offset + LENGTH, written, Relaxed);
        self.rings.ring.store_u16(offset + ID, id, Relaxed);
        if with_flags {
            self.write_flags(at, written);
        }
    }

    fn write_flags(&self, at: Position, written: u32) {
        let flags = bits(true, at.wrap) | if written > 0 { F_WRITE } else { 0 };
        self.rings.ring.store_u16(usize::from(at.index) * DESCRIPTOR_BYTES + FLAGS, flags, Release);
    }

    pub(super) fn call_wanted(&mut self) -> bool {
        let used = self.record.used();
        let since = std::mem::take(&mut self.used_since_call);
        let old = std::mem::replace(&mut self.called_at, used);
        let word = self.rings.driver.load_u32(0, Acquire);
        let (off_wrap, flags) = (word & 0xffff, (word >> 16) as u16);
        match flags & 3 {
            EVENTS_AT if self.event_idx => {
                let event =
                    Position { index: (off_wrap & 0x7fff) as u16, wrap: off_wrap >> 15 != 0 };
                // Two laps are as far as a wrap counter can see.
                let laps = 2 * u32::from(self.size);
                let linear = |at: Position| {
                    u32::from(at.index) + if at.wrap { 0 } else { u32::from(self.size) }
                };
                let ahead = (linear(event) % laps + laps - linear(old)) % laps;
                since >= u32::from(self.size) || ahead < since
            }
            flags => flags != EVENTS_OFF,
        }
    }

    pub(super) fn want_kicks(&mut self) {
        let off_wrap = half(self.next_available);
        let flags = if self.event_idx { EVENTS_AT } else { EVENTS_ON };
        self.rings.device.store_u32(0, off_wrap | u32::from(flags) << 16, Relaxed);
    }

    pub(super) fn want_no_kicks(&mut self) {
        self.rings.device.store_u32(0, u32::from(EVENTS_OFF) << 16, Relaxed);
    }

    pub(super) fn is_ready(&self) -> bool {
        self.taken < self.size && self.rings.is(false, self.next_available)
    }

    pub(super) fn base(&self) -> u32 {
        half(self.next_available) | half(self.record.used()) << 16
    }
}
