//! Calls that take caller memory: blocking ones on slices, and the unsafe ones on pointers.
//!
//! With `memory.rs` the only file of this crate that holds `unsafe`.

use std::io::{IoSlice, IoSliceMut};

use nebd_abi::{Errno, Op, OpFlags};

use crate::core::Core;
use crate::error::{SubmitError, errno};
use crate::memory::{RawIovec, Span};
use crate::poll::Queue;
use crate::session::{Prepared, Session};
use crate::transfer::{Callback, Handler, Keep, Segment, Transfer};

/// Blocking calls. Offsets and lengths are multiples of the block size, or the answer is `EINVAL`.
impl Session {
    /// Fills `bytes` from `offset` on.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), Errno> {
        self.readv(&mut [IoSliceMut::new(bytes)], offset)
    }

    /// Writes `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64, flags: OpFlags) -> Result<(), Errno> {
        self.writev(&[IoSlice::new(bytes)], offset, flags)
    }

    /// Fills several slices, one after the other, from `offset` on.
    pub fn readv(&self, slices: &mut [IoSliceMut<'_>], offset: u64) -> Result<(), Errno> {
        let iovec = |slice: &mut IoSliceMut<'_>| RawIovec {
            pointer: slice.as_mut_ptr(),
            length: slice.len(),
        };
        let iovecs: Vec<_> = slices.iter_mut().map(iovec).collect();
        // SAFETY: the slices are borrowed exclusively until this returns.
        unsafe { self.run_raw(Op::Read, OpFlags::NONE, offset, &iovecs) }
    }

    /// Writes several slices, one after the other, at `offset`.
    pub fn writev(&self, slices: &[IoSlice<'_>], offset: u64, flags: OpFlags) -> Result<(), Errno> {
        let iovec = |slice: &IoSlice<'_>| RawIovec {
            pointer: slice.as_ptr().cast_mut(),
            length: slice.len(),
        };
        let iovecs: Vec<_> = slices.iter().map(iovec).collect();
        // SAFETY: the slices are borrowed until this returns; a write only reads from them.
        unsafe { self.run_raw(Op::Write, flags, offset, &iovecs) }
    }

    /// Reads or writes caller memory and waits for it; `op` is [`Op::Read`] or [`Op::Write`].
    ///
    /// # Safety
    /// The memory is valid for reads (a write) or writes (a read), and nobody else uses it in a
    /// conflicting way, until this returns.
    pub unsafe fn run_raw(
        &self,
        op: Op,
        flags: OpFlags,
        offset: u64,
        iovecs: &[RawIovec],
    ) -> Result<(), Errno> {
        let handler = Handler::Wait(std::thread::current());
        // SAFETY: `issue_and_wait` returns once the transfer is done or abandoned; neither touches
        // caller memory again.
        match unsafe { self.core().prepare_raw(op, flags, offset, iovecs, handler)? } {
            Prepared::Nothing(_) => Ok(()),
            Prepared::Transfer(transfer) => self.core().issue_and_wait(transfer),
        }
    }

    /// Like [`submit`](Self::submit) for a read or write of caller memory; `op` is [`Op::Read`] or
    /// [`Op::Write`].
    ///
    /// # Safety
    /// The memory stays valid for reads (a write) or writes (a read), and nobody else uses it in a
    /// conflicting way, until `done` is called (or dropped uncalled, with the session).
    pub unsafe fn submit_raw(
        &self,
        op: Op,
        flags: OpFlags,
        offset: u64,
        iovecs: &[RawIovec],
        done: Callback,
    ) -> Result<(), Errno> {
        let handler = Handler::Callback(done);
        // SAFETY: the caller keeps the memory until the handler is told, which is the last use.
        let prepared = unsafe { self.core().prepare_raw(op, flags, offset, iovecs, handler)? };
        self.core().start(prepared)
    }
}

impl Queue {
    /// Like [`submit`](Self::submit), for a read or write of caller memory, which is copied through
    /// the arena where the server cannot reach it, and split where it must be.
    ///
    /// # Safety
    /// The memory stays valid for reads (a write) or writes (a read), and nobody else uses it in a
    /// conflicting way, until `user_data` was reaped.
    pub unsafe fn submit_raw(
        &self,
        op: Op,
        flags: OpFlags,
        offset: u64,
        iovecs: &[RawIovec],
        user_data: u64,
    ) -> Result<(), SubmitError> {
        let handler = Handler::Host(user_data);
        // SAFETY: the caller keeps the memory until the handler is told, which is the last use.
        let prepared = unsafe { self.core().prepare_raw(op, flags, offset, iovecs, handler)? };
        self.start(prepared)
    }
}

impl Core {
    /// A read or write of caller memory.
    ///
    /// # Safety
    /// The memory stays valid, and free of conflicting use, until the handler is told.
    unsafe fn prepare_raw(
        &self,
        op: Op,
        flags: OpFlags,
        offset: u64,
        iovecs: &[RawIovec],
        handler: Handler,
    ) -> Result<Prepared, Errno> {
        if !op.has_data() {
            return Err(Errno::INVAL);
        }
        let length = iovecs.iter().try_fold(0u64, |sum, one| sum.checked_add(one.length as u64));
        let length = length.ok_or(Errno::INVAL)?;
        self.check(op, flags, offset, length)?;
        let mut segments = Vec::with_capacity(iovecs.len());
        let mut keeps = Vec::new();
        for iovec in iovecs.iter().filter(|iovec| iovec.length > 0) {
            let direct = self.reach(iovec).map(|(place, keep)| {
                keeps.push(keep);
                place
            });
            if direct.is_none() && self.arena.size() == 0 {
                return Err(errno::NOBUFS);
            }
            // SAFETY: by this function's contract; a transfer uses its spans up to the telling.
            let span = unsafe { Span::of_caller(*iovec) };
            segments.push(Segment { direct, span: Some(span), length: iovec.length as u64 });
        }
        let keep = match keeps.len() {
            0 | 1 => keeps.pop().unwrap_or_default(),
            _ => Keep::Many(keeps.into()),
        };
        let transfer =
            Transfer::new((op, flags, offset, length), segments, keep, self.deadline(), handler);
        Ok(self.prepared(transfer))
    }

    /// Memory id and offset of caller memory that the server can reach, and what keeps it so: a
    /// request that timed out is told, and the caller lets go, before the server does.
    fn reach(&self, iovec: &RawIovec) -> Option<((u32, u64), Keep)> {
        if let Some((allocation, offset)) = self.arena.lookup(iovec.pointer, iovec.length) {
            return Some(((0, offset), Keep::Arena(allocation)));
        }
        let (lease, offset) = self.memories.lookup(iovec.pointer, iovec.length)?;
        Some(((lease.id(), offset), Keep::Memory(lease)))
    }
}
