//! A shard's way into the backends: completions of its own thread, of io_uring, and of others.
//!
//! ```text
//!   submit ─► Lane::done ────────────────────────┐   answered at once
//!          ─► Ring (SQ, backlog) ─► kernel ─► CQ ┼─► drain ─► the shard publishes
//!          ─► another thread ─► Mailbox::posts ──┘
//!
//!   sleep() == true ─► epoll_wait(wait_fds) ─► wake() ─► drain …
//! ```
//!
//! No wakeup is lost: `sleep` first sets `asleep` and lets io_uring ring the doorbell, then looks.
//! Who posts or completes before the look is seen by it, who does after it rings the doorbell, an
//! eventfd; an edge-triggered `epoll_wait` counts that as an edge even if it comes before the call.
//! A caller treats `EINTR` from `epoll_wait` like a wakeup: where the kernel lacks `DEFER_TASKRUN`
//! (before 6.1) completions interrupt the thread first.

mod probe;
mod ring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use crossbeam::queue::SegQueue;
use nebd_abi::Errno;
use rustix::event::EventfdFlags;

pub use probe::{UringRefusal, uring_refusal};
pub(crate) use ring::Ring;

use crate::file::Task;

/// A request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The request's tag.
    pub tag: u64,
    /// How it went.
    pub result: Result<(), Errno>,
}

/// Where other threads put completions, and how they wake the shard.
#[derive(Debug)]
pub struct Mailbox {
    posts: SegQueue<Done>,
    asleep: AtomicBool,
    doorbell: OwnedFd,
    /// Calls of `drain` that are over; written by the shard alone.
    drains: AtomicU64,
}

impl Mailbox {
    fn new() -> io::Result<Mailbox> {
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox {
            posts: SegQueue::new(),
            asleep: AtomicBool::new(false),
            doorbell,
            drains: AtomicU64::new(0),
        })
    }

    /// Leaves a completion.
    pub fn post(&self, done: Done) {
        self.posts.push(done);
        if self.asleep.swap(false, SeqCst) {
            self.ring();
        }
    }

    /// Wakes the shard, whatever it waits for.
    pub fn ring(&self) {
        // It fails only if the counter is full, and then the shard is awake.
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    /// How often the lane was drained. What is answered while this is `n` has been published once
    /// it is `n + 3`: the drain that was under way may have missed it, the one after had it, and
    /// before the third the shard published it.
    pub(crate) fn drains(&self) -> u64 {
        self.drains.load(SeqCst)
    }
}

/// How completions of io_uring reach the thread that submitted.
///
/// The default is not the one with the highest throughput. Requests in flight pin the description
/// that holds a volume's lock, and a successor waits for it. When their thread is dead the kernel
/// ends cooperative ones as they complete, but deferred ones only in passes of 50 ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskRun {
    /// When the thread asks (`DEFER_TASKRUN`, Linux 6.1): no interrupts, completions in batches,
    /// and a thread in `epoll_wait` is woken by the ring's descriptor alone.
    Deferred,
    /// With the thread's next system call (`COOP_TASKRUN`, Linux 5.19).
    #[default]
    Cooperative,
    /// At once, by interrupting the thread.
    Interrupting,
}

/// How a lane is set up.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// Whether to use io_uring where the kernel allows it.
    pub io_uring: bool,
    /// Entries of the io_uring submission ring.
    pub io_uring_entries: u32,
    /// How completions arrive; what the kernel does not know yet falls back to the next.
    pub task_run: TaskRun,
}

impl Default for LaneConfig {
    fn default() -> Self {
        LaneConfig { io_uring: true, io_uring_entries: 256, task_run: TaskRun::default() }
    }
}

/// One shard thread's lane. Not shared; other threads reach it through its [`Mailbox`].
///
/// It may be made on another thread than the one that uses it, but only one thread may use it.
/// Dropping a lane waits for what the kernel still does on its behalf.
pub struct Lane {
    mailbox: Arc<Mailbox>,
    done: Vec<Done>,
    ring: Result<Ring, UringRefusal>,
    reaped: Vec<(Box<Task>, i32)>,
}

impl Lane {
    /// A lane for one shard thread.
    pub fn new(config: &LaneConfig) -> io::Result<Lane> {
        let mailbox = Mailbox::new()?;
        let ring = match uring_refusal() {
            _ if !config.io_uring => Err(UringRefusal::NotWanted),
            Some(refusal) => Err(refusal),
            None => Ring::new(config, mailbox.doorbell.as_fd()),
        };
        Ok(Lane { mailbox: Arc::new(mailbox), done: Vec::new(), ring, reaped: Vec::new() })
    }

    /// For new requests, and for whoever wants to wake this shard.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// How io_uring works in this lane; `None` if it was refused or not wanted.
    pub fn uring(&self) -> Option<TaskRun> {
        self.ring.as_ref().ok().map(Ring::task_run)
    }

    /// Why there is no io_uring in this lane.
    pub fn uring_refusal(&self) -> Option<UringRefusal> {
        self.ring.as_ref().err().copied()
    }

    pub(crate) fn push_done(&mut self, done: Done) {
        self.done.push(done);
    }

    pub(crate) fn ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut().ok().filter(|ring| ring.works())
    }

    /// Hands queued work to the kernel; call once after a batch of submissions.
    pub fn flush(&mut self) {
        if let Ok(ring) = &mut self.ring {
            ring.submit();
        }
    }

    /// Moves everything that is answered by now into `out`.
    ///
    /// The caller publishes these answers before it drains again: a backend takes that as proof that
    /// the client can see them.
    pub fn drain(&mut self, out: &mut Vec<Done>) {
        self.drain_unpublished(out);
        self.mailbox.drains.fetch_add(1, SeqCst);
    }

    /// The same for a caller that will not publish these answers, or not before it is known whether
    /// another process owns the volumes: they prove nothing to a backend.
    pub fn drain_unpublished(&mut self, out: &mut Vec<Done>) {
        self.advance();
        out.append(&mut self.done);
        while let Some(done) = self.mailbox.posts.pop() {
            out.push(done);
        }
    }

    /// Moves what this thread itself has answered by now into `out`, and nothing else: unlike
    /// [`drain`](Self::drain), it never enters the kernel. To be published at once, too.
    pub fn take_answered(&mut self, out: &mut Vec<Done>) {
        out.append(&mut self.done);
    }

    /// Takes the completions of io_uring and starts whatever is next for their requests.
    fn advance(&mut self) {
        let Ok(ring) = &mut self.ring else { return };
        let mut reaped = std::mem::take(&mut self.reaped);
        ring.reap(&mut reaped);
        while let Some(task) = self.ring.as_mut().ok().and_then(Ring::take_refused) {
            task.drive(self);
        }
        for (task, result) in reaped.drain(..) {
            task.advance_in(self, result);
        }
        self.reaped = reaped;
        self.flush();
    }

    /// Descriptors that become readable when there may be something to [`drain`](Self::drain).
    /// To be watched edge-triggered.
    pub fn wait_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.mailbox.doorbell.as_fd()]
    }

    /// The shard wants to sleep: true if it may, false if something was answered meanwhile.
    pub fn sleep(&mut self) -> bool {
        self.mailbox.asleep.store(true, SeqCst);
        self.flush();
        if let Ok(ring) = &mut self.ring {
            ring.ring_doorbell(true);
        }
        self.done.is_empty()
            && self.mailbox.posts.is_empty()
            && !self.ring.as_mut().is_ok_and(Ring::has_news)
    }

    /// The shard is awake.
    pub fn wake(&mut self) {
        self.mailbox.asleep.store(false, SeqCst);
        if let Ok(ring) = &mut self.ring {
            ring.ring_doorbell(false);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // The kernel reads and writes the buffers of these requests; they must not be freed under
        // it. The answers go to a mailbox that nobody empties any more.
        while let Ok(ring) = &mut self.ring
            && ring.in_flight() > 0
        {
            ring.wait();
            self.advance();
            if let Ok(ring) = &mut self.ring {
                ring.leak_if_broken();
            }
        }
    }
}
