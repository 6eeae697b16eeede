//! `rbd_completion_t`, and the way of a request's result into it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nebd_client::Errno;

use crate::failure::number;
use crate::image::Image;
use crate::raw::Callback;

/// What `rbd_completion_t` points to. The host's handle is one of its owners.
#[derive(Default)]
pub struct Completion {
    callback: Option<Callback>,
    state: Mutex<State>,
    is_told: Condvar,
    is_released: AtomicBool,
}

#[derive(Clone, Copy, Default)]
struct State {
    value: Option<i64>,
    /// The callback has returned.
    is_told: bool,
}

impl Completion {
    /// A completion that calls back.
    pub fn new(callback: Option<Callback>) -> Completion {
        Completion { callback, ..Completion::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request's value or negative errno; zero while it is in flight.
    pub fn value(&self) -> i64 {
        self.lock().value.unwrap_or(0)
    }

    /// Whether the callback has returned.
    pub fn is_complete(&self) -> bool {
        self.lock().is_told
    }

    /// Waits until the callback has returned.
    pub fn wait(&self) -> i64 {
        let mut state = self.lock();
        while !state.is_told {
            state = self.is_told.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.value.unwrap_or(0)
    }

    /// The host has given up its handle.
    pub fn release(&self) {
        self.is_released.store(true, SeqCst);
    }

    /// The callback's argument.
    pub fn callback(&self) -> Option<Callback> {
        self.callback
    }
}

/// Completions for a host that is told by an eventfd and asks which ones.
pub struct Notice {
    event: OwnedFd,
    done: Mutex<VecDeque<Arc<Completion>>>,
}

impl Notice {
    /// Tells through this eventfd.
    pub fn new(event: OwnedFd) -> Notice {
        Notice { event, done: Mutex::default() }
    }

    fn push(&self, completion: Arc<Completion>) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push_back(completion);
        // It can only fail if the counter is full, and then the host is told already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// One that was not taken yet. Those that the host has released have nobody who asks.
    pub fn pop(&self) -> Option<Arc<Completion>> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let next = done.pop_front()?;
            if !next.is_released.load(SeqCst) {
                return Some(next);
            }
        }
    }
}

/// A request's way back to its host. Dropped without [`tell`](Self::tell), the request was refused,
/// and its host is told by a return value.
pub struct Reply {
    completion: Arc<Completion>,
    image: Arc<Image>,
    /// What success is told as.
    value: i64,
}

impl Reply {
    /// For a request that is about to begin.
    pub fn new(completion: Arc<Completion>, image: &Arc<Image>, value: u64) -> Reply {
        image.in_flight.begin();
        // No request is as long as an `i64` can tell.
        Reply { completion, image: image.clone(), value: i64::try_from(value).unwrap_or(i64::MAX) }
    }

    /// A second way to the same host, for a refusal that only turns up once the first is given away.
    pub fn twin(&self) -> Reply {
        self.image.in_flight.begin();
        let (completion, image) = (self.completion.clone(), self.image.clone());
        Reply { completion, image, value: self.value }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Tells the host.
    pub fn tell(&self, result: Result<(), Errno>) {
        let completion = &self.completion;
        completion.lock().value = Some(number(result.map(|()| self.value)));
        if let Some(callback) = completion.callback {
            callback.call(completion);
        }
        if let Some(notice) = self.image.notice.get() {
            notice.push(completion.clone());
        }
        completion.lock().is_told = true;
        completion.is_told.notify_all();
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.image.in_flight.end();
    }
}

/// Requests that have not told their host.
#[derive(Default)]
pub struct InFlight {
    count: Mutex<usize>,
    none_left: Condvar,
}

impl InFlight {
    fn begin(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn end(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            self.none_left.notify_all();
        }
    }

    /// Waits until none is left.
    pub fn wait_for_none(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self.none_left.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
