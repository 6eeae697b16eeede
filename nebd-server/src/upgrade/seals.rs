//! The seals of all shards.

use std::collections::BTreeMap;
use std::time::Instant;

use crossbeam::channel::Receiver;
use nebd_abi::layout::SessionId;

use crate::shard::FreezeEvent;

/// What the shards said when they were sealed.
pub(super) struct Seals {
    /// Sessions with requests at their storage, once for each of their queues.
    pub(super) left: Vec<SessionId>,
    /// When each session was last answered.
    pub(super) last_ns: BTreeMap<[u8; 16], u64>,
}

impl Seals {
    /// Waits until every shard is sealed: only then may anybody claim. One that was sealed early may
    /// tell of its last answers before another is sealed.
    pub(super) fn collect(
        shards: usize,
        events: &Receiver<FreezeEvent>,
        deadline: Instant,
    ) -> Option<Seals> {
        let mut seals = Seals { left: Vec::new(), last_ns: BTreeMap::new() };
        let (mut sealed, mut drained) = (0, Vec::new());
        while sealed < shards {
            match events.recv_deadline(deadline).ok()? {
                FreezeEvent::Sealed { left, last_ns } => {
                    sealed += 1;
                    seals.left.extend(left);
                    for (session, ns) in last_ns {
                        let last = seals.last_ns.entry(session.0).or_default();
                        *last = ns.max(*last);
                    }
                }
                FreezeEvent::Drained(session) => drained.push(session),
            }
        }
        for session in drained {
            if let Some(at) = seals.left.iter().position(|left| *left == session) {
                seals.left.swap_remove(at);
            }
        }
        Some(seals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn session(number: u8) -> SessionId {
        SessionId([number; 16])
    }

    fn sealed(left: &[u8], times: &[(u8, u64)]) -> FreezeEvent {
        FreezeEvent::Sealed {
            left: left.iter().map(|number| session(*number)).collect(),
            last_ns: times.iter().map(|(number, ns)| (session(*number), *ns)).collect(),
        }
    }

    #[test]
    fn no_claim_before_every_shard_is_sealed() {
        let (sender, events) = crossbeam::channel::unbounded();
        let soon = Instant::now() + Duration::from_millis(20);
        sender.send(sealed(&[1, 1, 2], &[(1, 10), (2, 30)])).unwrap();
        sender.send(FreezeEvent::Drained(session(1))).unwrap();
        sender.send(FreezeEvent::Drained(session(2))).unwrap();
        assert!(Seals::collect(2, &events, soon).is_none(), "one shard has said nothing");
        let later = Instant::now() + Duration::from_secs(60);
        for event in [
            sealed(&[1, 1, 2], &[(1, 10), (2, 30)]),
            FreezeEvent::Drained(session(1)),
            FreezeEvent::Drained(session(2)),
            sealed(&[3], &[(1, 20)]),
        ] {
            sender.send(event).unwrap();
        }
        let seals = Seals::collect(2, &events, later).unwrap();
        let mut left = seals.left;
        left.sort_unstable();
        assert_eq!(left, [session(1), session(3)], "one queue of session 1, and session 3");
        assert_eq!(seals.last_ns[&[1; 16]], 20);
    }
}
