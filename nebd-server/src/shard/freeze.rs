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

use super::Command;

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
    /// Commands that came after the seal and would have requests dispatched or answered.
    pub(super) kept_commands: Vec<Command>,
}

impl Frozen {
    pub(super) fn new(freeze: Freeze) -> Frozen {
        Frozen { freeze, is_sealed: false, kept: Vec::new(), kept_commands: Vec::new() }
    }

    /// Keeps a command for the case that there is no successor, which judges for itself; returns what may
    /// be obeyed all the same.
    pub(super) fn keep(&mut self, command: Command) -> Option<Command> {
        let touches_rings = matches!(
            command,
            Command::Suspect { .. } | Command::Abort { .. } | Command::Park(..) | Command::Virt(..)
        );
        if self.is_sealed && touches_rings {
            self.kept_commands.push(command);
            return None;
        }
        Some(command)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_seal_nothing_is_dispatched_on_anybodys_word() {
        let (events, _heard) = crossbeam::channel::unbounded();
        let mut frozen = Frozen::new(Freeze { deadline: Instant::now(), events });
        let park = || Command::Park(SessionId([1; 16]), false);
        assert!(frozen.keep(park()).is_some(), "before the seal its requests are waited for");
        frozen.is_sealed = true;
        assert!(frozen.keep(park()).is_none());
        assert!(matches!(frozen.kept_commands[..], [Command::Park(_, false)]));
        for command in [Command::Thaw, Command::Probe, Command::Drain(SessionId([1; 16]))] {
            assert!(frozen.keep(command).is_some());
        }
        assert_eq!(frozen.kept_commands.len(), 1);
    }
}
