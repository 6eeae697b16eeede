//! Limits of a volume: requests and bytes a second, with what may be saved up for a burst.
//!
//! Each limit is a meter in the manner of GCRA: one word holds when everything that was let through
//! so far would have been due at the limit's pace. A queue may take requests while that is no
//! further ahead than the burst. So one request may overdraw, and what it took is paid for by a
//! pause; nothing waits once it has been taken from a ring, and all queues of a volume, on whatever
//! shard, share its limits without a lock.
//!
//! Limits change at run time. What was saved up is not handed over to a successor.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Longest burst that can be saved up.
pub const BURST_MS_MAX: u64 = 3_600_000;

/// What a volume may have; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub struct Limits {
    /// Requests a second.
    pub iops: u64,
    /// Bytes read and written a second.
    pub bytes_per_s: u64,
    /// An idle volume saves up this much of both, in milliseconds at the limit.
    pub burst_ms: u64,
}

#[derive(Debug, Default)]
struct Meter {
    /// Picoseconds for each unit; 0 is no limit.
    pace_ps: AtomicU64,
    /// When all that was let through was due, in nanoseconds since `Throttle::base`.
    due_ns: AtomicU64,
}

impl Meter {
    fn set(&self, per_second: u64) {
        let pace = 1_000_000_000_000_u64.checked_div(per_second).map_or(0, |pace| pace.max(1));
        self.pace_ps.store(pace, Relaxed);
    }

    fn charge(&self, now_ns: u64, units: u64) {
        let pace = self.pace_ps.load(Relaxed);
        if pace == 0 {
            return;
        }
        let cost_ns =
            u64::try_from(u128::from(units) * u128::from(pace) / 1000).unwrap_or(u64::MAX);
        let later = |due: u64| Some(due.max(now_ns).saturating_add(cost_ns));
        let _ = self.due_ns.fetch_update(Relaxed, Relaxed, later);
    }

    /// How long nothing may be taken.
    fn pause_ns(&self, now_ns: u64, burst_ns: u64) -> u64 {
        if self.pace_ps.load(Relaxed) == 0 {
            return 0;
        }
        self.due_ns.load(Relaxed).saturating_sub(now_ns.saturating_add(burst_ns))
    }
}

/// The limits of a volume, and how far they are used up.
#[derive(Debug)]
pub struct Throttle {
    base: Instant,
    limits: Mutex<Limits>,
    is_limited: AtomicBool,
    burst_ns: AtomicU64,
    requests: Meter,
    bytes: Meter,
}

impl Throttle {
    /// With nothing used up.
    pub fn new(limits: &Limits) -> Throttle {
        let throttle = Throttle {
            base: Instant::now(),
            limits: Mutex::default(),
            is_limited: AtomicBool::new(false),
            burst_ns: AtomicU64::new(0),
            requests: Meter::default(),
            bytes: Meter::default(),
        };
        throttle.set(limits);
        throttle
    }

    /// Limits for whatever is taken from now on. If they are new, old debts are forgiven: they were
    /// reckoned at another pace.
    pub fn set(&self, limits: &Limits) {
        let mut present = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *present, *limits) == *limits {
            return;
        }
        let now_ns = self.now_ns(Instant::now());
        for (meter, per_second) in
            [(&self.requests, limits.iops), (&self.bytes, limits.bytes_per_s)]
        {
            meter.set(per_second);
            meter.due_ns.store(now_ns, Relaxed);
        }
        self.burst_ns.store(limits.burst_ms.min(BURST_MS_MAX) * 1_000_000, Relaxed);
        self.is_limited.store(limits.iops > 0 || limits.bytes_per_s > 0, Relaxed);
    }

    /// Until when nothing may be taken; `None` if something may be now.
    pub fn closed_until(&self) -> Option<Instant> {
        if !self.is_limited.load(Relaxed) {
            return None;
        }
        let now = Instant::now();
        let (now_ns, burst_ns) = (self.now_ns(now), self.burst_ns.load(Relaxed));
        let pause_ns =
            self.requests.pause_ns(now_ns, burst_ns).max(self.bytes.pause_ns(now_ns, burst_ns));
        (pause_ns > 0).then(|| now + Duration::from_nanos(pause_ns))
    }

    /// A request with so many bytes of data was taken.
    pub fn charge(&self, bytes: u64) {
        if self.is_limited.load(Relaxed) {
            let now_ns = self.now_ns(Instant::now());
            self.requests.charge(now_ns, 1);
            self.bytes.charge(now_ns, bytes);
        }
    }

    fn now_ns(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.base).as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of one byte that a meter lets through in a millisecond-grained second.
    fn let_through(meter: &Meter, from_ms: u64, to_ms: u64, burst_ms: u64) -> u64 {
        let mut count = 0;
        for ms in from_ms..to_ms {
            while meter.pause_ns(ms * 1_000_000, burst_ms * 1_000_000) == 0 {
                meter.charge(ms * 1_000_000, 1);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn a_meter_keeps_its_pace_and_saves_up_a_burst() {
        let meter = Meter::default();
        meter.set(500);
        let first = let_through(&meter, 0, 1000, 0);
        assert!((499..=501).contains(&first), "{first}");
        // Idle for a second, of which 200 ms are saved: 100 requests on top of 500.
        let second = let_through(&meter, 2000, 3000, 200);
        assert!((599..=602).contains(&second), "{second}");
        let third = let_through(&meter, 3000, 4000, 200);
        assert!((499..=501).contains(&third), "{third}");
    }

    #[test]
    fn a_large_request_is_let_through_and_paid_for() {
        let meter = Meter::default();
        meter.set(1 << 20);
        assert_eq!(meter.pause_ns(0, 0), 0);
        meter.charge(0, 2 << 20);
        let pause = meter.pause_ns(0, 0);
        assert!((1_999_000_000..=2_000_000_000).contains(&pause), "{pause}");
    }

    #[test]
    fn without_limits_nothing_waits_and_new_limits_forgive() {
        let throttle = Throttle::new(&Limits::default());
        throttle.charge(u64::MAX);
        assert_eq!(throttle.closed_until(), None);
        throttle.set(&Limits { iops: 1, bytes_per_s: 1, burst_ms: 0 });
        assert_eq!(throttle.closed_until(), None);
        throttle.charge(u64::MAX);
        assert!(throttle.closed_until().is_some());
        throttle.set(&Limits { iops: 1, ..Limits::default() });
        assert_eq!(throttle.closed_until(), None);
    }
}
