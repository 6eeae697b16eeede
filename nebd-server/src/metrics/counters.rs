//! Counters in shared memory: of a session in its ledger, of a volume in the statistics.
//!
//! A shard adds to its own [`Tally`] with each answer, and moves it to the shared [`Counters`] once
//! a batch, before it calls the client: what a client has seen answered and slept for is counted.
//! A server that dies loses what the batch in its hands would have added, and no more.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use nebd_abi::{Errno, Op};

/// Kinds of requests that are told apart; 0 is whatever has no name.
pub const OPS: usize = 6;
/// Names of the kinds, as metrics label them.
pub const OP_NAMES: [&str; OPS] = ["other", "read", "write", "flush", "discard", "write_zeroes"];
/// Buckets of a histogram: 8 to each power of two of microseconds, up to 268 s.
pub const BUCKETS: usize = 208;
const SUB_BITS: u32 = 3;
const SUB: u64 = 1 << SUB_BITS;

/// Requests of one kind.
#[derive(Debug, Default)]
#[repr(C)]
pub struct OpCounters {
    /// Answered.
    pub requests: AtomicU64,
    /// Of them, with an errno.
    pub errors: AtomicU64,
    /// Of those without an errno; none for a flush.
    pub bytes: AtomicU64,
}

/// A histogram of times.
#[derive(Debug)]
#[repr(C)]
pub struct Histogram {
    /// All of them together.
    pub sum_ns: AtomicU64,
    /// How many were in each bucket, see [`bucket_of`]; whatever is longer is in the last.
    pub buckets: [AtomicU64; BUCKETS],
}

/// Everything that is counted of a session, or of a volume's sessions that have ended.
#[derive(Debug)]
#[repr(C)]
pub struct Counters {
    /// By the number of the operation in a slot.
    pub ops: [OpCounters; OPS],
    /// Requests that their storage had not answered for as long as raises an alarm.
    pub stalls: AtomicU64,
    /// How often a queue was held back by its volume's limits.
    pub throttles: AtomicU64,
    /// For how long, all queues together.
    pub throttled_ns: AtomicU64,
    reserved: AtomicU64,
    /// From being taken from the ring to being answered.
    pub latency: Histogram,
}

const _: () = {
    assert!(size_of::<Histogram>() == 1672);
    assert!(size_of::<Counters>() == 1848);
    assert!(std::mem::offset_of!(Counters, latency) == 176);
};

impl Histogram {
    /// Counts a time.
    pub fn record(&self, ns: u64) {
        self.sum_ns.fetch_add(ns, Relaxed);
        self.buckets[bucket_of(ns)].fetch_add(1, Relaxed);
    }

    fn words(&self) -> impl Iterator<Item = &AtomicU64> {
        std::iter::once(&self.sum_ns).chain(&self.buckets)
    }
}

impl Counters {
    fn words(&self) -> impl Iterator<Item = &AtomicU64> {
        let ops = self.ops.iter().flat_map(|op| [&op.requests, &op.errors, &op.bytes]);
        let rest = [&self.stalls, &self.throttles, &self.throttled_ns, &self.reserved];
        ops.chain(rest).chain(self.latency.words())
    }

    /// Adds everything to `to` and leaves nothing here. Whoever dies on the way loses a word at
    /// most, and counts none twice.
    pub fn move_to(&self, to: &Counters) {
        for (from, to) in self.words().zip(to.words()) {
            let value = from.swap(0, Relaxed);
            if value > 0 {
                to.fetch_add(value, Relaxed);
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.words().for_each(|word| word.store(0, Relaxed));
    }
}

/// The bucket of a time: one a microsecond below 8, then 8 to each power of two.
pub fn bucket_of(ns: u64) -> usize {
    let us = ns / 1000;
    if us < SUB {
        return us as usize;
    }
    let shift = us.ilog2() - SUB_BITS;
    let bucket = (u64::from(shift) + 1) * SUB + ((us >> shift) - SUB);
    (bucket as usize).min(BUCKETS - 1)
}

/// The first number of microseconds that is beyond a bucket.
pub fn bucket_end_us(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < SUB {
        return bucket + 1;
    }
    let (shift, sub) = (bucket / SUB - 1, bucket % SUB);
    (SUB + sub + 1) << shift
}

/// Values of an [`OpCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "see there")]
pub struct OpTotals {
    pub requests: u64,
    pub errors: u64,
    pub bytes: u64,
}

/// Values of a [`Histogram`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "see there")]
pub struct Times {
    pub sum_ns: u64,
    pub buckets: [u64; BUCKETS],
}

impl Default for Times {
    fn default() -> Times {
        Times { sum_ns: 0, buckets: [0; BUCKETS] }
    }
}

impl Times {
    /// Adds a histogram's values.
    pub fn add(&mut self, histogram: &Histogram) {
        self.sum_ns = self.sum_ns.wrapping_add(histogram.sum_ns.load(Relaxed));
        for (mine, theirs) in self.buckets.iter_mut().zip(&histogram.buckets) {
            *mine = mine.wrapping_add(theirs.load(Relaxed));
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }
}

/// Values of [`Counters`], of one or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "see there")]
pub struct Totals {
    pub ops: [OpTotals; OPS],
    pub stalls: u64,
    pub throttles: u64,
    pub throttled_ns: u64,
    pub latency: Times,
}

impl Totals {
    /// Adds what `counters` hold.
    pub fn add(&mut self, counters: &Counters) {
        for (mine, theirs) in self.ops.iter_mut().zip(&counters.ops) {
            mine.requests = mine.requests.wrapping_add(theirs.requests.load(Relaxed));
            mine.errors = mine.errors.wrapping_add(theirs.errors.load(Relaxed));
            mine.bytes = mine.bytes.wrapping_add(theirs.bytes.load(Relaxed));
        }
        self.stalls = self.stalls.wrapping_add(counters.stalls.load(Relaxed));
        self.throttles = self.throttles.wrapping_add(counters.throttles.load(Relaxed));
        self.throttled_ns = self.throttled_ns.wrapping_add(counters.throttled_ns.load(Relaxed));
        self.latency.add(&counters.latency);
    }

    /// Requests of all kinds.
    pub fn requests(&self) -> u64 {
        self.ops.iter().fold(0, |sum, op| sum.wrapping_add(op.requests))
    }

    /// Errors of all kinds.
    pub fn errors(&self) -> u64 {
        self.ops.iter().fold(0, |sum, op| sum.wrapping_add(op.errors))
    }

    /// Values of one kind.
    pub fn of(&self, op: Op) -> OpTotals {
        self.ops[op as usize]
    }
}

/// What one shard has counted of one queue and not yet told.
#[derive(Debug, Default)]
pub struct Tally {
    any: bool,
    ops: [OpTotals; OPS],
    latency_sum_ns: u64,
    /// Answers of a batch have been waiting equally long, more or less: their bucket, and how many.
    bucket: usize,
    in_bucket: u64,
}

impl Tally {
    /// A request is answered.
    pub fn answered(&mut self, op: Option<Op>, length: u64, result: Result<(), Errno>) {
        self.any = true;
        let totals = &mut self.ops[op.map_or(0, |op| op as usize)];
        totals.requests += 1;
        match result {
            Ok(()) if op == Some(Op::Flush) => {}
            Ok(()) => totals.bytes = totals.bytes.wrapping_add(length),
            Err(_) => totals.errors += 1,
        }
    }

    /// It took the storage so long; `counters` are those of the queue's session.
    pub fn took(&mut self, counters: &Counters, ns: u64) {
        let bucket = bucket_of(ns);
        if bucket != self.bucket {
            self.settle_bucket(counters);
            self.bucket = bucket;
        }
        self.in_bucket += 1;
        self.latency_sum_ns += ns;
    }

    fn settle_bucket(&mut self, counters: &Counters) {
        if self.in_bucket > 0 {
            let count = std::mem::take(&mut self.in_bucket);
            counters.latency.buckets[self.bucket].fetch_add(count, Relaxed);
        }
    }

    /// Tells everything.
    pub fn settle(&mut self, counters: &Counters) {
        if !std::mem::take(&mut self.any) {
            return;
        }
        for (mine, shared) in self.ops.iter_mut().zip(&counters.ops) {
            if mine.requests == 0 {
                continue;
            }
            let OpTotals { requests, errors, bytes } = std::mem::take(mine);
            shared.requests.fetch_add(requests, Relaxed);
            if bytes > 0 {
                shared.bytes.fetch_add(bytes, Relaxed);
            }
            if errors > 0 {
                shared.errors.fetch_add(errors, Relaxed);
            }
        }
        self.settle_bucket(counters);
        let sum_ns = std::mem::take(&mut self.latency_sum_ns);
        if sum_ns > 0 {
            counters.latency.sum_ns.fetch_add(sum_ns, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::ledger::{Attachment, Ledger};

    fn ledger() -> Ledger {
        let (major, attach_flags, incarnation) = (1, 0, 0);
        let (client_uid, client_gid, client_pid) = (0, 0, 0);
        let attachment =
            Attachment { major, attach_flags, client_uid, client_gid, client_pid, incarnation };
        Ledger::create(1, &attachment).unwrap()
    }

    #[test]
    fn each_time_is_in_its_bucket_and_powers_of_two_are_exact() {
        let mut ns = 0u64;
        while ns < 268_000_000_000 {
            let bucket = bucket_of(ns);
            let us = ns / 1000;
            assert!(us < bucket_end_us(bucket), "{ns}");
            assert!(bucket == 0 || us >= bucket_end_us(bucket - 1), "{ns}");
            ns += 1 + ns / 29;
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_end_us(BUCKETS - 1), 1 << 28);
        for power in 0..=28 {
            assert!((0..BUCKETS).any(|bucket| bucket_end_us(bucket) == 1 << power), "{power}");
        }
    }

    #[test]
    fn a_tally_is_told_once_and_whole() {
        let ledger = ledger();
        let mut tally = Tally::default();
        for ns in [500, 700, 9_000, 600, 1_000_000] {
            tally.answered(Some(Op::Read), 4096, Ok(()));
            tally.took(ledger.counters(), ns);
        }
        tally.answered(Some(Op::Write), 512, Err(Errno::IO));
        tally.answered(Some(Op::Flush), u64::MAX, Ok(()));
        tally.answered(None, 7, Err(Errno::INVAL));
        tally.settle(ledger.counters());
        tally.settle(ledger.counters());
        let mut totals = Totals::default();
        totals.add(ledger.counters());
        assert_eq!(totals.of(Op::Read), OpTotals { requests: 5, errors: 0, bytes: 5 * 4096 });
        assert_eq!(totals.of(Op::Write), OpTotals { requests: 1, errors: 1, bytes: 0 });
        assert_eq!(totals.of(Op::Flush), OpTotals { requests: 1, errors: 0, bytes: 0 });
        assert_eq!((totals.requests(), totals.errors()), (8, 2));
        assert_eq!((totals.latency.count(), totals.latency.sum_ns), (5, 1_010_800));
        assert_eq!(totals.latency.buckets[0], 3);
    }

    #[test]
    fn what_is_moved_is_counted_in_one_place() {
        let (from, to) = (ledger(), ledger());
        from.counters().stalls.store(3, Relaxed);
        from.counters().latency.record(5_000);
        to.counters().stalls.store(4, Relaxed);
        from.counters().move_to(to.counters());
        let mut both = Totals::default();
        both.add(from.counters());
        assert_eq!(both, Totals::default());
        both.add(to.counters());
        assert_eq!((both.stalls, both.latency.count(), both.latency.sum_ns), (7, 1, 5_000));
    }
}
