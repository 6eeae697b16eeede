//! librbd: images, and the calls that wait.
//!
//! What the functions promise and ask is librbd's own documentation; that is also their safety
//! contract.

#![allow(clippy::missing_safety_doc)]

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use nebd_client::{Errno, OpFlags, RawIovec};

use crate::admin;
use crate::completion::Completion;
use crate::exports_rados::Pool;
use crate::failure::{NOENT, guard, guard_long};
use crate::image::Image;
use crate::raw::{self, Caller};

/// librbd's objects have a size, ours are the server's business; QEMU shows it as the cluster size.
const ORDER: u32 = 16;

/// `rbd_image_info_t`.
#[repr(C)]
pub struct ImageInfo {
    size: u64,
    object_size: u64,
    object_count: u64,
    order: c_int,
    block_name_prefix: [c_char; 24],
    parent_pool: i64,
    parent_name: [c_char; 96],
}

/// `rbd_open`. A snapshot cannot be opened, for there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_open(
    pool: *mut Pool,
    name: *const c_char,
    image: *mut *const Image,
    snapshot: *const c_char,
) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| unsafe { open(pool, name, image, snapshot, false) })
}

/// `rbd_open_read_only`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_open_read_only(
    pool: *mut Pool,
    name: *const c_char,
    image: *mut *const Image,
    snapshot: *const c_char,
) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| unsafe { open(pool, name, image, snapshot, true) })
}

/// Opens an image.
///
/// # Safety
/// As `rbd_open` asks.
unsafe fn open(
    pool: *mut Pool,
    name: *const c_char,
    image: *mut *const Image,
    snapshot: *const c_char,
    read_only: bool,
) -> Result<(), Errno> {
    // SAFETY: the caller's promise, three times.
    let (pool, name, snapshot) =
        unsafe { (raw::borrow(pool)?, raw::text(name)?, raw::text(snapshot)?) };
    if snapshot.is_some_and(|name| !name.is_empty()) {
        return Err(NOENT);
    }
    if image.is_null() {
        return Err(Errno::INVAL);
    }
    let volume = pool.volume(name.ok_or(Errno::INVAL)?)?;
    let opened = Arc::new(Image::open(&pool.config, &volume, read_only)?);
    // SAFETY: not NULL, and the caller's promise.
    unsafe { raw::put(image, Arc::into_raw(opened)) }
}

/// `rbd_close`. Waits for what is in flight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_close(image: *const Image) -> c_int {
    guard(|| {
        if image.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: made by rbd_open, and given back once.
        Image::close(unsafe { Arc::from_raw(image) });
        Ok(())
    })
}

/// `rbd_create`. The order is that of objects, which do not exist here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_create(
    pool: *mut Pool,
    name: *const c_char,
    size: u64,
    _order: *mut c_int,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise, twice.
        let (pool, name) = unsafe { (raw::borrow(pool)?, raw::text(name)?) };
        admin::create(&pool.config, &pool.volume(name.ok_or(Errno::INVAL)?)?, size)
    })
}

/// `rbd_remove`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_remove(pool: *mut Pool, name: *const c_char) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise, twice.
        let (pool, name) = unsafe { (raw::borrow(pool)?, raw::text(name)?) };
        admin::remove(&pool.config, &pool.volume(name.ok_or(Errno::INVAL)?)?)
    })
}

/// Calls a function of an image.
///
/// # Safety
/// `image` is NULL or an image that is not closed meanwhile.
unsafe fn with(image: *const Image, call: impl FnOnce(&Image) -> Result<(), Errno>) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| call(unsafe { raw::borrow(image) }?))
}

/// `rbd_resize`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_resize(image: *const Image, size: u64) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with(image, |image| image.resize(size)) }
}

/// `rbd_get_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_get_size(image: *const Image, size: *mut u64) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe { with(image, |image| raw::put(size, image.info().size)) }
}

/// `rbd_stat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_stat(
    image: *const Image,
    info: *mut ImageInfo,
    info_bytes: usize,
) -> c_int {
    let fill = |image: &Image| {
        if info_bytes < size_of::<ImageInfo>() {
            return Err(Errno::INVAL);
        }
        let size = image.info().size;
        let filled = ImageInfo {
            size,
            object_size: 1 << ORDER,
            object_count: size.div_ceil(1 << ORDER),
            order: ORDER as c_int,
            block_name_prefix: [0; 24],
            parent_pool: -1,
            parent_name: [0; 96],
        };
        // SAFETY: the caller's promise, and it is long enough.
        unsafe { raw::put(info, filled) }
    };
    // SAFETY: the caller's promise.
    unsafe { with(image, fill) }
}

/// `rbd_get_features`: none. With `fast-diff` QEMU would ask what is allocated, and the server is
/// not asked that yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_get_features(image: *const Image, features: *mut u64) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe { with(image, |_| raw::put(features, 0)) }
}

/// `rbd_get_flags`: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_get_flags(image: *const Image, flags: *mut u64) -> c_int {
    // SAFETY: the caller's promise, twice.
    unsafe { with(image, |_| raw::put(flags, 0)) }
}

/// `rbd_get_parent_info`: there is no parent.
#[unsafe(no_mangle)]
pub extern "C" fn rbd_get_parent_info(
    _image: *const Image,
    _pool: *mut c_char,
    _pool_bytes: usize,
    _name: *mut c_char,
    _name_bytes: usize,
    _snapshot: *mut c_char,
    _snapshot_bytes: usize,
) -> c_int {
    -NOENT.0
}

/// `rbd_namespace_exists`: it does not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_namespace_exists(
    _pool: *mut Pool,
    _name: *const c_char,
    exists: *mut bool,
) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| unsafe { raw::put(exists, false) })
}

/// Starts a request and waits for it.
///
/// # Safety
/// `image` is NULL or an image that is not closed meanwhile.
unsafe fn wait(
    image: *const Image,
    start: impl FnOnce(&Arc<Image>, Arc<Completion>) -> Result<(), Errno>,
) -> i64 {
    guard_long(|| {
        // SAFETY: the caller's promise.
        let image = unsafe { raw::share(image) }?;
        let completion = Arc::new(Completion::default());
        start(&image, completion.clone())?;
        Ok(completion.wait())
    })
}

/// `rbd_read`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_read(
    image: *const Image,
    offset: u64,
    length: usize,
    data: *mut c_char,
) -> isize {
    let iovecs = [RawIovec { pointer: data.cast(), length }];
    let read = |image: &Arc<Image>, completion| {
        // SAFETY: the caller's promise, until this returns.
        image.read(offset, unsafe { Caller::new(&iovecs) }?, completion)
    };
    // SAFETY: the caller's promise.
    unsafe { wait(image, read) as isize }
}

/// `rbd_write`. Returns the length, unlike the asynchronous one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_write(
    image: *const Image,
    offset: u64,
    length: usize,
    data: *const c_char,
) -> isize {
    // A write only reads the memory; iovecs have no const.
    let iovecs = [RawIovec { pointer: data.cast_mut().cast(), length }];
    let write = |image: &Arc<Image>, completion| {
        // SAFETY: the caller's promise, until this returns.
        image.write(offset, OpFlags::NONE, unsafe { Caller::new(&iovecs) }?, completion)
    };
    // SAFETY: the caller's promise.
    match unsafe { wait(image, write) } {
        0 => length as isize,
        error => error as isize,
    }
}

/// `rbd_flush`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_flush(image: *const Image) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { wait(image, |image, completion| image.flush(completion)) as c_int }
}

/// `rbd_invalidate_cache`: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn rbd_invalidate_cache(_image: *const Image) -> c_int {
    0
}

/// The callback of `rbd_diff_iterate2`.
pub type DiffCallback = unsafe extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;

/// `rbd_diff_iterate2`: everything is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rbd_diff_iterate2(
    image: *const Image,
    snapshot: *const c_char,
    offset: u64,
    length: u64,
    _include_parent: u8,
    _whole_object: u8,
    callback: Option<DiffCallback>,
    argument: *mut c_void,
) -> c_int {
    guard_long(|| {
        // SAFETY: the caller's promise, twice.
        let (image, snapshot) = unsafe { (raw::borrow(image)?, raw::text(snapshot)?) };
        if snapshot.is_some() {
            return Err(NOENT);
        }
        let length = length.min(image.info().size.saturating_sub(offset));
        let callback = callback.ok_or(Errno::INVAL)?;
        if length == 0 {
            return Ok(0);
        }
        // SAFETY: the host gave a function for this.
        Ok(unsafe { callback(offset, length as usize, 1, argument) }.into())
    }) as c_int
}

/// `rbd_snap_list`: an empty list.
#[unsafe(no_mangle)]
pub extern "C" fn rbd_snap_list(
    _image: *const Image,
    _snapshots: *mut c_void,
    _count_max: *mut c_int,
) -> c_int {
    0
}

/// `rbd_snap_list_end`: nothing was listed.
#[unsafe(no_mangle)]
pub extern "C" fn rbd_snap_list_end(_snapshots: *mut c_void) {}

/// What nebd does not have.
macro_rules! not_supported {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: not supported.")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($argument: $type),*) -> c_int {
            -Errno::NOTSUP.0
        }
    )*};
}

not_supported! {
    rbd_snap_create(_image: *const Image, _name: *const c_char);
    rbd_snap_remove(_image: *const Image, _name: *const c_char);
    rbd_snap_rollback(_image: *const Image, _name: *const c_char);
    rbd_encryption_format(
        _image: *const Image, _format: c_int, _options: *mut c_void, _options_bytes: usize
    );
    rbd_encryption_load(
        _image: *const Image, _format: c_int, _options: *mut c_void, _options_bytes: usize
    );
}
