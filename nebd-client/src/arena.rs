//! Buffers in the arena.

/// A piece of the session's arena: requests that use it are not copied.
///
/// The server writes to it while a read is in flight; its bytes are therefore reached by copies and
/// raw pointers, never by references. Freed once it is dropped and no request uses it any more.
#[derive(Debug)]
pub struct Buffer {
    length: usize,
}

impl Buffer {
    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Start of the buffer, page-aligned; valid for [`len`](Self::len) bytes while this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::null_mut()
    }

    /// Copies bytes out, from `offset` on; false, and nothing copied, if they are not all inside.
    pub fn read(&self, _offset: usize, _bytes: &mut [u8]) -> bool {
        false
    }

    /// Copies bytes in, from `offset` on; false, and nothing copied, if they do not all fit.
    pub fn write(&mut self, _offset: usize, _bytes: &[u8]) -> bool {
        false
    }
}
