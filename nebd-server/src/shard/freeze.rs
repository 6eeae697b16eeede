//! A shard that gives its queues up to a successor in another process.
//!
//! ```text
//!            Freeze                    nothing in flight, or time over       Thaw
//!   serving ────────► frozen ────────────────────────────────────────► sealed ────► serving
//!                     pops nothing, still publishes     touches no shared memory
//! ```
//!
//! Once sealed, a shard writes to no ring and rings no client: by then the successor may. What
//! storage answers is kept for the case that there will be none. A frozen shard does not look at
//! its doorbells either: to take note of one would clear the ring's flag that a successor sets
//! before it sleeps.

use std::time::Instant;

use crossbeam::channel::Sender;
use nebd_abi::layout::SessionId;
use nebd_backend::Done;

/// What a frozen shard tells.
#[derive(Debug)]
pub enum FreezeEvent {
    /// It is sealed.
    Sealed {
        /// Sessions that still have requests at their storage.
        left: Vec<SessionId>,
        /// When each session was last answered, by the monotonic clock in nanoseconds.
        last_ns: Vec<(SessionId, u64)>,
    },
    /// A queue of this session that had been left has nothing at its storage any more.
    Drained(SessionId),
}

/// What freezes a shard.
#[derive(Debug)]
pub struct Freeze {
    /// When it is sealed, come what may.
    pub deadline: Instant,
    /// Where it tells.
    pub events: Sender<FreezeEvent>,
}

/// A shard that is frozen.
pub(super) struct Frozen {
    pub(super) freeze: Freeze,
    pub(super) is_sealed: bool,
    /// Answers that came after the seal.
    pub(super) kept: Vec<Done>,
}

impl Frozen {
    pub(super) fn new(freeze: Freeze) -> Frozen {
        Frozen { freeze, is_sealed: false, kept: Vec::new() }
    }

    pub(super) fn tell(&self, event: FreezeEvent) {
        // Nobody listens: the takeover was given up, and Thaw is on its way.
        let _ = self.freeze.events.send(event);
    }
}

/// Nanoseconds of the clock that all processes share.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}
