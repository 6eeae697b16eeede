//! The exported functions, but for those that move data. `nebd.h` says what they promise and what
//! they ask of their callers; that is also their safety contract.

#![allow(clippy::missing_safety_doc)]

use std::ffi::{OsStr, c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use nebd_client::{CompletionMode, Errno};

use crate::failure::{BADF, InCallback, explain, explanation, guard, guard_with};
use crate::options::Options;
use crate::raw::{self, EventCallback, RawInfo, RawStats, Target};
use crate::volume::Volume;

/// The library's version, with a final NUL.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// `nebd_version`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_version() -> *const c_char {
    VERSION.as_ptr().cast()
}

/// `nebd_error_text`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_error_text(text: *mut c_char, size: usize) -> usize {
    guard_with(0, || {
        let explanation = explanation();
        // SAFETY: the caller's promise.
        unsafe { raw::fill_text(text, size, &explanation) };
        explanation.len()
    })
}

/// `nebd_options_new`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_options_new() -> *mut Options {
    guard_with(std::ptr::null_mut(), || Box::into_raw(Box::default()))
}

/// `nebd_options_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_options_free(options: *mut Options) {
    guard_with((), || {
        if !options.is_null() {
            // SAFETY: made by nebd_options_new, and freed once.
            drop(unsafe { Box::from_raw(options) });
        }
    });
}

/// Changes an options object.
///
/// # Safety
/// As for every setter: `options` is NULL or an options object that no other thread uses.
unsafe fn set(
    options: *mut Options,
    change: impl FnOnce(&mut Options) -> Result<(), Errno>,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let options = unsafe { options.as_mut() }.ok_or(Errno::INVAL)?;
        change(options).map(|()| 0)
    })
}

/// `nebd_options_set_socket`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_options_set_socket(
    options: *mut Options,
    path: *const c_char,
) -> c_int {
    let change = |options: &mut Options| {
        // SAFETY: the caller's promise.
        let path = unsafe { raw::text(path) }?;
        let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
        options.change(|inner| inner.socket(path));
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { set(options, change) }
}

/// Setters that hand one value on, whose meaning `nebd_client::Options` checks at open.
macro_rules! setters {
    ($($name:ident($argument:ident: $type:ty) => $inner:ident($value:expr);)*) => {$(
        #[doc = concat!("`", stringify!($name), "`.")]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(options: *mut Options, $argument: $type) -> c_int {
            let change = |options: &mut Options| {
                options.change(|inner| inner.$inner($value));
                Ok(())
            };
            // SAFETY: the caller's promise.
            unsafe { set(options, change) }
        }
    )*};
}

setters! {
    nebd_options_set_read_only(read_only: c_int) => read_only(read_only != 0);
    nebd_options_set_exclusive(exclusive: c_int) => exclusive(exclusive != 0);
    nebd_options_set_arena_bytes(bytes: u64) => arena_bytes(bytes);
    nebd_options_set_connect_timeout_ms(ms: u64) => connect_timeout(Duration::from_millis(ms));
    nebd_options_set_io_timeout_ms(ms: u64) => io_timeout(limit(ms));
    nebd_options_set_stall_after_ms(ms: u64) => stall_after(Duration::from_millis(ms));
    nebd_options_set_spin_us(us: u64) => spin(Duration::from_micros(us));
}

/// Zero is no limit.
fn limit(ms: u64) -> Option<Duration> {
    (ms != 0).then(|| Duration::from_millis(ms))
}

/// `nebd_options_set_queues`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_options_set_queues(
    options: *mut Options,
    count: u32,
    depth: u32,
) -> c_int {
    let change = |options: &mut Options| {
        options.change(|inner| inner.queues(count).depth(depth));
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { set(options, change) }
}

/// `nebd_options_set_completion`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_options_set_completion(options: *mut Options, mode: c_int) -> c_int {
    let change = |options: &mut Options| {
        options.set_mode(match mode {
            0 => CompletionMode::Threaded,
            1 => CompletionMode::Manual,
            _ => return Err(Errno::INVAL),
        });
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { set(options, change) }
}

/// `nebd_options_set_event_callback`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_options_set_event_callback(
    options: *mut Options,
    callback: Option<EventCallback>,
    user_data: *mut c_void,
) -> c_int {
    let target = Target::new(callback, user_data).ok();
    let change = |options: &mut Options| {
        options.set_events(target);
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { set(options, change) }
}

/// `nebd_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_open(
    name: *const c_char,
    options: *const Options,
    volume: *mut *mut Volume,
) -> c_int {
    guard(|| {
        if volume.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: not NULL, and the caller's promise.
        unsafe { volume.write(std::ptr::null_mut()) };
        // SAFETY: the caller's promise.
        let name = unsafe { raw::text(name) }?.to_str().map_err(|_| Errno::INVAL)?;
        // SAFETY: the caller's promise.
        let options = unsafe { options.as_ref() }.cloned().unwrap_or_default();
        let opened = Volume::open(name, &options).map_err(|error| {
            explain(&error);
            error.errno()
        })?;
        // SAFETY: as above.
        unsafe { volume.write(Box::into_raw(Box::new(opened))) };
        Ok(0)
    })
}

/// `nebd_close`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_close(volume: *mut Volume) -> c_int {
    guard(|| {
        if volume.is_null() {
            return Ok(0);
        }
        InCallback::refuse()?;
        // SAFETY: made by nebd_open, and closed once.
        let volume = unsafe { Box::from_raw(volume) };
        volume.close().map(|()| 0)
    })
}

/// Calls a function of a volume.
///
/// # Safety
/// `volume` is NULL or a volume that is not closed meanwhile.
pub(crate) unsafe fn with(
    volume: *mut Volume,
    call: impl FnOnce(&Volume) -> Result<c_int, Errno>,
) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| call(unsafe { raw::borrow(volume) }?))
}

/// `nebd_info`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_info(volume: *mut Volume, info: *mut RawInfo, size: usize) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe { with(volume, |volume| raw::fill(info, size, &volume.info(false)?).map(|()| 0)) }
}

/// `nebd_refresh`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_refresh(
    volume: *mut Volume,
    info: *mut RawInfo,
    size: usize,
) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe { with(volume, |volume| raw::fill(info, size, &volume.info(true)?).map(|()| 0)) }
}

/// `nebd_stats`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_stats(
    volume: *mut Volume,
    stats: *mut RawStats,
    size: usize,
) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe { with(volume, |volume| raw::fill(stats, size, &volume.stats()?).map(|()| 0)) }
}

/// `nebd_resize`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_resize(volume: *mut Volume, size_bytes: u64) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with(volume, |volume| volume.resize(size_bytes).map(|()| 0)) }
}

/// `nebd_poll`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_poll(volume: *mut Volume, queue: u32, timeout_ms: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with(volume, |volume| volume.poll(queue, timeout_ms)) }
}

/// `nebd_arm`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_arm(volume: *mut Volume, queue: u32) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with(volume, |volume| volume.arm(queue)) }
}

/// `nebd_eventfd`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_eventfd(volume: *mut Volume, queue: u32) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with(volume, |volume| volume.event_fd(queue)) }
}

/// `nebd_alloc`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_alloc(volume: *mut Volume, length: usize) -> *mut c_void {
    guard_with(std::ptr::null_mut(), || {
        // SAFETY: the caller's promise.
        let volume = unsafe { raw::borrow(volume) };
        let address = volume.and_then(|volume| volume.alloc(length));
        address.map_or(std::ptr::null_mut(), <*mut u8>::cast)
    })
}

/// `nebd_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_free(volume: *mut Volume, data: *mut c_void) {
    guard_with((), || {
        // SAFETY: the caller's promise.
        if let Ok(volume) = unsafe { raw::borrow(volume) } {
            volume.free(data.addr());
        }
    });
}

/// `nebd_register_memory`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_register_memory(
    volume: *mut Volume,
    memfd: c_int,
    length: u64,
    address: *mut c_void,
) -> c_int {
    let register = |volume: &Volume| {
        if memfd < 0 {
            return Err(BADF);
        }
        if address.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: not negative, and the caller keeps it open during the call.
        let memfd = unsafe { BorrowedFd::borrow_raw(memfd) };
        volume.register(memfd, length, address.cast())
    };
    // SAFETY: the caller's promise.
    unsafe { with(volume, register) }
}

/// `nebd_unregister_memory`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_unregister_memory(volume: *mut Volume, id: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with(volume, |volume| volume.unregister(id).map(|()| 0)) }
}
