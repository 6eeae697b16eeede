//! The record of a split queue.
//!
//! ```text
//!       0       1       2       3       4       5       6       7
//!   0  │ features = 0                                                  │
//!   8  │ version = 1   │ desc_num      │ last_batch    │ used_idx      │
//!  16  │ inflight│ ─ zero ─                            │ next          │  desc[0]
//!  24  │ counter                                                       │
//! ```
//!
//! The used ring's index commits a batch. If it is ahead of `used_idx`, the difference is the length of
//! the batch that was committed and perhaps not cleared, and `last_batch` leads through it.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{QueueRecord, RecordError, VERSION};
use crate::access::Window;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
const HEADER: usize = 16;
const ENTRY: usize = 16;
const NEXT: usize = 6;
const COUNTER: usize = 8;

pub(crate) struct SplitRecord {
    window: Window,
    /// Of the ring: the record may have more entries.
    size: u16,
    last_batch: u16,
    counter: u64,
    is_new: bool,
}

fn entry(head: u16) -> usize {
    HEADER + usize::from(head) * ENTRY
}

impl SplitRecord {
    /// Opens the record of a ring of this size, whose used index is `used`. Returns the heads that are
    /// in flight, in the order in which they were taken.
    pub(crate) fn open(
        record: QueueRecord,
        size: u16,
        used: u16,
    ) -> Result<(SplitRecord, Vec<u16>), RecordError> {
        let QueueRecord { window, entries } = record;
        let mut record = SplitRecord { window, size, last_batch: 0, counter: 0, is_new: false };
        if entries < size || !record.window.is_aligned_to(8) {
            return Err(RecordError::Entries(entries));
        }
        match record.window.load_u16(VERSION_AT, Acquire) {
            0 => {
                record.initialise(entries, used);
                record.is_new = true;
                return Ok((record, Vec::new()));
            }
            VERSION => {}
            other => return Err(RecordError::Version(other)),
        }
        let said = record.window.load_u16(ENTRIES_AT, Relaxed);
        if said < size {
            return Err(RecordError::Entries(said));
        }
        record.last_batch = record.window.load_u16(LAST_BATCH_AT, Relaxed);
        record.settle(used)?;
        let mut heads: Vec<(u64, u16)> = (0..size)
            .filter(|head| record.is_in_flight(*head))
            .map(|head| (record.window.load_u64(entry(head) + COUNTER, Relaxed), head))
            .collect();
        heads.sort_unstable();
        record.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok((record, heads.into_iter().map(|(_, head)| head).collect()))
    }

    fn initialise(&mut self, entries: u16, used: u16) {
        for head in 0..entries {
            self.window.store_u8(entry(head), 0, Relaxed);
        }
        self.window.store_u64(0, 0, Relaxed);
        self.window.store_u16(ENTRIES_AT, entries, Relaxed);
        self.window.store_u16(LAST_BATCH_AT, 0, Relaxed);
        self.window.store_u16(USED_AT, used, Relaxed);
        self.window.store_u16(VERSION_AT, VERSION, Release);
    }

    /// Whether it knows nothing of its ring's past.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.window.load_u8(entry(head), Relaxed) != 0
    }

    /// Clears the chains of a batch that its ring has and the record has not.
    fn settle(&mut self, used: u16) -> Result<(), RecordError> {
        let recorded = self.window.load_u16(USED_AT, Relaxed);
        let batch = used.wrapping_sub(recorded);
        let is_empty = || (0..self.size).all(|head| !self.is_in_flight(head));
        if batch > self.size && !is_empty() {
            return Err(RecordError::Stale { record: recorded, ring: used });
        }
        if batch <= self.size {
            let mut head = self.last_batch;
            for _ in 0..batch {
                if head >= self.size {
                    return Err(RecordError::Inconsistent("a batch leads out of the queue"));
                }
                self.window.store_u8(entry(head), 0, Relaxed);
                head = self.window.load_u16(entry(head) + NEXT, Relaxed);
            }
        }
        self.window.store_u16(USED_AT, used, Release);
        Ok(())
    }

    /// A chain was taken.
    pub(crate) fn begin(&mut self, head: u16) {
        self.window.store_u64(entry(head) + COUNTER, self.counter, Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.window.store_u8(entry(head), 1, Release);
    }

    /// These chains are about to be answered together.
    pub(crate) fn prepare(&mut self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            self.window.store_u16(entry(head) + NEXT, self.last_batch, Relaxed);
            self.last_batch = head;
        }
        self.window.store_u16(LAST_BATCH_AT, self.last_batch, Release);
    }

    /// The used ring's index has just told of them.
    pub(crate) fn finish(&mut self, heads: impl Iterator<Item = u16>, used: u16) {
        for head in heads {
            self.window.store_u8(entry(head), 0, Relaxed);
        }
        self.window.store_u16(USED_AT, used, Release);
    }
}
