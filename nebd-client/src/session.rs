//! An attached volume.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::time::Duration;

use nebd_abi::control::{Message, VolumeInfo};
use nebd_abi::layout::{LayoutVersion, RegionParams, SessionId};
use nebd_abi::region::{Region, RegionError};
use nebd_abi::{Errno, Generation, OpFlags, VolumeName};
use rustix::mm::Advice;

use crate::arena::Buffer;
use crate::calls::Call;
use crate::complete;
use crate::control::Admission;
use crate::core::{Core, Parts};
use crate::error::{CallError, OpenError, errno};
use crate::future::{FutureState, IoFuture};
use crate::io::Io;
use crate::memory::{self, Handle};
use crate::options::Options;
use crate::poll::Queue;
use crate::queue::QueueCore;
use crate::registered::{Memories, Memory};
use crate::runtime::Runtime;
use crate::sync::Promise;
use crate::transfer::{Callback, Handler, Transfer};

/// An attached volume. Shared freely between threads (`Arc<Session>`).
///
/// Dropping it detaches in the background. Requests in flight are still carried out, and their
/// callbacks run, but in [`CompletionMode::Manual`](crate::CompletionMode::Manual) nobody is told.
/// [`close`](Session::close) waits for them.
#[derive(Debug)]
pub struct Session {
    core: Handle<Core>,
}

/// What a session has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Generation of the server that attached the session last.
    pub generation: Generation,
    /// Whether the session is attached right now. The data path does not depend on it.
    pub connected: bool,
    /// Times the session was attached again.
    pub reconnects: u64,
    /// Requests in the rings.
    pub in_flight: u64,
    /// Servers seen taking over.
    pub takeovers: u64,
    /// Blackout of the last takeover, in microseconds.
    pub blackout_last_us: u64,
    /// Worst blackout of any takeover, in microseconds.
    pub blackout_worst_us: u64,
}

impl Session {
    /// Attaches `volume` (`BACKEND:NAME`); waits for a server up to [`Options::connect_timeout`].
    pub fn open(volume: &str, options: Options) -> Result<Session, OpenError> {
        if memory::is_forked_child() {
            return Err(OpenError::Forked);
        }
        let volume: VolumeName = volume.parse()?;
        memory::watch_for_fork()
            .map_err(|source| OpenError::System { action: "watch for a fork", source })?;
        let parts = make_parts(volume, options)?;
        let opened = Arc::new(Promise::default());
        let mut made = None;
        let admitted = Runtime::admit(|runtime| {
            let core = made.insert(Arc::new(Core::new(parts, runtime))).clone();
            Admission { core, opened: opened.clone() }
        });
        admitted.map_err(|source| OpenError::System { action: "start a thread", source })?;
        let answer = opened.wait(None);
        match (made, answer) {
            (Some(core), Some(Ok(()))) => Ok(Session { core: Handle::new(core) }),
            (Some(core), Some(Err(error))) => {
                // Unless some server has to be told first, when there is one.
                if !core.is_detaching.load(SeqCst) {
                    core.gone.wait(None);
                    core.runtime.join_if_retired();
                }
                Err(error)
            }
            // `admit` made it, and `opened` was waited for without limit.
            _ => Err(OpenError::System {
                action: "start a session",
                source: std::io::ErrorKind::Other.into(),
            }),
        }
    }

    /// The volume's name.
    pub fn volume(&self) -> &VolumeName {
        &self.core.volume
    }

    /// The session's identity, the same over every server.
    pub fn id(&self) -> SessionId {
        self.core.id
    }

    /// What the volume is and can do, as last told by the server; asks nobody.
    pub fn info(&self) -> VolumeInfo {
        self.core.info()
    }

    /// Asks the server for [`info`](Self::info) anew.
    pub fn refresh(&self) -> Result<VolumeInfo, CallError> {
        match self.core.calls.ask(&self.core, Message::Info)? {
            Message::Attached(info) => Ok(info),
            _ => Err(CallError::Answer { volume: self.core.volume.clone() }),
        }
    }

    /// What the session has seen so far.
    pub fn stats(&self) -> Stats {
        if memory::is_forked_child() {
            return Stats::default();
        }
        let core = &self.core;
        let header = core.region.header();
        let connected = core.is_connected.load(Acquire);
        Stats {
            generation: Generation(core.generation.load(Relaxed)),
            connected,
            reconnects: core.reconnects.load(Relaxed),
            in_flight: core.in_flight(),
            takeovers: header.takeovers.load(Relaxed),
            blackout_last_us: header.blackout_last_us.load(Relaxed),
            blackout_worst_us: header.blackout_worst_us.load(Relaxed),
        }
    }

    /// Changes the size of the volume, in bytes. Survives deaths of the server: the same operation
    /// is asked for again until one answers.
    pub fn resize(&self, size: u64) -> Result<(), CallError> {
        self.core.usable().map_err(|errno| self.unusable(errno))?;
        let operation = random_id()
            .map_err(|source| CallError::System { action: "draw a random number", source })?;
        match self.core.calls.ask(&self.core, Message::Resize { operation, size })? {
            Message::Done => {
                self.core.learn_size(size);
                Ok(())
            }
            // The new size was taken from the answer as it came.
            Message::Attached(_) => Ok(()),
            _ => Err(CallError::Answer { volume: self.core.volume.clone() }),
        }
    }

    /// Waits for the requests in flight and detaches. If no server is there to say goodbye to for
    /// [`Options::connect_timeout`], that is done in the background, and this returns
    /// [`CallError::Timeout`].
    ///
    /// [`Queue`]s of the session answer `ESHUTDOWN` afterwards; completions that the host has not
    /// reaped are gone. Called from a callback it does not wait for other callbacks.
    pub fn close(self) -> Result<(), CallError> {
        let core = self.core.shared().clone();
        if memory::is_forked_child() {
            std::mem::forget(core);
            return Err(self.unusable(errno::FORKED));
        }
        core.refuse(errno::CLOSED);
        core.is_closing.store(true, SeqCst);
        // Requests that timed out may never come back; the others are waited for.
        let deadline = core.deadline();
        for queue in &core.queues {
            let is_idle = || {
                core.failure().is_some()
                    || (queue.in_flight() == 0 && queue.backlogged.load(SeqCst) == 0)
            };
            core.drive(queue, deadline, is_idle);
        }
        if core.is_manual() {
            // Callbacks are owed; user data is the host's to have reaped.
            (0..core.options.queues).filter_map(|index| self.queue_at(index)).for_each(|queue| {
                queue.reap(|_, _| ());
            });
        } else if !complete::is_this_thread() {
            // What was reaped elsewhere is being told there.
            while core.is_telling() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.detach();
        if core.gone.wait(Some(core.options.connect_timeout)).is_none() {
            return Err(CallError::Timeout { volume: core.volume.clone() });
        }
        core.runtime.join_if_retired();
        Ok(())
    }

    /// A buffer in the arena of `length` bytes, `ENOMEM` if there is no room now. Its contents are
    /// whatever was there before. An eighth of the arena, a mebibyte at most, is kept back for
    /// requests that are copied.
    pub fn alloc(&self, length: usize) -> Result<Buffer, Errno> {
        self.core.usable()?;
        self.core.arena.buffer(length)
    }

    /// Makes a memfd (sealed with `F_SEAL_SHRINK` and `F_SEAL_GROW`, of exactly `size` bytes, whole
    /// pages) usable as data of requests. It is registered again with each new server.
    pub fn register_memory(&self, fd: BorrowedFd<'_>, size: u64) -> Result<Memory, CallError> {
        self.core.usable().map_err(|errno| self.unusable(errno))?;
        Memories::register(self.core.shared(), fd, size, None)
    }

    /// Like [`register_memory`](Self::register_memory) for a memfd that this process has mapped,
    /// whole, at `base`: raw requests whose pointers lie in the mapping are then not copied.
    pub fn register_mapped_memory(
        &self,
        fd: BorrowedFd<'_>,
        size: u64,
        base: *mut u8,
    ) -> Result<Memory, CallError> {
        self.core.usable().map_err(|errno| self.unusable(errno))?;
        Memories::register(self.core.shared(), fd, size, Some(base as usize))
    }

    /// Queues of the session.
    pub fn queue_count(&self) -> u32 {
        self.core.options.queues
    }

    /// A queue to be driven by the host; `None` beyond the last, and in a session whose
    /// completions are reaped by the library ([`CompletionMode`](crate::CompletionMode)).
    pub fn queue(&self, index: u32) -> Option<Queue> {
        self.queue_at(index).filter(|_| self.core.is_manual())
    }

    fn queue_at(&self, index: u32) -> Option<Queue> {
        let queue = self.core.queues.get(index as usize)?;
        Some(Queue::new(self.core.clone(), Handle::new(queue.clone())))
    }

    /// Forgets a range: it reads as zeros or as before.
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.run(Io::discard(offset, length))
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&self, offset: u64, length: u64, flags: OpFlags) -> Result<(), Errno> {
        self.run(Io::write_zeroes(offset, length).with_flags(flags))
    }

    /// Makes every write that was acknowledged before durable.
    pub fn flush(&self) -> Result<(), Errno> {
        self.run(Io::flush())
    }

    /// Carries out any request and waits for it.
    pub fn run(&self, io: Io<'_>) -> Result<(), Errno> {
        match self.core.prepare(&io, Handler::Wait(std::thread::current()))? {
            Prepared::Nothing(_) => Ok(()),
            Prepared::Transfer(transfer) => self.core.issue_and_wait(transfer),
        }
    }

    /// Starts a request; `done` is called with its result, exactly once, on the `nebd-complete`
    /// thread or in [`Queue::reap`]. With an error nothing was started and `done` is not called.
    ///
    /// Never blocks: what finds no room in the ring waits in a list.
    pub fn submit(&self, io: Io<'_>, done: Callback) -> Result<(), Errno> {
        let prepared = self.core.prepare(&io, Handler::Callback(done))?;
        self.core().start(prepared)
    }

    /// Starts a request whose completion is a `Future`, for any executor.
    pub fn start(&self, io: Io<'_>) -> IoFuture {
        let state = Arc::new(FutureState::default());
        let prepared = self.core.prepare(&io, Handler::Future(state.clone()));
        if let Err(errno) = prepared.and_then(|prepared| self.core().start(prepared)) {
            state.complete(Err(errno));
        }
        IoFuture::new(state)
    }

    /// What the handles share.
    pub(crate) fn core(&self) -> &Arc<Core> {
        self.core.shared()
    }

    fn unusable(&self, errno: Errno) -> CallError {
        CallError::Session { volume: self.core.volume.clone(), errno }
    }

    /// Asks to be detached, once.
    fn detach(&self) {
        let core = &self.core;
        core.refuse(errno::CLOSED);
        core.is_closing.store(true, SeqCst);
        if !core.is_detaching.swap(true, SeqCst) {
            // Nothing will come any more for those who wait for something to reap.
            core.queues.iter().for_each(|queue| queue.call_doorbell().ring());
            core.calls.push(Arc::new(Call::new(Message::Detach)));
            core.runtime.wake_control();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !memory::is_forked_child() {
            self.detach();
        }
    }
}

/// A request that was checked.
pub(crate) enum Prepared {
    /// There is nothing to do: it has succeeded.
    Nothing(Handler),
    Transfer(Arc<Transfer>),
}

impl Core {
    pub(crate) fn prepare(&self, io: &Io<'_>, handler: Handler) -> Result<Prepared, Errno> {
        self.check(io.op, io.flags, io.offset, io.length)?;
        let (segments, keep) = io.segments(self)?;
        let header = (io.op, io.flags, io.offset, io.length);
        Ok(self.prepared(Transfer::new(header, segments, keep, self.deadline(), handler)))
    }

    /// What has no bytes needs no server, except a flush.
    pub(crate) fn prepared(&self, transfer: Arc<Transfer>) -> Prepared {
        match transfer.take_if_empty() {
            Some(handler) => Prepared::Nothing(handler),
            None => Prepared::Transfer(transfer),
        }
    }

    pub(crate) fn issue_and_wait(&self, transfer: Arc<Transfer>) -> Result<(), Errno> {
        let Some(queue) = self.lane() else { return Err(Errno::INVAL) };
        self.issue(queue, transfer.clone());
        self.wait_for(queue, &transfer)
    }

    /// Starts what a callback or a future waits for.
    pub(crate) fn start(self: &Arc<Self>, prepared: Prepared) -> Result<(), Errno> {
        self.serve()?;
        let Some(queue) = self.lane() else { return Err(Errno::INVAL) };
        match prepared {
            Prepared::Nothing(handler) => self.tell_success(queue, handler),
            Prepared::Transfer(transfer) => self.issue(queue, transfer),
        }
        Ok(())
    }
}

fn make_parts(volume: VolumeName, options: Options) -> Result<Parts, OpenError> {
    let system = |action| move |source| OpenError::System { action, source };
    let id = random_id().map(SessionId).map_err(system("draw a session id"))?;
    let geometry = options.geometry();
    let params = RegionParams {
        version: LayoutVersion::CURRENT,
        session: id,
        geometry,
        volume: volume.clone(),
        client_pid: std::process::id(),
        client_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let region = Region::create(params)
        .and_then(|region| {
            // A child must not keep the guest's data alive, nor write to it.
            let action = "keep from forked children";
            let advised = region.memory().advise(Advice::LinuxDontFork);
            advised.map_err(|source| RegionError::System { action, source })?;
            Ok(Arc::new(region))
        })
        .map_err(|source| OpenError::Region { volume: volume.clone(), source })?;
    let queues = (0..geometry.queue_count)
        .map(|index| QueueCore::new(&region, index, &options).map(Arc::new))
        .collect::<Result<_, _>>()
        .map_err(system("make an eventfd"))?;
    Ok(Parts { volume, id, options, region, queues })
}

fn random_id() -> std::io::Result<[u8; 16]> {
    let mut id = [0; 16];
    let flags = rustix::rand::GetRandomFlags::empty();
    // Up to 256 bytes come whole.
    rustix::rand::getrandom(&mut id[..], flags)?;
    Ok(id)
}
