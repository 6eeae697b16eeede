//! Pointers of the host: memory of requests, functions to be called, handles, texts.

use std::borrow::Cow;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use nebd_client::{Errno, RawIovec, Session};
use rustix::fs::Stat;

use crate::completion::Completion;
use crate::image::Data;

/// Most pieces of a request, as of the system calls.
const IOVECS_MAX: usize = 1024;

/// `rbd_callback_t`.
pub type Function = unsafe extern "C" fn(completion: *const Completion, argument: *mut c_void);

/// A function of the host with its argument. Without a function the argument is only kept.
#[derive(Clone, Copy)]
pub struct Callback {
    function: Option<Function>,
    argument: *mut c_void,
}

// SAFETY: librbd's callbacks run on a thread of the library, and its users know; what the argument
// points to is not touched here.
unsafe impl Send for Callback {}
// SAFETY: as above.
unsafe impl Sync for Callback {}

impl Callback {
    /// `function`, if there is one, to be called with `argument`.
    pub fn new(function: Option<Function>, argument: *mut c_void) -> Callback {
        Callback { function, argument }
    }

    /// What it is called with.
    pub fn argument(&self) -> *mut c_void {
        self.argument
    }

    /// Calls it for a completion.
    pub fn call(&self, completion: &Arc<Completion>) {
        if let Some(function) = self.function {
            // SAFETY: the host gave a function for completions; the handle may be released in it,
            // for `completion` is another owner.
            unsafe { function(Arc::as_ptr(completion), self.argument) }
        }
    }
}

/// Memory of the host that a request reads or fills.
pub struct Caller<'a>(Cow<'a, [RawIovec]>);

// SAFETY: addresses and lengths; what they mean is promised to `Caller::new`.
unsafe impl Send for Caller<'_> {}

impl<'a> Caller<'a> {
    /// The memory of a request.
    ///
    /// # Safety
    /// It is valid for what the request does with it, and nobody else uses it in a conflicting way,
    /// until the request's host was told.
    pub unsafe fn new(iovecs: &'a [RawIovec]) -> Result<Caller<'a>, Errno> {
        let is_valid = |iovec: &RawIovec| !iovec.pointer.is_null() || iovec.length == 0;
        let all_are = iovecs.len() <= IOVECS_MAX && iovecs.iter().all(is_valid);
        if all_are { Ok(Caller(iovecs.into())) } else { Err(Errno::INVAL) }
    }

    /// The same memory, to be used after the array of its pieces is gone.
    pub fn into_owned(self) -> Caller<'static> {
        Caller(Cow::Owned(self.0.into_owned()))
    }

    /// Bytes.
    pub fn length(&self) -> Result<u64, Errno> {
        let sum = self.0.iter().try_fold(0u64, |sum, one| sum.checked_add(one.length as u64));
        sum.filter(|sum| *sum <= i64::MAX as u64).ok_or(Errno::INVAL)
    }

    /// The first `length` bytes.
    pub fn truncated(self, length: u64) -> Caller<'static> {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        let cut = self.0.iter().map(|iovec| {
            let length = iovec.length.min(left);
            left -= length;
            RawIovec { pointer: iovec.pointer, length }
        });
        Caller(cut.collect())
    }

    /// Where the pieces lie.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let pieces = self.0.iter().filter(|iovec| iovec.length > 0);
        pieces.map(|iovec| {
            let start = iovec.pointer.addr();
            start..start.saturating_add(iovec.length)
        })
    }

    /// Submits the request; `done` is what tells the host.
    pub fn submit(
        &self,
        session: &Session,
        data: Data,
        done: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) -> Result<(), Errno> {
        // SAFETY: the memory is ours until the host is told, which `done` does.
        unsafe { session.submit_raw(data.op, data.flags, data.offset, &self.0, Box::new(done)) }
    }

    /// Copies to the start of `bytes`, which is no shorter.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let mut at = 0;
        for iovec in self.0.iter() {
            let to = bytes[at..at + iovec.length].as_mut_ptr();
            // SAFETY: the piece is ours to read by the constructor's promise, and no memory of ours.
            unsafe { std::ptr::copy_nonoverlapping(iovec.pointer, to, iovec.length) };
            at += iovec.length;
        }
    }

    /// Copies from the start of `bytes`, which is no shorter.
    pub fn copy_from(&self, bytes: &[u8]) {
        let mut at = 0;
        for iovec in self.0.iter() {
            let from = bytes[at..at + iovec.length].as_ptr();
            // SAFETY: the piece is ours to fill by the constructor's promise, and no memory of ours.
            unsafe { std::ptr::copy_nonoverlapping(from, iovec.pointer, iovec.length) };
            at += iovec.length;
        }
    }
}

/// Submits a request for a part of a buffer, which comes back with the result.
pub fn submit_owned(
    session: &Session,
    data: Data,
    mut buffer: Vec<u8>,
    within: Range<usize>,
    done: impl FnOnce(Vec<u8>, Result<(), Errno>) + Send + 'static,
) -> Result<(), Errno> {
    let part = buffer.get_mut(within).ok_or(Errno::INVAL)?;
    let iovec = RawIovec { pointer: part.as_mut_ptr(), length: part.len() };
    // SAFETY: the bytes are the vector's, which `done` keeps, untouched, until it is called.
    unsafe {
        let done = Box::new(move |result| done(buffer, result));
        session.submit_raw(data.op, data.flags, data.offset, &[iovec], done)
    }
}

/// What a descriptor of the host is now; it may have been closed, and then it is an error.
pub fn stat_of_host(fd: RawFd) -> rustix::io::Result<Stat> {
    if fd < 0 {
        return Err(rustix::io::Errno::BADF);
    }
    // SAFETY: not negative. The call takes numbers that are no descriptors, or another's, for what
    // they are, and the borrow ends with it.
    rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// What a handle points to.
///
/// # Safety
/// `handle` is NULL or came from this library and is not given back while the result is used.
pub unsafe fn borrow<'a, T>(handle: *const T) -> Result<&'a T, Errno> {
    // SAFETY: the caller's promise.
    unsafe { handle.as_ref() }.ok_or(Errno::INVAL)
}

/// One more owner of what a shared handle points to.
///
/// # Safety
/// As for [`borrow`]; `handle` came from [`Arc::into_raw`].
pub unsafe fn share<T>(handle: *const T) -> Result<Arc<T>, Errno> {
    if handle.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the host's handle is an owner, by the caller's promise.
    unsafe {
        Arc::increment_strong_count(handle);
        Ok(Arc::from_raw(handle))
    }
}

/// Text of a C string; `None` for NULL.
///
/// # Safety
/// `text` is NULL or a C string that lives and does not change while the result is used.
pub unsafe fn text<'a>(text: *const c_char) -> Result<Option<&'a str>, Errno> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, and the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().map(Some).map_err(|_| Errno::INVAL)
}

/// The array of a request's pieces.
///
/// # Safety
/// `iov` is NULL or points to `count` iovecs that do not change while the result is used.
pub unsafe fn iovecs<'a>(iov: *const RawIovec, count: c_int) -> Result<&'a [RawIovec], Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
    if count == 0 {
        return Ok(&[]);
    }
    if iov.is_null() || !iov.is_aligned() {
        return Err(Errno::INVAL);
    }
    // SAFETY: aligned, not NULL, and the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(iov, count) })
}

/// Writes a result, if the host wants it.
///
/// # Safety
/// `to` is NULL or valid for a write.
pub unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Errno> {
    if to.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: not NULL, and the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}
