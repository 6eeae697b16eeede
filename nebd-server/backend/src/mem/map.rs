//! The mapping of a `mem` volume, and raw copies from and to it.
//!
//! A page of the mapping that is read is allocated, even if nothing was ever written there. So reads
//! ask the file first where it has data, and remember the answer by extents: what is unknown is
//! asked again, so a bit that is missing costs a system call, and one too many costs memory.
//!
//! A write to a page that is not mapped yet costs a fault for each page; a read maps all pages around
//! it that exist, for writing too. So each extent is read once before it is written. In a gibibyte
//! of small pages that is 16 thousand faults in place of 262 thousand.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::SeekFrom;

use super::copy;
use crate::Segment;

/// Bytes that share a bit.
const EXTENT_BYTES: usize = 64 << 10;

/// A volume's data, mapped. Several threads copy at once, and clients may change their side at any
/// time: bytes are only ever copied raw, and a race yields one or the other, as on a disk.
pub(super) struct Map {
    map: MmapRaw,
    /// Of the data, in the file.
    start: u64,
    /// One bit an extent: it is known to have data.
    has_data: Extents,
    /// One bit an extent: this process has touched it, so its pages are mapped.
    touched: Extents,
}

impl Map {
    /// Maps `file` from `start` to its end. It must be sealed against shrinking.
    pub(super) fn new(file: &File, start: u64) -> io::Result<Map> {
        let map = MmapOptions::new().offset(start).map_raw(file)?;
        // A core dump of the server is no place for its clients' disks.
        let (pointer, bytes) = (map.as_mut_ptr().cast(), map.len());
        // SAFETY: the range is the mapping just made; this advice does not change its contents.
        let advised = unsafe {
            rustix::mm::madvise(pointer, bytes, rustix::mm::Advice::LinuxDontDump).and_then(|()| {
                rustix::mm::madvise(pointer, bytes, rustix::mm::Advice::LinuxDontFork)
            })
        };
        advised?;
        Ok(Map { map, start, has_data: Extents::new(bytes), touched: Extents::new(bytes) })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Copies the segments to the data at `offset`; `None` if it is out of range.
    pub(super) fn write(&self, offset: u64, segments: &[Segment]) -> Option<()> {
        let mut at = usize::try_from(offset).ok()?;
        for segment in segments {
            let end = self.end_of(at, segment)?;
            for extent in at / EXTENT_BYTES..end.div_ceil(EXTENT_BYTES) {
                self.has_data.set(extent);
                if !self.touched.has(extent) {
                    self.touch((extent * EXTENT_BYTES).max(at));
                    self.touched.set(extent);
                }
            }
            // SAFETY: `at .. end` is in the mapping, which cannot fault because its file cannot
            // shrink; the segment stays mapped until its request is completed. They never overlap:
            // no client has a mapping of this file.
            unsafe {
                let data = self.map.as_mut_ptr().add(at);
                copy::to_memory(data, segment.pointer.cast_const(), segment.length);
            }
            at = end;
        }
        Some(())
    }

    /// Copies the data at `offset` to the segments; `None` if it is out of range. `file` is the one
    /// that is mapped.
    pub(super) fn read(&self, file: &File, offset: u64, segments: &[Segment]) -> Option<()> {
        let mut at = usize::try_from(offset).ok()?;
        for segment in segments {
            let (begin, end) = (at, self.end_of(at, segment)?);
            while at < end {
                let (piece_end, has_data) = self.piece(file, at, end);
                // SAFETY: as in `write`: both ranges are within what was checked above.
                unsafe {
                    let target = segment.pointer.add(at - begin);
                    if has_data {
                        let data = self.map.as_mut_ptr().add(at).cast_const();
                        std::ptr::copy_nonoverlapping(data, target, piece_end - at);
                    } else {
                        std::ptr::write_bytes(target, 0, piece_end - at);
                    }
                }
                at = piece_end;
            }
        }
        Some(())
    }

    /// What was in these bytes has been given back.
    pub(super) fn forget(&self, offset: u64, length: u64) {
        let extent = EXTENT_BYTES as u64;
        for extent in offset.div_ceil(extent)..(offset + length) / extent {
            self.has_data.clear(extent as usize);
            self.touched.clear(extent as usize);
        }
    }

    /// Maps the pages around a byte that is about to be written.
    fn touch(&self, at: usize) {
        // SAFETY: the byte is in the mapping. Nobody cares what it is.
        let _ = unsafe { self.map.as_mut_ptr().add(at).cast_const().read_volatile() };
    }

    fn end_of(&self, at: usize, segment: &Segment) -> Option<usize> {
        at.checked_add(segment.length).filter(|end| *end <= self.map.len())
    }

    /// How far, at most to `end`, all is like at `at`: to be copied, or known to be zeros.
    fn piece(&self, file: &File, at: usize, end: usize) -> (usize, bool) {
        let extent = at / EXTENT_BYTES;
        let extent_end = (extent + 1) * EXTENT_BYTES;
        if self.has_data.has(extent) {
            let next =
                (extent + 1..).find(|next| next * EXTENT_BYTES >= end || !self.has_data.has(*next));
            return (next.map_or(end, |next| end.min(next * EXTENT_BYTES)), true);
        }
        let from = self.start + (extent * EXTENT_BYTES) as u64;
        let data = match rustix::fs::seek(file, SeekFrom::Data(from)) {
            Ok(position) => (position - self.start) as usize,
            // Nothing up to the end.
            Err(rustix::io::Errno::NXIO) => usize::MAX,
            Err(_) => at,
        };
        if data < extent_end {
            self.has_data.set(extent);
            return (end.min(extent_end), true);
        }
        // Whole extents, except at the end: where data begins within one, that one is copied.
        let zeros_end = if data >= end { end } else { data / EXTENT_BYTES * EXTENT_BYTES };
        (zeros_end, false)
    }
}

/// A bit for each extent of a mapping.
struct Extents(Box<[AtomicU64]>);

impl Extents {
    fn new(bytes: usize) -> Extents {
        let words = bytes.div_ceil(EXTENT_BYTES).div_ceil(64);
        Extents((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn has(&self, extent: usize) -> bool {
        let word = self.0.get(extent / 64);
        word.is_some_and(|word| word.load(Relaxed) & 1 << (extent % 64) != 0)
    }

    fn set(&self, extent: usize) {
        let Some(word) = self.0.get(extent / 64) else { return };
        let bit = 1 << (extent % 64);
        // Mostly it is set, and a load does not take the cache line from other cores.
        if word.load(Relaxed) & bit == 0 {
            word.fetch_or(bit, Relaxed);
        }
    }

    fn clear(&self, extent: usize) {
        let Some(word) = self.0.get(extent / 64) else { return };
        let bit = 1 << (extent % 64);
        if word.load(Relaxed) & bit != 0 {
            word.fetch_and(!bit, Relaxed);
        }
    }
}
