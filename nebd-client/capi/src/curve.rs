//! Curve's interface: the functions of `libnebd.h`, which says what they promise and what they ask
//! of their callers; that is also their safety contract. docs/curve-api.md compares it with Curve's.
//!
//! ```text
//!  nebd_lib_… ──► context   Curve's structs, memory of the caller
//!                 table     fd ─► disk; config: Curve's file; name: what a file name stands for
//!                 disk      any offset and length ──► nebd_client::Session
//!                 ranges    who may write where
//! ```

#![allow(clippy::missing_safety_doc)]

mod config;
mod context;
mod disk;
mod name;
mod place;
mod ranges;
mod table;

use std::ffi::{OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nebd_client::{Errno, Op};

pub use context::{AioCallback, AioContext, OpenFlags};

use crate::curve::context::{Lent, Reply};
use crate::curve::disk::Hold;
use crate::failure::{explain, guard_with};
use crate::raw;

/// The result of a function: 0, or -1 for whatever went wrong.
fn status(call: impl FnOnce() -> Result<(), Errno>) -> c_int {
    guard_with(-1, || call().map_or(-1, |()| 0))
}

/// The result of a function that tells a number of bytes.
fn bytes(call: impl FnOnce() -> Result<u64, Errno>) -> i64 {
    guard_with(-1, || call().ok().and_then(|bytes| i64::try_from(bytes).ok()).unwrap_or(-1))
}

/// `nebd_lib_init`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_init() -> c_int {
    status(|| table::init(None))
}

/// `nebd_lib_init_with_conf`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_init_with_conf(path: *const c_char) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { raw::text(path) }?;
        table::init(Some(Path::new(OsStr::from_bytes(path.to_bytes()))))
    })
}

/// `nebd_lib_uninit`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_uninit() -> c_int {
    status(|| {
        table::uninit();
        Ok(())
    })
}

/// `nebd_lib_init_open_flags`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_init_open_flags(flags: *mut OpenFlags) {
    // SAFETY: the caller's promise.
    if let Some(flags) = unsafe { flags.as_mut() } {
        flags.exclusive = 1;
    }
}

/// `nebd_lib_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_open(file_name: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { nebd_lib_open_with_flags(file_name, std::ptr::null()) }
}

/// `nebd_lib_open_with_flags`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_open_with_flags(
    file_name: *const c_char,
    flags: *const OpenFlags,
) -> c_int {
    let open = || {
        // SAFETY: the caller's promise.
        let file_name = unsafe { raw::text(file_name) }?.to_str().map_err(|_| Errno::INVAL)?;
        // SAFETY: the caller's promise.
        let exclusive = unsafe { flags.as_ref() }.is_none_or(|flags| flags.exclusive != 0);
        table::open(file_name, exclusive)
    };
    guard_with(-1, || open().unwrap_or(-1))
}

/// `nebd_lib_close`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_close(fd: c_int) -> c_int {
    status(|| {
        table::close(fd);
        Ok(())
    })
}

/// `nebd_lib_pread`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_pread(
    fd: c_int,
    data: *mut c_void,
    offset: i64,
    length: usize,
) -> c_int {
    status(|| {
        let data = Lent::new(data, length)?;
        // SAFETY: the caller's promise.
        unsafe { table::find(fd)?.run(Op::Read, offset, data) }
    })
}

/// `nebd_lib_pwrite`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_pwrite(
    fd: c_int,
    data: *const c_void,
    offset: i64,
    length: usize,
) -> c_int {
    status(|| {
        // A write only reads the memory.
        let data = Lent::new(data.cast_mut(), length)?;
        // SAFETY: the caller's promise.
        unsafe { table::find(fd)?.run(Op::Write, offset, data) }
    })
}

/// `nebd_lib_sync`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_sync(fd: c_int) -> c_int {
    status(|| table::find(fd)?.flush())
}

/// Starts a read or write.
///
/// # Safety
/// `context` is NULL or a context that is the library's, with its buffer, until its callback.
unsafe fn start(fd: c_int, op: Op, context: *mut AioContext) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let (reply, asked) = unsafe { Reply::new(context) }?;
        let data = Lent::new(asked.buf, asked.length)?;
        // SAFETY: the caller's promise.
        unsafe { table::find(fd)?.start(op, asked.offset, data, reply) }
    })
}

/// `nebd_lib_aio_pread`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_aio_pread(fd: c_int, context: *mut AioContext) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { start(fd, Op::Read, context) }
}

/// `nebd_lib_aio_pwrite`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_aio_pwrite(fd: c_int, context: *mut AioContext) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { start(fd, Op::Write, context) }
}

/// `nebd_lib_discard`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_discard(fd: c_int, context: *mut AioContext) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let (reply, asked) = unsafe { Reply::new(context) }?;
        table::find(fd)?.start_discard(asked.offset, asked.length, reply)
    })
}

/// `nebd_lib_flush`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_flush(fd: c_int, context: *mut AioContext) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let (reply, _) = unsafe { Reply::new(context) }?;
        table::find(fd)?.start_flush(reply)
    })
}

/// Size of the volume.
fn size(disk: &Hold) -> Result<u64, Errno> {
    disk.size().ok_or(Errno::IO)
}

/// `nebd_lib_filesize`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_filesize(fd: c_int) -> i64 {
    bytes(|| size(&table::find(fd)?))
}

/// `nebd_lib_getinfo`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_getinfo(fd: c_int) -> i64 {
    nebd_lib_filesize(fd)
}

/// `nebd_lib_blocksize`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_blocksize(fd: c_int) -> i64 {
    bytes(|| Ok(table::find(fd)?.block_size()))
}

/// `nebd_lib_resize`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_resize(fd: c_int, size: i64) -> c_int {
    status(|| {
        let size = u64::try_from(size).map_err(|_| Errno::INVAL)?;
        table::find(fd)?.resize(size).map_err(|error| {
            explain(&error);
            error.errno()
        })
    })
}

/// `nebd_lib_invalidcache`.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_invalidcache(fd: c_int) -> c_int {
    status(|| table::find(fd).map(drop))
}
