//! What crosses the boundary in Curve's interface: its structs, and memory of the caller.

use std::ffi::{c_int, c_uint, c_void};

use nebd_client::{Errno, RawIovec};

use crate::failure::InCallback;

/// `LibAioCallBack`.
pub type AioCallback = unsafe extern "C" fn(context: *mut AioContext);

/// `NebdOpenFlags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct OpenFlags {
    /// Nobody else may have the volume open.
    pub exclusive: c_int,
}

/// `NebdClientAioContext`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AioContext {
    /// Where in the volume.
    pub offset: i64,
    /// Bytes.
    pub length: usize,
    /// Set before the callback.
    pub ret: c_int,
    /// `LIBAIO_OP`; the called function decides.
    pub op: c_uint,
    /// Called once.
    pub cb: Option<AioCallback>,
    /// Data of a read or write.
    pub buf: *mut c_void,
    /// Not touched.
    pub retry_count: c_uint,
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(AioContext, offset) == 0);
    assert!(offset_of!(AioContext, length) == 8);
    assert!(offset_of!(AioContext, ret) == 16);
    assert!(offset_of!(AioContext, op) == 20);
    assert!(offset_of!(AioContext, cb) == 24);
    assert!(offset_of!(AioContext, buf) == 32);
    assert!(offset_of!(AioContext, retry_count) == 40);
    assert!(size_of::<AioContext>() == 48);
    assert!(size_of::<OpenFlags>() == 4);
};

/// A context that was passed in: the library's until it is told the result, once.
#[derive(Clone, Copy)]
pub struct Reply(*mut AioContext);

// SAFETY: libnebd.h lends the context to the library until its callback, on whatever thread.
unsafe impl Send for Reply {}

impl Reply {
    /// The context, and what it asks for; an error if it has no callback.
    ///
    /// # Safety
    /// `context` is NULL or a context that is the library's from here on.
    pub unsafe fn new(context: *mut AioContext) -> Result<(Reply, AioContext), Errno> {
        // SAFETY: the caller's promise.
        let asked = *unsafe { context.as_ref() }.ok_or(Errno::INVAL)?;
        asked.cb.ok_or(Errno::INVAL)?;
        Ok((Reply(context), asked))
    }

    /// Sets the result and calls back. The context may be gone afterwards.
    pub fn tell(self, result: Result<(), Errno>) {
        let _in_callback = InCallback::enter();
        // SAFETY: the context is the library's until the callback, which libnebd.h asks to be
        // callable on any thread; nothing touches it once the callback has begun.
        unsafe {
            (*self.0).ret = if result.is_ok() { 0 } else { -1 };
            if let Some(callback) = (*self.0).cb {
                callback(self.0);
            }
        }
    }
}

/// Memory of the caller, the library's until a request is done.
#[derive(Clone, Copy)]
pub struct Lent {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: an address and a length, which only raw calls of `nebd_client` use.
unsafe impl Send for Lent {}

impl Lent {
    /// `length` bytes at `pointer`, which must not be NULL if there are any.
    pub fn new(pointer: *mut c_void, length: usize) -> Result<Lent, Errno> {
        if pointer.is_null() && length > 0 {
            return Err(Errno::INVAL);
        }
        Ok(Lent { pointer: pointer.cast(), length })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// As an iovec.
    pub fn iovec(&self) -> RawIovec {
        RawIovec { pointer: self.pointer, length: self.length }
    }
}

/// Memory of the library's own that requests read into and write from.
pub struct Scratch {
    bytes: *mut [u8],
}

// SAFETY: it owns its memory, which only raw calls of `nebd_client` use.
unsafe impl Send for Scratch {}

impl Scratch {
    /// `length` zeros.
    pub fn new(length: usize) -> Scratch {
        Scratch { bytes: Box::into_raw(vec![0; length].into_boxed_slice()) }
    }

    /// The part at `offset`, cut to what is there.
    pub fn iovec(&self, offset: usize, length: usize) -> RawIovec {
        let offset = offset.min(self.bytes.len());
        let pointer = self.bytes.cast::<u8>().wrapping_add(offset);
        RawIovec { pointer, length: length.min(self.bytes.len() - offset) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`, freed once; requests that use it hold it.
        drop(unsafe { Box::from_raw(self.bytes) });
    }
}
