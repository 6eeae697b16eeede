//! librados: connections and pools. Its objects do not exist here.
//!
//! What the functions promise and ask is librados's own documentation; that is also their safety
//! contract.

#![allow(clippy::missing_safety_doc)]

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;

use nebd_client::Errno;

use crate::config::Config;
use crate::failure::{NOENT, guard, guard_with};
use crate::raw;

/// What `rados_t` points to.
#[derive(Default)]
pub struct Cluster {
    config: Config,
}

/// What `rados_ioctx_t` points to: a pool.
pub struct Pool {
    pub(crate) config: Config,
    backend: String,
    namespace: String,
}

impl Pool {
    /// The volume that an image's name stands for.
    pub fn volume(&self, image: &str) -> Result<String, Errno> {
        // There are none, so nothing is in one.
        if !self.namespace.is_empty() {
            return Err(NOENT);
        }
        Ok(format!("{}:{image}", self.backend))
    }
}

/// `rados_create`. The user's name means nothing here: the socket's and the volume's modes say who
/// may do what.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_create(cluster: *mut *mut Cluster, _user: *const c_char) -> c_int {
    guard(|| {
        if cluster.is_null() {
            return Err(Errno::INVAL);
        }
        let new = Box::new(Cluster { config: Config::of_environment() });
        // SAFETY: not NULL, and the caller's promise.
        unsafe { raw::put(cluster, Box::into_raw(new)) }
    })
}

/// `rados_create2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_create2(
    cluster: *mut *mut Cluster,
    _cluster_name: *const c_char,
    user: *const c_char,
    _flags: u64,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { rados_create(cluster, user) }
}

/// `rados_conf_read_file`. There is no file where none is named: the environment names the socket.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_conf_read_file(cluster: *mut Cluster, path: *const c_char) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise, twice; a connection is set up by one thread.
        let (cluster, path) = unsafe { (cluster.as_mut().ok_or(Errno::INVAL)?, raw::text(path)?) };
        path.map_or(Ok(()), |path| cluster.config.read(Path::new(path)))
    })
}

/// `rados_conf_set`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_conf_set(
    cluster: *mut Cluster,
    option: *const c_char,
    value: *const c_char,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise, three times; a connection is set up by one thread.
        let (cluster, option, value) = unsafe {
            (cluster.as_mut().ok_or(Errno::INVAL)?, raw::text(option)?, raw::text(value)?)
        };
        cluster.config.set(option.ok_or(Errno::INVAL)?, value.ok_or(Errno::INVAL)?)
    })
}

/// `rados_connect`. Each image connects by itself.
#[unsafe(no_mangle)]
pub extern "C" fn rados_connect(_cluster: *mut Cluster) -> c_int {
    0
}

/// `rados_shutdown`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_shutdown(cluster: *mut Cluster) {
    guard_with((), || {
        if !cluster.is_null() {
            // SAFETY: made by rados_create, and given back once.
            drop(unsafe { Box::from_raw(cluster) });
        }
    });
}

/// `rados_ioctx_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_ioctx_create(
    cluster: *mut Cluster,
    name: *const c_char,
    pool: *mut *mut Pool,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise, twice.
        let (cluster, name) = unsafe { (raw::borrow(cluster)?, raw::text(name)?) };
        let backend = name.ok_or(Errno::INVAL)?.to_owned();
        if pool.is_null() {
            return Err(Errno::INVAL);
        }
        let config = cluster.config.clone();
        let new = Box::new(Pool { config, backend, namespace: String::new() });
        // SAFETY: not NULL, and the caller's promise.
        unsafe { raw::put(pool, Box::into_raw(new)) }
    })
}

/// `rados_ioctx_destroy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_ioctx_destroy(pool: *mut Pool) {
    guard_with((), || {
        if !pool.is_null() {
            // SAFETY: made by rados_ioctx_create, and given back once.
            drop(unsafe { Box::from_raw(pool) });
        }
    });
}

/// `rados_ioctx_set_namespace`. It cannot fail, so what is done in a namespace does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rados_ioctx_set_namespace(pool: *mut Pool, name: *const c_char) {
    guard_with((), || {
        // SAFETY: the caller's promise, twice; a pool is set up by one thread.
        if let (Some(pool), Ok(name)) = unsafe { (pool.as_mut(), raw::text(name)) } {
            pool.namespace = name.unwrap_or("").to_owned();
        }
    });
}

/// Functions of librados's objects, which fio binds at load and does not call for images.
macro_rules! objects {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: not here.")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($argument: $type),*) -> c_int {
            -Errno::NOTSUP.0
        }
    )*};
}

objects! {
    rados_aio_create_completion(
        _argument: *mut c_void, _complete: *const c_void, _safe: *const c_void, _made: *mut c_void
    );
    rados_aio_is_complete(_completion: *mut c_void);
    rados_aio_read(
        _pool: *mut Pool, _object: *const c_char, _completion: *mut c_void, _data: *mut c_char,
        _length: usize, _offset: u64
    );
    rados_aio_write(
        _pool: *mut Pool, _object: *const c_char, _completion: *mut c_void, _data: *const c_char,
        _length: usize, _offset: u64
    );
    rados_aio_write_op_operate(
        _operation: *mut c_void, _pool: *mut Pool, _completion: *mut c_void,
        _object: *const c_char, _time: *mut c_void, _flags: c_int
    );
    rados_remove(_pool: *mut Pool, _object: *const c_char);
    rados_write(
        _pool: *mut Pool, _object: *const c_char, _data: *const c_char, _length: usize, _offset: u64
    );
}

/// `rados_aio_release`: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn rados_aio_release(_completion: *mut c_void) {}

/// `rados_create_write_op`: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn rados_create_write_op() -> *mut c_void {
    std::ptr::null_mut()
}

/// `rados_release_write_op`: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn rados_release_write_op(_operation: *mut c_void) {}

/// `rados_write_op_zero`: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn rados_write_op_zero(_operation: *mut c_void, _offset: u64, _length: u64) {}
