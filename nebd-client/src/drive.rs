//! Waiting for a result without a thread of the library: one of those who wait leads.
//!
//! ```text
//!           ┌──────────── done? ────────────► return; wake one follower
//!  caller ──┤ leader: spin, reap for all, sleep on the call doorbell
//!           └ follower: parked until its own result, or until nobody leads
//! ```
//!
//! Every wait has a waker: a result unparks its thread, and rings the doorbell if a leader sleeps
//! that is not the one who reaped; a leader that leaves unparks one follower, and a follower that
//! leaves while nobody leads passes that on.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::Thread;
use std::time::{Duration, Instant};

use nebd_abi::Errno;

use crate::core::Core;
use crate::error::errno;
use crate::queue::{QueueCore, Sleeper};
use crate::sync::{is_over, lock, remaining};
use crate::tell::Role;
use crate::transfer::Transfer;

impl Core {
    /// Waits for a transfer that was issued on `queue`; gives it up at its deadline.
    pub(crate) fn wait_for(
        &self,
        queue: &QueueCore,
        transfer: &Arc<Transfer>,
    ) -> Result<(), Errno> {
        // Also when a bug below should unwind: the caller's memory goes away with its frame.
        let given_up = GiveUp(transfer);
        self.drive(queue, transfer.deadline, || transfer.is_done());
        drop(given_up);
        transfer.result()
    }

    /// Waits on `queue` until `is_done`, or until `deadline`.
    pub(crate) fn drive(
        &self,
        queue: &QueueCore,
        deadline: Option<Instant>,
        is_done: impl Fn() -> bool,
    ) {
        while !is_done() && !is_over(deadline) {
            if queue.led.swap(true, SeqCst) {
                follow(queue, deadline, &is_done);
            } else {
                self.lead(queue, deadline, &is_done);
            }
        }
        if !queue.led.load(SeqCst) {
            wake_follower(queue);
        }
    }

    fn lead(&self, queue: &QueueCore, deadline: Option<Instant>, is_done: &impl Fn() -> bool) {
        let mut role = Role::Leader(queue);
        loop {
            self.reap(queue, &mut role);
            if is_done() || is_over(deadline) {
                break;
            }
            if queue.spin.until(|| queue.is_ringing() || is_done() || is_over(deadline)) {
                continue;
            }
            if queue.fall_asleep(Sleeper::Leader) {
                queue.leader_wait(remaining(deadline));
            }
            queue.leader_drain();
        }
        queue.awake(Sleeper::Leader);
        queue.led.store(false, SeqCst);
        wake_follower(queue);
    }
}

struct GiveUp<'a>(&'a Arc<Transfer>);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if !self.0.is_done() {
            // Who is to be told is the one who gives up.
            drop(self.0.abandon(errno::TIMEDOUT));
        }
    }
}

fn follow(queue: &QueueCore, deadline: Option<Instant>, is_done: &impl Fn() -> bool) {
    let me = std::thread::current();
    lock(&queue.followers).push_back(me.clone());
    // From here on whoever leaves the lead sees this thread in the list.
    while !is_done() && queue.led.load(SeqCst) && !is_over(deadline) {
        std::thread::park_timeout(remaining(deadline).unwrap_or(Duration::MAX));
    }
    let mut followers = lock(&queue.followers);
    let mine = |thread: &Thread| thread.id() == me.id();
    if let Some(index) = followers.iter().position(mine) {
        followers.remove(index);
    }
}

fn wake_follower(queue: &QueueCore) {
    let follower = lock(&queue.followers).front().cloned();
    if let Some(follower) = follower {
        follower.unpark();
    }
}
