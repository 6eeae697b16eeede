//! What the handles and the threads of a session share: checks, submitting, telling results.

use std::cell::Cell;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, fence};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nebd_abi::control::VolumeInfo;
use nebd_abi::layout::{SessionId, TRANSFER_BYTES_MAX};
use nebd_abi::region::Region;
use nebd_abi::ring::Submission;
use nebd_abi::{Epoch, Errno, Op, OpFlags, VolumeName};

use crate::arena::Arena;
use crate::calls::Calls;
use crate::error::errno;
use crate::memory;
use crate::meter::Meter;
use crate::options::{CompletionMode, Options};
use crate::queue::{Pending, QueueCore};
use crate::registered::Memories;
use crate::runtime::Runtime;
use crate::sync::{Promise, lock};
use crate::tell::Role;
use crate::transfer::{Finished, Limits, Next, Transfer};

/// The most of a request that is copied through the arena at once.
const BOUNCE_BYTES_MAX: u64 = 1 << 20;

/// A session.
pub(crate) struct Core {
    pub(crate) volume: VolumeName,
    pub(crate) id: SessionId,
    pub(crate) options: Options,
    pub(crate) region: Arc<Region>,
    pub(crate) arena: Arc<Arena>,
    pub(crate) queues: Box<[Arc<QueueCore>]>,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) calls: Calls,
    pub(crate) memories: Memories,
    pub(crate) meter: Meter,
    /// As the server told it last; `None` before the first attach.
    info: Mutex<Option<VolumeInfo>>,
    size: AtomicU64,
    block_size: AtomicU32,
    is_read_only: AtomicBool,
    transfer_bytes_max: AtomicU64,
    /// Errno that new requests meet, zero while the session is usable.
    refusal: AtomicI32,
    /// Errno with which the session failed, zero while it has not.
    failure: AtomicI32,
    /// Whether the stall watch ticks; see `watch.rs`.
    pub(crate) is_watched: AtomicBool,
    /// Whether the `nebd-complete` thread reaps.
    pub(crate) is_served: Mutex<bool>,
    pub(crate) is_served_hint: AtomicBool,
    /// Callbacks handed to the `nebd-complete` thread and not yet run.
    pub(crate) deferred: Arc<AtomicU32>,
    /// The server was asked to detach it, or will be.
    pub(crate) is_detaching: AtomicBool,
    /// The session is to be detached.
    pub(crate) is_closing: AtomicBool,
    /// Kept once the control thread has let go of the session.
    pub(crate) gone: Promise<()>,
    pub(crate) is_connected: AtomicBool,
    pub(crate) reconnects: AtomicU64,
    /// Of the server that attached the session last.
    pub(crate) generation: AtomicU32,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("volume", &self.volume).field("id", &self.id).finish()
    }
}

/// What a session is made of.
pub(crate) struct Parts {
    pub(crate) volume: VolumeName,
    pub(crate) id: SessionId,
    pub(crate) options: Options,
    pub(crate) region: Arc<Region>,
    pub(crate) queues: Box<[Arc<QueueCore>]>,
}

impl Core {
    pub(crate) fn new(parts: Parts, runtime: Arc<Runtime>) -> Core {
        Core {
            volume: parts.volume,
            id: parts.id,
            options: parts.options,
            arena: Arc::new(Arena::new(parts.region.clone())),
            region: parts.region,
            queues: parts.queues,
            runtime,
            calls: Calls::default(),
            memories: Memories::default(),
            meter: Meter::default(),
            info: Mutex::new(None),
            size: AtomicU64::new(0),
            block_size: AtomicU32::new(4096),
            is_read_only: AtomicBool::new(false),
            transfer_bytes_max: AtomicU64::new(TRANSFER_BYTES_MAX),
            refusal: AtomicI32::new(0),
            failure: AtomicI32::new(0),
            is_watched: AtomicBool::new(false),
            is_served: Mutex::new(false),
            is_served_hint: AtomicBool::new(false),
            deferred: Arc::default(),
            is_detaching: AtomicBool::new(false),
            is_closing: AtomicBool::new(false),
            gone: Promise::default(),
            is_connected: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            generation: AtomicU32::new(0),
        }
    }

    pub(crate) fn is_manual(&self) -> bool {
        self.options.completion == CompletionMode::Manual
    }

    /// Whether new requests are taken.
    pub(crate) fn usable(&self) -> Result<(), Errno> {
        if memory::is_forked_child() {
            return Err(errno::FORKED);
        }
        match self.refusal.load(SeqCst) {
            0 => Ok(()),
            code => Err(Errno(code)),
        }
    }

    /// No new request is taken from here on.
    pub(crate) fn refuse(&self, errno: Errno) {
        let _ = self.refusal.compare_exchange(0, errno.0.max(1), SeqCst, SeqCst);
    }

    /// The errno with which the session failed.
    pub(crate) fn failure(&self) -> Option<Errno> {
        Some(self.failure.load(SeqCst)).filter(|code| *code != 0).map(Errno)
    }

    /// The volume, as told at the last attach.
    pub(crate) fn info(&self) -> VolumeInfo {
        // A forked child must not wait for a lock that nobody there will release.
        let known = if memory::is_forked_child() { None } else { *lock(&self.info) };
        known.unwrap_or(VolumeInfo {
            size: 0,
            block_size: 0,
            read_only: true,
            can_discard: false,
            can_write_zeroes: false,
            epoch: Epoch::default(),
            transfer_bytes_max: 0,
            incarnation: 0,
        })
    }

    /// The session has failed; false if it had failed before.
    pub(crate) fn set_failure(&self, errno: Errno) -> bool {
        self.failure.compare_exchange(0, errno.0.max(1), SeqCst, SeqCst).is_ok()
    }

    /// Takes what the server tells of the volume; returns whether the size is another.
    pub(crate) fn learn(&self, info: VolumeInfo) -> bool {
        let transfer = match info.transfer_bytes_max {
            0 => TRANSFER_BYTES_MAX,
            bytes => bytes.clamp(info.block_size.into(), TRANSFER_BYTES_MAX),
        };
        self.transfer_bytes_max.store(transfer, Relaxed);
        self.block_size.store(info.block_size.max(1), Relaxed);
        self.is_read_only.store(info.read_only || self.options.read_only, Relaxed);
        *lock(&self.info) = Some(info);
        self.size.swap(info.size, Relaxed) != info.size
    }

    /// The volume has another size; false if that was known.
    pub(crate) fn learn_size(&self, size: u64) -> bool {
        if let Some(info) = lock(&self.info).as_mut() {
            info.size = size;
        }
        self.size.swap(size, Relaxed) != size
    }

    /// Checks a request against the volume, so that what cannot succeed never takes a slot.
    pub(crate) fn check(
        &self,
        op: Op,
        flags: OpFlags,
        offset: u64,
        length: u64,
    ) -> Result<(), Errno> {
        self.usable()?;
        let allowed = match op {
            Op::Write => OpFlags::FUA,
            Op::WriteZeroes => OpFlags::FUA | OpFlags::NO_UNMAP,
            Op::Read | Op::Flush | Op::Discard => OpFlags::NONE,
        };
        if !allowed.contains(flags) {
            return Err(Errno::INVAL);
        }
        if op == Op::Flush {
            return Ok(());
        }
        if op.is_mutation() && self.is_read_only.load(Relaxed) {
            return Err(Errno::ROFS);
        }
        let block = u64::from(self.block_size.load(Relaxed));
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(Errno::INVAL);
        }
        // The server writes the size to the header before it tells: of two sizes the larger one
        // counts here, for an error that the server would not give must not be given.
        let size = self.size.load(Relaxed).max(self.region.header().volume_size.load(Relaxed));
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ if op == Op::Read => Err(Errno::INVAL),
            _ => Err(Errno::NOSPC),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        let transfer = self.transfer_bytes_max.load(Relaxed);
        let share = (self.arena.size() / 4).clamp(nebd_abi::layout::PAGE, BOUNCE_BYTES_MAX);
        Limits {
            iovecs: self.options.iovecs_per_slot as usize,
            transfer,
            bounce: share.min(transfer),
            block: self.block_size.load(Relaxed).into(),
        }
    }

    /// When a request that is made now is over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.options.io_timeout.and_then(|timeout| Instant::now().checked_add(timeout))
    }

    /// The calling thread's queue.
    pub(crate) fn lane(&self) -> Option<&QueueCore> {
        thread_local!(static LANE: Cell<Option<usize>> = const { Cell::new(None) });
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let lane = LANE.try_with(|lane| match lane.get() {
            Some(lane) => lane,
            None => {
                let next = NEXT.fetch_add(1, Relaxed) as usize;
                lane.set(Some(next));
                next
            }
        });
        self.queues.get(lane.unwrap_or(0) % self.queues.len().max(1)).map(|queue| &**queue)
    }

    /// Starts a transfer; what finds no room waits in the queue's backlog.
    pub(crate) fn issue(&self, queue: &QueueCore, transfer: Arc<Transfer>) {
        let finished =
            if queue.backlogged.load(Acquire) > 0 { None } else { self.advance(queue, &transfer) };
        match finished {
            Some(finished) => self.tell_all(queue, finished, &mut Role::Other),
            None => self.wait_in_line(queue, transfer),
        }
        self.kicked(queue);
    }

    /// Puts a transfer at the end of the backlog.
    pub(crate) fn wait_in_line(&self, queue: &QueueCore, transfer: Arc<Transfer>) {
        let mut backlog = lock(&queue.backlog);
        backlog.push_back(transfer);
        queue.backlogged.store(backlog.len() as u32, SeqCst);
        drop(backlog);
        // Pairs with the fence in `reap`: either the reaper sees the backlog, or what it freed is
        // seen here.
        fence(SeqCst);
        self.pump(queue, &mut Role::Other);
    }

    /// Puts what is left of a transfer into the ring. `None` if there is no room for all of it,
    /// otherwise who is to be told already.
    pub(crate) fn advance(
        &self,
        queue: &QueueCore,
        transfer: &Arc<Transfer>,
    ) -> Option<Option<Finished>> {
        let mut state = transfer.state();
        loop {
            if !state.is_exhausted() && queue.is_full() {
                return None;
            }
            let planned = match transfer.next(&mut state, self.limits(), &self.arena) {
                Next::Chunk(planned) => planned,
                Next::NoRoom => return None,
                Next::Exhausted(finished) => return Some(finished),
            };
            let request = Submission {
                op: transfer.op,
                flags: transfer.flags,
                offset: planned.offset,
                length: planned.length,
                buffers: &planned.buffers,
            };
            let (length, next) = (planned.length, planned.next);
            let pending = Pending::Chunk { transfer: transfer.clone(), chunk: planned.chunk };
            if queue.publish(&request, pending).is_err() {
                return None;
            }
            state.submitted(length, next);
            if state.is_exhausted() {
                return Some(None);
            }
        }
    }

    /// Puts into the ring what waits in the backlog, as far as there is room.
    pub(crate) fn pump(&self, queue: &QueueCore, role: &mut Role<'_>) {
        let finished = self.drain_backlog(queue);
        self.tell_all(queue, finished, role);
    }

    /// The same, but for the telling of those that came to their end with that.
    fn drain_backlog(&self, queue: &QueueCore) -> Vec<Finished> {
        let mut finished = Vec::new();
        let mut backlog = lock(&queue.backlog);
        while let Some(told) = backlog.front().and_then(|front| self.advance(queue, front)) {
            finished.extend(told);
            backlog.pop_front();
        }
        queue.backlogged.store(backlog.len() as u32, SeqCst);
        finished
    }

    /// Rings the kick doorbell if the server sleeps, after requests were published.
    pub(crate) fn kicked(&self, queue: &QueueCore) {
        // The fence in `kick` orders the publishing before the two loads below.
        queue.kick();
        if !self.is_watched.load(SeqCst) && !self.is_watched.swap(true, SeqCst) {
            self.runtime.wake_control();
        }
        if self.failure().is_some() {
            self.sweep();
        }
    }

    /// Reaps a queue until it is empty and tells the results; returns how many there were.
    ///
    /// The host's code runs last: it may block on a lock whose holder is in a blocking call, and
    /// that call's completion, or the slot that it waits for, may be in the same batch.
    pub(crate) fn reap(&self, queue: &QueueCore, role: &mut Role<'_>) -> usize {
        let mut count = 0;
        let mut spare = None;
        let new_epoch = |epoch: Epoch, now_ns: u64| self.meter.saw_epoch(self, epoch, now_ns);
        while let Some(mut batch) = queue.reap(spare.take(), role.sleeper(), new_epoch) {
            count += batch.len();
            batch.iter_mut().for_each(|one| self.settle(queue, one, role));
            let finished = self.refill();
            // A close waits for the last completion, whoever reaps it.
            if self.is_closing.load(SeqCst) && !role.leads(queue) {
                queue.wake_leader();
            }
            batch.drain(..).for_each(|one| self.tell_settled(queue, one, role));
            for (other, finished) in finished {
                self.tell_all(other, finished, role);
            }
            queue.delivering.fetch_sub(1, SeqCst);
            spare = Some(batch);
        }
        count
    }

    /// Gives the room that reaping has made to those who wait for it; returns who came to an end.
    fn refill(&self) -> Vec<(&QueueCore, Vec<Finished>)> {
        // Pairs with the fence in `wait_in_line`.
        fence(SeqCst);
        let mut told = Vec::new();
        for queue in self.queues.iter().filter(|queue| queue.backlogged.load(SeqCst) > 0) {
            let finished = self.drain_backlog(queue);
            if !finished.is_empty() {
                told.push((&**queue, finished));
            }
            self.kicked(queue);
        }
        told
    }

    /// Requests in the rings.
    pub(crate) fn in_flight(&self) -> u64 {
        if self.failure().is_some() {
            return 0;
        }
        self.queues.iter().map(|queue| queue.in_flight()).sum()
    }

    /// Whether nothing is in flight or waits to be.
    pub(crate) fn is_idle(&self) -> bool {
        if self.failure().is_some() {
            return true;
        }
        self.queues.iter().all(|queue| queue.backlogged.load(SeqCst) == 0 && queue.in_flight() == 0)
    }
}
