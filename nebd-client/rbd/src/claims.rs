//! Who changes which blocks: a change of a part of a block reads the block and writes it back, and
//! no other change of it may happen in between.
//!
//! Whole blocks may be changed by many at once, as on any disk. Claims that have to wait start in
//! the order of their asking.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How a range is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whole blocks are written.
    Whole,
    /// Blocks are read and written back.
    Part,
}

/// What to do once the range is claimed.
type Start = Box<dyn FnOnce(Claim) + Send>;

/// The ranges of an image that are being changed.
#[derive(Default)]
pub struct Claims(Mutex<State>);

#[derive(Default)]
struct State {
    active: Vec<Active>,
    waiting: VecDeque<(Active, Start)>,
    /// Of all these, how many are [`Kind::Part`].
    parts: usize,
    last: u64,
}

#[derive(Clone)]
struct Active {
    id: u64,
    kind: Kind,
    range: Range<u64>,
}

impl Active {
    fn conflicts(&self, other: &Active) -> bool {
        (self.kind == Kind::Part || other.kind == Kind::Part)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

/// A range that is claimed, until this is dropped.
pub struct Claim {
    claims: Arc<Claims>,
    id: u64,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims `range`, whole blocks, if nobody is in the way.
    pub fn try_claim(self: &Arc<Self>, kind: Kind, range: Range<u64>) -> Option<Claim> {
        let mut state = self.lock();
        let new = state.new_claim(kind, range);
        state.is_free(&new, state.waiting.len()).then(|| state.begin(self, new))
    }

    /// Claims `range` as soon as nobody is in the way; `start` runs here or where the last one
    /// that is in the way ends.
    pub fn claim(
        self: &Arc<Self>,
        kind: Kind,
        range: Range<u64>,
        start: impl FnOnce(Claim) + Send + 'static,
    ) {
        let mut state = self.lock();
        let new = state.new_claim(kind, range);
        if state.is_free(&new, state.waiting.len()) {
            let claim = state.begin(self, new);
            drop(state);
            start(claim);
        } else {
            state.parts += usize::from(kind == Kind::Part);
            state.waiting.push_back((new, Box::new(start)));
        }
    }

    /// The claims that wait no longer.
    fn end(self: &Arc<Self>, id: u64) -> Vec<(Claim, Start)> {
        let mut state = self.lock();
        if let Some(index) = state.active.iter().position(|active| active.id == id) {
            let ended = state.active.swap_remove(index);
            state.parts -= usize::from(ended.kind == Kind::Part);
        }
        let mut started = Vec::new();
        let mut index = 0;
        while let Some((next, _)) = state.waiting.get(index) {
            if state.is_free(next, index)
                && let Some((next, start)) = state.waiting.remove(index)
            {
                state.parts -= usize::from(next.kind == Kind::Part);
                started.push((state.begin(self, next), start));
            } else {
                index += 1;
            }
        }
        started
    }
}

impl State {
    fn new_claim(&mut self, kind: Kind, range: Range<u64>) -> Active {
        self.last += 1;
        Active { id: self.last, kind, range }
    }

    /// Whether nobody active, and nobody among the first `before` that wait, is in the way.
    fn is_free(&self, new: &Active, before: usize) -> bool {
        if new.kind == Kind::Whole && self.parts == 0 {
            return true;
        }
        let waiting = self.waiting.iter().take(before).map(|(waiting, _)| waiting);
        !self.active.iter().chain(waiting).any(|other| other.conflicts(new))
    }

    fn begin(&mut self, claims: &Arc<Claims>, new: Active) -> Claim {
        self.parts += usize::from(new.kind == Kind::Part);
        let id = new.id;
        self.active.push(new);
        Claim { claims: claims.clone(), id }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        for (claim, start) in self.claims.end(self.id) {
            start(claim);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const HERE: Range<u64> = 0..4096;

    #[test]
    fn whole_blocks_are_shared_and_parts_are_not() {
        let claims = Arc::new(Claims::default());
        let whole = claims.try_claim(Kind::Whole, HERE).unwrap();
        let other = claims.try_claim(Kind::Whole, HERE).unwrap();
        assert!(claims.try_claim(Kind::Part, HERE).is_none());
        drop((whole, other));
        let part = claims.try_claim(Kind::Part, HERE).unwrap();
        assert!(claims.try_claim(Kind::Part, HERE).is_none());
        assert!(claims.try_claim(Kind::Whole, 0..8192).is_none());
        assert!(claims.try_claim(Kind::Part, 4096..8192).is_some());
        drop(part);
        assert!(claims.try_claim(Kind::Part, HERE).is_some());
        assert_eq!(claims.lock().parts, 0);
    }

    #[test]
    fn those_that_wait_start_in_order() {
        let claims = Arc::new(Claims::default());
        let (started, starts) = mpsc::channel();
        let wait = |kind, range, name: &'static str| {
            let started = started.clone();
            claims.claim(kind, range, move |claim| started.send((name, claim)).unwrap());
        };
        let first = claims.try_claim(Kind::Part, HERE).unwrap();
        wait(Kind::Part, HERE, "second");
        wait(Kind::Whole, HERE, "third");
        wait(Kind::Whole, HERE, "fourth");
        wait(Kind::Part, 8192..12288, "elsewhere");
        assert_eq!(starts.try_recv().unwrap().0, "elsewhere");
        assert!(starts.try_recv().is_err());
        drop(first);
        let (name, second) = starts.try_recv().unwrap();
        assert_eq!(name, "second");
        assert!(starts.try_recv().is_err());
        drop(second);
        let (third, fourth) = (starts.try_recv().unwrap(), starts.try_recv().unwrap());
        assert_eq!((third.0, fourth.0), ("third", "fourth"));
        drop((third, fourth));
        assert!(claims.lock().active.is_empty());
        assert_eq!(claims.lock().parts, 0);
    }

    #[test]
    fn a_newcomer_does_not_overtake_one_that_waits() {
        let claims = Arc::new(Claims::default());
        let whole = claims.try_claim(Kind::Whole, HERE).unwrap();
        let (started, starts) = mpsc::channel();
        claims.claim(Kind::Part, HERE, move |claim| started.send(claim).unwrap());
        assert!(claims.try_claim(Kind::Whole, HERE).is_none());
        drop(whole);
        drop(starts.try_recv().unwrap());
        assert!(claims.try_claim(Kind::Whole, HERE).is_some());
    }
}
