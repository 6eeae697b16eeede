//! The `nebd-complete` thread: reaps for sessions with callbacks or futures, runs the callbacks,
//! tells events. Started with the first of them; asleep in `epoll_wait` while there is nothing.
//!
//! Queues are watched edge-triggered and never drained: each ring of the doorbell is an edge, and a
//! blocking call that polls the same doorbell level-triggered keeps its own wakeup.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nebd_abi::Errno;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;

use crate::core::Core;
use crate::memory;
use crate::options::{Event, EventCallback};
use crate::queue::{QueueCore, Sleeper};
use crate::sync::{Doorbell, lock};
use crate::tell::{Role, run};
use crate::transfer::Callback;

/// Something for the thread to do.
pub(crate) enum Task {
    /// A callback whose request another thread has reaped; the counter goes down afterwards.
    Callback(Callback, Result<(), Errno>, Arc<AtomicU32>),
    /// An event.
    Event(EventCallback, Event),
    /// A session is to be reaped from now on.
    Serve(Arc<Core>),
}

/// The thread, as the others see it.
pub(crate) struct Complete {
    epoll: OwnedFd,
    wake: Doorbell,
    tasks: Mutex<VecDeque<Task>>,
    /// Sessions by the upper half of their queues' tokens.
    sessions: Mutex<Sessions>,
    is_stopping: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Sessions {
    by_token: HashMap<u32, Arc<Core>>,
    last: u32,
}

thread_local!(static IS_COMPLETE: Cell<bool> = const { Cell::new(false) });

/// Whether this is the thread itself, running a callback.
pub(crate) fn is_this_thread() -> bool {
    IS_COMPLETE.try_with(Cell::get).unwrap_or(false)
}

fn token(session: u32, queue: u32) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(session) << 32 | u64::from(queue))
}

impl Complete {
    pub(crate) fn spawn() -> io::Result<Arc<Complete>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Doorbell::new()?;
        epoll::add(&epoll, &wake, token(0, 0), epoll::EventFlags::IN)?;
        let complete = Arc::new(Complete {
            epoll,
            wake,
            tasks: Mutex::default(),
            sessions: Mutex::default(),
            is_stopping: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let body = complete.clone();
        let thread = std::thread::Builder::new().name("nebd-complete".into()).spawn(move || {
            memory::block_signals();
            IS_COMPLETE.with(|is_complete| is_complete.set(true));
            body.run();
        })?;
        *lock(&complete.thread) = Some(thread);
        Ok(complete)
    }

    /// Gives the thread something to do.
    pub(crate) fn push(&self, task: Task) {
        let mut tasks = lock(&self.tasks);
        let was_empty = tasks.is_empty();
        tasks.push_back(task);
        drop(tasks);
        if was_empty {
            self.wake.ring();
        }
    }

    /// Reaps a session from now on.
    pub(crate) fn add(&self, core: &Arc<Core>) -> io::Result<()> {
        let mut sessions = lock(&self.sessions);
        sessions.last += 1;
        let session = sessions.last;
        for (index, queue) in core.queues.iter().enumerate() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            let token = token(session, index as u32);
            if let Err(errno) = epoll::add(&self.epoll, queue.call_doorbell(), token, flags) {
                // Half a session would be in the way of the next try.
                for queue in core.queues.iter().take(index) {
                    let _ = epoll::delete(&self.epoll, queue.call_doorbell());
                }
                return Err(errno.into());
            }
        }
        sessions.by_token.insert(session, core.clone());
        drop(sessions);
        // Arms the queues.
        self.push(Task::Serve(core.clone()));
        Ok(())
    }

    /// A session is over.
    pub(crate) fn remove(&self, core: &Arc<Core>) {
        let mut sessions = lock(&self.sessions);
        let before = sessions.by_token.len();
        sessions.by_token.retain(|_, other| !Arc::ptr_eq(other, core));
        if sessions.by_token.len() < before {
            for queue in &core.queues {
                let _ = epoll::delete(&self.epoll, queue.call_doorbell());
            }
        }
    }

    /// Ends the thread once its tasks are done.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, SeqCst);
        self.wake.ring();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|_| !is_this_thread()) {
            let _ = thread.join();
        }
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(64);
        loop {
            self.run_tasks();
            if self.is_stopping.load(SeqCst) && lock(&self.tasks).is_empty() {
                return;
            }
            events.clear();
            // An error can only be EINTR, which is as good as no event.
            let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), None);
            for event in &events {
                let bits = event.data.u64();
                match ((bits >> 32) as u32, bits as u32) {
                    (0, _) => drop(self.wake.drain()),
                    (session, queue) => {
                        let core = lock(&self.sessions).by_token.get(&session).cloned();
                        if let Some(core) = core {
                            core.queues.get(queue as usize).inspect(|queue| serve(&core, queue));
                        }
                    }
                }
            }
        }
    }

    fn run_tasks(&self) {
        loop {
            let Some(task) = lock(&self.tasks).pop_front() else { return };
            match task {
                Task::Callback(callback, result, deferred) => {
                    run(callback, result);
                    deferred.fetch_sub(1, SeqCst);
                }
                Task::Event(callback, event) => {
                    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| callback(event)));
                }
                Task::Serve(core) => core.queues.iter().for_each(|queue| serve(&core, queue)),
            }
        }
    }
}

/// Reaps until there is nothing and the server knows that it has to ring.
fn serve(core: &Core, queue: &QueueCore) {
    loop {
        core.reap(queue, &mut Role::Complete);
        if queue.fall_asleep(Sleeper::Complete) {
            return;
        }
    }
}
