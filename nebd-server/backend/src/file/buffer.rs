//! Memory of requests: the client's own, and aligned stand-ins where the kernel would refuse it.
//!
//! Client memory may change at any time, so it is only ever copied, never referred to.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::OnceLock;

use crate::Segment;

/// Data that goes through a stand-in goes in pieces of at most this many bytes.
pub(super) const BOUNCE_BYTES_MAX: u64 = 256 << 10;

/// Most pieces of memory a system call takes (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 1024;

/// Most bytes of one system call; the kernel stops 4 KiB short of 2 GiB, we at a rounder number.
const CALL_BYTES_MAX: usize = 1 << 30;

/// Stand-in memory, aligned to 4 KiB.
#[derive(Debug)]
pub(super) struct Aligned {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns plain memory.
unsafe impl Send for Aligned {}
// SAFETY: it is written only through raw pointers by the request that owns it, or never (zeros).
unsafe impl Sync for Aligned {}

impl Aligned {
    /// Zeroed memory.
    pub(super) fn new(bytes: usize) -> Aligned {
        let layout =
            Layout::from_size_align(bytes.max(1), 4096).unwrap_or(Layout::new::<[u8; 4096]>());
        // SAFETY: the layout is not empty.
        let pointer = unsafe { alloc_zeroed(layout) };
        match NonNull::new(pointer) {
            Some(pointer) => Aligned { pointer, layout },
            None => handle_alloc_error(layout),
        }
    }

    /// A piece of it.
    pub(super) fn part(&self, offset: usize, bytes: usize) -> Vectors {
        assert!(offset + bytes <= self.layout.size());
        // SAFETY: within the allocation, by the line above.
        Vectors::one(unsafe { self.pointer.as_ptr().add(offset) }, bytes)
    }

    /// Copies from the segments, `skip` bytes into them, to the start of this.
    pub(super) fn gather(&mut self, segments: &[Segment], skip: u64, bytes: usize) {
        assert!(bytes <= self.layout.size());
        let mut to = self.pointer.as_ptr();
        each_piece(segments, skip, bytes, |from, length| {
            // SAFETY: a segment stays mapped until its request is completed; the pieces sum up to
            // at most `bytes`, which fit; the two are separate allocations.
            unsafe {
                std::ptr::copy_nonoverlapping(from, to, length);
                to = to.add(length);
            }
        });
    }

    /// Copies from the start of this to the segments, `skip` bytes into them.
    pub(super) fn scatter(&self, segments: &[Segment], skip: u64, bytes: usize) {
        assert!(bytes <= self.layout.size());
        let mut from = self.pointer.as_ptr().cast_const();
        each_piece(segments, skip, bytes, |to, length| {
            // SAFETY: as in `gather`, the other way.
            unsafe {
                std::ptr::copy_nonoverlapping(from, to, length);
                from = from.add(length);
            }
        });
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) }
    }
}

/// 256 KiB of zeros that nobody writes to.
pub(super) fn zeros() -> &'static Aligned {
    static ZEROS: OnceLock<Aligned> = OnceLock::new();
    ZEROS.get_or_init(|| Aligned::new(BOUNCE_BYTES_MAX as usize))
}

/// Fills the segments with zeros from `skip` bytes into them.
pub(super) fn fill_zeros(segments: &[Segment], skip: u64) {
    each_piece(segments, skip, usize::MAX, |to, length| {
        // SAFETY: a segment stays mapped until its request is completed.
        unsafe { std::ptr::write_bytes(to, 0, length) }
    });
}

/// Whether direct IO can use all segments as they are.
pub(super) fn is_aligned(segments: &[Segment], memory: u32, length: u32) -> bool {
    segments.iter().all(|segment| {
        segment.pointer.addr().is_multiple_of(memory as usize)
            && segment.length.is_multiple_of(length as usize)
    })
}

fn each_piece(
    segments: &[Segment],
    mut skip: u64,
    mut bytes: usize,
    mut piece: impl FnMut(*mut u8, usize),
) {
    for segment in segments {
        if skip >= segment.length as u64 {
            skip -= segment.length as u64;
            continue;
        }
        let length = (segment.length - skip as usize).min(bytes);
        if length == 0 {
            return;
        }
        // A wrapping add never leaves the segment here: `skip` is below its length.
        piece(segment.pointer.wrapping_add(skip as usize), length);
        bytes -= length;
        skip = 0;
    }
}

/// Addresses for one system call. They name memory that their request keeps mapped, or that their
/// task owns; both outlive the call because the task does.
#[derive(Clone, Debug)]
pub(crate) struct Vectors(Inner);

#[derive(Clone, Debug)]
enum Inner {
    One([libc::iovec; 1]),
    Many(Box<[libc::iovec]>),
}

// SAFETY: addresses; only the kernel follows them.
unsafe impl Send for Vectors {}
// SAFETY: as above.
unsafe impl Sync for Vectors {}

impl Vectors {
    fn one(pointer: *mut u8, bytes: usize) -> Vectors {
        Vectors(Inner::One([libc::iovec {
            iov_base: pointer.cast(),
            iov_len: bytes.min(CALL_BYTES_MAX),
        }]))
    }

    /// What is left of the segments after `skip` bytes, as much as one call takes.
    pub(super) fn of(segments: &[Segment], skip: u64) -> Vectors {
        if let [segment] = segments {
            let skip = skip.min(segment.length as u64) as usize;
            return Vectors::one(segment.pointer.wrapping_add(skip), segment.length - skip);
        }
        let mut vectors = Vec::with_capacity(segments.len().min(VECTORS_MAX));
        each_piece(segments, skip, CALL_BYTES_MAX, |pointer, length| {
            if vectors.len() < VECTORS_MAX {
                vectors.push(libc::iovec { iov_base: pointer.cast(), iov_len: length });
            }
        });
        Vectors(Inner::Many(vectors.into_boxed_slice()))
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.as_slice().iter().map(|vector| vector.iov_len).sum()
    }

    fn as_slice(&self) -> &[libc::iovec] {
        match &self.0 {
            Inner::One(one) => one,
            Inner::Many(many) => many,
        }
    }

    /// The only piece, if there is only one.
    pub(crate) fn single(&self) -> Option<(*mut u8, u32)> {
        match self.as_slice() {
            [one] => Some((one.iov_base.cast(), u32::try_from(one.iov_len).ok()?)),
            _ => None,
        }
    }

    /// For the system call. The address is good while this is neither moved nor dropped.
    pub(crate) fn raw(&self) -> (*const libc::iovec, u32) {
        (self.as_slice().as_ptr(), self.as_slice().len() as u32)
    }
}
