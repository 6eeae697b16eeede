//! The system calls that move data, and those that no crate wraps.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, StatxFlags};

use super::buffer::Vectors;

/// What a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    BlockDevice,
}

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    /// A device node's inode is not the device's.
    special: u64,
}

impl Identity {
    pub(super) fn of(fd: impl AsFd) -> io::Result<Identity> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
            Identity { device: 0, inode: 0, special: stat.st_rdev }
        } else {
            Identity { device: stat.st_dev, inode: stat.st_ino, special: 0 }
        })
    }
}

/// What kind of volume a file can be; anything else is refused.
pub(super) fn kind(file: &File) -> io::Result<Kind> {
    let stat = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Kind::Regular),
        FileType::BlockDevice => Ok(Kind::BlockDevice),
        _ => Err(io::Error::from_raw_os_error(libc::ENOTBLK)),
    }
}

/// Present size in bytes.
pub(super) fn size(file: &File, kind: Kind) -> io::Result<u64> {
    match kind {
        Kind::Regular => Ok(rustix::fs::fstat(file)?.st_size as u64),
        Kind::BlockDevice => {
            let mut size = 0u64;
            // SAFETY: BLKGETSIZE64 writes one u64 to the address it is given.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(size) }
        }
    }
}

// Numbers of linux/fs.h, the same on every architecture that Rust and io_uring share but for the
// direction bits of MIPS, PowerPC and SPARC, which nebd does not support.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272u32 as libc::Ioctl;
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Tells a block device that a range is not needed.
pub(super) fn device_discard(fd: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: BLKDISCARD reads two u64 from the address it is given.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `preadv` or `pwritev`; bytes moved.
pub(super) fn transfer(
    fd: BorrowedFd<'_>,
    vectors: &Vectors,
    offset: u64,
    write: bool,
) -> io::Result<usize> {
    let (pointer, count) = vectors.raw();
    let (fd, offset) = (fd.as_raw_fd(), offset as libc::off_t);
    // SAFETY: `vectors` names memory that stays mapped until its request is completed, and the
    // request is borrowed by the caller; no Rust reference to that memory exists.
    let moved = unsafe {
        if write {
            libc::pwritev(fd, pointer, count as libc::c_int, offset)
        } else {
            libc::preadv(fd, pointer, count as libc::c_int, offset)
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// `fallocate`.
pub(super) fn allocate(
    fd: BorrowedFd<'_>,
    mode: FallocateFlags,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    Ok(rustix::fs::fallocate(fd, mode, offset, length)?)
}

/// Closes what `file` refers to, whoever else uses the number: every system call on it fails with
/// `EBADF` from here on.
pub(super) fn disconnect(file: &File) -> io::Result<()> {
    // Such a descriptor is good for nothing but being one.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let nothing = rustix::fs::open("/", flags, Mode::empty())?;
    // SAFETY: both numbers are open, and `file` goes on to own the one it has: what lies behind it
    // is replaced in one step, and nothing here or elsewhere counts on what that is.
    let result = unsafe { libc::dup3(nothing.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What direct IO demands of memory addresses, and of offsets and lengths, in bytes; `None` if the
/// file cannot do it.
pub(super) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let flags = AtFlags::EMPTY_PATH;
    let told = rustix::fs::statx(file, "", flags, StatxFlags::DIOALIGN)
        .ok()
        .filter(|statx| statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    if let Some(statx) = told {
        let (memory, offset) = (statx.stx_dio_mem_align, statx.stx_dio_offset_align);
        return (offset > 0).then_some((memory.max(1), offset));
    }
    // A kernel before 6.1, or a file system that does not say (FUSE, network): try. 512 bytes at an
    // address that is aligned to no more are refused where the logical block is larger.
    let trial = super::buffer::Aligned::new(8192);
    for alignment in [512, 4096] {
        let vectors = trial.part(alignment as usize, alignment as usize);
        if transfer(file.as_fd(), &vectors, 0, false).is_ok() {
            return Some((alignment, alignment));
        }
    }
    None
}

/// Whether asking for the attributes of a file costs no IO: on a local file system.
pub(super) fn has_cheap_attributes(file: &File) -> bool {
    const EXT: u64 = 0xEF53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683E;
    const F2FS: u64 = 0xF2F5_2010;
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file)
        .is_ok_and(|fs| [EXT, XFS, BTRFS, F2FS, TMPFS].contains(&(fs.f_type as u64)))
}
