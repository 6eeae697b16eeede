//! One queue of a session: slots, what is pending in them, and who sleeps on its doorbell.
//!
//! Submitting and reaping hold separate locks. A slot's `Pending` is written by the submitter
//! before the slot is published and taken by the reaper before the slot is free again, so its
//! lock is never contended but by a session that fails or a request that times out.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::Duration;

use nebd_abi::region::Region;
use nebd_abi::ring::{ClientReap, ClientSubmit, Submission};
use nebd_abi::{Epoch, Errno};

use crate::options::{CompletionMode, Options};
use crate::sync::{Doorbell, Listener, Spin, lock, now_ns};
use crate::transfer::{Callback, Chunk, Handler, Keep, Transfer};

/// What a slot's completion is for.
pub(crate) enum Pending {
    /// Nothing: the slot is free, or its session has failed.
    Free,
    /// A request of the host's own queue.
    Host {
        user_data: u64,
        keep: Keep,
        /// When it was submitted, if requests have a deadline.
        since_ns: u64,
    },
    /// A part of a transfer.
    Chunk { transfer: Arc<Transfer>, chunk: Chunk },
    /// Timed out and told; the memory stays taken until the ring is done with it.
    Expired { _keep: Keep },
    /// Reaped, its memory let go; what is left is to tell the host.
    Told(Handler),
}

/// Somebody who sleeps until the server rings the call doorbell.
#[derive(Clone, Copy)]
pub(crate) enum Sleeper {
    /// The `nebd-complete` thread.
    Complete = 1,
    /// A thread in a blocking call.
    Leader = 2,
    /// The host's event loop.
    Host = 4,
}

/// A completion for a host that is not reaping right now.
pub(crate) enum Stashed {
    Host(u64, Result<(), Errno>),
    Callback(Callback, Result<(), Errno>),
}

/// The reaping side.
pub(crate) struct ReapSide {
    ring: ClientReap,
    /// Bits of [`Sleeper`].
    sleepers: u8,
    /// Of the last completion.
    epoch: Epoch,
    /// A batch to be used again, so that reaping allocates nothing.
    spare: Vec<(Pending, Result<(), Errno>)>,
}

impl ReapSide {
    fn awake(&mut self, sleeper: Sleeper) {
        let slept = self.sleepers & sleeper as u8 != 0;
        self.sleepers &= !(sleeper as u8);
        if slept && self.sleepers == 0 {
            self.ring.wake();
        }
    }
}

/// How a blocking call sleeps beside a host that drains the call doorbell.
struct Beside {
    listener: Listener,
    bell: Doorbell,
}

/// One queue.
pub(crate) struct QueueCore {
    submit: Mutex<ClientSubmit>,
    reap: Mutex<ReapSide>,
    free: FreeSlots,
    pending: Box<[Mutex<Pending>]>,
    kick: Doorbell,
    call: Doorbell,
    /// In a session whose host sleeps on the call doorbell as well.
    beside: Option<Beside>,
    /// Requests ever submitted: written under `submit`, before the request is published.
    submitted: AtomicU64,
    /// Requests ever reaped: written under `reap`.
    completed: AtomicU64,
    /// When the requests in flight began to wait: set by the first after none.
    waiting_since_ns: AtomicU64,
    /// When something was reaped last.
    completed_ns: AtomicU64,
    /// Transfers that found no room, in order.
    pub(crate) backlog: Mutex<VecDeque<Arc<Transfer>>>,
    /// Its length.
    pub(crate) backlogged: AtomicU32,
    /// Whether a blocking call sleeps on the call doorbell, or is about to.
    pub(crate) led: AtomicBool,
    /// Blocking calls that wait for the leader, or to lead.
    pub(crate) followers: Mutex<VecDeque<Thread>>,
    /// Completions reaped on the host's behalf by one that is not the host.
    pub(crate) stash: Mutex<VecDeque<Stashed>>,
    /// Its length, to look at without the lock.
    pub(crate) stashed: AtomicU32,
    /// Batches that were reaped and are being told.
    pub(crate) delivering: AtomicU32,
    pub(crate) spin: Spin,
}

/// The most a batch reaps before it is told.
const BATCH_MAX: usize = 64;

impl QueueCore {
    pub(crate) fn new(
        region: &Arc<Region>,
        index: u32,
        options: &Options,
    ) -> io::Result<QueueCore> {
        let memory = region.queue(index).ok_or(io::ErrorKind::InvalidInput)?;
        let depth = region.geometry().queue_depth;
        let reap = ReapSide {
            ring: ClientReap::new(memory.clone()),
            sleepers: 0,
            epoch: Epoch::default(),
            spare: Vec::new(),
        };
        let call = Doorbell::new()?;
        let beside = match options.completion {
            CompletionMode::Threaded => None,
            CompletionMode::Manual => {
                let bell = Doorbell::new()?;
                Some(Beside { listener: Listener::new([&call, &bell])?, bell })
            }
        };
        Ok(QueueCore {
            submit: Mutex::new(ClientSubmit::new(memory)),
            reap: Mutex::new(reap),
            free: FreeSlots::new(depth),
            pending: (0..depth).map(|_| Mutex::new(Pending::Free)).collect(),
            kick: Doorbell::new()?,
            call,
            beside,
            submitted: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            waiting_since_ns: AtomicU64::new(0),
            completed_ns: AtomicU64::new(0),
            backlog: Mutex::new(VecDeque::new()),
            backlogged: AtomicU32::new(0),
            led: AtomicBool::new(false),
            followers: Mutex::new(VecDeque::new()),
            stash: Mutex::new(VecDeque::new()),
            stashed: AtomicU32::new(0),
            delivering: AtomicU32::new(0),
            spin: Spin::new(options.spin),
        })
    }

    /// The doorbell that wakes the server.
    pub(crate) fn kick_doorbell(&self) -> &Doorbell {
        &self.kick
    }

    /// The doorbell that the server rings.
    pub(crate) fn call_doorbell(&self) -> &Doorbell {
        &self.call
    }

    /// Wakes the blocking call that leads, if there is one, to look again.
    ///
    /// Not by the call doorbell where the host drains that: the ring could be gone before the
    /// sleeping thread has looked.
    pub(crate) fn wake_leader(&self) {
        if self.led.load(Ordering::SeqCst) {
            self.beside.as_ref().map_or(&self.call, |beside| &beside.bell).ring();
        }
    }

    /// The leader sleeps until somebody rings for it, at the longest for `timeout`.
    pub(crate) fn leader_wait(&self, timeout: Option<Duration>) {
        match &self.beside {
            None => drop(self.call.wait(timeout)),
            Some(beside) => beside.listener.wait(timeout),
        }
    }

    /// The leader is about to look at everything; the host's rings stay.
    pub(crate) fn leader_drain(&self) {
        self.beside.as_ref().map_or(&self.call, |beside| &beside.bell).drain();
    }

    /// Whether every slot is taken.
    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Publishes a request; gives `pending` back if every slot is taken.
    pub(crate) fn publish(
        &self,
        request: &Submission<'_>,
        pending: Pending,
    ) -> Result<(), Pending> {
        let mut ring = lock(&self.submit);
        let Some(slot) = self.free.take() else { return Err(pending) };
        let Some(place) = self.pending.get(slot as usize) else { return Err(pending) };
        *lock(place) = pending;
        let submitted = self.submitted.load(Ordering::Relaxed);
        if submitted == self.completed.load(Ordering::Relaxed) {
            self.waiting_since_ns.store(now_ns(), Ordering::Relaxed);
        }
        self.submitted.store(submitted + 1, Ordering::Relaxed);
        ring.submit(slot, request);
        Ok(())
    }

    /// Wakes the server if it sleeps. The full fence in here is what `Core::kicked` builds on.
    pub(crate) fn kick(&self) {
        let needed = lock(&self.submit).kick_needed();
        if needed {
            self.kick.ring();
        }
    }

    /// Requests submitted and not reaped.
    pub(crate) fn in_flight(&self) -> u64 {
        // `completed` first: it never passes a `submitted` that is read later.
        let completed = self.completed.load(Ordering::Acquire);
        self.submitted.load(Ordering::Acquire).saturating_sub(completed)
    }

    /// Requests ever reaped.
    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }

    /// When the last completion was reaped, and when the requests in flight (if any) began to wait.
    pub(crate) fn stamps(&self) -> (u64, Option<u64>) {
        let waiting = (self.in_flight() > 0).then(|| self.waiting_since_ns.load(Ordering::Relaxed));
        (self.completed_ns.load(Ordering::Relaxed), waiting)
    }

    /// Takes what was completed, at most a batch, out of the ring; `sleeper`, if it had asked for
    /// the doorbell, needs it no more. `new_epoch` is called with an
    /// epoch that the queue had not seen, before the completion counts.
    pub(crate) fn reap(
        &self,
        spare: Option<Vec<(Pending, Result<(), Errno>)>>,
        sleeper: Option<Sleeper>,
        new_epoch: impl Fn(Epoch, u64),
    ) -> Option<Vec<(Pending, Result<(), Errno>)>> {
        let mut side = lock(&self.reap);
        if let Some(spare) = spare {
            side.spare = spare;
        }
        if let Some(sleeper) = sleeper {
            side.awake(sleeper);
        }
        if !side.ring.is_ready() {
            return None;
        }
        let now_ns = now_ns();
        let mut batch = std::mem::take(&mut side.spare);
        while batch.len() < BATCH_MAX {
            let Some(completion) = side.ring.reap() else { break };
            if completion.epoch != side.epoch {
                side.epoch = completion.epoch;
                new_epoch(completion.epoch, now_ns);
            }
            let pending = self.take_pending(completion.slot);
            self.free.put(completion.slot);
            batch.push((pending, completion.result));
        }
        let completed = self.completed.load(Ordering::Relaxed) + batch.len() as u64;
        self.completed_ns.store(now_ns, Ordering::Relaxed);
        // Before the requests stop counting as in flight.
        self.delivering.fetch_add(1, Ordering::SeqCst);
        self.completed.store(completed, Ordering::Release);
        Some(batch)
    }

    /// Takes what is pending in a slot, without freeing the slot.
    fn take_pending(&self, slot: u32) -> Pending {
        self.pending
            .get(slot as usize)
            .map_or(Pending::Free, |place| std::mem::replace(&mut *lock(place), Pending::Free))
    }

    /// Takes everything that is pending: the session has failed, no slot will be used again.
    pub(crate) fn take_all_pending(&self) -> Vec<Pending> {
        (0..self.pending.len() as u32).map(|slot| self.take_pending(slot)).collect()
    }

    /// Looks at everything that is pending.
    pub(crate) fn for_each_pending(&self, mut look: impl FnMut(&mut Pending)) {
        self.pending.iter().for_each(|place| look(&mut lock(place)));
    }

    /// Whether there is something to reap.
    pub(crate) fn is_ready(&self) -> bool {
        self.stashed.load(Ordering::Acquire) > 0 || lock(&self.reap).ring.is_ready()
    }

    /// Whether the ring holds completions; a spinning thread asks, so it waits for nobody.
    pub(crate) fn is_ringing(&self) -> bool {
        self.reap.try_lock().is_ok_and(|side| side.ring.is_ready())
    }

    /// Asks for the doorbell on behalf of `sleeper`; false if something is there already.
    pub(crate) fn fall_asleep(&self, sleeper: Sleeper) -> bool {
        let mut side = lock(&self.reap);
        side.sleepers |= sleeper as u8;
        side.ring.sleep()
    }

    /// `sleeper` is awake.
    pub(crate) fn awake(&self, sleeper: Sleeper) {
        lock(&self.reap).awake(sleeper);
    }
}

/// Which slots are free; taken by submitters under their lock, put back by reapers under theirs.
struct FreeSlots(Box<[AtomicU64]>);

impl FreeSlots {
    fn new(depth: u32) -> FreeSlots {
        let words = depth.div_ceil(64);
        let word = |index: u32| match depth - index * 64 {
            left if left < 64 => (1 << left) - 1,
            _ => u64::MAX,
        };
        FreeSlots((0..words).map(|index| AtomicU64::new(word(index))).collect())
    }

    fn take(&self) -> Option<u32> {
        for (index, word) in self.0.iter().enumerate() {
            // Acquire: what the reaper did with the slot has happened.
            let bits = word.load(Ordering::Acquire);
            if bits != 0 {
                let bit = bits.trailing_zeros();
                word.fetch_and(!(1 << bit), Ordering::AcqRel);
                return Some(index as u32 * 64 + bit);
            }
        }
        None
    }

    fn put(&self, slot: u32) {
        if let Some(word) = self.0.get(slot as usize / 64) {
            word.fetch_or(1 << (slot % 64), Ordering::Release);
        }
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_given_out_once() {
        for depth in [1, 2, 32, 64, 128, 4096] {
            let free = FreeSlots::new(depth);
            let mut slots: Vec<u32> = std::iter::from_fn(|| free.take()).collect();
            assert_eq!(slots.len(), depth as usize);
            slots.sort_unstable();
            slots.dedup();
            assert_eq!(slots.last(), Some(&(depth - 1)));
            assert_eq!(slots.len(), depth as usize);
            assert!(free.is_empty());
            free.put(depth - 1);
            assert_eq!(free.take(), Some(depth - 1));
        }
    }
}
