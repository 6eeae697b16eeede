//! The board as the host sees it: a file without a name.
//!
//! QEMU offers it to servers of vhost-user as a part of the guest's memory, and ours takes no memory
//! that others can make smaller. So it is sealed; and it outlives QEMU, for this program holds it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nebd_guest::board::{BYTES, Board, Common, MAGIC, OfDisk, Words};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};

use super::error::{GuestError, system};
use super::machine::Disk;

/// The file. A read or write that fails is one of memory that is gone, and is told as zero.
#[derive(Debug)]
pub struct BoardFile(File);

impl BoardFile {
    /// Where QEMU finds it, as long as this program lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl Words for BoardFile {
    fn load(&self, word: usize) -> u64 {
        let mut bytes = [0; 8];
        match self.0.read_exact_at(&mut bytes, word as u64 * 8) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        }
    }

    fn store(&self, word: usize, value: u64) {
        // A page of the page cache: nothing to wait for, and no way to fail but a full disk, which shows
        // in what the guest does.
        let _ = self.0.write_all_at(&value.to_le_bytes(), word as u64 * 8);
    }
}

/// Makes a board for these disks.
pub fn make(disks: &[Disk]) -> Result<Board<BoardFile>, GuestError> {
    let file = sealed().map_err(|error| system("make the board")(error.into()))?;
    let board = Board(BoardFile(file));
    for (index, disk) in disks.iter().enumerate() {
        board.set_of_disk(index, OfDisk::Kind, disk.kind as u64);
        board.set_of_disk(index, OfDisk::Bytes, disk.bytes);
        board.set_of_disk(index, OfDisk::Depth, disk.depth);
        board.set_of_disk(index, OfDisk::Rest, disk.rest_ms);
    }
    board.set(Common::Disks, disks.len() as u64);
    board.set(Common::Magic, MAGIC);
    Ok(board)
}

/// A file that has its memory, and keeps its size.
fn sealed() -> rustix::io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("nebd-board", flags)?);
    fallocate(&file, FallocateFlags::empty(), 0, BYTES)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}
