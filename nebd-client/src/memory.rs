//! Raw memory: copies to and from memory that another process can change, the page that notices
//! a fork, and the signal mask of the library's threads.
//!
//! With `raw.rs` (the public unsafe calls) the only file of this crate that holds `unsafe`.

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};
use nebd_abi::region::Region;
use rustix::mm::Advice;

/// A piece of caller memory, for the raw calls; laid out as C's `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RawIovec {
    /// Start. Inside a [`Buffer`](crate::Buffer) or a mapped [`Memory`](crate::Memory) the memory is
    /// used in place, otherwise copied.
    pub pointer: *mut u8,
    /// Bytes.
    pub length: usize,
}

/// Memory that bytes are copied from or to. Whoever keeps one keeps what it points to alive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: a span is an address and a length; it is used by raw copies alone.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// Caller memory.
    ///
    /// # Safety
    /// It stays valid, and free of conflicting use, as long as the span is copied from or to.
    pub(crate) unsafe fn of_caller(iovec: RawIovec) -> Span {
        Span { pointer: iovec.pointer, length: iovec.length }
    }

    /// A piece of the region's arena; the holder keeps the region.
    pub(crate) fn of_arena(region: &Region, offset: u64, length: u64) -> Option<Span> {
        let pointer = region.arena(offset, length)?;
        Some(Span { pointer, length: usize::try_from(length).ok()? })
    }

    /// The part at `offset`, if it lies inside.
    pub(crate) fn part(&self, offset: u64, length: u64) -> Option<Span> {
        let (offset, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
        if offset.checked_add(length)? > self.length {
            return None;
        }
        Some(Span { pointer: self.pointer.wrapping_add(offset), length })
    }

    /// Start.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.pointer
    }

    /// Copies as many bytes as both have.
    pub(crate) fn copy_to(&self, to: &Span) {
        // SAFETY: both spans are valid by their constructors' promises; `copy` minds no overlap. The
        // other process may race with the copy: it then copies garbage, which is that one's choice.
        unsafe { std::ptr::copy(self.pointer, to.pointer, self.length.min(to.length)) };
    }

    /// Copies out; `bytes` is no longer than the span.
    pub(crate) fn read(&self, bytes: &mut [u8]) {
        let length = bytes.len();
        self.copy_to(&Span { pointer: bytes.as_mut_ptr(), length });
    }

    /// Copies in; `bytes` is no longer than the span.
    pub(crate) fn write(&self, bytes: &[u8]) {
        // `copy_to` only reads from its source.
        Span { pointer: bytes.as_ptr().cast_mut(), length: bytes.len() }.copy_to(self);
    }
}

/// Non-zero in the process that made it, zero in every child forked from that one.
static FORK_WORD: OnceLock<&'static AtomicU32> = OnceLock::new();

/// Makes the page that tells a forked child from its parent; kept for the life of the process.
pub(crate) fn watch_for_fork() -> io::Result<()> {
    if FORK_WORD.get().is_some() {
        return Ok(());
    }
    let page = MmapRaw::from(MmapOptions::new().len(4096).map_anon()?);
    // SAFETY: the page is ours alone and still empty; the advice empties it in children only.
    unsafe { rustix::mm::madvise(page.as_mut_ptr().cast(), 4096, Advice::LinuxWipeOnFork)? };
    // SAFETY: page-aligned, zeroed, never unmapped (forgotten below), and used as an atomic alone.
    let word = unsafe { &*page.as_mut_ptr().cast::<AtomicU32>() };
    std::mem::forget(page);
    word.store(1, Relaxed);
    // If another thread was quicker, its page counts and this one is four lost kibibytes.
    let _ = FORK_WORD.set(word);
    Ok(())
}

/// Whether this process was forked from one that uses the library.
pub(crate) fn is_forked_child() -> bool {
    FORK_WORD.get().is_some_and(|word| word.load(Relaxed) == 0)
}

/// An `Arc` that a forked child forgets instead of dropping: what it leads to (mappings that the
/// child does not have, locks that another thread held) is the parent's.
#[derive(Debug)]
pub(crate) struct Handle<T>(ManuallyDrop<Arc<T>>);

impl<T> Handle<T> {
    pub(crate) fn new(shared: Arc<T>) -> Handle<T> {
        Handle(ManuallyDrop::new(shared))
    }

    pub(crate) fn shared(&self) -> &Arc<T> {
        &self.0
    }
}

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Handle<T> {
        Handle(self.0.clone())
    }
}

impl<T> Deref for Handle<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Handle<T> {
    fn drop(&mut self) {
        if !is_forked_child() {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// Blocks every signal in the calling thread: the library's threads take none of the host's.
pub(crate) fn block_signals() {
    // SAFETY: a sigset_t is plain bits, filled in before use; the mask is this thread's alone.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
}
