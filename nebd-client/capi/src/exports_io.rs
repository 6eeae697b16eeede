//! The exported functions that move data. `nebd.h` is their contract, and their safety contract.

#![allow(clippy::missing_safety_doc)]

use std::ffi::{c_int, c_void};

use nebd_client::{Errno, Io, Op, OpFlags, Queue, RawIovec, SubmitError};

use crate::exports::with;
use crate::failure::AGAIN;
use crate::raw::{self, Callback, Target};
use crate::volume::{Reply, Volume};

/// Bits of the flags that name a queue: its index plus one, 0 for none.
const QUEUE_SHIFT: u32 = 16;
const FLAG_BITS: u32 = (1 << QUEUE_SHIFT) - 1;

/// Where a request goes and how, out of its flags.
struct Way {
    flags: OpFlags,
    queue: Option<u32>,
}

/// Flags of a request: those that its operation has no meaning for are refused, not dropped.
fn parse(op: Op, flags: u32) -> Result<Way, Errno> {
    let meant = match op {
        Op::Write => OpFlags::FUA,
        Op::WriteZeroes => OpFlags::FUA | OpFlags::NO_UNMAP,
        Op::Read | Op::Flush | Op::Discard => OpFlags::NONE,
    };
    let bits = u8::try_from(flags & FLAG_BITS).map_err(|_| Errno::INVAL)?;
    let flags_of_op = OpFlags::from_bits(bits).ok_or(Errno::INVAL)?;
    if !meant.contains(flags_of_op) {
        return Err(Errno::INVAL);
    }
    Ok(Way { flags: flags_of_op, queue: (flags >> QUEUE_SHIFT).checked_sub(1) })
}

/// Flags of a blocking request, which goes through no queue of the host's choice.
fn parse_blocking(op: Op, flags: u32) -> Result<OpFlags, Errno> {
    let way = parse(op, flags)?;
    if way.queue.is_some() { Err(Errno::INVAL) } else { Ok(way.flags) }
}

/// Carries out a read or write and waits for it.
///
/// # Safety
/// As `nebd_readv` and `nebd_writev` ask of their callers.
unsafe fn run_data(
    volume: *mut Volume,
    op: Op,
    iov: *const RawIovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    let run = |volume: &Volume| {
        let flags = parse_blocking(op, flags)?;
        // SAFETY: the caller's promise.
        let iovecs = unsafe { raw::iovecs(iov, iovcnt) }?;
        // SAFETY: the memory is the library's until this returns.
        unsafe { volume.session.run_raw(op, flags, offset, iovecs) }.map(|()| 0)
    };
    // SAFETY: the caller's promise.
    unsafe { with(volume, run) }
}

/// `nebd_read`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_read(
    volume: *mut Volume,
    data: *mut c_void,
    length: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    let iovec = RawIovec { pointer: data.cast(), length };
    // SAFETY: the caller's promise.
    unsafe { run_data(volume, Op::Read, &iovec, 1, offset, flags) }
}

/// `nebd_write`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_write(
    volume: *mut Volume,
    data: *const c_void,
    length: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    // A write only reads the memory; iovecs have no const.
    let iovec = RawIovec { pointer: data.cast_mut().cast(), length };
    // SAFETY: the caller's promise.
    unsafe { run_data(volume, Op::Write, &iovec, 1, offset, flags) }
}

/// `nebd_readv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_readv(
    volume: *mut Volume,
    iov: *const RawIovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { run_data(volume, Op::Read, iov, iovcnt, offset, flags) }
}

/// `nebd_writev`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_writev(
    volume: *mut Volume,
    iov: *const RawIovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { run_data(volume, Op::Write, iov, iovcnt, offset, flags) }
}

/// Carries out a request without data and waits for it.
///
/// # Safety
/// `volume` is NULL or a volume that is not closed meanwhile.
unsafe fn run_plain(volume: *mut Volume, op: Op, flags: u32, io: Io<'static>) -> c_int {
    let run = |volume: &Volume| {
        let flags = parse_blocking(op, flags)?;
        volume.session.run(io.with_flags(flags)).map(|()| 0)
    };
    // SAFETY: the caller's promise.
    unsafe { with(volume, run) }
}

/// `nebd_discard`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_discard(
    volume: *mut Volume,
    offset: u64,
    length: u64,
    flags: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { run_plain(volume, Op::Discard, flags, Io::discard(offset, length)) }
}

/// `nebd_write_zeroes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_write_zeroes(
    volume: *mut Volume,
    offset: u64,
    length: u64,
    flags: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { run_plain(volume, Op::WriteZeroes, flags, Io::write_zeroes(offset, length)) }
}

/// `nebd_flush`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_flush(volume: *mut Volume, flags: u32) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { run_plain(volume, Op::Flush, flags, Io::flush()) }
}

/// Submits through a queue of the host's choice. The reply travels as the request's user data.
fn submit_to(
    queue: &Queue,
    reply: Reply,
    submit: impl FnOnce(u64) -> Result<(), SubmitError>,
) -> Result<(), Errno> {
    let reply = Box::into_raw(Box::new(reply));
    let submitted = submit(reply.expose_provenance() as u64);
    if let Err(error) = submitted {
        // SAFETY: made above; a refused request never returns its user data.
        drop(unsafe { Box::from_raw(reply) });
        return Err(match error {
            SubmitError::WouldBlock => AGAIN,
            SubmitError::Errno(errno) => errno,
        });
    }
    queue.kick();
    Ok(())
}

/// Reaps a queue and runs the callbacks; returns how many requests completed.
pub(crate) fn reap(queue: &Queue) -> usize {
    queue.reap(|user_data, result| {
        let reply: *mut Reply = std::ptr::with_exposed_provenance_mut(user_data as usize);
        // SAFETY: `submit_to` made it, alone submits to this queue with user data, and each request
        // is reaped once; the library keeps user data in memory of its own.
        let reply = unsafe { Box::from_raw(reply) };
        reply.tell(result);
    })
}

/// Starts a read or write.
///
/// # Safety
/// As `nebd_aio_readv` and `nebd_aio_writev` ask of their callers.
unsafe fn submit_data(
    volume: *mut Volume,
    op: Op,
    (iov, iovcnt): (*const RawIovec, c_int),
    offset: u64,
    flags: u32,
    target: Result<Target<Callback>, Errno>,
) -> c_int {
    let submit = |volume: &Volume| {
        let way = parse(op, flags)?;
        // SAFETY: the caller's promise.
        let iovecs = unsafe { raw::iovecs(iov, iovcnt) }?;
        let target = target?;
        let flags = way.flags;
        if let Some(index) = way.queue {
            let queue = volume.queue(index)?;
            submit_to(queue, volume.reply(target), |user_data| {
                // SAFETY: the memory is the library's until the callback.
                unsafe { queue.submit_raw(op, flags, offset, iovecs, user_data) }
            })?;
        } else {
            let reply = volume.reply(target);
            let done = Box::new(move |result| reply.tell(result));
            // SAFETY: the memory is the library's until the callback.
            unsafe { volume.session.submit_raw(op, flags, offset, iovecs, done) }?;
        }
        Ok(0)
    };
    // SAFETY: the caller's promise.
    unsafe { with(volume, submit) }
}

/// `nebd_aio_readv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_aio_readv(
    volume: *mut Volume,
    iov: *const RawIovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
    callback: Option<Callback>,
    user_data: *mut c_void,
) -> c_int {
    let target = Target::new(callback, user_data);
    // SAFETY: the caller's promise.
    unsafe { submit_data(volume, Op::Read, (iov, iovcnt), offset, flags, target) }
}

/// `nebd_aio_writev`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_aio_writev(
    volume: *mut Volume,
    iov: *const RawIovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
    callback: Option<Callback>,
    user_data: *mut c_void,
) -> c_int {
    let target = Target::new(callback, user_data);
    // SAFETY: the caller's promise.
    unsafe { submit_data(volume, Op::Write, (iov, iovcnt), offset, flags, target) }
}

/// Starts a request without data.
///
/// # Safety
/// `volume` is NULL or a volume that is not closed meanwhile; the target's function may be called.
unsafe fn submit_plain(
    volume: *mut Volume,
    op: Op,
    flags: u32,
    io: Io<'static>,
    target: Result<Target<Callback>, Errno>,
) -> c_int {
    let submit = |volume: &Volume| {
        let way = parse(op, flags)?;
        let target = target?;
        let io = io.with_flags(way.flags);
        if let Some(index) = way.queue {
            let queue = volume.queue(index)?;
            submit_to(queue, volume.reply(target), |user_data| queue.submit(io, user_data))?;
        } else {
            let reply = volume.reply(target);
            volume.session.submit(io, Box::new(move |result| reply.tell(result)))?;
        }
        Ok(0)
    };
    // SAFETY: the caller's promise.
    unsafe { with(volume, submit) }
}

/// `nebd_aio_discard`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_aio_discard(
    volume: *mut Volume,
    offset: u64,
    length: u64,
    flags: u32,
    callback: Option<Callback>,
    user_data: *mut c_void,
) -> c_int {
    let target = Target::new(callback, user_data);
    // SAFETY: the caller's promise.
    unsafe { submit_plain(volume, Op::Discard, flags, Io::discard(offset, length), target) }
}

/// `nebd_aio_write_zeroes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_aio_write_zeroes(
    volume: *mut Volume,
    offset: u64,
    length: u64,
    flags: u32,
    callback: Option<Callback>,
    user_data: *mut c_void,
) -> c_int {
    let target = Target::new(callback, user_data);
    let io = Io::write_zeroes(offset, length);
    // SAFETY: the caller's promise.
    unsafe { submit_plain(volume, Op::WriteZeroes, flags, io, target) }
}

/// `nebd_aio_flush`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_aio_flush(
    volume: *mut Volume,
    flags: u32,
    callback: Option<Callback>,
    user_data: *mut c_void,
) -> c_int {
    let target = Target::new(callback, user_data);
    // SAFETY: the caller's promise.
    unsafe { submit_plain(volume, Op::Flush, flags, Io::flush(), target) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_without_meaning_are_refused() {
        let fua = 1;
        let no_unmap = 2;
        assert!(parse(Op::Write, fua).is_ok());
        assert!(parse(Op::WriteZeroes, fua | no_unmap).is_ok());
        for (op, flags) in [
            (Op::Read, fua),
            (Op::Flush, fua),
            (Op::Discard, no_unmap),
            (Op::Write, no_unmap),
            (Op::Write, 1 << 2),
            (Op::Write, 1 << 12),
        ] {
            assert_eq!(parse(op, flags).err(), Some(Errno::INVAL), "{op:?} {flags:#x}");
        }
    }

    #[test]
    fn flags_name_a_queue() {
        assert_eq!(parse(Op::Read, 0).unwrap().queue, None);
        assert_eq!(parse(Op::Read, 1 << 16).unwrap().queue, Some(0));
        assert_eq!(parse(Op::Write, 64 << 16 | 1).unwrap().queue, Some(63));
        assert_eq!(parse_blocking(Op::Read, 1 << 16), Err(Errno::INVAL));
    }
}
