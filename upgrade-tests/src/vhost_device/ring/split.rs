//! A split ring.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{Base, DESCRIPTOR_BYTES, F_INDIRECT, F_NEXT, NOWHERE, Piece};

const FLAGS: u64 = 0;
const INDEX: u64 = 2;
const RING: u64 = 4;
const NO_NOTIFY: u16 = 1;

pub(super) struct SplitRing {
    base: Base,
    free: Vec<u16>,
    /// By the chain's head: its slot, and its descriptors.
    in_flight: Vec<Option<(usize, Vec<u16>)>>,
    next_available: u16,
    /// `next_available` when it was last asked whether to kick.
    kicked_at: u16,
    next_used: u16,
}

impl SplitRing {
    pub(super) fn new(base: Base) -> SplitRing {
        let size = base.kind.size;
        SplitRing {
            base,
            free: (0..size).rev().collect(),
            in_flight: (0..size).map(|_| None).collect(),
            next_available: 0,
            kicked_at: 0,
            next_used: 0,
        }
    }

    pub(super) fn push(&mut self, pieces: &[Piece], table: u64, slot: usize) -> bool {
        let is_indirect = self.base.kind.indirect;
        let places = if is_indirect { 1 } else { pieces.len() };
        if self.free.len() < places {
            return false;
        }
        let taken = self.free.split_off(self.free.len() - places);
        let mut described = self.base.described(pieces);
        if is_indirect {
            for (index, (address, length, flags)) in described.iter().enumerate() {
                let more = if index + 1 < described.len() { F_NEXT } else { 0 };
                let at = table + DESCRIPTOR_BYTES * index as u64;
                self.base.write_descriptor(at, *address, *length, flags | more, index as u16 + 1);
            }
            let bytes = DESCRIPTOR_BYTES as u32 * described.len() as u32;
            described = vec![(self.base.memory.guest_address(table), bytes, F_INDIRECT)];
        }
        for (index, (address, length, flags)) in described.iter().enumerate() {
            let (more, next) = taken.get(index + 1).map_or((0, 0), |next| (F_NEXT, *next));
            let at = self.base.place.descriptors + DESCRIPTOR_BYTES * u64::from(taken[index]);
            self.base.write_descriptor(at, *address, *length, flags | more, next);
        }
        let head = taken[0];
        self.in_flight[usize::from(head)] = Some((slot, taken));
        let (memory, available) = (&self.base.memory, self.base.place.available);
        let at = u64::from(self.next_available % self.base.kind.size);
        memory.store_u16(available + RING + 2 * at, head, Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        memory.store_u16(available + INDEX, self.next_available, Release);
        true
    }

    pub(super) fn is_kick_needed(&mut self) -> bool {
        let old = std::mem::replace(&mut self.kicked_at, self.next_available);
        if old == self.next_available {
            return false;
        }
        let (memory, used) = (&self.base.memory, self.base.place.used);
        if !self.base.kind.event_idx {
            return memory.load_u16(used + FLAGS, Relaxed) & NO_NOTIFY == 0;
        }
        let event = memory.load_u16(used + RING + 8 * u64::from(self.base.kind.size), Relaxed);
        self.next_available.wrapping_sub(event).wrapping_sub(1)
            < self.next_available.wrapping_sub(old)
    }

    pub(super) fn has_used(&self) -> bool {
        self.base.memory.load_u16(self.base.place.used + INDEX, Acquire) != self.next_used
    }

    pub(super) fn pop(&mut self) -> Result<Option<(usize, u32)>, String> {
        if !self.has_used() {
            return Ok(None);
        }
        let at = u64::from(self.next_used % self.base.kind.size);
        let element = self.base.place.used + RING + 8 * at;
        let head = self.base.memory.load_u32(element, Relaxed);
        let written = self.base.memory.load_u32(element + 4, Relaxed);
        let known = self.in_flight.get_mut(head as usize).and_then(Option::take);
        let Some((slot, taken)) = known else {
            return Err(format!("used entry {}: chain {head} is not in flight", self.next_used));
        };
        self.next_used = self.next_used.wrapping_add(1);
        for descriptor in &taken {
            let at = self.base.place.descriptors + DESCRIPTOR_BYTES * u64::from(*descriptor);
            self.base.write_descriptor(at, NOWHERE, u32::MAX, u16::MAX, u16::MAX);
        }
        self.free.extend(taken);
        Ok(Some((slot, written)))
    }

    pub(super) fn want_no_calls(&mut self) {
        if !self.base.kind.event_idx {
            self.base.memory.store_u16(self.base.place.available + FLAGS, NO_NOTIFY, Relaxed);
        }
    }

    pub(super) fn want_calls(&mut self) {
        let (memory, available) = (&self.base.memory, self.base.place.available);
        if self.base.kind.event_idx {
            let at = available + RING + 2 * u64::from(self.base.kind.size);
            memory.store_u16(at, self.next_used, Relaxed);
        } else {
            memory.store_u16(available + FLAGS, 0, Relaxed);
        }
    }
}
