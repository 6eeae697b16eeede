//! The mapping of a `mem` volume, and raw copies from and to it.

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

use crate::Segment;

/// A volume's data, mapped. Several threads copy at once, and clients may change their side at any
/// time: bytes are only ever copied raw, and a race yields one or the other, as on a disk.
pub(super) struct Map(MmapRaw);

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
        Ok(Map(map))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    /// Copies between the segments and the data at `offset`; `None` if it is out of range.
    pub(super) fn copy(&self, offset: u64, segments: &[Segment], is_write: bool) -> Option<()> {
        let mut at = usize::try_from(offset).ok()?;
        for segment in segments {
            let end = at.checked_add(segment.length).filter(|end| *end <= self.0.len())?;
            // SAFETY: `at .. end` is in the mapping, which cannot fault because its file cannot
            // shrink; the segment stays mapped until its request is completed. They never overlap:
            // no client has a mapping of this file.
            unsafe {
                let data = self.0.as_mut_ptr().add(at);
                if is_write {
                    std::ptr::copy_nonoverlapping(
                        segment.pointer.cast_const(),
                        data,
                        segment.length,
                    );
                } else {
                    std::ptr::copy_nonoverlapping(
                        data.cast_const(),
                        segment.pointer,
                        segment.length,
                    );
                }
            }
            at = end;
        }
        Some(())
    }
}
