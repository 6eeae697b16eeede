//! Telling results and events to the host: who may run its code, and on which thread.
//!
//! ```text
//!  who reaps          callback                         user data of a host's queue
//!  nebd-complete      runs it                          –
//!  host, in reap      runs it                          passes it on
//!  anybody else       hands it to nebd-complete,       puts it aside for the host's next reap,
//!                     or puts it aside (manual)        and rings
//! ```

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use nebd_abi::Errno;

use crate::complete::Task;
use crate::core::Core;
use crate::error::errno;
use crate::options::Event;
use crate::queue::{Pending, QueueCore, Sleeper, Stashed};
use crate::sync::lock;
use crate::transfer::{Callback, Finished, Handler, Transfer};

/// Who is reaping, hence who may run what.
pub(crate) enum Role<'a> {
    /// The `nebd-complete` thread: runs callbacks.
    Complete,
    /// The host, in its own queue: runs callbacks, takes user data.
    Host(&'a mut dyn FnMut(u64, Result<(), Errno>)),
    /// A blocking call that leads the queue with this address.
    Leader(*const QueueCore),
    /// Any other thread of the host or the library.
    Other,
}

impl Role<'_> {
    /// As whom this thread sleeps on the doorbell, if it does.
    pub(crate) fn sleeper(&self) -> Option<Sleeper> {
        match self {
            Role::Complete => Some(Sleeper::Complete),
            Role::Host(_) => Some(Sleeper::Host),
            Role::Leader(_) => Some(Sleeper::Leader),
            Role::Other => None,
        }
    }

    /// Whether this is the thread that leads `queue`.
    pub(crate) fn leads(&self, queue: &QueueCore) -> bool {
        matches!(self, Role::Leader(led) if std::ptr::eq(*led, queue))
    }
}

impl Core {
    /// Passes a completion on to the one it is for.
    pub(crate) fn deliver(
        &self,
        queue: &QueueCore,
        pending: Pending,
        result: Result<(), Errno>,
        role: &mut Role<'_>,
    ) {
        let mut one = (pending, result);
        self.settle(queue, &mut one, role);
        self.tell_settled(queue, one, role);
    }

    /// The first half: memory is let go, and threads that wait are told. What is left to tell, if
    /// anything, may run the host's code and stays.
    pub(crate) fn settle(
        &self,
        queue: &QueueCore,
        (pending, result): &mut (Pending, Result<(), Errno>),
        role: &mut Role<'_>,
    ) {
        let finished = match std::mem::replace(pending, Pending::Free) {
            Pending::Host { user_data, .. } => {
                Some(Finished { handler: Handler::Host(user_data), result: *result })
            }
            Pending::Chunk { transfer, chunk } => transfer.chunk_done(&chunk, *result),
            Pending::Expired { .. } | Pending::Free | Pending::Told(_) => None,
        };
        match finished {
            Some(finished) if matches!(finished.handler, Handler::Wait(_)) => {
                self.tell(queue, finished, role);
            }
            Some(finished) => {
                (*pending, *result) = (Pending::Told(finished.handler), finished.result);
            }
            None => {}
        }
    }

    /// The second half.
    pub(crate) fn tell_settled(
        &self,
        queue: &QueueCore,
        (pending, result): (Pending, Result<(), Errno>),
        role: &mut Role<'_>,
    ) {
        if let Pending::Told(handler) = pending {
            self.tell(queue, Finished { handler, result }, role);
        }
    }

    pub(crate) fn tell_all(
        &self,
        queue: &QueueCore,
        finished: impl IntoIterator<Item = Finished>,
        role: &mut Role<'_>,
    ) {
        finished.into_iter().for_each(|finished| self.tell(queue, finished, role));
    }

    /// Tells a result to the one who waits for it. No lock is held: hosts' code may run here.
    fn tell(&self, queue: &QueueCore, finished: Finished, role: &mut Role<'_>) {
        let Finished { handler, result } = finished;
        match (handler, role) {
            (Handler::Wait(thread), role) => {
                thread.unpark();
                // Pairs with the swap of `led` in `drive`: either the leader sees its result, or it
                // is seen here to lead.
                fence(SeqCst);
                if !role.leads(queue) {
                    queue.wake_leader();
                }
            }
            // A waker is the host's code, too.
            (Handler::Future(state), Role::Complete | Role::Host(_)) => {
                let _ = std::panic::catch_unwind(AssertUnwindSafe(|| state.complete(result)));
            }
            (Handler::Future(state), role) => {
                let done = Box::new(move |result| state.complete(result));
                self.defer(queue, done, result, role);
            }
            (Handler::Host(user_data), Role::Host(completed)) => completed(user_data, result),
            (Handler::Host(user_data), role) => {
                self.stash(queue, Stashed::Host(user_data, result), role);
            }
            (Handler::Callback(callback), Role::Complete | Role::Host(_)) => run(callback, result),
            (Handler::Callback(callback), role) => self.defer(queue, callback, result, role),
        }
    }

    fn defer(
        &self,
        queue: &QueueCore,
        callback: Callback,
        result: Result<(), Errno>,
        role: &Role<'_>,
    ) {
        if self.is_manual() {
            return self.stash(queue, Stashed::Callback(callback, result), role);
        }
        match self.runtime.complete() {
            Ok(complete) => {
                self.deferred.fetch_add(1, SeqCst);
                complete.push(Task::Callback(callback, result, self.deferred.clone()));
            }
            // It was started when the callback was taken, so this is not met in practice; a
            // callback on the wrong thread is better than none.
            Err(_) => run(callback, result),
        }
    }

    pub(crate) fn stash(&self, queue: &QueueCore, stashed: Stashed, role: &Role<'_>) {
        let mut stash = lock(&queue.stash);
        let was_empty = stash.is_empty();
        stash.push_back(stashed);
        queue.stashed.store(stash.len() as u32, SeqCst);
        drop(stash);
        // A leader wakes itself with it, so once is enough for what it puts aside; but not later
        // than now: its own request may take for ever.
        if was_empty || !role.leads(queue) {
            queue.call_doorbell().ring();
        }
    }

    /// Lets the `nebd-complete` thread reap, from the first callback on.
    pub(crate) fn serve(self: &Arc<Self>) -> Result<(), Errno> {
        if self.is_manual() || self.is_served_hint.load(Acquire) {
            return Ok(());
        }
        let mut is_served = lock(&self.is_served);
        if !*is_served {
            let complete = self.runtime.complete().map_err(|error| Errno::from_io(&error))?;
            complete.add(self).map_err(|error| Errno::from_io(&error))?;
            *is_served = true;
            self.is_served_hint.store(true, SeqCst);
        }
        Ok(())
    }

    /// The session is over: everything in flight has failed, and so does all that comes.
    pub(crate) fn fail(&self, errno: Errno) {
        if !self.set_failure(errno) {
            return;
        }
        self.refuse(errno);
        self.sweep();
        self.emit(Event::Detached { errno });
    }

    /// Tells everybody who waits in a failed session.
    pub(crate) fn sweep(&self) {
        let Some(errno) = self.failure() else { return };
        for queue in &self.queues {
            for pending in queue.take_all_pending() {
                self.deliver(queue, pending, Err(errno), &mut Role::Other);
            }
            let backlog: Vec<_> = lock(&queue.backlog).drain(..).collect();
            queue.backlogged.store(0, SeqCst);
            let finished = backlog.iter().filter_map(|transfer| transfer.abandon(errno));
            self.tell_all(queue, finished, &mut Role::Other);
            queue.call_doorbell().ring();
            queue.wake_leader();
        }
    }

    /// Tells those whose time is over. What they asked for stays in the ring.
    pub(crate) fn expire(&self, timeout: Duration, now_ns: u64) {
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let now = Instant::now();
        let is_over = |transfer: &Transfer| transfer.deadline.is_some_and(|at| now >= at);
        for queue in &self.queues {
            let (mut expired, mut told) = (Vec::new(), Vec::new());
            queue.for_each_pending(|pending| match pending {
                Pending::Chunk { transfer, .. } if is_over(transfer) => {
                    expired.push(transfer.clone());
                }
                Pending::Host { user_data, keep, since_ns }
                    if now_ns.saturating_sub(*since_ns) >= timeout_ns =>
                {
                    told.push(Finished {
                        handler: Handler::Host(*user_data),
                        result: Err(errno::TIMEDOUT),
                    });
                    *pending = Pending::Expired { _keep: std::mem::take(keep) };
                }
                _ => {}
            });
            let waiting = lock(&queue.backlog).iter().filter(|t| is_over(t)).cloned().collect();
            for transfer in [expired, waiting].concat() {
                told.extend(transfer.abandon(errno::TIMEDOUT));
            }
            self.tell_all(queue, told, &mut Role::Other);
            self.pump(queue, &mut Role::Other);
        }
    }

    /// Whether results are on their way to those who wait for them.
    pub(crate) fn is_telling(&self) -> bool {
        self.deferred.load(SeqCst) > 0
            || self.queues.iter().any(|queue| queue.delivering.load(SeqCst) > 0)
    }

    /// Tells success of a request that had nothing to do.
    pub(crate) fn tell_success(&self, queue: &QueueCore, handler: Handler) {
        if let Handler::Future(state) = handler {
            // Nobody has the future yet, so there is no waker.
            return state.complete(Ok(()));
        }
        self.tell(queue, Finished { handler, result: Ok(()) }, &mut Role::Other);
    }

    /// Tells the host, on the `nebd-complete` thread.
    pub(crate) fn emit(&self, event: Event) {
        let Some(callback) = &self.options.on_event else { return };
        // Without a thread there is nobody to tell; the host sees it in `stats`.
        if let Ok(complete) = self.runtime.complete() {
            complete.push(Task::Event(callback.clone(), event));
        }
    }
}

/// Runs a callback of the host; its panic is its own affair.
pub(crate) fn run(callback: Callback, result: Result<(), Errno>) {
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| callback(result)));
}
