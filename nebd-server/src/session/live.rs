//! What a queue is doing right now, as its shard sees it: told, not remembered.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::shard::monotonic_ns;

/// Written by the shard that serves the queue; on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct QueueLive {
    /// Requests at the storage.
    pub in_flight: AtomicU32,
    stalled: AtomicU32,
    /// Monotonic clock at which the oldest of those that wait conspicuously was given to the
    /// storage; 0 if there is none.
    oldest_ns: AtomicU64,
}

impl QueueLive {
    /// The shard has looked: so many stalls, and the oldest request has waited for so long.
    pub fn note(&self, stalled: u32, oldest_waited_ns: Option<u64>) {
        self.stalled.store(stalled, Relaxed);
        let since = |waited_ns| monotonic_ns().saturating_sub(waited_ns).max(1);
        self.oldest_ns.store(oldest_waited_ns.map_or(0, since), Relaxed);
    }

    /// Requests at the storage that have waited for long enough to raise an alarm.
    pub fn stalled(&self) -> u32 {
        self.stalled.load(Relaxed)
    }

    /// For how long the oldest of those that wait conspicuously has waited, in nanoseconds.
    pub fn oldest_waited_ns(&self) -> u64 {
        match self.oldest_ns.load(Relaxed) {
            0 => 0,
            since => monotonic_ns().saturating_sub(since),
        }
    }
}
