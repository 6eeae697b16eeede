//! Worker threads for what may block: opening, resizing and closing volumes.
//!
//! As many threads as there are jobs, up to a limit, and none that wakes up without work.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

/// Threads at most; each session of a volume that waits for its storage holds one, and must not
/// keep those of other volumes waiting.
const THREADS_MAX: usize = 4096;
/// Threads that stay when there is nothing to do.
const THREADS_KEPT: usize = 2;

/// A pool of worker threads.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wanted: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Jobs {
    /// Runs `job` on a worker thread.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.queue.push_back(Box::new(job));
        if state.idle >= state.queue.len() || state.threads >= THREADS_MAX {
            self.0.wanted.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.0.clone();
        let spawned =
            std::thread::Builder::new().name("nebd-job".into()).spawn(move || shared.work());
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot start a worker thread; the job waits for another");
            self.0.state.lock().unwrap_or_else(PoisonError::into_inner).threads -= 1;
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            } else if state.threads > THREADS_KEPT {
                state.threads -= 1;
                return;
            } else {
                state.idle += 1;
                state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn jobs_that_wait_for_each_other_all_run() {
        let jobs = Jobs::default();
        for _ in 0..20 {
            let barrier = Arc::new(Barrier::new(32));
            for _ in 0..31 {
                let barrier = barrier.clone();
                jobs.spawn(move || _ = barrier.wait());
            }
            barrier.wait();
        }
    }
}
