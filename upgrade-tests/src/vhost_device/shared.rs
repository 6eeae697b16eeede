//! What the guest's half and the hypervisor's half of the driver share: doorbells, figures, and what the
//! hypervisor is to do.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, epoll, eventfd};
use serde::Serialize;

use super::control::Control;

/// What happened to a driver's connection so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Times that it connected again: it was closed, or was told to.
    pub reconnects: u64,
    /// Of them, those that the server was the cause of.
    pub losses: u64,
    /// Control messages that were carried out under load.
    pub controls: u64,
    /// Times that the server said that the configuration has changed.
    pub config_changes: u64,
    /// Bytes of the disk, as the configuration space says.
    pub size_bytes: u64,
}

/// What a hypervisor is told to do.
pub(super) enum Command {
    /// Carry this out, and say so.
    Perform(Control, Sender<()>),
    /// Draw from the controls with this seed, and carry out, until told otherwise by `None`.
    Churn(Option<u64>),
    /// It is over.
    End,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) reconnects: AtomicU64,
    pub(super) losses: AtomicU64,
    pub(super) controls: AtomicU64,
    pub(super) config_changes: AtomicU64,
    pub(super) size_bytes: AtomicU64,
}

pub(super) struct Shared {
    kicks: Vec<Mutex<OwnedFd>>,
    calls: Vec<Mutex<OwnedFd>>,
    /// Readable while a call is.
    called: OwnedFd,
    commands: Mutex<VecDeque<Command>>,
    commanded: OwnedFd,
    failure: Mutex<Option<String>>,
    pub(super) counters: Counters,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn doorbell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn ring(doorbell: &OwnedFd) {
    // A full counter rings as well.
    let _ = rustix::io::write(doorbell, &1u64.to_ne_bytes());
}

impl Shared {
    pub(super) fn new(queues: usize) -> io::Result<Shared> {
        let doorbells =
            || (0..queues).map(|_| Ok(Mutex::new(doorbell()?))).collect::<io::Result<Vec<_>>>();
        let shared = Shared {
            kicks: doorbells()?,
            calls: doorbells()?,
            called: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            commands: Mutex::default(),
            commanded: doorbell()?,
            failure: Mutex::default(),
            counters: Counters::default(),
        };
        for call in &shared.calls {
            shared.watch(&lock(call))?;
        }
        Ok(shared)
    }

    fn watch(&self, call: &OwnedFd) -> io::Result<()> {
        let data = epoll::EventData::new_u64(0);
        Ok(epoll::add(&self.called, call, data, epoll::EventFlags::IN)?)
    }

    pub(super) fn kick(&self, queue: usize) {
        ring(&lock(&self.kicks[queue]));
    }

    /// Readable when the device has called.
    pub(super) fn called(&self) -> BorrowedFd<'_> {
        self.called.as_fd()
    }

    pub(super) fn drain_calls(&self) {
        for call in &self.calls {
            let _ = rustix::io::read(&*lock(call), &mut [0; 8]);
        }
    }

    /// Duplicates of a ring's doorbells: kick, call.
    pub(super) fn doorbells(&self, queue: usize) -> io::Result<(OwnedFd, OwnedFd)> {
        Ok((lock(&self.kicks[queue]).try_clone()?, lock(&self.calls[queue]).try_clone()?))
    }

    /// A new kick, told to the device by `tell`; from then on it is the guest's.
    pub(super) fn replace_kick<E: From<io::Error>>(
        &self,
        queue: usize,
        tell: impl FnOnce(BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let new = doorbell()?;
        let told = tell(new.as_fd());
        *lock(&self.kicks[queue]) = new;
        // The old one may have been rung after it was looked at for the last time.
        self.kick(queue);
        told
    }

    /// The same with a call.
    pub(super) fn replace_call<E: From<io::Error>>(
        &self,
        queue: usize,
        tell: impl FnOnce(BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let new = doorbell()?;
        self.watch(&new)?;
        let told = tell(new.as_fd());
        let old = std::mem::replace(&mut *lock(&self.calls[queue]), new);
        // The server has a duplicate: without this it would stay in the epoll.
        let _ = epoll::delete(&self.called, &old);
        ring(&lock(&self.calls[queue]));
        told
    }

    pub(super) fn command(&self, command: Command) {
        lock(&self.commands).push_back(command);
        ring(&self.commanded);
    }

    pub(super) fn next_command(&self) -> Option<Command> {
        let _ = rustix::io::read(&self.commanded, &mut [0; 8]);
        let mut commands = lock(&self.commands);
        let next = commands.pop_front();
        if !commands.is_empty() {
            ring(&self.commanded);
        }
        next
    }

    /// Readable while there are commands.
    pub(super) fn commanded(&self) -> BorrowedFd<'_> {
        self.commanded.as_fd()
    }

    /// The device is of no use any more. The guest is woken to hear of it.
    pub(super) fn fail(&self, why: String) {
        lock(&self.failure).get_or_insert(why);
        for call in &self.calls {
            ring(&lock(call));
        }
    }

    pub(super) fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    pub(super) fn figures(&self) -> Figures {
        let Counters { reconnects, losses, controls, config_changes, size_bytes } = &self.counters;
        Figures {
            reconnects: reconnects.load(SeqCst),
            losses: losses.load(SeqCst),
            controls: controls.load(SeqCst),
            config_changes: config_changes.load(SeqCst),
            size_bytes: size_bytes.load(SeqCst),
        }
    }
}
