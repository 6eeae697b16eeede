//! Switches that break a rule on purpose, so that tests can prove they would notice.

#[cfg(any(loom, feature = "test-hooks"))]
static BROKEN: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// A rule of the ring that test builds and models can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rule {
    /// The client reaps only a completion whose `seq` is the one in the slot.
    ReapMatch = 1 << 0,
    /// The client clears the slot's `seq` when it reaps.
    ReapFrees = 1 << 1,
    /// The client sets a slot's `seq` after its other fields.
    SeqLast = 1 << 2,
    /// A successor takes what a published completion answered as done.
    MarkDone = 1 << 3,
    /// A successor does not count the entry beyond the completion tail.
    TornEntry = 1 << 4,
    /// A successor reads the submission tail before the slots.
    TailFirst = 1 << 5,
    /// A `(slot, seq)` that was dispatched is not dispatched again by the same server.
    DispatchOnce = 1 << 6,
}

/// Test builds only: breaks a rule, or keeps it again, for the whole process.
#[cfg(any(loom, feature = "test-hooks"))]
pub fn switch_broken(rule: Rule, broken: bool) {
    use std::sync::atomic::Ordering::Relaxed;
    if broken {
        BROKEN.fetch_or(rule as u8, Relaxed);
    } else {
        BROKEN.fetch_and(!(rule as u8), Relaxed);
    }
}

/// Test builds only: the client accepts completions that match no request in flight.
#[cfg(any(loom, feature = "test-hooks"))]
pub fn switch_reap_match_off(off: bool) {
    switch_broken(Rule::ReapMatch, off);
}

#[cfg(any(loom, feature = "test-hooks"))]
pub(super) fn is_broken(rule: Rule) -> bool {
    BROKEN.load(std::sync::atomic::Ordering::Relaxed) & rule as u8 != 0
}

#[cfg(not(any(loom, feature = "test-hooks")))]
pub(super) const fn is_broken(_rule: Rule) -> bool {
    false
}
