//! C's values: structs that cross the boundary, function pointers with their user data, pointers.

use std::ffi::{CStr, c_char, c_int, c_void};

use nebd_client::{Errno, RawIovec};

use crate::failure::{InCallback, negative};

/// Most entries of an iovec array, as `IOV_MAX`.
const IOVECS_MAX: usize = 1024;

/// `nebd_callback`.
pub type Callback = unsafe extern "C" fn(user_data: *mut c_void, result: c_int);
/// `nebd_event_callback`.
pub type EventCallback = unsafe extern "C" fn(user_data: *mut c_void, event: *const RawEvent);

/// `struct nebd_event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct RawEvent {
    /// `NEBD_EVENT_…`.
    pub kind: u32,
    /// A negative errno, or 0.
    pub error: i32,
    /// What the kind says.
    pub value: u64,
}

/// `struct nebd_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RawInfo {
    /// Size of the volume.
    pub size_bytes: u64,
    /// Longest read or write that is not split.
    pub transfer_bytes_max: u64,
    /// 512 or 4096.
    pub block_size: u32,
    /// `NEBD_INFO_…`.
    pub flags: u32,
    /// Granted by the storage.
    pub epoch_major: u32,
    /// Raised by the host.
    pub epoch_minor: u32,
    /// Queues of the session.
    pub queue_count: u32,
    /// Zero.
    pub reserved: u32,
}

/// `struct nebd_stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RawStats {
    /// Of the server that attached the session last.
    pub generation: u64,
    /// 1 if attached right now.
    pub connected: u64,
    /// Times attached again.
    pub reconnects: u64,
    /// Requests in the rings.
    pub in_flight: u64,
    /// Servers that took over.
    pub takeovers: u64,
    /// At the last takeover.
    pub blackout_last_us: u64,
    /// At the worst takeover.
    pub blackout_worst_us: u64,
}

/// Structs that may be filled in part: plain bytes without padding, every pattern of them valid.
pub trait Fillable: Copy {}
impl Fillable for RawInfo {}
impl Fillable for RawStats {}

const _: () = {
    assert!(size_of::<RawEvent>() == 16);
    assert!(size_of::<RawInfo>() == 2 * 8 + 6 * 4);
    assert!(size_of::<RawStats>() == 7 * 8);
};

/// A host's function with its user data.
#[derive(Clone, Copy)]
pub struct Target<F> {
    function: F,
    user_data: *mut c_void,
}

// SAFETY: nebd.h tells the host that callbacks run on other threads; the pointer itself is only
// handed back to it.
unsafe impl<F: Send> Send for Target<F> {}
// SAFETY: as above; nothing behind the pointer is touched here.
unsafe impl<F: Sync> Sync for Target<F> {}

impl<F> Target<F> {
    /// `function`, which must not be NULL, to be called with `user_data`.
    pub fn new(function: Option<F>, user_data: *mut c_void) -> Result<Target<F>, Errno> {
        Ok(Target { function: function.ok_or(Errno::INVAL)?, user_data })
    }
}

impl Target<Callback> {
    /// Tells the host how its request went.
    pub fn call(self, result: Result<(), Errno>) {
        let _in_callback = InCallback::enter();
        // SAFETY: the host gave a function that may be called from any thread with this user data.
        unsafe { (self.function)(self.user_data, result.err().map_or(0, negative)) }
    }
}

impl Target<EventCallback> {
    /// Tells the host what happened.
    pub fn call(self, event: &RawEvent) {
        let _in_callback = InCallback::enter();
        // SAFETY: as for completions; the event outlives the call.
        unsafe { (self.function)(self.user_data, event) }
    }
}

/// What an opaque handle points to.
///
/// # Safety
/// `handle` is NULL or came from this library and is not freed while the result is used.
pub unsafe fn borrow<'a, T>(handle: *const T) -> Result<&'a T, Errno> {
    // SAFETY: the caller's promise.
    unsafe { handle.as_ref() }.ok_or(Errno::INVAL)
}

/// Text of a C string.
///
/// # Safety
/// `text` is NULL or a C string that lives and does not change while the result is used.
pub unsafe fn text<'a>(text: *const c_char) -> Result<&'a CStr, Errno> {
    if text.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: not NULL, and the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// The iovec array of a request. Its entries are checked, the memory they name is not looked at.
///
/// # Safety
/// `iov` is NULL or points to `count` iovecs that do not change while the result is used.
pub unsafe fn iovecs<'a>(iov: *const RawIovec, count: c_int) -> Result<&'a [RawIovec], Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
    if count == 0 || count > IOVECS_MAX || iov.is_null() || !iov.is_aligned() {
        return Err(Errno::INVAL);
    }
    // SAFETY: aligned, not NULL, and the caller's promise.
    let iovecs = unsafe { std::slice::from_raw_parts(iov, count) };
    let is_valid = |iovec: &RawIovec| !iovec.pointer.is_null() || iovec.length == 0;
    if iovecs.iter().all(is_valid) { Ok(iovecs) } else { Err(Errno::INVAL) }
}

/// Fills a struct of the host, which may know a shorter or a longer one.
///
/// # Safety
/// `to` is NULL or valid for writes of `size` bytes.
pub unsafe fn fill<T: Fillable>(to: *mut T, size: usize, value: &T) -> Result<(), Errno> {
    if to.is_null() {
        return Err(Errno::INVAL);
    }
    let known = size.min(size_of::<T>());
    let to = to.cast::<u8>();
    // SAFETY: `known` is within both, and so is the rest within `to`; the value is a local of ours.
    unsafe {
        std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), to, known);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// Copies text with a final NUL, cut to `size` bytes.
///
/// # Safety
/// `to` is valid for writes of `size` bytes, or NULL with size 0.
pub unsafe fn fill_text(to: *mut c_char, size: usize, text: &str) {
    if to.is_null() || size == 0 {
        return;
    }
    let length = text.len().min(size - 1);
    let to = to.cast::<u8>();
    // SAFETY: `length + 1` bytes fit, and the text is ours.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to, length);
        to.add(length).write(0);
    }
}
