//! The clock of a run, and what happened in it: kills, successors, power cuts.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::oracle::Moment;

/// Something that happened to the server or the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: Moment,
    /// What, such as `kill #3 (sigkill)`.
    pub what: String,
}

/// The clock and the events of a run.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    events: Mutex<Vec<Event>>,
    /// Counts the writes that a kill met.
    pub kill: KillWatch,
}

/// Counts the writes that were submitted before a kill and reaped after it.
#[derive(Debug, Default)]
pub struct KillWatch {
    /// When the kill was about to happen; zero if none is watched.
    before: AtomicU64,
    /// Whether it has happened.
    happened: AtomicU64,
    held: AtomicU32,
}

impl KillWatch {
    /// A kill is about to happen.
    pub fn arm(&self, now: Moment) {
        self.happened.store(0, SeqCst);
        self.held.store(0, SeqCst);
        self.before.store(now.max(1), SeqCst);
    }

    /// The signal has been sent, or the death was seen.
    pub fn happened(&self) {
        self.happened.store(1, SeqCst);
    }

    /// A write that was submitted at `submitted` is reaped now.
    pub fn reaped(&self, submitted: Moment) {
        if self.happened.load(SeqCst) != 0 && submitted < self.before.load(SeqCst) {
            self.held.fetch_add(1, SeqCst);
        }
    }

    /// Writes counted since [`arm`](Self::arm).
    pub fn held(&self) -> u32 {
        self.held.load(SeqCst)
    }
}

impl Default for Timeline {
    fn default() -> Timeline {
        Timeline { start: Instant::now(), events: Mutex::default(), kill: KillWatch::default() }
    }
}

impl Timeline {
    /// A clock that starts now.
    pub fn shared() -> Arc<Timeline> {
        Arc::default()
    }

    /// Nanoseconds since the run began.
    pub fn now(&self) -> Moment {
        self.start.elapsed().as_nanos() as Moment
    }

    /// Notes that something happened, now.
    pub fn note(&self, what: impl Into<String>) {
        let event = Event { at: self.now(), what: what.into() };
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }

    /// Everything that happened.
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Between which events a moment lies.
    pub fn around(&self, moment: Moment) -> String {
        let events = self.events();
        let next = events.partition_point(|event| event.at <= moment);
        let before = next.checked_sub(1).and_then(|i| events.get(i));
        let text = |event: &Event| format!("{} at {}", event.what, seconds(event.at));
        let before = before.map_or_else(|| "the start".to_owned(), text);
        match events.get(next) {
            Some(after) => format!("between {before} and {}", text(after)),
            None => format!("after {before}"),
        }
    }
}

/// A moment, for people.
pub fn seconds(moment: Moment) -> String {
    format!("{}.{:06} s", moment / 1_000_000_000, moment / 1000 % 1_000_000)
}
