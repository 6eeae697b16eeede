//! A shard's way into the backends: completions of its own thread, of io_uring, and of others.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crossbeam::queue::SegQueue;
use nebd_abi::Errno;
use rustix::event::EventfdFlags;

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
}

impl Mailbox {
    fn new() -> io::Result<Mailbox> {
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { posts: SegQueue::new(), asleep: AtomicBool::new(false), doorbell })
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
}

/// How a lane is set up.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// Whether to use io_uring where the kernel allows it.
    pub io_uring: bool,
    /// Entries of the io_uring submission ring.
    pub io_uring_entries: u32,
}

impl Default for LaneConfig {
    fn default() -> Self {
        LaneConfig { io_uring: true, io_uring_entries: 256 }
    }
}

/// One shard thread's lane. Not shared; other threads reach it through its [`Mailbox`].
pub struct Lane {
    mailbox: Arc<Mailbox>,
    done: Vec<Done>,
}

impl Lane {
    /// A lane for the calling thread.
    pub fn new(_config: &LaneConfig) -> io::Result<Lane> {
        Ok(Lane { mailbox: Arc::new(Mailbox::new()?), done: Vec::new() })
    }

    /// For new requests, and for whoever wants to wake this shard.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    pub(crate) fn push_done(&mut self, done: Done) {
        self.done.push(done);
    }

    /// Hands queued work to the kernel; call once after a batch of submissions.
    pub fn flush(&mut self) {}

    /// Moves everything that is answered by now into `out`.
    pub fn drain(&mut self, out: &mut Vec<Done>) {
        out.append(&mut self.done);
        while let Some(done) = self.mailbox.posts.pop() {
            out.push(done);
        }
    }

    /// Descriptors that become readable when there may be something to [`drain`](Self::drain).
    /// To be watched edge-triggered.
    pub fn wait_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.mailbox.doorbell.as_fd()]
    }

    /// The shard wants to sleep: true if it may, false if something was answered meanwhile.
    pub fn sleep(&mut self) -> bool {
        self.mailbox.asleep.store(true, SeqCst);
        self.done.is_empty() && self.mailbox.posts.is_empty()
    }

    /// The shard is awake.
    pub fn wake(&mut self) {
        self.mailbox.asleep.store(false, SeqCst);
    }
}
