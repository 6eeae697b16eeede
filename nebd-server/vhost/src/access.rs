//! Loads, stores and copies in memory that a guest or a hypervisor changes at any time.
//!
//! One of the two files that hold `unsafe`. A [`Window`] is a bounded range of a mapping that it
//! keeps alive; everything above works on it, and never forms a reference to such memory.

use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use nebd_abi::region::SharedMemory;

/// What keeps a window's memory mapped.
pub(crate) type Owner = Arc<dyn Send + Sync>;

/// A piece of memory that data comes from or goes to.
///
/// It stays mapped as long as the [`GuestMemory`](crate::memory::GuestMemory) that it was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: a segment is an address; whoever reads or writes through it does so with raw copies.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// For [`GuestMemory`](crate::memory::GuestMemory) alone: the bytes are mapped.
    pub(crate) fn new(pointer: *mut u8, length: usize) -> Segment {
        Segment { pointer, length }
    }

    /// Start.
    pub fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.length
    }

    /// The same without its first bytes, or without its last.
    pub(crate) fn slice(&self, from: usize, length: usize) -> Segment {
        let from = from.min(self.length);
        Segment { pointer: self.pointer.wrapping_add(from), length: length.min(self.length - from) }
    }

    /// Copies its first bytes out; returns how many.
    ///
    /// Each byte is loaded once, by an atomic: of a plain copy the compiler may look at the source
    /// again, which has changed after it was checked.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> usize {
        let count = bytes.len().min(self.length);
        let mut at = self.pointer;
        let (words, rest) = bytes[..count].as_chunks_mut();
        // Headers and tables are aligned, as a rule.
        if self.pointer.addr().is_multiple_of(align_of::<AtomicU64>()) {
            for word in words {
                // SAFETY: a segment's bytes are mapped as long as its guest memory, which the caller, a
                // chain or a queue, holds; so many words lie in it, and they are aligned.
                *word = unsafe { AtomicU64::from_ptr(at.cast()) }.load(Relaxed).to_ne_bytes();
                at = at.wrapping_add(word.len());
            }
        } else {
            for byte in words.as_flattened_mut() {
                // SAFETY: as above; a byte is always aligned.
                *byte = unsafe { AtomicU8::from_ptr(at) }.load(Relaxed);
                at = at.wrapping_add(1);
            }
        }
        for byte in rest {
            // SAFETY: as above.
            *byte = unsafe { AtomicU8::from_ptr(at) }.load(Relaxed);
            at = at.wrapping_add(1);
        }
        count
    }

    /// Copies bytes to its start; returns how many.
    pub(crate) fn write(&self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.length);
        if !hooks::store() {
            return count;
        }
        // SAFETY: as for `read`, and segments come from mappings that may be written; the source is
        // private, and no reference to the destination is formed.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer, count) };
        count
    }
}

/// A bounded range of shared memory, kept mapped.
#[derive(Clone)]
pub(crate) struct Window {
    start: *mut u8,
    length: usize,
    _owner: Owner,
}

// SAFETY: an address in memory that `_owner`, itself Send and Sync, keeps mapped; all access is atomic.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

macro_rules! access {
    ($load:ident, $store:ident, $type:ty, $atomic:ty) => {
        /// Loads a little-endian number.
        pub(crate) fn $load(&self, offset: usize, order: Ordering) -> $type {
            let Some(pointer) = self.at(offset, size_of::<$type>()) else { return 0 };
            // SAFETY: `at` found it in bounds and aligned, `_owner` keeps it mapped, and memory that
            // others change is touched by atomics only.
            <$type>::from_le(unsafe { <$atomic>::from_ptr(pointer.cast()) }.load(order))
        }

        /// Stores a little-endian number.
        pub(crate) fn $store(&self, offset: usize, value: $type, order: Ordering) {
            let Some(pointer) = self.at(offset, size_of::<$type>()) else { return };
            if hooks::store() {
                // SAFETY: as for the load; windows are cut from mappings that may be written.
                unsafe { <$atomic>::from_ptr(pointer.cast()) }.store(value.to_le(), order);
            }
        }
    };
}

impl Window {
    /// A window onto bytes that `owner` keeps mapped; for [`crate::memory`] alone.
    pub(crate) fn new(segment: Segment, owner: Owner) -> Window {
        Window { start: segment.pointer, length: segment.length, _owner: owner }
    }

    /// `length` bytes at `offset` of a mapped memfd; `None` if they are not all inside.
    pub(crate) fn of(memory: &Arc<SharedMemory>, offset: u64, length: u64) -> Option<Window> {
        let start = memory.range(offset, length)?;
        Some(Window { start, length: usize::try_from(length).ok()?, _owner: memory.clone() })
    }

    /// `length` zeroed bytes of this process alone.
    pub(crate) fn private(length: usize) -> Window {
        let words: Arc<[AtomicU64]> = (0..length.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        let start = words.as_ptr().cast::<u8>().cast_mut();
        Window { start, length, _owner: Arc::new(words) }
    }

    /// Bytes.
    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// Whether its start is a multiple of `alignment`.
    pub(crate) fn is_aligned_to(&self, alignment: usize) -> bool {
        self.start.addr().is_multiple_of(alignment)
    }

    /// Callers stay inside, whatever the other side says; a bug of ours is ignored, not obeyed.
    fn at(&self, offset: usize, size: usize) -> Option<*mut u8> {
        let pointer = self.start.wrapping_add(offset);
        let is_inside = offset.checked_add(size).is_some_and(|end| end <= self.length)
            && pointer.addr().is_multiple_of(size);
        debug_assert!(is_inside, "{size} bytes at {offset} of a window of {}", self.length);
        is_inside.then_some(pointer)
    }

    access!(load_u8, store_u8, u8, AtomicU8);
    access!(load_u16, store_u16, u16, AtomicU16);
    access!(load_u32, store_u32, u32, AtomicU32);
    access!(load_u64, store_u64, u64, AtomicU64);

    /// Copies bytes out; what lies beyond the window stays as it was.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        let whole = Segment { pointer: self.start, length: self.length };
        whole.slice(offset, bytes.len()).read(bytes);
    }

    /// Copies bytes in; what would lie beyond the window is dropped.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        let whole = Segment { pointer: self.start, length: self.length };
        whole.slice(offset, bytes.len()).write(bytes);
    }
}

/// The death of a device at a chosen store, for tests: from then on none of its stores arrives.
pub(crate) mod hooks {
    #[cfg(not(test))]
    #[inline(always)]
    pub(super) fn store() -> bool {
        true
    }

    #[cfg(test)]
    pub(super) use counting::store;
    #[cfg(test)]
    pub(crate) use counting::{alive, die_after, stores, unharmed};

    #[cfg(test)]
    mod counting {
        use std::cell::Cell;

        thread_local! {
            /// Stores that still arrive, and stores that were made.
            static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
            static MADE: Cell<u64> = const { Cell::new(0) };
            static PAUSED: Cell<bool> = const { Cell::new(false) };
        }

        pub(in crate::access) fn store() -> bool {
            if PAUSED.get() {
                return true;
            }
            MADE.set(MADE.get() + 1);
            let left = LEFT.get();
            LEFT.set(left.saturating_sub(1));
            left > 0
        }

        /// This thread's device dies after so many more stores.
        pub(crate) fn die_after(stores: u64) {
            LEFT.set(stores);
        }

        /// Whether every store so far has arrived.
        pub(crate) fn alive() -> bool {
            LEFT.get() > 0
        }

        /// Stores made by devices of this thread.
        pub(crate) fn stores() -> u64 {
            MADE.get()
        }

        /// Runs the driver's side, whose stores do not count.
        pub(crate) fn unharmed<T>(run: impl FnOnce() -> T) -> T {
            let before = PAUSED.replace(true);
            let result = run();
            PAUSED.set(before);
            result
        }
    }
}
