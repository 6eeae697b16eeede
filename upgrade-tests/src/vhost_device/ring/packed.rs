//! A packed ring.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{Base, DESCRIPTOR_BYTES, F_INDIRECT, F_NEXT, Piece};

const LENGTH: u64 = 8;
const ID: u64 = 12;
const FLAGS: u64 = 14;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Event suppression: always, never, at a place.
const EVENTS_ON: u16 = 0;
const EVENTS_OFF: u16 = 1;
const EVENTS_AT: u16 = 2;

pub(super) struct PackedRing {
    base: Base,
    /// Buffer ids that name no request.
    ids: Vec<u16>,
    /// By buffer id: the request's slot, and the places that it takes.
    in_flight: Vec<Option<(usize, u16)>>,
    free_places: u16,
    next_available: u16,
    available_wrap: bool,
    /// Places taken since it was last asked whether to kick.
    unkicked: u16,
    next_used: u16,
    used_wrap: bool,
}

impl PackedRing {
    pub(super) fn new(base: Base) -> PackedRing {
        let size = base.kind.size;
        PackedRing {
            base,
            ids: (0..size).rev().collect(),
            in_flight: (0..size).map(|_| None).collect(),
            free_places: size,
            next_available: 0,
            available_wrap: true,
            unkicked: 0,
            next_used: 0,
            used_wrap: true,
        }
    }

    fn descriptor(&self, index: u16) -> u64 {
        self.base.place.descriptors + DESCRIPTOR_BYTES * u64::from(index)
    }

    pub(super) fn push(&mut self, pieces: &[Piece], table: u64, slot: usize) -> bool {
        let is_indirect = self.base.kind.indirect;
        let places = if is_indirect { 1 } else { pieces.len() as u16 };
        if self.free_places < places {
            return false;
        }
        // As many ids as places: there is one left.
        let Some(id) = self.ids.pop() else { return false };
        let mut described = self.base.described(pieces);
        if is_indirect {
            for (index, (address, length, flags)) in described.iter().enumerate() {
                let at = table + DESCRIPTOR_BYTES * index as u64;
                self.base.write_descriptor(at, *address, *length, 0xabcd, *flags);
            }
            let bytes = DESCRIPTOR_BYTES as u32 * described.len() as u32;
            described = vec![(self.base.memory.guest_address(table), bytes, F_INDIRECT)];
        }
        let head = self.descriptor(self.next_available);
        let mut head_flags = 0;
        for (index, (address, length, flags)) in described.iter().enumerate() {
            let more = if index + 1 < described.len() { F_NEXT } else { 0 };
            let flags = flags | more | if self.available_wrap { AVAILABLE } else { USED };
            let at = self.descriptor(self.next_available);
            self.base.memory.store_u64(at, *address, Relaxed);
            self.base.memory.store_u32(at + LENGTH, *length, Relaxed);
            self.base.memory.store_u16(at + ID, id, Relaxed);
            if index == 0 {
                head_flags = flags;
            } else {
                self.base.memory.store_u16(at + FLAGS, flags, Relaxed);
            }
            self.next_available += 1;
            if self.next_available == self.base.kind.size {
                (self.next_available, self.available_wrap) = (0, !self.available_wrap);
            }
        }
        self.in_flight[usize::from(id)] = Some((slot, places));
        self.free_places -= places;
        self.unkicked = self.unkicked.saturating_add(places);
        self.base.memory.store_u16(head + FLAGS, head_flags, Release);
        true
    }

    pub(super) fn is_kick_needed(&mut self) -> bool {
        let unkicked = std::mem::take(&mut self.unkicked);
        if unkicked == 0 {
            return false;
        }
        let word = self.base.memory.load_u32(self.base.place.used, Relaxed);
        let (off_wrap, flags) = (word as u16, (word >> 16) as u16 & 3);
        if flags != EVENTS_AT {
            return flags != EVENTS_OFF;
        }
        let size = self.base.kind.size;
        let mut event = off_wrap & 0x7fff;
        if self.available_wrap != (off_wrap >> 15 != 0) {
            event = event.wrapping_sub(size);
        }
        unkicked >= size || self.next_available.wrapping_sub(event).wrapping_sub(1) < unkicked
    }

    pub(super) fn has_used(&self) -> bool {
        let flags = self.base.memory.load_u16(self.descriptor(self.next_used) + FLAGS, Acquire);
        let both = if self.used_wrap { AVAILABLE | USED } else { 0 };
        flags & (AVAILABLE | USED) == both
    }

    pub(super) fn pop(&mut self) -> Result<Option<(usize, u32)>, String> {
        if !self.has_used() {
            return Ok(None);
        }
        let at = self.descriptor(self.next_used);
        let id = self.base.memory.load_u16(at + ID, Relaxed);
        let written = self.base.memory.load_u32(at + LENGTH, Relaxed);
        let known = self.in_flight.get_mut(usize::from(id)).and_then(Option::take);
        let Some((slot, places)) = known else {
            return Err(format!("place {}: buffer {id} is not in flight", self.next_used));
        };
        self.ids.push(id);
        self.free_places += places;
        self.next_used += places;
        if self.next_used >= self.base.kind.size {
            self.next_used -= self.base.kind.size;
            self.used_wrap = !self.used_wrap;
        }
        Ok(Some((slot, written)))
    }

    pub(super) fn want_no_calls(&mut self) {
        if !self.base.kind.event_idx {
            let flags = u32::from(EVENTS_OFF) << 16;
            self.base.memory.store_u32(self.base.place.available, flags, Relaxed);
        }
    }

    pub(super) fn want_calls(&mut self) {
        let off_wrap = u32::from(self.next_used) | u32::from(self.used_wrap) << 15;
        let flags = if self.base.kind.event_idx { EVENTS_AT } else { EVENTS_ON };
        let word = off_wrap | u32::from(flags) << 16;
        self.base.memory.store_u32(self.base.place.available, word, Relaxed);
    }
}
