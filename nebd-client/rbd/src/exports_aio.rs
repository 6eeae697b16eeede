//! librbd: requests that complete later.
//!
//! What the functions promise and ask is librbd's own documentation; that is also their safety
//! contract. A request that is refused at once tells its host by the return value alone.

#![allow(clippy::missing_safety_doc)]

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nebd_client::{Errno, OpFlags, RawIovec};

use crate::completion::{Completion, Notice};
use crate::failure::{guard, guard_long, guard_with};
use crate::image::Image;
use crate::raw::{self, Callback, Caller, Function};

/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`.
const THICK: c_int = 1;
/// `LIBRADOS_OP_FLAG_FADVISE_FUA`.
const FUA: c_int = 0x80;
/// `EVENT_TYPE_EVENTFD`.
const EVENT_TYPE_EVENTFD: c_int = 2;

/// `rbd_aio_create_completion`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_create_completion(
    argument: *mut c_void,
    function: Option<Function>,
    completion: *mut *const Completion,
) -> c_int {
    guard(|| {
        if completion.is_null() {
            return Err(Errno::INVAL);
        }
        let new = Arc::new(Completion::new(Some(Callback::new(function, argument))));
        // SAFETY: not NULL, and the caller's promise.
        unsafe { raw::put(completion, Arc::into_raw(new)) }
    })
}

/// `rbd_aio_release`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_release(completion: *const Completion) {
    guard_with((), || {
        if !completion.is_null() {
            // SAFETY: made by rbd_aio_create_completion, and given back once.
            unsafe { Arc::from_raw(completion) }.release();
        }
    });
}

/// `rbd_aio_get_return_value`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_get_return_value(completion: *const Completion) -> isize {
    // SAFETY: the caller's promise.
    guard_long(|| Ok(unsafe { raw::borrow(completion) }?.value())) as isize
}

/// `rbd_aio_get_arg`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_get_arg(completion: *const Completion) -> *mut c_void {
    // SAFETY: the caller's promise.
    let completion = unsafe { raw::borrow(completion) };
    let callback = completion.ok().and_then(Completion::callback);
    callback.map_or(std::ptr::null_mut(), |callback| callback.argument())
}

/// `rbd_aio_is_complete`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_is_complete(completion: *const Completion) -> c_int {
    // SAFETY: the caller's promise.
    guard_long(|| Ok(unsafe { raw::borrow(completion) }?.is_complete().into())) as c_int
}

/// `rbd_aio_wait_for_complete`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_wait_for_complete(completion: *const Completion) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let completion = unsafe { raw::share(completion) }?;
        completion.wait();
        Ok(())
    })
}

/// Starts a request.
///
/// # Safety
/// `image` and `completion` are NULL or handles that are not given back meanwhile.
unsafe fn start(
    image: *const Image,
    completion: *const Completion,
    start: impl FnOnce(&Arc<Image>, Arc<Completion>) -> Result<(), Errno>,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise, twice.
        let (image, completion) = unsafe { (raw::share(image)?, raw::share(completion)?) };
        start(&image, completion)
    })
}

/// Starts a read.
///
/// # Safety
/// As for [`start`] and [`Caller::new`].
unsafe fn read(
    image: *const Image,
    iovecs: &[RawIovec],
    offset: u64,
    completion: *const Completion,
) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe {
        start(image, completion, |image, completion| {
            image.read(offset, Caller::new(iovecs)?, completion)
        })
    }
}

/// Starts a write.
///
/// # Safety
/// As for [`start`] and [`Caller::new`].
unsafe fn write(
    image: *const Image,
    iovecs: &[RawIovec],
    offset: u64,
    completion: *const Completion,
) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe {
        start(image, completion, |image, completion| {
            image.write(offset, OpFlags::NONE, Caller::new(iovecs)?, completion)
        })
    }
}

/// `rbd_aio_read`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_read(
    image: *const Image,
    offset: u64,
    length: usize,
    data: *mut c_char,
    completion: *const Completion,
) -> c_int {
    let iovecs = [RawIovec { pointer: data.cast(), length }];
    // SAFETY: the caller's promise.
    unsafe { read(image, &iovecs, offset, completion) }
}

/// `rbd_aio_readv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_readv(
    image: *const Image,
    iov: *const RawIovec,
    count: c_int,
    offset: u64,
    completion: *const Completion,
) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe {
        match raw::iovecs(iov, count) {
            Ok(iovecs) => read(image, iovecs, offset, completion),
            Err(errno) => -errno.0,
        }
    }
}

/// `rbd_aio_write`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_write(
    image: *const Image,
    offset: u64,
    length: usize,
    data: *const c_char,
    completion: *const Completion,
) -> c_int {
    // A write only reads the memory; iovecs have no const.
    let iovecs = [RawIovec { pointer: data.cast_mut().cast(), length }];
    // SAFETY: the caller's promise.
    unsafe { write(image, &iovecs, offset, completion) }
}

/// `rbd_aio_writev`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_writev(
    image: *const Image,
    iov: *const RawIovec,
    count: c_int,
    offset: u64,
    completion: *const Completion,
) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe {
        match raw::iovecs(iov, count) {
            Ok(iovecs) => write(image, iovecs, offset, completion),
            Err(errno) => -errno.0,
        }
    }
}

/// `rbd_aio_discard`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_discard(
    image: *const Image,
    offset: u64,
    length: u64,
    completion: *const Completion,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        start(image, completion, |image, completion| image.discard(offset, length, completion))
    }
}

/// `rbd_aio_write_zeroes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_write_zeroes(
    image: *const Image,
    offset: u64,
    length: usize,
    completion: *const Completion,
    zero_flags: c_int,
    op_flags: c_int,
) -> c_int {
    let zero = |image: &Arc<Image>, completion| {
        if zero_flags & !THICK != 0 {
            return Err(Errno::INVAL);
        }
        let thick = if zero_flags & THICK != 0 { OpFlags::NO_UNMAP } else { OpFlags::NONE };
        let durable = if op_flags & FUA != 0 { OpFlags::FUA } else { OpFlags::NONE };
        image.write_zeroes((offset, length as u64), thick | durable, completion)
    };
    // SAFETY: the caller's promise.
    unsafe { start(image, completion, zero) }
}

/// `rbd_aio_flush`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_aio_flush(
    image: *const Image,
    completion: *const Completion,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { start(image, completion, |image, completion| image.flush(completion)) }
}

/// `rbd_set_image_notification`: an eventfd, which stays the host's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_set_image_notification(
    image: *const Image,
    fd: c_int,
    kind: c_int,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let image = unsafe { raw::borrow(image) }?;
        if kind != EVENT_TYPE_EVENTFD || fd < 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: not negative, and the host keeps it open during the call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let own = fd.try_clone_to_owned().map_err(|error| Errno::from_io(&error))?;
        image.notice.set(Notice::new(own)).map_err(|_| Errno::INVAL)
    })
}

/// `rbd_poll_io_events`: completions that were told since the last call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_poll_io_events(
    image: *const Image,
    completions: *mut *const Completion,
    count: c_int,
) -> c_int {
    guard_long(|| {
        // SAFETY: the caller's promise.
        let notice = unsafe { raw::borrow(image) }?.notice.get().ok_or(Errno::INVAL)?;
        let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        let mut taken = 0;
        while taken < count
            && let Some(completion) = notice.pop()
        {
            // SAFETY: the host's array has `count` places. The handle is the host's: it was not
            // released, and the host does not do that before it has asked.
            unsafe { raw::put(completions.wrapping_add(taken), Arc::as_ptr(&completion)) }?;
            taken += 1;
        }
        Ok(taken as i64)
    }) as c_int
}
