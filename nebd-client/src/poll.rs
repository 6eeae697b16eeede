//! A queue driven by the host: the fastest path.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nebd_abi::{Errno, Op, OpFlags};

use crate::error::SubmitError;
use crate::io::Io;
use crate::session::RawIovec;

/// A queue of a session in [`CompletionMode::Manual`](crate::CompletionMode::Manual).
///
/// Submitting and reaping take separate locks, which cost little as long as one thread at a time
/// uses the queue, as it should.
///
/// ```text
///  loop {
///      submit … submit, kick          one doorbell for all of them
///      reap                           completions, and callbacks of Session::submit
///      if arm() { continue }          something is there already
///      sleep until event_fd is readable (epoll, poll, io_uring)
///  }
/// ```
#[derive(Debug)]
pub struct Queue {}

impl Queue {
    /// Puts a request into the queue; [`reap`](Self::reap) returns `user_data` with its result.
    ///
    /// The server learns of it with the next [`kick`](Self::kick). A request with more buffers than
    /// a slot holds, or more bytes than a transfer may have, is refused with `EINVAL`: this path
    /// does not split.
    pub fn submit(&self, _io: Io<'_>, _user_data: u64) -> Result<(), SubmitError> {
        Err(SubmitError::WouldBlock)
    }

    /// Like [`submit`](Self::submit), for a read or write of caller memory, which is copied through
    /// the arena where the server cannot reach it, and split where it must be.
    ///
    /// # Safety
    /// The memory stays valid for reads (a write) or writes (a read), and nobody else uses it in a
    /// conflicting way, until `user_data` was reaped.
    pub unsafe fn submit_raw(
        &self,
        _op: Op,
        _flags: OpFlags,
        _offset: u64,
        _iovecs: &[RawIovec],
        _user_data: u64,
    ) -> Result<(), SubmitError> {
        Err(SubmitError::WouldBlock)
    }

    /// Tells the server of what was submitted; costs a system call only if it sleeps.
    pub fn kick(&self) {}

    /// Calls `completed` with the user data and result of each completed request, runs the
    /// callbacks and wakes the futures of others on this queue; returns how many completed.
    pub fn reap(&self, _completed: impl FnMut(u64, Result<(), Errno>)) -> usize {
        0
    }

    /// Prepares for sleeping on [`event_fd`](Self::event_fd). True if completions are there already
    /// (reap instead of sleeping); false if the descriptor will become readable with the next.
    pub fn arm(&self) -> bool {
        true
    }

    /// Waits until there is something to reap, or `timeout` is over (`None`: no limit), or the
    /// session has failed: spins a little if that pays, then sleeps. True if there is something.
    pub fn wait(&self, _timeout: Option<Duration>) -> bool {
        false
    }

    /// An eventfd that becomes readable with completions once [`arm`](Self::arm) returned false.
    /// It is for polling only: `arm` drains it. Valid as long as the queue.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        unreachable!()
    }

    /// Requests submitted and not yet reaped.
    pub fn in_flight(&self) -> u32 {
        0
    }
}
