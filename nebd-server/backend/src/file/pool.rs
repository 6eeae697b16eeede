//! Threads for what io_uring cannot do, or is not allowed to. One pool a volume, so that a hung
//! file holds up no other; its threads come when there is work and go when there is none.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::Errno;

use super::open_file::OpenFile;
use super::syncs;
use super::task::Task;

const IDLE_S_MAX: u64 = 10;
const STACK_BYTES: usize = 256 << 10;

enum Job {
    Task(Box<Task>),
    Settle(Arc<OpenFile>),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    ready: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Pool {
    shared: Arc<Shared>,
    threads_max: usize,
}

impl Pool {
    pub(super) fn new(threads_max: usize) -> Pool {
        Pool { shared: Arc::default(), threads_max: threads_max.max(1) }
    }

    /// Runs a task to its end.
    pub(super) fn run(&self, task: Box<Task>) {
        self.push(Job::Task(task));
    }

    /// Settles what the volume's syncs owe.
    pub(super) fn settle(&self, file: &Arc<OpenFile>) {
        self.push(Job::Settle(file.clone()));
    }

    fn push(&self, job: Job) {
        let mut state = self.shared.state();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.threads >= self.threads_max {
            drop(state);
            self.shared.ready.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.shared.clone();
        let spawned = std::thread::Builder::new()
            .name("nebd-file".into())
            .stack_size(STACK_BYTES)
            .spawn(move || work(&shared));
        if let Err(error) = spawned {
            self.spawn_failed(&error);
        }
    }

    fn spawn_failed(&self, error: &std::io::Error) {
        let mut state = self.shared.state();
        state.threads -= 1;
        tracing::error!(%error, threads = state.threads, "cannot start a thread for file IO");
        let orphans =
            if state.threads == 0 { std::mem::take(&mut state.jobs) } else { VecDeque::new() };
        drop(state);
        self.shared.ready.notify_one();
        for job in orphans {
            match job {
                Job::Task(task) => task.request.complete_remote(Err(Errno::from_io(error))),
                Job::Settle(file) => syncs::fail_all(&file, Errno::from_io(error)),
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.ready.notify_all();
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state();
    loop {
        while let Some(job) = state.jobs.pop_front() {
            drop(state);
            match job {
                Job::Task(task) => task.run_to_end(),
                Job::Settle(file) => syncs::settle(&file),
            }
            state = shared.state();
        }
        if state.closed {
            break;
        }
        state.idle += 1;
        let idle = Duration::from_secs(IDLE_S_MAX);
        let (guard, timeout) =
            shared.ready.wait_timeout(state, idle).unwrap_or_else(PoisonError::into_inner);
        state = guard;
        state.idle -= 1;
        if timeout.timed_out() && state.jobs.is_empty() {
            break;
        }
    }
    state.threads -= 1;
}
