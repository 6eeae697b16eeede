//! Who may write where: a write that is no whole blocks reads the blocks at its ends and writes them
//! back, and nobody else may write to those blocks meanwhile.
//!
//! ```text
//!  whole blocks (Shared): beside each other; a counter and no lock while no partial write was seen
//!  partial      (Alone):  beside nobody; the first one waits for all that are merely counted
//!
//!  what cannot begin waits in line, behind whatever it conflicts with
//! ```
//!
//! The first partial write of a volume changes its ways for good: from then on every write is
//! tracked by its range.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// How a range of bytes is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Beside others of the kind.
    Shared,
    /// Beside nobody.
    Alone,
}

/// The writes of one volume that this process has under way.
#[derive(Default)]
pub struct Ranges {
    untracked: AtomicU64,
    is_tracking: AtomicBool,
    state: Mutex<State>,
}

/// Those of a volume, whichever way it is opened how often.
pub fn of_volume(name: &str) -> Arc<Ranges> {
    static KNOWN: Mutex<BTreeMap<String, Weak<Ranges>>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&KNOWN);
    known.retain(|_, ranges| ranges.strong_count() > 0);
    known.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
        let ranges = Arc::default();
        known.insert(name.to_owned(), Arc::downgrade(&ranges));
        ranges
    })
}

#[derive(Default)]
struct State {
    active: Vec<Claim>,
    waiting: Vec<(Claim, Start)>,
    last_id: u64,
    /// Some thread starts those who wait, and looks again before it leaves.
    is_pumping: bool,
}

type Start = Box<dyn FnOnce(Right) + Send>;

#[derive(Clone, Debug)]
struct Claim {
    id: u64,
    range: Range<u64>,
    usage: Use,
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        (self.usage == Use::Alone || other.usage == Use::Alone)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

/// The right to write to a range, until it is dropped.
pub struct Right {
    ranges: Arc<Ranges>,
    /// `None` if it is merely counted.
    id: Option<u64>,
}

impl Drop for Right {
    fn drop(&mut self) {
        let Some(id) = self.id else { return self.ranges.leave_untracked() };
        self.ranges.lock().active.retain(|claim| claim.id != id);
        self.ranges.pump();
    }
}

/// Somebody who has to wait.
pub struct Waiter(Claim);

impl Ranges {
    /// The right to use `range`, unless it has to be waited for.
    pub fn try_enter(self: &Arc<Self>, range: Range<u64>, usage: Use) -> Result<Right, Waiter> {
        if usage == Use::Shared && self.enter_untracked() {
            return Ok(Right { ranges: Arc::clone(self), id: None });
        }
        self.is_tracking.store(true, SeqCst);
        let mut state = self.lock();
        state.last_id += 1;
        let claim = Claim { id: state.last_id, range, usage };
        let mut others = state.active.iter().chain(state.waiting.iter().map(|(claim, _)| claim));
        if others.any(|other| other.conflicts(&claim)) || self.is_held_up(&claim) {
            return Err(Waiter(claim));
        }
        let right = Right { ranges: Arc::clone(self), id: Some(claim.id) };
        state.active.push(claim);
        Ok(right)
    }

    /// Calls `start` in its turn, on the thread of whoever it waited for.
    pub fn wait(self: &Arc<Self>, waiter: Waiter, start: impl FnOnce(Right) + Send + 'static) {
        self.lock().waiting.push((waiter.0, Box::new(start)));
        // Whoever was in the way may have left in between.
        self.pump();
    }

    /// Waits for its turn on this thread.
    pub fn wait_here(self: &Arc<Self>, waiter: Waiter) -> Right {
        let turn = Arc::new((Mutex::new(None), Condvar::new()));
        let given = Arc::clone(&turn);
        self.wait(waiter, move |right| {
            *lock(&given.0) = Some(right);
            given.1.notify_one();
        });
        let mut right = lock(&turn.0);
        loop {
            match right.take() {
                Some(right) => return right,
                None => right = turn.1.wait(right).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn enter_untracked(self: &Arc<Self>) -> bool {
        if self.is_tracking.load(SeqCst) {
            return false;
        }
        self.untracked.fetch_add(1, SeqCst);
        // Who begins to track stores that first and counts afterwards: one of the two sees the other.
        if self.is_tracking.load(SeqCst) {
            self.leave_untracked();
            return false;
        }
        true
    }

    fn leave_untracked(self: &Arc<Self>) {
        if self.untracked.fetch_sub(1, SeqCst) == 1 && self.is_tracking.load(SeqCst) {
            self.pump();
        }
    }

    /// Where untracked writes go is not known.
    fn is_held_up(&self, claim: &Claim) -> bool {
        claim.usage == Use::Alone && self.untracked.load(SeqCst) > 0
    }

    /// Starts those who need not wait any longer. One thread at a time does, and not recursively:
    /// what is started may end at once.
    fn pump(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.is_pumping {
            return;
        }
        state.is_pumping = true;
        loop {
            let startable = state.waiting.iter().enumerate().find(|(index, (claim, _))| {
                let earlier = state.waiting.iter().take(*index).map(|(claim, _)| claim);
                !state.active.iter().chain(earlier).any(|other| other.conflicts(claim))
                    && !self.is_held_up(claim)
            });
            let Some((index, _)) = startable else { break };
            let (claim, start) = state.waiting.remove(index);
            let right = Right { ranges: Arc::clone(self), id: Some(claim.id) };
            state.active.push(claim);
            drop(state);
            start(right);
            state = self.lock();
        }
        state.is_pumping = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics half way through a change under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn enter(ranges: &Arc<Ranges>, range: Range<u64>, usage: Use) -> mpsc::Receiver<Right> {
        let (sender, receiver) = mpsc::channel();
        match ranges.try_enter(range, usage) {
            Ok(right) => sender.send(right).unwrap(),
            Err(waiter) => ranges.wait(waiter, move |right| drop(sender.send(right))),
        }
        receiver
    }

    fn tracking() -> Arc<Ranges> {
        let ranges = Arc::new(Ranges::default());
        assert!(ranges.try_enter(0..1, Use::Alone).is_ok());
        ranges
    }

    #[test]
    fn one_alone_waits_for_everybody_in_its_range() {
        let ranges = tracking();
        let one = enter(&ranges, 0..8, Use::Shared).try_recv().unwrap();
        let two = enter(&ranges, 4..12, Use::Shared).try_recv().unwrap();
        let alone = enter(&ranges, 6..10, Use::Alone);
        let beside = enter(&ranges, 10..20, Use::Alone);
        assert!(alone.try_recv().is_err());
        drop(one);
        assert!(alone.try_recv().is_err() && beside.try_recv().is_err());
        drop(two);
        let alone = alone.try_recv().unwrap();
        assert!(beside.try_recv().is_ok());
        let late = enter(&ranges, 0..7, Use::Shared);
        assert!(late.try_recv().is_err());
        assert!(ranges.try_enter(7..8, Use::Shared).is_err());
        drop(alone);
        assert!(late.try_recv().is_ok());
        assert!(ranges.try_enter(7..8, Use::Shared).is_ok());
    }

    #[test]
    fn nobody_overtakes_those_he_conflicts_with() {
        let ranges = tracking();
        let first = enter(&ranges, 0..8, Use::Shared).try_recv().unwrap();
        let alone = enter(&ranges, 4..12, Use::Alone);
        // Does not conflict with the first, but with the one that waits.
        let third = enter(&ranges, 8..16, Use::Shared);
        assert!(third.try_recv().is_err());
        drop(first);
        let alone = alone.try_recv().unwrap();
        assert!(third.try_recv().is_err());
        drop(alone);
        assert!(third.try_recv().is_ok());
    }

    #[test]
    fn the_first_partial_write_waits_for_those_merely_counted() {
        let ranges = Arc::new(Ranges::default());
        let one = enter(&ranges, 0..8, Use::Shared).try_recv().unwrap();
        let two = enter(&ranges, 90..99, Use::Shared).try_recv().unwrap();
        assert!(one.id.is_none() && two.id.is_none());
        let alone = enter(&ranges, 0..8, Use::Alone);
        assert!(enter(&ranges, 50..60, Use::Shared).try_recv().unwrap().id.is_some());
        drop(two);
        assert!(alone.try_recv().is_err());
        drop(one);
        assert!(alone.try_recv().is_ok());
    }

    #[test]
    fn a_long_line_of_those_who_end_at_once_is_no_recursion() {
        let ranges = Arc::new(Ranges::default());
        let first = enter(&ranges, 0..8, Use::Alone).try_recv().unwrap();
        let (sender, receiver) = mpsc::channel();
        for index in 0..2000 {
            let sender = sender.clone();
            let Err(waiter) = ranges.try_enter(0..8, Use::Alone) else { panic!("not in line") };
            ranges.wait(waiter, move |right| {
                drop(right);
                sender.send(index).unwrap();
            });
        }
        drop(first);
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), (0..2000).collect::<Vec<_>>());
    }

    #[test]
    fn threads_exclude_each_other() {
        let ranges = Arc::new(Ranges::default());
        let inside = Arc::new(AtomicU64::new(0));
        let run = |thread: u64, ranges: &Arc<Ranges>, inside: &AtomicU64| {
            for round in 0..2000 {
                // Some rounds go by before the first one alone.
                let is_alone = round > 200 && !(round + thread).is_multiple_of(3);
                // One alone counts for many.
                let (usage, weight) =
                    if is_alone { (Use::Alone, 1 << 32) } else { (Use::Shared, 1) };
                let right =
                    ranges.try_enter(0..8, usage).unwrap_or_else(|waiter| ranges.wait_here(waiter));
                let before = inside.fetch_add(weight, SeqCst);
                assert!(before < 1 << 32 && (!is_alone || before == 0));
                inside.fetch_sub(weight, SeqCst);
                drop(right);
            }
        };
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (ranges, inside) = (ranges.clone(), inside.clone());
                scope.spawn(move || run(thread, &ranges, &inside));
            }
        });
    }
}
