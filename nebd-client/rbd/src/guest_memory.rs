//! Guest RAM of QEMU: found by the address of a request, registered with the server, and from then
//! on not copied.
//!
//! ```text
//!  request ── address ──► known? ── yes ─► still QEMU's descriptor? ── yes ─► in place
//!                           │ no                 │ no: forgotten
//!                           ▼                    ▼
//!                         copied; once it is done /proc/self/maps is looked at, at ever longer
//!                         intervals while there is nothing to find
//! ```
//!
//! librbd's interface does not say where guest RAM is or when it goes away, so this relies on what
//! QEMU does, and looks at nothing else: its `memory-backend-memfd` maps the whole memfd shared,
//! and when the memory is unplugged unmaps it and closes the descriptor. A request whose memory
//! has a descriptor that is not that memfd any more is copied: its addresses may be somebody else's.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nebd_client::{Memory, Session};

use crate::failure::tell_error;
use crate::raw::{self, Caller};

/// As it stands in `/proc/self/maps`.
const NAME: &str = "/memfd:memory-backend-memfd";
/// Most copied requests between two looks.
const INTERVAL_MAX: u32 = 1 << 20;

/// A file: device and inode.
type FileId = (u64, u64);

/// What is known of the guest's memory.
#[derive(Default)]
pub struct GuestMemory {
    table: Mutex<Table>,
    direct: AtomicU64,
    copied: AtomicU64,
    /// Copied requests until the next look, and after how many that comes.
    until_look: AtomicU32,
}

#[derive(Default)]
struct Table {
    known: Vec<Known>,
    /// Those that could not be registered are not tried again.
    refused: Vec<FileId>,
    interval: u32,
}

struct Known {
    range: Range<usize>,
    host_fd: RawFd,
    file: FileId,
    /// Held, for as long as the range means the memory.
    _memory: Memory,
}

impl Known {
    /// Whether QEMU still has the memory.
    fn is_alive(&self) -> bool {
        raw::stat_of_host(self.host_fd).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file)
    }
}

impl GuestMemory {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that were in registered memory, and others.
    pub fn counts(&self) -> (u64, u64) {
        (self.direct.load(Relaxed), self.copied.load(Relaxed))
    }

    /// Forgets what is gone, before a request is submitted. Returns an address to be looked for
    /// after the request, now and then.
    pub fn look_at(&self, caller: &Caller<'_>) -> Option<usize> {
        let mut table = self.lock();
        let mut unknown = None;
        for range in caller.ranges() {
            let found = table.known.iter().position(|known| contains(&known.range, &range));
            match found.and_then(|index| table.known.get(index).map(|known| (index, known))) {
                Some((_, known)) if known.is_alive() => continue,
                Some((index, _)) => drop(table.known.swap_remove(index)),
                None => {}
            }
            unknown = Some(range.start);
        }
        drop(table);
        if unknown.is_none() {
            self.direct.fetch_add(1, Relaxed);
            return None;
        }
        self.copied.fetch_add(1, Relaxed);
        let left = self.until_look.load(Relaxed);
        if left > 0 {
            // Requests of other threads may count at the same time: then a look comes a little later.
            self.until_look.store(left - 1, Relaxed);
            return None;
        }
        unknown
    }

    /// Looks for guest RAM at an address and registers it. Waits for the server's answer.
    pub fn find(&self, session: &Session, address: usize) {
        let mut table = self.lock();
        table.interval = (table.interval * 2).clamp(1, INTERVAL_MAX);
        self.until_look.store(table.interval, Relaxed);
        let known = |table: &Table| table.known.iter().any(|known| known.range.contains(&address));
        if known(&table) {
            return;
        }
        drop(table);
        let Ok(Some(found)) = look(address) else { return };
        if self.lock().refused.contains(&found.mapping.file) {
            return;
        }
        let base = std::ptr::with_exposed_provenance_mut(found.mapping.range.start);
        let size = found.mapping.range.len() as u64;
        // Not under the lock: requests go on meanwhile, copied.
        let registered = session.register_mapped_memory(found.memfd.as_fd(), size, base);
        let mut table = self.lock();
        match registered {
            Ok(memory) => {
                let Mapping { range, file } = found.mapping;
                let host_fd = found.host_fd;
                table.known.push(Known { range, host_fd, file, _memory: memory });
                // A guest may have more than one.
                table.interval = 0;
                self.until_look.store(0, Relaxed);
            }
            Err(error) => {
                table.refused.push(found.mapping.file);
                tell_error(&error);
            }
        }
    }
}

fn contains(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

struct Found {
    mapping: Mapping,
    host_fd: RawFd,
    memfd: File,
}

fn look(address: usize) -> io::Result<Option<Found>> {
    let maps = fs::read("/proc/self/maps")?;
    let Some(mapping) = mapping_at(&String::from_utf8_lossy(&maps), address) else {
        return Ok(None);
    };
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let Some(host_fd) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
            continue;
        };
        // Descriptors come and go meanwhile.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if (metadata.dev(), metadata.ino()) == mapping.file
            && metadata.len() == mapping.range.len() as u64
        {
            let memfd = File::options().read(true).write(true).open(&path)?;
            return Ok(Some(Found { mapping, host_fd, memfd }));
        }
    }
    Ok(None)
}

/// A file that is mapped from its start, in one piece.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    range: Range<usize>,
    file: FileId,
}

/// The guest RAM in which `address` lies. One mapping can have several lines: advice given for a
/// part of it divides it.
fn mapping_at(maps: &str, address: usize) -> Option<Mapping> {
    let mut found: Option<Mapping> = None;
    for line in maps.lines() {
        let Some((range, offset, file)) = line_of_guest_ram(line) else { continue };
        match &mut found {
            Some(mapping)
                if mapping.file == file
                    && mapping.range.end == range.start
                    && mapping.range.len() == offset =>
            {
                mapping.range.end = range.end;
            }
            Some(mapping) if mapping.range.contains(&address) => break,
            _ if offset == 0 => found = Some(Mapping { range, file }),
            _ => {}
        }
    }
    found.filter(|mapping| mapping.range.contains(&address))
}

/// Range, offset in the file, and the file.
fn line_of_guest_ram(line: &str) -> Option<(Range<usize>, usize, FileId)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text| usize::from_str_radix(text, 16).ok();
    let range = hex(start)?..hex(end)?;
    let is_shared = fields.next()?.starts_with("rw") && line.contains(" rw-s ");
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let major = u32::from_str_radix(major, 16).ok()?;
    let minor = u32::from_str_radix(minor, 16).ok()?;
    let inode = fields.next()?.parse().ok()?;
    let is_guest_ram = fields.next()? == NAME;
    let file = (rustix::fs::makedev(major, minor), inode);
    (is_shared && is_guest_ram).then_some((range, offset, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d000000000-55d000001000 r-xp 00000000 fe:00 123 /usr/bin/qemu-system-x86_64
7f0000000000-7f0000200000 rw-s 00000000 00:01 2054 /memfd:memory-backend-memfd (deleted)
7f0000200000-7f0000400000 rw-s 00200000 00:01 2054 /memfd:memory-backend-memfd (deleted)
7f0000400000-7f0000500000 rw-s 00000000 00:01 2055 /memfd:memory-backend-memfd (deleted)
7f0000600000-7f0000700000 rw-p 00000000 00:01 2056 /memfd:memory-backend-memfd (deleted)
7f0000800000-7f0000900000 rw-s 00000000 00:01 2057 /memfd:other (deleted)
7f0000a00000-7f0000b00000 rw-s 00100000 00:01 2058 /memfd:memory-backend-memfd (deleted)
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0 [stack]
";

    fn file(inode: u64) -> FileId {
        (rustix::fs::makedev(0, 1), inode)
    }

    #[test]
    fn a_divided_mapping_is_one() {
        let whole = Mapping { range: 0x7f00_0000_0000..0x7f00_0040_0000, file: file(2054) };
        assert_eq!(mapping_at(MAPS, 0x7f00_0000_0000), Some(whole));
        let range = mapping_at(MAPS, 0x7f00_003f_ffff).unwrap().range;
        assert_eq!(range, 0x7f00_0000_0000..0x7f00_0040_0000);
        let next = Mapping { range: 0x7f00_0040_0000..0x7f00_0050_0000, file: file(2055) };
        assert_eq!(mapping_at(MAPS, 0x7f00_0040_0000), Some(next));
    }

    #[test]
    fn nothing_else_is_guest_ram() {
        // Private; of another name; without its start; none at all.
        for address in [0x7f00_0060_0000, 0x7f00_0080_0000, 0x7f00_00a0_0000, 0x55d0_0000_0000] {
            assert_eq!(mapping_at(MAPS, address), None, "{address:#x}");
        }
        assert_eq!(mapping_at(MAPS, 0x1000), None);
    }
}
