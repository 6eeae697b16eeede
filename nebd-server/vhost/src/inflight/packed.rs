//! The record of a packed queue.
//!
//! ```text
//!       0       1       2       3       4       5       6       7
//!   0  │ features = 0                                                  │
//!   8  │ version = 1   │ desc_num      │ free_head     │ old_free_head │
//!  16  │ used_idx      │ old_used_idx  │ wrap  │old_w. │ ─ zero ─      │
//!  24  │ ─ zero ─                                                      │
//!  32  │inflight│ zero │ next          │ last          │ num           │  desc[0]
//!  40  │ counter                                                       │
//!  48  │ id            │ flags         │ len                           │
//!  56  │ addr                                                          │
//! ```
//!
//! Descriptors of a chain are copied into entries of the record, for the ring may be overwritten. Free
//! entries are a list that starts at `free_head` and ends at the first link beyond the queue. What is
//! under way moves `free_head` and `used_idx`; `old_free_head` and `old_used_idx` say where to go back
//! to. Taking a chain is committed by one store of both heads; answering a batch is committed by the
//! flags of its first descriptor in the ring, which is why recovery looks there.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{QueueRecord, RecordError, VERSION};
use crate::access::Window;
use crate::chain::Descriptor;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
/// `free_head`, and `old_free_head` behind it.
const FREE_AT: usize = 12;
const USED_AT: usize = 16;
const HEADER: usize = 32;
const ENTRY: usize = 32;
const NEXT: usize = 2;
const COUNTER: usize = 8;
const DESCRIPTOR: usize = 16;
const ADDRESS: usize = 24;

/// A place in a packed ring, and in which lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// So many descriptors on; at most a lap.
    pub(crate) fn advance(self, count: u16, size: u16) -> Position {
        let index = u32::from(self.index) + u32::from(count);
        match index.checked_sub(u32::from(size)) {
            Some(index) => Position { index: index as u16, wrap: !self.wrap },
            None => Position { index: index as u16, wrap: self.wrap },
        }
    }
}

/// A chain that was in flight when its server died.
pub(crate) struct Recorded {
    pub entry: u16,
    pub last: u16,
    pub descriptors: Vec<Descriptor>,
    counter: u64,
}

pub(crate) struct PackedRecord {
    window: Window,
    size: u16,
    free_head: u16,
    /// Links, as we wrote them.
    next: Box<[u16]>,
    used: Position,
    counter: u64,
}

fn entry(index: u16) -> usize {
    HEADER + usize::from(index) * ENTRY
}

impl PackedRecord {
    /// Opens the record of a ring of this size. A new one starts at `base`; in one that exists
    /// `is_answered` says whether the descriptor at a place has left the state "available".
    pub(crate) fn open(
        record: QueueRecord,
        size: u16,
        base: Position,
        is_answered: impl FnOnce(Position) -> bool,
    ) -> Result<(PackedRecord, Vec<Recorded>), RecordError> {
        let QueueRecord { window, entries } = record;
        let next = (1..=size).collect();
        let mut record = PackedRecord { window, size, free_head: 0, next, used: base, counter: 0 };
        if entries < size || !record.window.is_aligned_to(8) {
            return Err(RecordError::Entries(entries));
        }
        match record.window.load_u16(VERSION_AT, Acquire) {
            0 => {
                record.initialise(entries);
                return Ok((record, Vec::new()));
            }
            VERSION => {}
            other => return Err(RecordError::Version(other)),
        }
        let said = record.window.load_u16(ENTRIES_AT, Relaxed);
        if said < size {
            return Err(RecordError::Entries(said));
        }
        record.settle(is_answered)?;
        let in_flight = record.adopt()?;
        Ok((record, in_flight))
    }

    fn initialise(&mut self, entries: u16) {
        for index in 0..entries {
            self.window.store_u64(entry(index), u64::from(index + 1) << (8 * NEXT), Relaxed);
        }
        self.window.store_u64(0, 0, Relaxed);
        self.window.store_u16(ENTRIES_AT, entries, Relaxed);
        self.store_free(0, 0);
        self.store_used(self.used, self.used);
        self.window.store_u16(VERSION_AT, VERSION, Release);
    }

    fn store_free(&self, head: u16, old: u16) {
        self.window.store_u32(FREE_AT, u32::from(head) | u32::from(old) << 16, Release);
    }

    /// One store, so that a position never goes without its wrap counter.
    fn store_used(&self, used: Position, old: Position) {
        let [u0, u1] = used.index.to_le_bytes();
        let [o0, o1] = old.index.to_le_bytes();
        let bytes = [u0, u1, o0, o1, used.wrap.into(), old.wrap.into(), 0, 0];
        self.window.store_u64(USED_AT, u64::from_le_bytes(bytes), Release);
    }

    fn load_used(&self) -> Result<(Position, Position), RecordError> {
        let [u0, u1, o0, o1, wrap, old_wrap, ..] =
            self.window.load_u64(USED_AT, Acquire).to_le_bytes();
        let used = Position { index: u16::from_le_bytes([u0, u1]), wrap: wrap != 0 };
        let old = Position { index: u16::from_le_bytes([o0, o1]), wrap: old_wrap != 0 };
        if used.index >= self.size || old.index >= self.size {
            return Err(RecordError::Inconsistent("a used index is beyond the ring"));
        }
        Ok((used, old))
    }

    /// Commits or takes back what was under way.
    fn settle(&mut self, is_answered: impl FnOnce(Position) -> bool) -> Result<(), RecordError> {
        let free = self.window.load_u32(FREE_AT, Relaxed);
        let (head, old_head) = (free as u16, (free >> 16) as u16);
        let (used, old_used) = self.load_used()?;
        let is_committed = used != old_used && is_answered(old_used);
        (self.free_head, self.used) =
            if is_committed { (head, used) } else { (old_head, old_used) };
        // In this order: a death in between comes to the same end once more.
        self.store_free(self.free_head, self.free_head);
        self.store_used(self.used, self.used);
        Ok(())
    }

    /// Learns which entries are free, and which chains are in flight.
    fn adopt(&mut self) -> Result<Vec<Recorded>, RecordError> {
        let mut is_taken = vec![false; usize::from(self.size)];
        let mut free = self.free_head;
        let mut count = 0;
        while free < self.size {
            if std::mem::replace(&mut is_taken[usize::from(free)], true) {
                return Err(RecordError::Inconsistent("the free entries are a loop"));
            }
            count += 1;
            self.window.store_u8(entry(free), 0, Relaxed);
            let next = self.window.load_u16(entry(free) + NEXT, Relaxed);
            self.next[usize::from(free)] = next;
            free = next;
        }
        let mut chains = Vec::new();
        for index in 0..self.size {
            if !is_taken[usize::from(index)] && self.window.load_u8(entry(index), Relaxed) != 0 {
                let chain = self.recorded(index, &mut is_taken)?;
                count += chain.descriptors.len();
                chains.push(chain);
            }
        }
        if count != usize::from(self.size) {
            return Err(RecordError::Inconsistent("entries are neither free nor in flight"));
        }
        chains.sort_unstable_by_key(|chain| chain.counter);
        self.counter = chains.last().map_or(0, |chain| chain.counter.wrapping_add(1));
        Ok(chains)
    }

    fn recorded(&mut self, head: u16, is_taken: &mut [bool]) -> Result<Recorded, RecordError> {
        let [_, _, _, _, l0, l1, n0, n1] = self.window.load_u64(entry(head), Relaxed).to_le_bytes();
        let (last, num) = (u16::from_le_bytes([l0, l1]), u16::from_le_bytes([n0, n1]));
        let counter = self.window.load_u64(entry(head) + COUNTER, Relaxed);
        let mut descriptors = Vec::with_capacity(num.min(self.size).into());
        let mut index = head;
        for left in (0..num).rev() {
            match is_taken.get_mut(usize::from(index)) {
                Some(taken) if !*taken => *taken = true,
                _ => return Err(RecordError::Inconsistent("a chain leads astray")),
            }
            descriptors.push(self.load_descriptor(index));
            if left == 0 {
                break;
            }
            let next = self.window.load_u16(entry(index) + NEXT, Relaxed);
            self.next[usize::from(index)] = next;
            index = next;
        }
        if num == 0 || index != last {
            return Err(RecordError::Inconsistent("a chain does not end where it should"));
        }
        Ok(Recorded { entry: head, last, descriptors, counter })
    }

    fn load_descriptor(&self, index: u16) -> Descriptor {
        let [i0, i1, f0, f1, length @ ..] =
            self.window.load_u64(entry(index) + DESCRIPTOR, Relaxed).to_le_bytes();
        Descriptor {
            address: self.window.load_u64(entry(index) + ADDRESS, Relaxed),
            length: u32::from_le_bytes(length),
            next_or_id: u16::from_le_bytes([i0, i1]),
            flags: u16::from_le_bytes([f0, f1]),
        }
    }

    /// Where the next answer goes.
    pub(crate) fn used(&self) -> Position {
        self.used
    }

    /// A chain was taken: copies its descriptors. Returns its first entry and its last; `None` if there
    /// are not enough free ones, or no descriptors.
    pub(crate) fn begin(&mut self, descriptors: &[Descriptor]) -> Option<(u16, u16)> {
        let head = self.free_head;
        let (mut last, mut free) = (head, head);
        for descriptor in descriptors {
            last = free;
            free = *self.next.get(usize::from(free))?;
            let [i0, i1] = descriptor.next_or_id.to_le_bytes();
            let [f0, f1] = descriptor.flags.to_le_bytes();
            let [l0, l1, l2, l3] = descriptor.length.to_le_bytes();
            let word = u64::from_le_bytes([i0, i1, f0, f1, l0, l1, l2, l3]);
            self.window.store_u64(entry(last) + DESCRIPTOR, word, Relaxed);
            self.window.store_u64(entry(last) + ADDRESS, descriptor.address, Relaxed);
        }
        let [x0, x1] = self.next.get(usize::from(head))?.to_le_bytes();
        let [l0, l1] = last.to_le_bytes();
        let [n0, n1] = (descriptors.len() as u16).to_le_bytes();
        self.window.store_u64(entry(head) + COUNTER, self.counter, Relaxed);
        let word = u64::from_le_bytes([1, 0, x0, x1, l0, l1, n0, n1]);
        self.window.store_u64(entry(head), word, Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.free_head = free;
        self.store_free(free, free);
        Some((head, last))
    }

    /// These chains, first entry and last, are about to be answered together; `used` is where the
    /// answer after them will go. Returns where theirs go.
    pub(crate) fn prepare(
        &mut self,
        chains: impl Iterator<Item = (u16, u16)>,
        used: Position,
    ) -> Position {
        let old_free_head = self.free_head;
        for (head, last) in chains {
            self.next[usize::from(last)] = self.free_head;
            self.window.store_u16(entry(last) + NEXT, self.free_head, Relaxed);
            self.free_head = head;
        }
        let old = std::mem::replace(&mut self.used, used);
        self.store_free(self.free_head, old_free_head);
        self.store_used(used, old);
        old
    }

    /// The ring has just told of them.
    pub(crate) fn finish(&mut self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            self.window.store_u8(entry(head), 0, Relaxed);
        }
        self.store_free(self.free_head, self.free_head);
        self.store_used(self.used, self.used);
    }
}
