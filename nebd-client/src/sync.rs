//! Small things to wait with: locks that survive a panic, eventfds, a clock, a spin that adapts.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll};

/// Locks; what a panicking thread left behind is used as it is (a host's callback may panic, and
/// no lock of the library is held while one runs).
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value that comes once.
#[derive(Debug)]
pub(crate) struct Promise<T> {
    value: Mutex<Option<T>>,
    kept: Condvar,
}

impl<T> Default for Promise<T> {
    fn default() -> Promise<T> {
        Promise { value: Mutex::new(None), kept: Condvar::new() }
    }
}

impl<T> Promise<T> {
    /// Sets the value; the first counts.
    pub(crate) fn keep(&self, value: T) {
        lock(&self.value).get_or_insert(value);
        self.kept.notify_all();
    }

    /// Waits for the value and takes it; `None` if `timeout` was over first.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Option<T> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut value = lock(&self.value);
        while value.is_none() {
            value = match remaining(deadline) {
                None => self.kept.wait(value).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    self.kept.wait_timeout(value, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        value.take()
    }
}

/// An eventfd.
#[derive(Debug)]
pub(crate) struct Doorbell(OwnedFd);

impl Doorbell {
    pub(crate) fn new() -> io::Result<Doorbell> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Doorbell(rustix::event::eventfd(0, flags)?))
    }

    /// Makes it readable.
    pub(crate) fn ring(&self) {
        // It can fail only by being as readable as can be.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable again; false if nobody had rung.
    pub(crate) fn drain(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }

    /// Sleeps until it is readable; false if `timeout` was over first.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> bool {
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout)
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Polls; false on timeout. A signal looks like readiness: every caller looks again anyway.
pub(crate) fn poll(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> bool {
    !matches!(rustix::event::poll(fds, timespec(timeout).as_ref()), Ok(0))
}

fn timespec(timeout: Option<Duration>) -> Option<Timespec> {
    let timeout = timeout?;
    let tv_sec = i64::try_from(timeout.as_secs()).ok()?;
    Some(Timespec { tv_sec, tv_nsec: timeout.subsec_nanos().into() })
}

/// Wakes with each ring of its doorbells and drains none: others may sleep on them, and drain them.
#[derive(Debug)]
pub(crate) struct Listener(OwnedFd);

impl Listener {
    pub(crate) fn new(doorbells: [&Doorbell; 2]) -> io::Result<Listener> {
        let listener = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for doorbell in doorbells {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&listener, doorbell, epoll::EventData::new_u64(0), flags)?;
        }
        Ok(Listener(listener))
    }

    /// Sleeps until the next ring, one that came since the last sleep, or the end of `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 2];
        // An error can only be EINTR; whoever waits looks again anyway.
        let _ = epoll::wait(&self.0, &mut events, timespec(timeout).as_ref());
    }
}

/// Nanoseconds of the monotonic clock; never zero.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64).max(1)
}

/// What is left until `deadline`; `None` if there is none.
pub(crate) fn remaining(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

/// Whether `deadline` is over.
pub(crate) fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

/// A spin whose length grows while it pays and shrinks to nothing while it does not.
#[derive(Debug)]
pub(crate) struct Spin {
    max_ns: u64,
    budget_ns: AtomicU64,
    skipped: AtomicU32,
}

impl Spin {
    /// Below this a spin is not worth its clock reads.
    const BUDGET_NS_MIN: u64 = 1_000;
    /// A spin that does not pay is tried again every so often.
    const PROBE_EVERY: u32 = 32;

    pub(crate) fn new(max: Duration) -> Spin {
        let max_ns = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        Spin { max_ns, budget_ns: AtomicU64::new(max_ns), skipped: AtomicU32::new(0) }
    }

    fn is_time_to_probe(&self) -> bool {
        self.skipped.fetch_add(1, Relaxed).is_multiple_of(Spin::PROBE_EVERY)
    }

    /// Spins until `ready`; false if the budget was over first.
    pub(crate) fn until(&self, mut ready: impl FnMut() -> bool) -> bool {
        let mut budget_ns = self.budget_ns.load(Relaxed);
        if budget_ns < Spin::BUDGET_NS_MIN {
            if self.max_ns == 0 || !self.is_time_to_probe() {
                return false;
            }
            budget_ns = self.max_ns / 2;
        }
        let start_ns = now_ns();
        loop {
            for _ in 0..8 {
                std::hint::spin_loop();
            }
            if ready() {
                let grown = budget_ns.saturating_mul(2).min(self.max_ns);
                self.budget_ns.store(grown, Relaxed);
                return true;
            }
            if now_ns().saturating_sub(start_ns) >= budget_ns {
                self.budget_ns.store(budget_ns / 2, Relaxed);
                return false;
            }
        }
    }
}
