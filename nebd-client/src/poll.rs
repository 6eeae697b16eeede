//! A queue driven by the host: the fastest path.

use std::os::fd::{AsFd, BorrowedFd};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nebd_abi::Errno;
use nebd_abi::ring::Submission;

use crate::core::Core;
use crate::error::{SubmitError, errno};
use crate::io::Io;
use crate::memory::{self, Handle};
use crate::queue::{Pending, QueueCore, Sleeper, Stashed};
use crate::session::Prepared;
use crate::sync::{is_over, lock, now_ns, remaining};
use crate::tell::{Role, run};
use crate::transfer::Keep;

/// A queue of a session in [`CompletionMode::Manual`](crate::CompletionMode::Manual).
///
/// Submitting and reaping take separate locks, which cost little as long as one thread at a time
/// uses the queue, as it should. Blocking calls on such a session reap the queue themselves; what
/// they find for the host is kept for its next [`reap`](Self::reap).
///
/// ```text
///  loop {
///      submit … submit, kick          one doorbell for all of them
///      reap                           completions, and callbacks of Session::submit
///      if arm() { continue }          something is there already
///      sleep until event_fd is readable (epoll, poll, io_uring)
///  }
/// ```
pub struct Queue {
    core: Handle<Core>,
    queue: Handle<QueueCore>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("core", &*self.core).finish_non_exhaustive()
    }
}

impl Queue {
    pub(crate) fn new(core: Handle<Core>, queue: Handle<QueueCore>) -> Queue {
        Queue { core, queue }
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        self.core.shared()
    }

    /// Puts a request into the queue; [`reap`](Self::reap) returns `user_data` with its result.
    ///
    /// The server learns of it with the next [`kick`](Self::kick). A request with more buffers than
    /// a slot holds, or more bytes than a transfer may have, is refused with `EINVAL`: this path
    /// does not split.
    pub fn submit(&self, io: Io<'_>, user_data: u64) -> Result<(), SubmitError> {
        let core = &self.core;
        core.check(io.op, io.flags, io.offset, io.length)?;
        let limits = core.limits();
        let ranges = io.data.as_slice();
        if ranges.len() > limits.iovecs || (!ranges.is_empty() && io.length > limits.transfer) {
            return Err(Errno::INVAL.into());
        }
        let since_ns = core.options.io_timeout.map_or(0, |_| now_ns());
        let publish = |buffers: &[_], keep| {
            let Io { op, flags, offset, length, .. } = io;
            let request = Submission { op, flags, offset, length, buffers };
            let pending = Pending::Host { user_data, keep, since_ns };
            self.queue.publish(&request, pending).map_err(|_| SubmitError::WouldBlock)
        };
        match ranges {
            [] => publish(&[], Keep::None),
            [range] => {
                let (buffer, keep, _) = range.resolve(core)?;
                publish(&[buffer], keep)
            }
            ranges => {
                let resolved = ranges.iter().map(|range| range.resolve(core));
                let resolved = resolved.collect::<Result<Vec<_>, _>>()?;
                let (buffers, keeps): (Vec<_>, Vec<_>) =
                    resolved.into_iter().map(|(buffer, keep, _)| (buffer, keep)).unzip();
                publish(&buffers, Keep::Many(keeps.into()))
            }
        }
    }

    /// Puts a prepared transfer into the queue, all of it or, if that is all there is room for, its
    /// beginning; the rest follows as requests complete.
    pub(crate) fn start(&self, prepared: Prepared) -> Result<(), SubmitError> {
        let (core, queue) = (&self.core, &self.queue);
        let transfer = match prepared {
            Prepared::Transfer(transfer) => transfer,
            Prepared::Nothing(handler) => {
                core.tell_success(queue, handler);
                return Ok(());
            }
        };
        match core.advance(queue, &transfer) {
            Some(finished) => core.tell_all(queue, finished, &mut Role::Other),
            None if !transfer.has_begun() => return Err(SubmitError::WouldBlock),
            // The host kicks; it reaps, too, and with that brings the rest on its way.
            None => core.wait_in_line(queue, transfer),
        }
        Ok(())
    }

    /// Tells the server of what was submitted; costs a system call only if it sleeps.
    pub fn kick(&self) {
        if !memory::is_forked_child() {
            self.core.kicked(&self.queue);
        }
    }

    /// Calls `completed` with the user data and result of each completed request, and runs the
    /// callbacks and wakes the futures of others on this queue; returns how often it called.
    ///
    /// `completed` may submit. It runs without a lock held.
    pub fn reap(&self, mut completed: impl FnMut(u64, Result<(), Errno>)) -> usize {
        if memory::is_forked_child() {
            return 0;
        }
        let mut count = 0;
        let mut panic = None;
        let mut counted = |user_data, result| {
            if panic.is_some() {
                // The host's panic is not to cost it what else has completed.
                let stashed = Stashed::Host(user_data, result);
                return self.core.stash(&self.queue, stashed, &Role::Other);
            }
            count += 1;
            let completed = AssertUnwindSafe(|| completed(user_data, result));
            panic = std::panic::catch_unwind(completed).err();
        };
        self.reap_stash(&mut counted);
        self.core.reap(&self.queue, &mut Role::Host(&mut counted));
        // The reaping itself may have put something aside.
        self.reap_stash(&mut counted);
        if let Some(panic) = panic {
            std::panic::resume_unwind(panic);
        }
        count
    }

    fn reap_stash(&self, completed: &mut impl FnMut(u64, Result<(), Errno>)) {
        let queue = &self.queue;
        if queue.stashed.load(SeqCst) == 0 {
            return;
        }
        let stashed = {
            let mut stash = lock(&queue.stash);
            queue.stashed.store(0, SeqCst);
            std::mem::take(&mut *stash)
        };
        for one in stashed {
            match one {
                Stashed::Host(user_data, result) => completed(user_data, result),
                Stashed::Callback(callback, result) => run(callback, result),
            }
        }
    }

    /// Prepares for sleeping on [`event_fd`](Self::event_fd). True if completions are there already
    /// (reap instead of sleeping); false if the descriptor will become readable with the next.
    pub fn arm(&self) -> bool {
        if memory::is_forked_child() {
            return true;
        }
        let queue = &self.queue;
        // Whether or not it had been armed: a stale ring would make the host's loop spin.
        queue.call_doorbell().drain();
        let may_sleep = queue.fall_asleep(Sleeper::Host) && queue.stashed.load(SeqCst) == 0;
        if !may_sleep {
            queue.awake(Sleeper::Host);
            // The ring that was drained may have been meant for a blocking call.
            queue.wake_leader();
        }
        !may_sleep
    }

    /// Waits until there is something to reap, or `timeout` is over (`None`: no limit), or nothing
    /// will come any more (the session has failed, or was closed with nothing in flight): spins a little if that pays, then sleeps. True if there is something.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let queue = &self.queue;
        let is_ended = || is_over(deadline) || self.is_at_its_end();
        let has_news = || queue.stashed.load(SeqCst) > 0 || queue.is_ringing();
        while !memory::is_forked_child() {
            if queue.is_ready() {
                return true;
            }
            if is_ended() {
                return queue.is_ready();
            }
            if queue.spin.until(|| has_news() || is_ended()) {
                continue;
            }
            if !self.arm() {
                // Asked again: the ring that told of the end may be what `arm` has drained.
                if !is_ended() {
                    queue.call_doorbell().wait(remaining(deadline));
                }
                queue.awake(Sleeper::Host);
            }
        }
        false
    }

    /// Whether nothing will come any more.
    fn is_at_its_end(&self) -> bool {
        self.core.failure().is_some()
            || self.core.is_detaching.load(SeqCst) && self.queue.in_flight() == 0
    }

    /// An eventfd that becomes readable with completions once [`arm`](Self::arm) returned false.
    /// It is for polling only: `arm` drains it. Valid as long as the queue.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.queue.call_doorbell().as_fd()
    }

    /// Requests submitted and not yet reaped.
    pub fn in_flight(&self) -> u32 {
        if memory::is_forked_child() {
            return 0;
        }
        u32::try_from(self.queue.in_flight()).unwrap_or(u32::MAX)
    }

    /// Why the session cannot be used any more, if it cannot.
    pub fn failure(&self) -> Option<Errno> {
        match memory::is_forked_child() {
            true => Some(errno::FORKED),
            false => self.core.failure(),
        }
    }
}
