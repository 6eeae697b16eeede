//! Threads for what io_uring cannot do, or is not allowed to. One pool a volume, so that a hung
//! file holds up no other; its threads come when there is work and go when there is none.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Sender, unbounded};
use nebd_abi::Errno;

use super::open_file::OpenFile;
use super::syncs;
use super::task::Task;

const IDLE_S_MAX: u64 = 10;
const STACK_BYTES: usize = 256 << 10;
/// Between attempts to start a thread where there is none.
const START_RETRY: Duration = Duration::from_millis(50);

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
        let _made_in_good_time = starter();
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
        if let Err(error) = start(&self.shared) {
            self.start_failed(&error);
        }
    }

    /// A lack of threads passes, so nobody is told: those that run do the work, or the first one is
    /// started later.
    fn start_failed(&self, error: &io::Error) {
        let mut state = self.shared.state();
        tracing::error!(%error, threads = state.threads - 1, "cannot start a thread for file IO");
        if state.threads > 1 {
            state.threads -= 1;
            drop(state);
            self.shared.ready.notify_one();
            return;
        }
        // It stays counted: it is being started.
        drop(state);
        if starter().is_some_and(|starter| starter.send(self.shared.clone()).is_ok()) {
            return;
        }
        let mut state = self.shared.state();
        state.threads -= 1;
        let orphans = std::mem::take(&mut state.jobs);
        drop(state);
        for job in orphans {
            match job {
                Job::Task(task) => task.give_up(Errno::IO),
                Job::Settle(file) => syncs::fail_all(&file, Errno::IO),
            }
        }
    }
}

/// A thread of the pool, which counts it already.
fn start(shared: &Arc<Shared>) -> io::Result<()> {
    let shared = shared.clone();
    let builder = std::thread::Builder::new().name("nebd-file".into()).stack_size(STACK_BYTES);
    builder.spawn(move || work(&shared)).map(|_| ())
}

/// The way to a thread that starts the threads that could not be started. It is made before it is
/// wanted, by the first pool.
fn starter() -> Option<&'static Sender<Arc<Shared>>> {
    static STARTER: OnceLock<Option<Sender<Arc<Shared>>>> = OnceLock::new();
    let make = || {
        let (sender, receiver) = unbounded::<Arc<Shared>>();
        let work = move || {
            for shared in receiver {
                while start(&shared).is_err() {
                    std::thread::sleep(START_RETRY);
                }
            }
        };
        let builder = std::thread::Builder::new().name("nebd-starter".into());
        match builder.stack_size(STACK_BYTES).spawn(work) {
            Ok(_) => Some(sender),
            Err(error) => {
                tracing::error!(%error, "file IO will fail if threads are short");
                None
            }
        }
    };
    STARTER.get_or_init(make).as_ref()
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
