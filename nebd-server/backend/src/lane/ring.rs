//! The io_uring of one lane, and the requests that the kernel works on through it.
//!
//! Set up, measured with `examples/file_engine.rs` on Linux 6.18 (see [`TaskRun`]):
//! - `COOP_TASKRUN | TASKRUN_FLAG`: completions are processed when this thread enters the kernel, a
//!   batch costs one system call, and the kernel's flag word says without one whether there is
//!   anything to reap. `DEFER_TASKRUN` would write 5 % faster at depth 32; `docs/decisions/0009`
//!   says what it costs when this process dies.
//! - The lane's eventfd is registered and watched in place of the ring's own descriptor, which the
//!   kernel does not wake for deferred work (seen on 6.18: a `poll` of it sleeps on). It is enabled
//!   only while the shard sleeps, so that a busy shard costs the kernel no signals.
//! - `R_DISABLED`: the ring belongs to the thread that enables it, at first use; a lane may be made
//!   elsewhere.
//! - `SUBMIT_ALL`: one bad entry does not hold up those behind it.
//! - No registered files: a request in flight must pin the very description that holds the
//!   volume's lock until it ends, and nothing may pin it longer.
//!
//! At most as many requests are in flight as the completion queue has room for, so that it never
//! overflows; the rest wait in a backlog.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering::SeqCst, fence};

use io_uring::{IoUring, squeue};

use super::{LaneConfig, TaskRun, UringRefusal};
use crate::file::Task;

pub(crate) struct Ring {
    uring: IoUring,
    task_run: TaskRun,
    enabled: bool,
    /// By the entry's user data.
    tasks: Vec<Option<Box<Task>>>,
    free: Vec<u32>,
    /// Entries that found no room.
    backlog: VecDeque<squeue::Entry>,
    /// What is in the submission queue and not yet taken by the kernel, oldest first.
    queued: VecDeque<u32>,
    /// In the submission queue or with the kernel.
    in_flight: u32,
    in_flight_max: u32,
    /// The kernel refuses to be entered: what it did not take is for threads.
    broken: bool,
}

impl Ring {
    /// `doorbell`: an eventfd that completions ring while the shard sleeps.
    pub(super) fn new(config: &LaneConfig, doorbell: BorrowedFd<'_>) -> Result<Ring, UringRefusal> {
        let order = [TaskRun::Deferred, TaskRun::Cooperative, TaskRun::Interrupting];
        let wanted = order.into_iter().skip_while(|task_run| *task_run != config.task_run);
        let mut refusal = UringRefusal::NotWanted;
        for task_run in wanted {
            match build(config.io_uring_entries.max(1), task_run) {
                Ok(mut uring) => {
                    uring.submitter().register_eventfd(doorbell.as_raw_fd())?;
                    uring.completion().disable_eventfd();
                    let in_flight_max = uring.params().cq_entries();
                    return Ok(Ring {
                        uring,
                        task_run,
                        enabled: false,
                        tasks: Vec::new(),
                        free: Vec::new(),
                        backlog: VecDeque::new(),
                        queued: VecDeque::new(),
                        in_flight: 0,
                        in_flight_max,
                        broken: false,
                    });
                }
                Err(error) => refusal = error.into(),
            }
        }
        Err(refusal)
    }

    pub(super) fn task_run(&self) -> TaskRun {
        self.task_run
    }

    /// Everything that was issued and has not come out of `reap`.
    pub(super) fn in_flight(&self) -> usize {
        self.tasks.len() - self.free.len()
    }

    /// Queues the system call that a task is at. The task owns all memory that `entry` refers to.
    pub(crate) fn issue(&mut self, task: Box<Task>, entry: squeue::Entry) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            self.tasks.len() as u32 - 1
        });
        self.tasks[index as usize] = Some(task);
        self.backlog.push_back(entry.user_data(u64::from(index)));
        self.fill();
    }

    /// Moves the backlog into the submission queue as far as there is room.
    fn fill(&mut self) {
        let mut queue = self.uring.submission();
        while self.in_flight < self.in_flight_max && !queue.is_full() && !self.broken {
            let Some(entry) = self.backlog.pop_front() else { break };
            // SAFETY: the memory it refers to is owned by its task or kept mapped by the request
            // inside it, and the task stays in `tasks` until the completion was reaped.
            if unsafe { queue.push(&entry) }.is_err() {
                self.backlog.push_front(entry);
                break;
            }
            self.queued.push_back(entry.get_user_data() as u32);
            self.in_flight += 1;
        }
    }

    /// Hands everything queued to the kernel, and takes what it has ready into the completion queue.
    pub(super) fn submit(&mut self) {
        loop {
            self.fill();
            if self.queued.is_empty() || self.broken {
                return;
            }
            if !self.enter(0) || self.backlog.is_empty() || self.in_flight == self.in_flight_max {
                return;
            }
        }
    }

    /// Waits for a completion.
    pub(super) fn wait(&mut self) {
        self.fill();
        if self.in_flight > 0 && !self.broken {
            self.enter(1);
        }
    }

    /// One `io_uring_enter`; false if the kernel took less than it was given.
    fn enter(&mut self, want: usize) -> bool {
        if !self.enabled {
            if let Err(error) = self.uring.submitter().register_enable_rings() {
                self.give_up(&error);
                return false;
            }
            self.enabled = true;
        }
        loop {
            match self.uring.submitter().submit_and_wait(want) {
                Ok(taken) => {
                    self.queued.drain(..taken.min(self.queued.len()));
                    return self.queued.is_empty();
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Short of memory, or completions must be reaped first: the next call tries
                    // again, and `has_news` keeps the shard awake until then.
                    Some(libc::EAGAIN | libc::EBUSY) => return false,
                    _ => {
                        self.give_up(&error);
                        return false;
                    }
                },
            }
        }
    }

    /// After the probe this is a bug or a filter installed later; requests must still be served.
    fn give_up(&mut self, error: &io::Error) {
        tracing::error!(%error, "io_uring fails; threads take over");
        self.broken = true;
    }

    /// Whether requests may be issued.
    pub(super) fn works(&self) -> bool {
        !self.broken
    }

    /// Takes what is complete, with its result.
    pub(super) fn reap(&mut self, out: &mut Vec<(Box<Task>, i32)>) {
        if self.kernel_has_work() && self.enabled && !self.broken {
            self.enter(0);
        }
        for entry in self.uring.completion() {
            let index = entry.user_data() as u32;
            if let Some(task) = self.tasks.get_mut(index as usize).and_then(Option::take) {
                self.free.push(index);
                self.in_flight -= 1;
                out.push((task, entry.result()));
            }
        }
    }

    /// Takes back one that the kernel will never take, if it refuses to be entered.
    pub(super) fn take_refused(&mut self) -> Option<Box<Task>> {
        if !self.broken {
            return None;
        }
        let queued = self.queued.pop_front();
        self.in_flight -= u32::from(queued.is_some());
        let backlog = || self.backlog.pop_front().map(|entry| entry.get_user_data() as u32);
        let index = queued.or_else(backlog)?;
        self.free.push(index);
        self.tasks.get_mut(index as usize).and_then(Option::take)
    }

    /// The shard is about to sleep, or awake again: whether completions ring the doorbell.
    ///
    /// The kernel queues a completion, then looks whether to ring; this allows it, then looks for
    /// completions, through a system call, because the kernel's flag word is not ordered with its
    /// look on every architecture.
    pub(super) fn ring_doorbell(&mut self, enabled: bool) {
        if !enabled {
            return self.uring.completion().disable_eventfd();
        }
        self.uring.completion().enable_eventfd();
        fence(SeqCst);
        if self.enabled && self.in_flight > 0 && !self.broken {
            self.run_deferred();
        }
    }

    /// Has the kernel finish what it deferred; unlike `enter`, always a system call.
    fn run_deferred(&mut self) {
        const GETEVENTS: u32 = 1;
        // SAFETY: no argument refers to memory.
        let result =
            unsafe { self.uring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
        // EINTR and EBUSY leave work for the next call; the kernel rings for what comes after.
        if let Err(error) = result {
            tracing::debug!(%error, "io_uring did not run its deferred work");
        }
    }

    /// Whether there is something to reap, or something that could not be submitted yet.
    pub(super) fn has_news(&mut self) -> bool {
        let waiting = !self.queued.is_empty() || self.broken && !self.backlog.is_empty();
        waiting || self.kernel_has_work() || !self.uring.completion().is_empty()
    }

    /// Whether entering the kernel would yield completions.
    fn kernel_has_work(&mut self) -> bool {
        let queue = self.uring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Nobody will ever learn how these end: their memory stays, for the kernel may still use it.
    pub(super) fn leak_if_broken(&mut self) {
        if self.broken {
            std::mem::forget(std::mem::take(&mut self.tasks));
            self.free.clear();
        }
    }
}

fn build(entries: u32, task_run: TaskRun) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_clamp().setup_r_disabled().setup_cqsize(entries.saturating_mul(4)).dontfork();
    match task_run {
        TaskRun::Deferred => builder
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag(),
        TaskRun::Cooperative => {
            builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag()
        }
        TaskRun::Interrupting => &mut builder,
    };
    builder.build(entries)
}
