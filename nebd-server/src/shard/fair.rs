//! Whose turn it is, how long a turn lasts, and how much of the storage it may hold.
//!
//! ```text
//!   one session present      a turn: `ring.batch` requests or TURN_BYTES_MAX, no other bound
//!   several on this shard    a turn: what the session's balance has; each round adds QUANTUM
//!   several on the server    at the storage: HELD_REQUESTS_MAX and HELD_BYTES_MAX for each session
//! ```
//!
//! A round is one pass over the active queues. Sizes are known only once a request was taken, so a
//! session may overdraw its balance with its last request, and pays with rounds in which it takes
//! nothing (surplus round robin). A balance belongs to the session, not to the queue: many queues
//! are no way to have more turns. Nothing is lost to rounds: as long as somebody owes, the shard goes
//! on with the next one at once, and a round without work is a few nanoseconds.
//!
//! What is at the storage is served in the storage's order, so a session that may fill its queue
//! decides how long the others wait. While others are present, each holds its share there and keeps
//! the rest in its ring. It always may have one request there, whatever its size: whoever waits
//! for room waits for an answer of its own, which wakes the shard, and for nobody else.
//!
//! Present is who had a request taken or unanswered within [`LINGER`], so that a session with one
//! request at a time stays present in between. Shards tell each other by [`Beacon`]s who is there:
//! a volume on another shard may be on the same disk.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nebd_abi::layout::SessionId;

/// Cost that a session may have in a round while others are present; for `mem` some 50 µs.
const QUANTUM: i64 = 256 << 10;
/// Cost of a request beside its bytes: what it takes to take, translate and answer it.
const REQUEST_COST: i64 = 8 << 10;
/// Bytes that a queue may move at a turn while its session is the only one.
const TURN_BYTES_MAX: i64 = 4 << 20;
/// Most that one request can cost: a discard of a whole volume must not owe for seconds.
const COST_MAX: u64 = TURN_BYTES_MAX as u64;
/// Requests and bytes that a session may have at the storage while others are present.
const HELD_REQUESTS_MAX: u32 = 32;
const HELD_BYTES_MAX: u64 = 2 << 20;
/// How long a session that asks for nothing still counts as present.
const LINGER: Duration = Duration::from_millis(50);
/// How long a shard's beacon holds.
const BEACON: Duration = Duration::from_millis(100);
/// Between looks at who is present.
const LOOK: Duration = Duration::from_millis(1);
/// In a beacon: more sessions than one.
const SEVERAL: u64 = u64::MAX;

/// What one shard tells the others: who is present there, and until when that may be believed.
#[derive(Debug, Default)]
pub struct Beacon {
    who: AtomicU64,
    until_ns: AtomicU64,
}

/// The beacons of all shards of a server.
pub fn beacons(shards: usize) -> Arc<[Beacon]> {
    (0..shards).map(|_| Beacon::default()).collect()
}

/// What a session has and owes on one shard; all of its queues there share it.
#[derive(Debug)]
pub(super) struct Share {
    session: SessionId,
    /// What it may still cost this round.
    balance: Cell<i64>,
    round: Cell<u64>,
    /// At the storage.
    requests: Cell<u32>,
    bytes: Cell<u64>,
    is_present: Cell<bool>,
    /// Had a request taken since the last look.
    was_served: Cell<bool>,
    seen_ns: Cell<u64>,
}

impl Share {
    pub(super) fn new(session: SessionId) -> Rc<Share> {
        Rc::new(Share {
            session,
            balance: Cell::new(QUANTUM),
            round: Cell::new(0),
            requests: Cell::new(0),
            bytes: Cell::new(0),
            is_present: Cell::new(false),
            was_served: Cell::new(false),
            seen_ns: Cell::new(0),
        })
    }

    /// A request went to the storage.
    pub(super) fn submitted(&self, bytes: u64) {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get().saturating_add(bytes));
    }

    /// The storage answered a request.
    pub(super) fn answered(&self, bytes: u64) {
        self.requests.set(self.requests.get().saturating_sub(1));
        self.bytes.set(self.bytes.get().saturating_sub(bytes));
    }

    fn has_room(&self) -> bool {
        let (requests, bytes) = (self.requests.get(), self.bytes.get());
        requests < HELD_REQUESTS_MAX && (bytes < HELD_BYTES_MAX || requests == 0)
    }
}

/// What is left of a turn.
pub(super) struct Turn {
    requests_left: u32,
    balance: i64,
    /// Others are present on this shard.
    is_shared: bool,
    /// Others may want the same storage.
    is_held: bool,
}

/// Whether a turn goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// Take one more.
    Take,
    /// The turn is over.
    Over,
    /// As much as it may have is at the storage.
    Full,
}

impl Turn {
    pub(super) fn pace(&self, share: &Share) -> Pace {
        match self.requests_left > 0 && self.balance > 0 {
            false => Pace::Over,
            true if self.is_held && !share.has_room() => Pace::Full,
            true => Pace::Take,
        }
    }

    /// A request of so many bytes was taken.
    pub(super) fn took(&mut self, bytes: u64) {
        self.requests_left -= 1;
        self.balance -= bytes.min(COST_MAX) as i64 + REQUEST_COST;
    }
}

/// Who is present on a shard.
pub(super) struct Fair {
    index: usize,
    beacons: Arc<[Beacon]>,
    present: Vec<Rc<Share>>,
    round: u64,
    next_look_ns: u64,
    /// By the last look at the beacons, others than the only one here.
    has_neighbours: bool,
}

impl Fair {
    pub(super) fn new(index: usize, beacons: Arc<[Beacon]>) -> Fair {
        let (present, round) = (Vec::new(), 0);
        Fair { index, beacons, present, round, next_look_ns: 0, has_neighbours: false }
    }

    /// A pass over the active queues begins.
    pub(super) fn begin_round(&mut self) {
        self.round += 1;
    }

    /// Whether several sessions are present on this shard.
    pub(super) fn is_shared(&self) -> bool {
        self.present.len() > 1
    }

    /// Whether a session may send nothing more to the storage until that has answered it.
    pub(super) fn is_full(&self, share: &Share) -> bool {
        self.is_held() && !share.has_room()
    }

    fn is_held(&self) -> bool {
        self.is_shared() || self.has_neighbours
    }

    /// The turn of one of a session's queues.
    pub(super) fn turn(&self, share: &Share, batch: u32) -> Turn {
        let (is_shared, is_held) = (self.is_shared(), self.is_held());
        let balance = match is_shared {
            false => TURN_BYTES_MAX,
            true if share.round.replace(self.round) == self.round => share.balance.get(),
            true => (share.balance.get() + QUANTUM).min(QUANTUM),
        };
        Turn { requests_left: batch, balance, is_shared, is_held }
    }

    /// A turn is over; `taken` if it had a request. Whether the session owes.
    pub(super) fn end(&mut self, turn: &Turn, share: &Rc<Share>, taken: bool) -> bool {
        share.balance.set(if turn.is_shared { turn.balance } else { QUANTUM });
        if taken {
            share.was_served.set(true);
            if !share.is_present.replace(true) {
                self.present.push(share.clone());
            }
        }
        turn.is_shared && turn.balance <= 0
    }

    /// Whether [`look`](Self::look) could find anything out.
    pub(super) fn wants_look(&self) -> bool {
        self.is_held() || self.beacons.len() > 1 && !self.present.is_empty()
    }

    /// Looks who is still present, here and elsewhere; `now_ns` is of one clock for all shards.
    pub(super) fn look(&mut self, now_ns: u64) {
        if now_ns < self.next_look_ns {
            return;
        }
        self.next_look_ns = now_ns + LOOK.as_nanos() as u64;
        self.present.retain(|share| {
            if share.was_served.replace(false) || share.requests.get() > 0 {
                share.seen_ns.set(now_ns);
            }
            let is_present = now_ns.saturating_sub(share.seen_ns.get()) < LINGER.as_nanos() as u64;
            share.is_present.set(is_present);
            is_present
        });
        let here = match &self.present[..] {
            [] => None,
            [share] => Some(mark(share.session)),
            _ => Some(SEVERAL),
        };
        if let (Some(who), Some(beacon)) = (here, self.beacons.get(self.index)) {
            beacon.who.store(who, Relaxed);
            beacon.until_ns.store(now_ns + BEACON.as_nanos() as u64, Relaxed);
        }
        let is_other = |(index, beacon): (usize, &Beacon)| {
            index != self.index
                && beacon.until_ns.load(Relaxed) > now_ns
                && Some(beacon.who.load(Relaxed)) != here
        };
        self.has_neighbours = self.beacons.iter().enumerate().any(is_other);
    }
}

/// A session in a beacon. Two with the same mark are taken for one: they are served as if alone.
fn mark(session: SessionId) -> u64 {
    let fold = |mark: u64, byte: &u8| (mark ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    session.0.iter().fold(0xcbf2_9ce4_8422_2325, fold) & !(1 << 63)
}

#[cfg(test)]
mod tests;
