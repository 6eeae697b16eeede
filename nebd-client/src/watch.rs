//! The stall watch of a session: is anything completed while requests wait?
//!
//! ```text
//!  unarmed ── first submission ──► ticking ── a tick without anything ──► unarmed
//!                                   │   ▲
//!              no progress for      ▼   │ progress: Resumed
//!              `stall_after`:      stalled: knock each `stall_after`
//! ```
//!
//! Unarmed it costs one load for each kick and no wakeup at all. Reads no clock: `now` is an
//! argument.

use std::time::{Duration, Instant};

/// The longest time between two looks.
const TICK_MAX: Duration = Duration::from_millis(500);
/// The shortest.
const TICK_MIN: Duration = Duration::from_millis(5);

/// What a session looks like at a tick.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Requests ever completed.
    pub(crate) completed: u64,
    /// Whether any waits.
    pub(crate) is_waiting: bool,
}

/// What is to be done after a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Quiet,
    /// Nothing happened and nothing waits: stop ticking.
    Idle,
    /// Requests have begun to stall: tell the host, knock.
    Stalled,
    /// Requests still stall: knock again.
    StillStalled,
    /// Requests are completed again: tell the host.
    Resumed,
}

/// The watch.
#[derive(Debug)]
pub(crate) struct Watch {
    stall_after: Duration,
    tick: Duration,
    ticking: Option<Ticking>,
}

#[derive(Debug)]
struct Ticking {
    next_at: Instant,
    completed: u64,
    /// When progress was seen last, or the last knock.
    since: Instant,
    is_stalled: bool,
}

impl Watch {
    pub(crate) fn new(stall_after: Duration, io_timeout: Option<Duration>) -> Watch {
        let tick = io_timeout.unwrap_or(TICK_MAX * 2).min(stall_after) / 2;
        Watch { stall_after, tick: tick.clamp(TICK_MIN, TICK_MAX), ticking: None }
    }

    /// Starts ticking, if it does not tick already.
    pub(crate) fn arm(&mut self, sample: Sample, now: Instant) {
        if self.ticking.is_none() {
            let (next_at, completed) = (now + self.tick, sample.completed);
            self.ticking = Some(Ticking { next_at, completed, since: now, is_stalled: false });
        }
    }

    /// When to look next.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.ticking.as_ref().map(|ticking| ticking.next_at)
    }

    /// Looks, if it is time to; `None` if it is not.
    pub(crate) fn tick(
        &mut self,
        now: Instant,
        sample: impl FnOnce() -> Sample,
    ) -> Option<Verdict> {
        let ticking = self.ticking.as_mut().filter(|ticking| ticking.next_at <= now)?;
        let sample = sample();
        ticking.next_at = now + self.tick;
        let has_progress = sample.completed != ticking.completed;
        ticking.completed = sample.completed;
        if has_progress || !sample.is_waiting {
            ticking.since = now;
            if std::mem::take(&mut ticking.is_stalled) {
                return Some(Verdict::Resumed);
            }
            if !has_progress {
                self.ticking = None;
                return Some(Verdict::Idle);
            }
            return Some(Verdict::Quiet);
        }
        if now.saturating_duration_since(ticking.since) < self.stall_after {
            return Some(Verdict::Quiet);
        }
        ticking.since = now;
        match std::mem::replace(&mut ticking.is_stalled, true) {
            false => Some(Verdict::Stalled),
            true => Some(Verdict::StillStalled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_knocks_resumes_and_falls_asleep() {
        let second = Duration::from_secs(1);
        let mut watch = Watch::new(second, None);
        let mut now = Instant::now();
        let sample = |completed, is_waiting| Sample { completed, is_waiting };
        assert_eq!(watch.next_at(), None);
        watch.arm(sample(5, true), now);
        let mut seen = Vec::new();
        for (completed, is_waiting) in [
            (5, true),
            (5, true),
            (5, true),
            (5, true),
            (7, true),
            (7, true),
            (8, false),
            (8, false),
        ] {
            now += TICK_MAX;
            seen.extend(watch.tick(now, || sample(completed, is_waiting)));
        }
        use Verdict::{Idle, Quiet, Resumed, Stalled, StillStalled};
        assert_eq!(seen, [Quiet, Stalled, Quiet, StillStalled, Resumed, Quiet, Quiet, Idle]);
        assert_eq!(watch.next_at(), None);
        assert_eq!(watch.tick(now + second, || sample(9, true)), None);
    }
}
