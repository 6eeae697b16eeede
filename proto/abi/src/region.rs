//! Mapping a region, and handing out views of its queues.
//!
//! One of the files that hold `unsafe`: everything above it works on references to atomics.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::layout::{
    CqEntry, Geometry, Iovec, LayoutError, PAGE, QueueHeader, RegionHeader, RegionParams, Slot,
    SqEntry,
};

/// Seals a region must carry: its size never changes under a mapping.
pub const REGION_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Why a memfd cannot be mapped as shared memory.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A system call failed.
    #[error("cannot {action} the shared memory")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It could shrink under the mapping, which would kill the process that reads it.
    #[error("the memory is not a memfd sealed with SHRINK, GROW and SEAL")]
    Unsealed,
    /// It is larger than allowed, empty, or not a whole number of pages.
    #[error("the memory has the impossible size {0}")]
    Size(u64),
    /// The header breaks the layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

fn system(action: &'static str) -> impl FnOnce(rustix::io::Errno) -> RegionError {
    move |errno| RegionError::System { action, source: errno.into() }
}

/// A mapped, sealed memfd. Its bytes may be changed by another process at any time.
#[derive(Debug)]
pub struct SharedMemory {
    map: MmapRaw,
    fd: OwnedFd,
}

impl SharedMemory {
    /// Creates, sizes, seals and maps a memfd.
    pub fn create(name: &str, size: u64) -> Result<SharedMemory, RegionError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags).map_err(system("create"))?;
        rustix::fs::ftruncate(&fd, size).map_err(system("size"))?;
        rustix::fs::fcntl_add_seals(&fd, REGION_SEALS).map_err(system("seal"))?;
        SharedMemory::map(fd, u64::MAX)
    }

    /// Maps a memfd made elsewhere, after checking its seals and size.
    pub fn map(fd: OwnedFd, size_max: u64) -> Result<SharedMemory, RegionError> {
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| RegionError::Unsealed)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(RegionError::Unsealed);
        }
        let size = rustix::fs::fstat(&fd).map_err(system("stat"))?.st_size as u64;
        if size == 0 || size > size_max || !size.is_multiple_of(PAGE) {
            return Err(RegionError::Size(size));
        }
        let map = MmapOptions::new()
            .len(usize::try_from(size).map_err(|_| RegionError::Size(size))?)
            .map_raw(&fd)
            .map_err(|source| RegionError::System { action: "map", source })?;
        Ok(SharedMemory { map, fd })
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes mapped.
    pub fn size(&self) -> u64 {
        self.map.len() as u64
    }

    /// Start of the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Pointer to `length` bytes at `offset`; `None` if they are not all inside.
    pub fn range(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let end = offset.checked_add(length)?;
        if end > self.size() {
            return None;
        }
        // SAFETY: offset <= size, so the pointer stays inside the mapping or one past its end.
        Some(unsafe { self.as_ptr().add(offset as usize) })
    }

    /// Inode identity of the memfd: two descriptors of one memory agree on it.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.fd)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Whether both map the same memfd; false if that cannot be told.
    pub fn is_same_as(&self, other: &SharedMemory) -> bool {
        matches!((self.identity(), other.identity()), (Ok(a), Ok(b)) if a == b)
    }

    /// Keeps the memory out of core dumps, or out of forked children.
    pub fn advise(&self, advice: rustix::mm::Advice) -> io::Result<()> {
        // SAFETY: DONTDUMP and DONTFORK, the only advices used, change no contents.
        unsafe { rustix::mm::madvise(self.as_ptr().cast(), self.map.len(), advice)? };
        Ok(())
    }

    /// Maps the pages of the first `length` bytes at once, so that nobody waits for them later.
    pub fn populate(&self, length: u64) -> io::Result<()> {
        let length = self.map.len().min(length as usize);
        // SAFETY: the range is mapped, and to map its pages changes no contents.
        unsafe {
            rustix::mm::madvise(
                self.as_ptr().cast(),
                length,
                rustix::mm::Advice::LinuxPopulateRead,
            )?;
        }
        Ok(())
    }

    /// A reference to a structure of atomics at `offset`.
    ///
    /// # Safety
    /// `T` consists of atomics alone, and any bit pattern is a valid `T`.
    pub unsafe fn atomics<T>(&self, offset: u64) -> Option<&T> {
        let pointer = self.range(offset, size_of::<T>() as u64)?.cast::<T>();
        if !pointer.is_aligned() {
            return None;
        }
        // SAFETY: in bounds and aligned as checked; atomics may be shared with another process.
        Some(unsafe { &*pointer })
    }
}

/// A session's region, mapped and checked.
#[derive(Debug)]
pub struct Region {
    memory: SharedMemory,
    params: RegionParams,
}

impl Region {
    /// Client: creates the region of a new session.
    pub fn create(params: RegionParams) -> Result<Region, RegionError> {
        params.geometry.validate()?;
        let memory = SharedMemory::create("nebd-region", params.geometry.region_size())?;
        let region = Region { memory, params };
        region.header().init(&region.params);
        Ok(region)
    }

    /// Server: maps a region that a client made, trusting none of it.
    pub fn open(fd: OwnedFd) -> Result<Region, RegionError> {
        let memory = SharedMemory::map(fd, crate::layout::REGION_BYTES_MAX)?;
        let seals = rustix::fs::fcntl_get_seals(memory.fd()).map_err(|_| RegionError::Unsealed)?;
        if !seals.contains(REGION_SEALS) {
            return Err(RegionError::Unsealed);
        }
        // SAFETY: RegionHeader consists of atomics alone.
        let header = unsafe { memory.atomics::<RegionHeader>(0) };
        let params = header.ok_or(RegionError::Size(memory.size()))?.params(memory.size())?;
        Ok(Region { memory, params })
    }

    /// The client's parameters, as checked at open; later changes in memory do not show here.
    pub fn params(&self) -> &RegionParams {
        &self.params
    }

    /// Sizes and offsets.
    pub fn geometry(&self) -> &Geometry {
        &self.params.geometry
    }

    /// The mapped memfd.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The shared header.
    pub fn header(&self) -> &RegionHeader {
        // SAFETY: RegionHeader consists of atomics alone; a region is never smaller than a page.
        unsafe { &*self.memory.as_ptr().cast::<RegionHeader>() }
    }

    /// Pointer to `length` bytes at `offset` of the arena; `None` if they are not all inside.
    pub fn arena(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let geometry = self.geometry();
        if offset.checked_add(length)? > geometry.arena_size {
            return None;
        }
        self.memory.range(geometry.arena_offset() + offset, length)
    }

    /// The queue with this index; `None` beyond the last.
    #[cfg(not(loom))]
    pub fn queue(self: &Arc<Self>, index: u32) -> Option<QueueMemory> {
        let geometry = *self.geometry();
        if index >= geometry.queue_count {
            return None;
        }
        let base = geometry.queues_offset() + u64::from(index) * geometry.queue_stride();
        let at = |offset: u64| {
            // SAFETY: `Geometry::validate` and the size check at open keep every queue inside the
            // mapping, whose address is not null.
            unsafe { NonNull::new_unchecked(self.memory.as_ptr().add((base + offset) as usize)) }
        };
        let slice = |offset, count: u32| (at(offset), count as usize);
        let (sq, entries) = slice(geometry.sq_offset(), geometry.ring_entries());
        let (slots, depth) = slice(geometry.slots_offset(), geometry.queue_depth);
        let iovecs = geometry.queue_depth * geometry.iovecs_per_slot;
        Some(QueueMemory {
            header: at(0).cast(),
            sq: NonNull::slice_from_raw_parts(sq.cast(), entries),
            cq: NonNull::slice_from_raw_parts(at(geometry.cq_offset()).cast(), entries),
            slots: NonNull::slice_from_raw_parts(slots.cast(), depth),
            iovecs: NonNull::slice_from_raw_parts(
                at(geometry.iovecs_offset()).cast(),
                iovecs as usize,
            ),
            iovecs_per_slot: geometry.iovecs_per_slot as usize,
            _owner: self.clone(),
        })
    }
}

/// The atomics of one queue, and whatever keeps them mapped.
#[derive(Clone)]
pub struct QueueMemory {
    header: NonNull<QueueHeader>,
    sq: NonNull<[SqEntry]>,
    cq: NonNull<[CqEntry]>,
    slots: NonNull<[Slot]>,
    iovecs: NonNull<[Iovec]>,
    iovecs_per_slot: usize,
    _owner: Arc<dyn Send + Sync>,
}

// SAFETY: the pointers lead to atomics that `_owner`, itself Send and Sync, keeps alive.
unsafe impl Send for QueueMemory {}
// SAFETY: as above; every access through `&self` is atomic.
unsafe impl Sync for QueueMemory {}

impl QueueMemory {
    /// Heads, tails and flags.
    pub fn header(&self) -> &QueueHeader {
        // SAFETY: `_owner` keeps it mapped, and it consists of atomics alone.
        unsafe { self.header.as_ref() }
    }

    /// The submission ring.
    pub fn sq(&self) -> &[SqEntry] {
        // SAFETY: as for `header`.
        unsafe { self.sq.as_ref() }
    }

    /// The completion ring.
    pub fn cq(&self) -> &[CqEntry] {
        // SAFETY: as for `header`.
        unsafe { self.cq.as_ref() }
    }

    /// The slots.
    pub fn slots(&self) -> &[Slot] {
        // SAFETY: as for `header`.
        unsafe { self.slots.as_ref() }
    }

    /// The iovecs in the table that belong to `slot`.
    pub fn iovecs(&self, slot: usize) -> &[Iovec] {
        // SAFETY: as for `header`.
        let table = unsafe { self.iovecs.as_ref() };
        &table[slot * self.iovecs_per_slot..][..self.iovecs_per_slot]
    }
}

#[cfg(loom)]
impl QueueMemory {
    /// A queue of `depth` slots in loom's memory, with one iovec a slot.
    pub fn for_model(depth: usize) -> QueueMemory {
        use crate::sync::AtomicU64;

        struct Model {
            header: Box<QueueHeader>,
            sq: Box<[SqEntry]>,
            cq: Box<[CqEntry]>,
            slots: Box<[Slot]>,
            iovecs: Box<[Iovec]>,
        }
        let word = || AtomicU64::new(0);
        let iovec = || Iovec { memory_length: word(), offset: word() };
        let model = Arc::new(Model {
            header: Box::new(QueueHeader::for_model()),
            sq: (0..2 * depth).map(|_| SqEntry { seq: word(), slot: word() }).collect(),
            cq: (0..2 * depth)
                .map(|_| CqEntry {
                    seq: word(),
                    slot_result: word(),
                    epoch: word(),
                    reserved: word(),
                })
                .collect(),
            slots: (0..depth)
                .map(|_| Slot {
                    seq: word(),
                    op: word(),
                    offset: word(),
                    length: word(),
                    iovec: iovec(),
                    reserved: [word(), word()],
                })
                .collect(),
            iovecs: (0..depth).map(|_| iovec()).collect(),
        });
        QueueMemory {
            header: NonNull::from(&*model.header),
            sq: NonNull::from(&*model.sq),
            cq: NonNull::from(&*model.cq),
            slots: NonNull::from(&*model.slots),
            iovecs: NonNull::from(&*model.iovecs),
            iovecs_per_slot: 1,
            _owner: model,
        }
    }
}
