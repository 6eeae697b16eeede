//! Alarms: what an operator must hear of, as events whose target and fields stay the same.
//!
//! Every alarm has the target `nebd::alarm` and a field `alarm` with its name; the rest is drawn up
//! in `docs/operations.md`. Of an outage of the storage under a thousand volumes the log tells the
//! first [`BURST`] volumes in each [`WINDOW`], and how many alarms it left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nebd_abi::layout::SessionId;
use nebd_abi::{Op, VolumeName};

/// Alarms of a kind that are told in a [`WINDOW`].
pub const BURST: u32 = 20;
/// After this time as many are told again.
pub const WINDOW: Duration = Duration::from_secs(10);

static STALLED: Mutex<Limiter> = Mutex::new(Limiter::new());
static ANSWERED: Mutex<Limiter> = Mutex::new(Limiter::new());

/// How many alarms of one kind were told lately.
struct Limiter {
    window: Option<Instant>,
    told: u32,
    left_out: u64,
}

impl Limiter {
    const fn new() -> Limiter {
        Limiter { window: None, told: 0, left_out: 0 }
    }

    /// Whether an alarm may be told now; if so, how many were left out since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let is_over = |began: Instant| now.saturating_duration_since(began) >= WINDOW;
        if self.window.is_none_or(is_over) {
            self.window = Some(now);
            self.told = 0;
        }
        if self.told == BURST {
            self.left_out += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

fn admit(limiter: &Mutex<Limiter>, now: Instant) -> Option<u64> {
    limiter.lock().unwrap_or_else(PoisonError::into_inner).admit(now)
}

/// Requests of one queue that have just become stalls.
pub(crate) struct Stall<'a> {
    pub(crate) volume: &'a VolumeName,
    pub(crate) session: SessionId,
    /// How many.
    pub(crate) requests: u32,
    /// The one that has waited longest.
    pub(crate) slot: usize,
    pub(crate) op: Op,
    pub(crate) waited: Duration,
}

/// The storage has not answered for as long as is configured.
pub(crate) fn request_stalled(stall: &Stall<'_>, now: Instant) {
    let Some(left_out) = admit(&STALLED, now) else { return };
    tracing::warn!(
        target: "nebd::alarm", alarm = "request_stalled",
        volume = %stall.volume, session = %stall.session, requests = stall.requests,
        slot = stall.slot, op = ?stall.op, waited_ms = stall.waited.as_millis() as u64, left_out,
        "storage has not answered a request; it goes on waiting"
    );
}

/// The storage has answered every request of a queue that had stalled.
pub(crate) fn stall_over(volume: &VolumeName, session: SessionId) {
    let Some(left_out) = admit(&ANSWERED, Instant::now()) else { return };
    tracing::info!(
        target: "nebd::alarm", alarm = "stall_over", %volume, %session, left_out,
        "storage answers again"
    );
}

/// A volume waits for the operator. Each is told: that is once a volume and crash.
pub(crate) fn volume_parked(volume: &VolumeName, reason: &str) {
    tracing::error!(
        target: "nebd::alarm", alarm = "volume_parked", %volume, reason, "volume parked"
    );
}

/// The operator has decided.
pub(crate) fn volume_unparked(volume: &VolumeName, abort: bool) {
    tracing::warn!(
        target: "nebd::alarm", alarm = "volume_unparked", %volume, abort,
        "volume unparked by the operator"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_told_later() {
        let mut limiter = Limiter::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limiter.admit(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limiter.admit(start + WINDOW / 2), None);
        }
        assert_eq!(limiter.admit(start + WINDOW), Some(1000));
        assert_eq!(limiter.admit(start + WINDOW), Some(0));
    }
}
