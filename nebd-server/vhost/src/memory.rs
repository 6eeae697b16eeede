//! The guest's memory: what the hypervisor shares, and where it is mapped here.
//!
//! Three kinds of address lead into it: a guest-physical one stands in descriptors, a user address
//! (of the hypervisor's process) says where the rings are, and pointers of ours are what both are
//! translated to. A range of guest-physical addresses may cross from one region into the next, and
//! is then several segments.
//!
//! # A file that shrinks
//! Touching a page beyond the end of a file is a SIGBUS, which ends the server (`fatal.rs` of the
//! server sees to that: at once, and it is counted as a death). So, as for registered memories, only
//! a memfd that is sealed against shrinking is mapped: QEMU's `memory-backend-memfd` seals its memory
//! unless told otherwise. Memory that cannot be sealed (files on hugetlbfs or in /dev/shm, the memory
//! of some other hypervisors) is refused, with an error that says so, unless the operator vouches for
//! whoever can truncate it ([`Backing::AnyFile`]). What remains then: that party can end the server,
//! whose successor would map the same memory and die again at the same request; the ledger's count of
//! deaths parks the volume after three. What remains with a sealed memfd: a hole punched into it reads
//! as zeros, which is the guest's own loss; and huge pages that run out when they are first touched are
//! a SIGBUS too, unless the hypervisor reserves them, as QEMU does for hugetlb by default.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::SealFlags;

use crate::access::{Segment, Window};

/// Regions that a guest's memory may have.
pub const REGIONS_MAX: usize = 64;

/// A piece of guest memory, as the hypervisor describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where it starts for the guest.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where it starts for the hypervisor's process.
    pub user_address: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    /// Whether both name the same region, wherever its file has it.
    pub fn is_same_as(&self, other: &RegionSpec) -> bool {
        (self.guest_address, self.size, self.user_address)
            == (other.guest_address, other.size, other.user_address)
    }
}

/// Which files may be mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Memfds that are sealed against shrinking.
    #[default]
    Sealed,
    /// Whatever can be mapped: whoever can truncate it can end this process.
    AnyFile,
}

/// Why memory cannot be the guest's.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A system call failed.
    #[error("cannot {action} the guest's memory")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It could shrink under the mapping.
    #[error(
        "the guest's memory is no memfd sealed against shrinking (QEMU: memory-backend-memfd with \
         share=on and seal=on)"
    )]
    Unsealed,
    /// It is empty, or wraps around.
    #[error("a region of {0:?} is impossible")]
    Region(RegionSpec),
    /// The file ends before it.
    #[error("the region ends at {end} of its file, which has {size} bytes")]
    Short {
        /// Where the region ends.
        end: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// Two regions share addresses.
    #[error("the regions at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
    /// More regions than [`REGIONS_MAX`].
    #[error("{0} regions are too many")]
    TooMany(usize),
}

/// A region, mapped.
#[derive(Debug)]
pub struct MappedRegion {
    spec: RegionSpec,
    /// Of the region's first byte in the mapping.
    skip: usize,
    map: MmapRaw,
}

impl MappedRegion {
    /// Maps what a hypervisor sent.
    pub fn map(
        spec: RegionSpec,
        fd: BorrowedFd<'_>,
        backing: Backing,
    ) -> Result<Arc<MappedRegion>, MemoryError> {
        let system = |action| {
            move |errno: rustix::io::Errno| MemoryError::System { action, source: errno.into() }
        };
        let impossible = || MemoryError::Region(spec);
        let end = spec.mmap_offset.checked_add(spec.size).ok_or_else(impossible)?;
        let wraps = spec.guest_address.checked_add(spec.size).is_none()
            || spec.user_address.checked_add(spec.size).is_none();
        if spec.size == 0 || wraps {
            return Err(impossible());
        }
        if backing == Backing::Sealed {
            let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| MemoryError::Unsealed)?;
            if !seals.contains(SealFlags::SHRINK) {
                return Err(MemoryError::Unsealed);
            }
        }
        let stat = rustix::fs::fstat(fd).map_err(system("stat"))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if end > size {
            return Err(MemoryError::Short { end, size });
        }
        // Mappings of huge pages start and end at such; st_blksize is their size.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0).max(4096);
        if !page.is_power_of_two() {
            return Err(impossible());
        }
        let start = spec.mmap_offset & !(page - 1);
        let length = end.checked_next_multiple_of(page).ok_or_else(impossible)? - start;
        let map = MmapOptions::new()
            .offset(start)
            .len(usize::try_from(length).map_err(|_| impossible())?)
            .map_raw(&fd)
            .map_err(|source| MemoryError::System { action: "map", source })?;
        // A core dump of the server holds no guest, and a child that it forks maps none.
        for advice in [Advice::DontDump, Advice::DontFork] {
            map.advise(advice)
                .map_err(|source| MemoryError::System { action: "advise", source })?;
        }
        let skip = (spec.mmap_offset - start) as usize;
        Ok(Arc::new(MappedRegion { spec, skip, map }))
    }

    /// As the hypervisor described it.
    pub fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    /// Address space that it takes up.
    pub fn mapped_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// What of `length` bytes at `offset` lies in the region, which `offset` does.
    fn segment(&self, offset: u64, length: u64) -> Segment {
        let length = length.min(self.spec.size - offset);
        // Inside the mapping, which was made long enough for the region.
        let pointer = self.map.as_mut_ptr().wrapping_add(self.skip + offset as usize);
        Segment::new(pointer, length as usize)
    }
}

/// All of a guest's memory. Changed by making another one.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// By guest address.
    regions: Vec<Arc<MappedRegion>>,
}

impl GuestMemory {
    /// The memory that consists of these regions.
    pub fn new(mut regions: Vec<Arc<MappedRegion>>) -> Result<Arc<GuestMemory>, MemoryError> {
        if regions.len() > REGIONS_MAX {
            return Err(MemoryError::TooMany(regions.len()));
        }
        regions.sort_by_key(|region| region.spec.user_address);
        check_overlaps(&regions, |spec| spec.user_address)?;
        regions.sort_by_key(|region| region.spec.guest_address);
        check_overlaps(&regions, |spec| spec.guest_address)?;
        Ok(Arc::new(GuestMemory { regions }))
    }

    /// The same with one more region; one that is there already is replaced.
    pub fn with(&self, region: Arc<MappedRegion>) -> Result<Arc<GuestMemory>, MemoryError> {
        let mut regions = self.others(region.spec());
        regions.push(region);
        GuestMemory::new(regions)
    }

    /// The same without a region.
    pub fn without(&self, spec: &RegionSpec) -> Arc<GuestMemory> {
        Arc::new(GuestMemory { regions: self.others(spec) })
    }

    fn others(&self, spec: &RegionSpec) -> Vec<Arc<MappedRegion>> {
        self.regions.iter().filter(|region| !region.spec.is_same_as(spec)).cloned().collect()
    }

    /// Its regions, by guest address.
    pub fn regions(&self) -> &[Arc<MappedRegion>] {
        &self.regions
    }

    /// Finds `length` bytes at a guest-physical address, in pieces where regions meet; `None` if they
    /// are not all there.
    pub(crate) fn find(
        &self,
        address: u64,
        length: u64,
        mut piece: impl FnMut(Segment),
    ) -> Option<()> {
        let (mut address, mut left) = (address, length);
        address.checked_add(length)?;
        while left > 0 {
            let region = self.regions.iter().find(|region| {
                address
                    .checked_sub(region.spec.guest_address)
                    .is_some_and(|at| at < region.spec.size)
            })?;
            let segment = region.segment(address - region.spec.guest_address, left);
            address += segment.len() as u64;
            left -= segment.len() as u64;
            piece(segment);
        }
        Some(())
    }

    /// A window onto `length` bytes at an address of the hypervisor's, all in one region.
    pub(crate) fn user_window(self: &Arc<Self>, address: u64, length: u64) -> Option<Window> {
        let end = address.checked_add(length)?;
        let region = self.regions.iter().find(|region| {
            let RegionSpec { user_address, size, .. } = region.spec;
            user_address <= address && end <= user_address + size
        })?;
        let segment = region.segment(address - region.spec.user_address, length);
        Some(Window::new(segment, self.clone()))
    }
}

fn check_overlaps(
    regions: &[Arc<MappedRegion>],
    start: impl Fn(&RegionSpec) -> u64,
) -> Result<(), MemoryError> {
    for pair in regions.windows(2) {
        let (first, second) = (&pair[0].spec, &pair[1].spec);
        if start(first) + first.size > start(second) {
            return Err(MemoryError::Overlap(start(first), start(second)));
        }
    }
    Ok(())
}

/// A sealed memfd, mapped.
#[cfg(test)]
pub(crate) fn sealed_memory(spec: RegionSpec) -> Result<Arc<MappedRegion>, MemoryError> {
    let size = (spec.mmap_offset + spec.size).next_multiple_of(4096);
    let memory = nebd_abi::region::SharedMemory::create("guest", size)
        .map_err(|error| MemoryError::System { action: "make", source: io::Error::other(error) })?;
    MappedRegion::map(spec, memory.fd(), Backing::Sealed)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn region(guest_address: u64, size: u64, user_address: u64) -> Arc<MappedRegion> {
        sealed_memory(RegionSpec { guest_address, size, user_address, mmap_offset: 512 }).unwrap()
    }

    fn pieces(memory: &GuestMemory, address: u64, length: u64) -> Option<Vec<usize>> {
        let mut lengths = Vec::new();
        memory.find(address, length, |piece| lengths.push(piece.len()))?;
        Some(lengths)
    }

    #[test]
    fn ranges_cross_regions_and_stop_at_holes() {
        let memory = GuestMemory::new(vec![
            region(0x2000, 0x1000, 0x7000_0000),
            region(0x1000, 0x1000, 0x9000_0000),
            region(0x8000, 0x1000, 0x8000_0000),
        ])
        .unwrap();
        assert_eq!(pieces(&memory, 0x1000, 0x1000), Some(vec![0x1000]));
        assert_eq!(pieces(&memory, 0x1ff0, 0x20), Some(vec![0x10, 0x10]));
        assert_eq!(pieces(&memory, 0x1000, 0x2000), Some(vec![0x1000, 0x1000]));
        assert_eq!(pieces(&memory, 0x1000, 0x2001), None);
        assert_eq!(pieces(&memory, 0xfff, 2), None);
        assert_eq!(pieces(&memory, u64::MAX - 1, 4), None);
        assert!(memory.user_window(0x7000_0ff0, 0x10).is_some());
        assert!(memory.user_window(0x7000_0ff0, 0x11).is_none());
        assert!(memory.user_window(u64::MAX, 2).is_none());
    }

    #[test]
    fn bytes_arrive_at_the_offset_in_the_file() {
        let shared = nebd_abi::region::SharedMemory::create("guest", 8192).unwrap();
        let spec =
            RegionSpec { guest_address: 0, size: 4096, user_address: 1 << 30, mmap_offset: 4096 };
        let region = MappedRegion::map(spec, shared.fd(), Backing::Sealed).unwrap();
        let memory = GuestMemory::new(vec![region]).unwrap();
        memory.find(5, 3, |piece| assert_eq!(piece.write(b"abc"), 3)).unwrap();
        let whole = Window::of(&Arc::new(shared), 0, 8192).unwrap();
        let mut bytes = [0; 3];
        whole.read(4096 + 5, &mut bytes);
        assert_eq!(&bytes, b"abc");
    }

    #[test]
    fn memory_that_can_shrink_is_refused_unless_vouched_for() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("unsealed", flags).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let spec = RegionSpec { guest_address: 0, size: 4096, user_address: 0, mmap_offset: 0 };
        let refused = MappedRegion::map(spec, fd.as_fd(), Backing::Sealed);
        assert!(matches!(refused, Err(MemoryError::Unsealed)));
        MappedRegion::map(spec, fd.as_fd(), Backing::AnyFile).unwrap();
        let longer = RegionSpec { size: 4097, ..spec };
        let refused = MappedRegion::map(longer, fd.as_fd(), Backing::AnyFile);
        assert!(matches!(refused, Err(MemoryError::Short { end: 4097, size: 4096 })));
    }

    #[test]
    fn impossible_tables_are_refused() {
        for spec in [
            RegionSpec { size: 0, ..RegionSpec::default() },
            RegionSpec { size: 4096, guest_address: u64::MAX - 4000, ..RegionSpec::default() },
            RegionSpec { size: 4096, user_address: u64::MAX - 4000, ..RegionSpec::default() },
            RegionSpec { size: 4096, mmap_offset: u64::MAX - 4000, ..RegionSpec::default() },
        ] {
            let shared = nebd_abi::region::SharedMemory::create("guest", 4096).unwrap();
            let refused = MappedRegion::map(spec, shared.fd(), Backing::Sealed);
            assert!(matches!(refused, Err(MemoryError::Region(_))), "{spec:?}");
        }
        let twice = vec![region(0, 8192, 0), region(4096, 4096, 1 << 20)];
        assert!(matches!(GuestMemory::new(twice), Err(MemoryError::Overlap(0, 4096))));
        let twice = vec![region(0, 8192, 0), region(8192, 4096, 4096)];
        assert!(matches!(GuestMemory::new(twice), Err(MemoryError::Overlap(0, 4096))));
    }

    #[test]
    fn a_region_that_is_added_again_replaces_itself() {
        let memory = GuestMemory::new(vec![region(0, 4096, 0)]).unwrap();
        let memory = memory.with(region(0, 4096, 0)).unwrap();
        assert_eq!(memory.regions().len(), 1);
        let memory = memory.without(memory.regions()[0].spec());
        assert_eq!(memory.regions().len(), 0);
    }
}
