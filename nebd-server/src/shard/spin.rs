//! When to spin before sleeping: only while it has paid lately, and within what the operator allows.
//!
//! A wakeup across cores costs tens of microseconds, a spin that finds work saves it; a spin that
//! finds nothing burns a core that the client may need. So spins are rated: found work raises the
//! rating, a vain spin lowers it, and below zero only one sleep in a while is preceded by a try.
//!
//! The rating is about latency; a [`SpinBudget`] is about the host. It counts all time without work
//! that was not slept, also that of spins that found work in the end, in windows of [`WINDOW`].

use std::time::{Duration, Instant};

const RATING_MAX: i32 = 16;
const RATING_MIN: i32 = -8;
/// Sleeps between tries while spinning does not pay.
const RETRY_SLEEPS: u32 = 64;
/// Turns between looks at the clock.
const TURNS_PER_LOOK: u32 = 16;
/// What a budget is for.
const WINDOW: Duration = Duration::from_millis(100);

/// What one shard may spin in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpinBudget(Option<Duration>);

impl SpinBudget {
    /// An equal part of `cores` for each of so many shards; 0 is no limit.
    pub fn of(cores: f64, shards: usize) -> SpinBudget {
        let share = (cores / shards.max(1) as f64).min(1.0);
        SpinBudget((share > 0.0).then(|| WINDOW.mul_f64(share)))
    }
}

/// What was spun in the present window.
struct Account {
    budget: Duration,
    spent: Duration,
    window: Instant,
}

impl Account {
    fn spend(&mut self, spun: Duration) {
        self.spent = self.spent.saturating_add(spun);
    }

    fn left(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.window) >= WINDOW {
            self.window = now;
            self.spent = Duration::ZERO;
        }
        self.budget.saturating_sub(self.spent)
    }
}

pub(super) struct Spin<C = fn() -> Instant> {
    clock: C,
    limit: Duration,
    account: Option<Account>,
    rating: i32,
    vain_sleeps: u32,
    turns: u32,
    /// When the present spin began, and when it is vain.
    spinning: Option<(Instant, Instant)>,
}

impl Spin {
    pub(super) fn new(limit: Duration, budget: SpinBudget) -> Spin {
        Spin::with_clock(limit, budget, Instant::now)
    }
}

impl<C: Fn() -> Instant> Spin<C> {
    fn with_clock(limit: Duration, SpinBudget(budget): SpinBudget, clock: C) -> Spin<C> {
        let account =
            budget.map(|budget| Account { budget, spent: Duration::ZERO, window: clock() });
        let (rating, vain_sleeps, turns) = (RATING_MAX / 2, 0, 0);
        Spin { clock, limit, account, rating, vain_sleeps, turns, spinning: None }
    }

    /// There was work.
    pub(super) fn worked(&mut self) {
        if let Some((since, _)) = self.spinning.take() {
            self.rating = (self.rating + 2).min(RATING_MAX);
            if let Some(account) = &mut self.account {
                account.spend((self.clock)().saturating_duration_since(since));
            }
        }
    }

    /// There was none: whether to look once more, or else sleep.
    pub(super) fn again(&mut self) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let Some((since, until)) = self.spinning else { return self.begin() };
        std::hint::spin_loop();
        self.turns += 1;
        if !self.turns.is_multiple_of(TURNS_PER_LOOK) {
            return true;
        }
        let now = (self.clock)();
        if now < until {
            return true;
        }
        self.spinning = None;
        self.rating = (self.rating - 1).max(RATING_MIN);
        if let Some(account) = &mut self.account {
            account.spend(now.saturating_duration_since(since));
        }
        false
    }

    fn begin(&mut self) -> bool {
        if self.rating < 0 && self.vain_sleeps + 1 < RETRY_SLEEPS {
            self.vain_sleeps += 1;
            return false;
        }
        let now = (self.clock)();
        let left = self.account.as_mut().map_or(self.limit, |account| account.left(now));
        if left.is_zero() {
            return false;
        }
        self.vain_sleeps = 0;
        self.spinning = Some((now, now + self.limit.min(left)));
        self.turns = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn vain_spins_end_the_spinning_and_work_brings_it_back() {
        let mut spin = Spin::new(Duration::from_nanos(1), SpinBudget(None));
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

    /// Time spun in 10 windows by a shard that has work after each `gap`, and sleeps otherwise.
    fn spun(budget: SpinBudget, gap: Duration) -> Duration {
        let now = Cell::new(Instant::now());
        let tick = Duration::from_nanos(500);
        let mut spin = Spin::with_clock(Duration::from_micros(100), budget, || now.get());
        let end = now.get() + WINDOW * 10;
        let mut spun = Duration::ZERO;
        while now.get() < end {
            let work = now.get() + gap;
            while now.get() < work && spin.again() {
                now.set(now.get() + tick);
                spun += tick;
            }
            now.set(now.get().max(work));
            spin.worked();
        }
        spun
    }

    #[test]
    fn all_spinning_stays_within_the_budget() {
        let gap = Duration::from_micros(90);
        assert!(spun(SpinBudget::of(0.0, 4), gap) > WINDOW * 9, "no limit");
        // Half a core for four shards.
        let limited = spun(SpinBudget::of(0.5, 4), gap);
        let share = WINDOW * 10 / 8;
        assert!(limited <= share.mul_f64(1.05) && limited >= share.mul_f64(0.9), "{limited:?}");
        let vain = spun(SpinBudget::of(0.01, 1), Duration::from_micros(500));
        assert!(vain <= (WINDOW / 10).mul_f64(1.1), "{vain:?}");
    }

    #[test]
    fn a_shard_has_a_core_at_most() {
        assert_eq!(SpinBudget::of(8.0, 2), SpinBudget(Some(WINDOW)));
        assert_eq!(SpinBudget::of(0.0, 2), SpinBudget(None));
    }
}
