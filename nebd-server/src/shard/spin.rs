//! When to spin before sleeping: only while it has paid lately.
//!
//! A wakeup across cores costs tens of microseconds, a spin that finds work saves it; a spin that
//! finds nothing burns a core that the client may need. So spins are rated: found work raises the
//! rating, a vain spin lowers it, and below zero only one sleep in a while is preceded by a try.

use std::time::{Duration, Instant};

const RATING_MAX: i32 = 16;
const RATING_MIN: i32 = -8;
/// Sleeps between tries while spinning does not pay.
const RETRY_SLEEPS: u32 = 64;
/// Turns between looks at the clock.
const TURNS_PER_LOOK: u32 = 16;

pub(super) struct Spin {
    limit: Duration,
    rating: i32,
    vain_sleeps: u32,
    turns: u32,
    since: Option<Instant>,
}

impl Spin {
    pub(super) fn new(limit: Duration) -> Spin {
        Spin { limit, rating: RATING_MAX / 2, vain_sleeps: 0, turns: 0, since: None }
    }

    /// There was work.
    pub(super) fn worked(&mut self) {
        if self.since.take().is_some() {
            self.rating = (self.rating + 2).min(RATING_MAX);
        }
    }

    /// There was none: whether to look once more, or else sleep.
    pub(super) fn again(&mut self) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let Some(since) = self.since else {
            if self.rating < 0 {
                self.vain_sleeps += 1;
                if self.vain_sleeps < RETRY_SLEEPS {
                    return false;
                }
                self.vain_sleeps = 0;
            }
            self.since = Some(Instant::now());
            self.turns = 0;
            return true;
        };
        std::hint::spin_loop();
        self.turns += 1;
        if !self.turns.is_multiple_of(TURNS_PER_LOOK) || since.elapsed() < self.limit {
            return true;
        }
        self.since = None;
        self.rating = (self.rating - 1).max(RATING_MIN);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vain_spins_end_the_spinning_and_work_brings_it_back() {
        let mut spin = Spin::new(Duration::from_nanos(1));
        let mut turns_of_a_sleep = || {
            let mut turns = 0;
            while spin.again() {
                turns += 1;
            }
            turns
        };
        for _ in 0..100 {
            turns_of_a_sleep();
        }
        let spun = (0..RETRY_SLEEPS).filter(|_| turns_of_a_sleep() > 0).count();
        assert_eq!(spun, 1, "one try in a while");
        for _ in 0..1000 {
            if spin.again() {
                spin.worked();
            }
        }
        assert!(spin.rating > 0);
    }
}
