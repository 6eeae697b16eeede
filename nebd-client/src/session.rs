//! An attached volume.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use nebd_abi::control::VolumeInfo;
use nebd_abi::layout::SessionId;
use nebd_abi::{Errno, Generation, Op, OpFlags, VolumeName};

use crate::arena::Buffer;
use crate::error::{CallError, OpenError};
use crate::future::IoFuture;
use crate::io::Io;
use crate::options::Options;
use crate::poll::Queue;

/// An attached volume. Shared freely between threads (`Arc<Session>`).
///
/// Dropping it detaches in the background: requests in flight are still carried out. [`close`]
/// waits for them.
///
/// [`close`]: Session::close
#[derive(Debug)]
pub struct Session {}

/// A sealed memfd of the host, usable as data of requests without copies. Forgotten by the server
/// once it is dropped and no request uses it any more.
#[derive(Debug)]
pub struct Memory {
    id: u32,
}

impl Memory {
    /// Its id in the session, from 1.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        0
    }
}

/// A piece of caller memory, for the raw calls; laid out as C's `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RawIovec {
    /// Start. Inside a [`Buffer`] or a mapped [`Memory`] it is used in place, otherwise copied.
    pub pointer: *mut u8,
    /// Bytes.
    pub length: usize,
}

/// What a session has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Generation of the server that attached the session last.
    pub generation: Generation,
    /// Whether the control socket is connected and the session attached right now.
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
    pub fn open(_volume: &str, _options: Options) -> Result<Session, OpenError> {
        Err(OpenError::Forked)
    }

    /// The volume's name.
    pub fn volume(&self) -> &VolumeName {
        unreachable!()
    }

    /// The session's identity, the same over every server.
    pub fn id(&self) -> SessionId {
        SessionId([0; 16])
    }

    /// What the volume is and can do, as last told by the server; asks nobody.
    pub fn info(&self) -> VolumeInfo {
        unreachable!()
    }

    /// Asks the server for [`info`](Self::info) anew.
    pub fn refresh(&self) -> Result<VolumeInfo, CallError> {
        unreachable!()
    }

    /// What the session has seen so far.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Changes the size of the volume, in bytes. Survives deaths of the server: the same operation
    /// is asked for again until one answers.
    pub fn resize(&self, _size: u64) -> Result<(), CallError> {
        unreachable!()
    }

    /// Waits for the requests in flight and detaches. If no server is there to say goodbye to for
    /// [`Options::connect_timeout`], that is done in the background, and this returns `Timeout`.
    pub fn close(self) -> Result<(), CallError> {
        unreachable!()
    }

    /// A buffer in the arena of `length` bytes, `ENOMEM` if there is no room now. Its contents are
    /// whatever was there before.
    pub fn alloc(&self, _length: usize) -> Result<Buffer, Errno> {
        Err(Errno::IO)
    }

    /// Makes a memfd (sealed with `F_SEAL_SHRINK` and `F_SEAL_GROW`, of exactly `size` bytes, whole pages)
    /// usable as data of requests. It is registered again with each new server.
    pub fn register_memory(&self, _fd: BorrowedFd<'_>, _size: u64) -> Result<Memory, CallError> {
        unreachable!()
    }

    /// Like [`register_memory`](Self::register_memory) for a memfd that this process has mapped,
    /// whole, at `base`: raw requests whose pointers lie in the mapping are then not copied.
    pub fn register_mapped_memory(
        &self,
        _fd: BorrowedFd<'_>,
        _size: u64,
        _base: *mut u8,
    ) -> Result<Memory, CallError> {
        unreachable!()
    }

    /// Queues of the session.
    pub fn queue_count(&self) -> u32 {
        0
    }

    /// A queue to be driven by the host; `None` beyond the last, and in a session whose
    /// completions are reaped by the library ([`CompletionMode`](crate::CompletionMode)).
    pub fn queue(&self, _index: u32) -> Option<Queue> {
        None
    }

    // Blocking calls. Offsets and lengths are multiples of the block size, or the answer is EINVAL.

    /// Fills `bytes` from `offset` on.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), Errno> {
        self.readv(&mut [IoSliceMut::new(bytes)], offset)
    }

    /// Writes `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64, flags: OpFlags) -> Result<(), Errno> {
        self.writev(&[IoSlice::new(bytes)], offset, flags)
    }

    /// Fills several slices, one after the other, from `offset` on.
    pub fn readv(&self, _slices: &mut [IoSliceMut<'_>], _offset: u64) -> Result<(), Errno> {
        Err(Errno::IO)
    }

    /// Writes several slices, one after the other, at `offset`.
    pub fn writev(
        &self,
        _slices: &[IoSlice<'_>],
        _offset: u64,
        _flags: OpFlags,
    ) -> Result<(), Errno> {
        Err(Errno::IO)
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
    pub fn run(&self, _io: Io<'_>) -> Result<(), Errno> {
        Err(Errno::IO)
    }

    /// Reads or writes caller memory and waits for it; `op` is [`Op::Read`] or [`Op::Write`].
    ///
    /// # Safety
    /// The memory is valid for reads (a write) or writes (a read), and nobody else uses it in a
    /// conflicting way, until this returns.
    pub unsafe fn run_raw(
        &self,
        _op: Op,
        _flags: OpFlags,
        _offset: u64,
        _iovecs: &[RawIovec],
    ) -> Result<(), Errno> {
        Err(Errno::IO)
    }

    /// Starts a request; `done` is called with its result, exactly once, on the `nebd-complete`
    /// thread or in [`Queue::reap`]. With an error nothing was started and `done` is not called.
    ///
    /// Never blocks: what finds no room in the ring waits in a list.
    pub fn submit(
        &self,
        _io: Io<'_>,
        _done: Box<dyn FnOnce(Result<(), Errno>) + Send>,
    ) -> Result<(), Errno> {
        Err(Errno::IO)
    }

    /// Like [`submit`](Self::submit) for a read or write of caller memory; `op` is [`Op::Read`] or
    /// [`Op::Write`].
    ///
    /// # Safety
    /// The memory stays valid for reads (a write) or writes (a read), and nobody else uses it in a
    /// conflicting way, until `done` is called.
    pub unsafe fn submit_raw(
        &self,
        _op: Op,
        _flags: OpFlags,
        _offset: u64,
        _iovecs: &[RawIovec],
        _done: Box<dyn FnOnce(Result<(), Errno>) + Send>,
    ) -> Result<(), Errno> {
        Err(Errno::IO)
    }

    /// Starts a request whose completion is a `Future`, for any executor.
    pub fn start(&self, _io: Io<'_>) -> IoFuture {
        IoFuture {}
    }
}
