//! The threads of the library in this process: started with the first session, gone with the last.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::complete::{self, Complete};
use crate::control::{self, Admission};
use crate::core::Core;
use crate::memory;
use crate::sync::{Doorbell, lock};

/// The present threads, if there are any.
static RUNTIME: Mutex<Option<Arc<Runtime>>> = Mutex::new(None);

/// What sessions share.
pub(crate) struct Runtime {
    /// Wakes the control thread.
    wake: Doorbell,
    /// New sessions on their way to the control thread.
    inbox: Mutex<Vec<Admission>>,
    control: Mutex<Option<JoinHandle<()>>>,
    complete: Mutex<Option<Arc<Complete>>>,
}

impl Runtime {
    /// Makes a session on the present threads, or on new ones.
    pub(crate) fn admit(make: impl FnOnce(Arc<Runtime>) -> Admission) -> io::Result<()> {
        let mut present = lock(&RUNTIME);
        let runtime = match &*present {
            Some(runtime) => runtime.clone(),
            None => {
                let runtime = Arc::new(Runtime {
                    wake: Doorbell::new()?,
                    inbox: Mutex::default(),
                    control: Mutex::new(None),
                    complete: Mutex::new(None),
                });
                let body = runtime.clone();
                let thread = std::thread::Builder::new().name("nebd-control".into());
                let thread = thread.spawn(move || {
                    memory::block_signals();
                    control::run(&body);
                })?;
                *lock(&runtime.control) = Some(thread);
                present.insert(runtime).clone()
            }
        };
        lock(&runtime.inbox).push(make(runtime.clone()));
        runtime.wake_control();
        Ok(())
    }

    /// Makes the control thread look at its sessions.
    pub(crate) fn wake_control(&self) {
        self.wake.ring();
    }

    /// The control thread's doorbell.
    pub(crate) fn wake_doorbell(&self) -> &Doorbell {
        &self.wake
    }

    /// New sessions.
    pub(crate) fn take_inbox(&self) -> Vec<Admission> {
        std::mem::take(&mut *lock(&self.inbox))
    }

    /// Called by the control thread when it has no session left: whether it is to end. If so the
    /// next session gets new threads.
    pub(crate) fn retire(self: &Arc<Self>) -> bool {
        let mut present = lock(&RUNTIME);
        // Sessions are admitted under the same lock.
        if !lock(&self.inbox).is_empty() {
            return false;
        }
        if present.as_ref().is_some_and(|runtime| Arc::ptr_eq(runtime, self)) {
            *present = None;
        }
        true
    }

    /// The `nebd-complete` thread, started now if it was not needed before.
    pub(crate) fn complete(&self) -> io::Result<Arc<Complete>> {
        let mut complete = lock(&self.complete);
        match &*complete {
            Some(complete) => Ok(complete.clone()),
            None => Ok(complete.insert(Complete::spawn()?).clone()),
        }
    }

    /// The thread no longer reaps for this session.
    pub(crate) fn dismiss(&self, core: &Arc<Core>) {
        if let Some(complete) = &*lock(&self.complete) {
            complete.remove(core);
        }
    }

    /// Ends the `nebd-complete` thread; called by the control thread as its last act.
    pub(crate) fn stop_complete(&self) {
        let complete = lock(&self.complete).take();
        if let Some(complete) = complete {
            complete.stop();
        }
    }

    /// Waits for the end of the threads, if they are about to end.
    pub(crate) fn join_if_retired(self: &Arc<Self>) {
        // The threads wait for a callback that closes the last session, not the other way round.
        if complete::is_this_thread() {
            return;
        }
        let is_present = lock(&RUNTIME).as_ref().is_some_and(|runtime| Arc::ptr_eq(runtime, self));
        if is_present {
            return;
        }
        let thread = lock(&self.control).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}
