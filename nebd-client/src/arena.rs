//! Buffers in the arena: an allocator of whole pages, first fit, with the sizes that are in use
//! kept at hand.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use nebd_abi::Errno;
use nebd_abi::layout::PAGE;
use nebd_abi::region::Region;

use crate::error::errno;
use crate::memory::{self, Handle, Span};
use crate::sync::lock;

/// Longest run of pages that is kept at hand after it is freed.
const RECENT_PAGES_MAX: usize = 64;
/// Runs kept at hand for each length.
const RECENT_RUNS_MAX: usize = 256;
/// Pages that `alloc` leaves to requests that are copied, at most.
const RESERVE_PAGES_MAX: u32 = 256;

/// The arena of a region, and which of its pages are taken.
#[derive(Debug)]
pub(crate) struct Arena {
    region: Arc<Region>,
    pages: Mutex<Pages>,
    /// What the host holds, by its first page: raw pointers into it keep it allocated.
    buffers: Mutex<BTreeMap<u32, Weak<Allocation>>>,
    /// Pages that only requests in flight may take, so that caller memory can always be copied,
    /// however many buffers the host holds.
    reserve: u32,
    total: u32,
}

impl Arena {
    pub(crate) fn new(region: Arc<Region>) -> Arena {
        let total = u32::try_from(region.geometry().arena_size / PAGE).unwrap_or(u32::MAX);
        let reserve = (total / 8).clamp(total.min(1), RESERVE_PAGES_MAX);
        let pages = Mutex::new(Pages::new(total));
        Arena { region, pages, buffers: Mutex::default(), reserve, total }
    }

    /// Bytes of the whole arena.
    pub(crate) fn size(&self) -> u64 {
        u64::from(self.total) * PAGE
    }

    /// Room for a copy of caller memory, given back when its request completes.
    pub(crate) fn bounce(self: &Arc<Self>, length: u64) -> Option<Allocation> {
        self.take(length, 0)
    }

    /// Room for a buffer of the host.
    pub(crate) fn buffer(self: &Arc<Self>, length: usize) -> Result<Buffer, Errno> {
        // An iovec says its length in 32 bits.
        if length == 0 || u32::try_from(length).is_err() {
            return Err(Errno::INVAL);
        }
        let mut allocation = self.take(length as u64, self.reserve).ok_or(errno::NOMEM)?;
        let span = allocation.span(0, length as u64).ok_or(errno::NOMEM)?;
        allocation.is_listed = true;
        let allocation = Arc::new(allocation);
        lock(&self.buffers).insert(allocation.first, Arc::downgrade(&allocation));
        Ok(Buffer { allocation, span, length })
    }

    fn take(self: &Arc<Self>, length: u64, keep: u32) -> Option<Allocation> {
        let count = u32::try_from(length.div_ceil(PAGE)).ok()?;
        let first = lock(&self.pages).take(count, keep)?;
        Some(Allocation { arena: Handle::new(self.clone()), first, count, is_listed: false })
    }

    /// Where `pointer` lies in the arena, and in which buffer, if `length` bytes from there do.
    pub(crate) fn lookup(
        &self,
        pointer: *const u8,
        length: usize,
    ) -> Option<(Arc<Allocation>, u64)> {
        let base = self.region.arena(0, self.size())?;
        let offset = (pointer as usize).checked_sub(base as usize)? as u64;
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.size())?;
        let page = u32::try_from(offset / PAGE).ok()?;
        // Not to be dropped under the lock, which its own drop takes.
        let found = lock(&self.buffers).range(..=page).next_back()?.1.upgrade();
        let is_inside = |one: &Arc<Allocation>| end <= one.offset() + u64::from(one.count) * PAGE;
        Some((found.filter(is_inside)?, offset))
    }
}

/// Some pages of the arena; free again when dropped.
#[derive(Debug)]
pub(crate) struct Allocation {
    arena: Handle<Arena>,
    first: u32,
    count: u32,
    /// Whether it is a buffer of the host.
    is_listed: bool,
}

impl Allocation {
    /// Bytes from the start of the arena.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.first) * PAGE
    }

    /// A part of it.
    pub(crate) fn span(&self, offset: u64, length: u64) -> Option<Span> {
        let whole = u64::from(self.count) * PAGE;
        if offset.checked_add(length)? > whole {
            return None;
        }
        Span::of_arena(&self.arena.region, self.offset() + offset, length)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // In a forked child the lock may be held for ever, by a thread that is not there.
        if memory::is_forked_child() {
            return;
        }
        if self.is_listed {
            lock(&self.arena.buffers).remove(&self.first);
        }
        lock(&self.arena.pages).give(self.first, self.count);
    }
}

/// A piece of the session's arena: requests that use it are not copied.
///
/// The server writes to it while a read is in flight; its bytes are therefore reached by copies and
/// raw pointers, never by references. Freed once it is dropped and no request uses it any more.
#[derive(Debug)]
pub struct Buffer {
    allocation: Arc<Allocation>,
    span: Span,
    length: usize,
}

impl Buffer {
    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Start of the buffer, page-aligned; valid for [`len`](Self::len) bytes while this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.span.as_ptr()
    }

    /// Copies bytes out, from `offset` on; false, and nothing copied, if they are not all inside
    /// (or the process is a forked child, which does not have the memory).
    #[must_use]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> bool {
        self.part(offset, bytes.len()).map(|part| part.read(bytes)).is_some()
    }

    /// Copies bytes in, from `offset` on; false, and nothing copied, if they do not all fit.
    #[must_use]
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> bool {
        self.part(offset, bytes.len()).map(|part| part.write(bytes)).is_some()
    }

    fn part(&self, offset: usize, length: usize) -> Option<Span> {
        if memory::is_forked_child() {
            return None;
        }
        self.span.part(offset as u64, length as u64)
    }

    /// What keeps the pages taken.
    pub(crate) fn allocation(&self) -> &Arc<Allocation> {
        &self.allocation
    }

    /// Whether it lies in this arena, not in another session's.
    pub(crate) fn is_of(&self, arena: &Arc<Arena>) -> bool {
        Arc::ptr_eq(self.allocation.arena.shared(), arena)
    }
}

/// Which pages are taken.
#[derive(Debug)]
struct Pages {
    /// One bit a page, set while it is taken or at hand.
    taken: Vec<u64>,
    total: u32,
    /// Pages that are free, those at hand included.
    free: u32,
    /// No word before this one has a free bit.
    first_free_word: usize,
    /// Runs freed lately, by their length less one.
    recent: Vec<Vec<u32>>,
}

impl Pages {
    fn new(total: u32) -> Pages {
        let mut taken = vec![0; (total as usize).div_ceil(64)];
        // Bits beyond the last page are never free.
        if let Some(last) = taken.last_mut().filter(|_| !total.is_multiple_of(64)) {
            *last = u64::MAX << (total % 64);
        }
        let recent = vec![Vec::new(); RECENT_PAGES_MAX];
        Pages { taken, total, free: total, first_free_word: 0, recent }
    }

    fn take(&mut self, count: u32, keep: u32) -> Option<u32> {
        if count == 0 || count.checked_add(keep)? > self.free {
            return None;
        }
        let first = match self.recent.get_mut(count as usize - 1).and_then(Vec::pop) {
            Some(first) => first,
            None => self.search(count).or_else(|| {
                self.put_recent_back();
                self.search(count)
            })?,
        };
        self.free -= count;
        Some(first)
    }

    fn give(&mut self, first: u32, count: u32) {
        self.free += count;
        match self.recent.get_mut(count as usize - 1) {
            Some(runs) if runs.len() < RECENT_RUNS_MAX => runs.push(first),
            _ => self.mark(first, count, false),
        }
    }

    fn put_recent_back(&mut self) {
        for length in 0..self.recent.len() {
            for first in std::mem::take(&mut self.recent[length]) {
                self.mark(first, length as u32 + 1, false);
            }
        }
    }

    /// The first run of free bits, which is then marked.
    fn search(&mut self, count: u32) -> Option<u32> {
        while self.taken.get(self.first_free_word) == Some(&u64::MAX) {
            self.first_free_word += 1;
        }
        let mut page = self.first_free_word as u32 * 64;
        let mut run = 0;
        while page < self.total && run < count {
            let word = *self.taken.get(page as usize / 64)? >> (page % 64);
            let left = 64 - page % 64;
            if word & 1 == 0 {
                let zeros = word.trailing_zeros().min(left);
                run += zeros;
                page += zeros;
            } else {
                run = 0;
                page += word.trailing_ones().min(left);
            }
        }
        // The last word's bits beyond the end are set, so a run never leaves the arena.
        let first = (page - run).min(self.total);
        (run >= count).then(|| {
            self.mark(first, count, true);
            first
        })
    }

    fn mark(&mut self, first: u32, count: u32, taken: bool) {
        let mut page = first;
        while page < first + count {
            let bits = (64 - page % 64).min(first + count - page);
            let mask = (u64::MAX >> (64 - bits)) << (page % 64);
            if let Some(word) = self.taken.get_mut(page as usize / 64) {
                if taken {
                    *word |= mask;
                } else {
                    *word &= !mask;
                }
            }
            page += bits;
        }
        if !taken {
            self.first_free_word = self.first_free_word.min(first as usize / 64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_never_overlap_and_all_pages_come_back() {
        let mut pages = Pages::new(1000);
        let mut held: Vec<(u32, u32)> = Vec::new();
        let mut state = 12345u32;
        let mut random = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            state >> 8
        };
        for _ in 0..20_000 {
            if random() % 2 == 0 {
                let count = 1 + random() % 90;
                if let Some(first) = pages.take(count, 0) {
                    assert!(first + count <= 1000);
                    for (other, length) in &held {
                        assert!(first + count <= *other || other + length <= first);
                    }
                    held.push((first, count));
                }
            } else if !held.is_empty() {
                let (first, count) = held.swap_remove(random() as usize % held.len());
                pages.give(first, count);
            }
        }
        for (first, count) in held {
            pages.give(first, count);
        }
        assert_eq!(pages.free, 1000);
        assert_eq!(pages.take(1000, 0), Some(0));
        assert_eq!(pages.take(1, 0), None);
    }

    #[test]
    fn a_reserve_is_left_alone() {
        let mut pages = Pages::new(64);
        assert_eq!(pages.take(60, 8), None);
        assert_eq!(pages.take(56, 8), Some(0));
        assert_eq!(pages.take(1, 8), None);
        assert_eq!(pages.take(8, 0), Some(56));
    }
}
