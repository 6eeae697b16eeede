//! The board as the host sees it: a file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nebd_guest::board::{BYTES, Board, Common, MAGIC, OfDisk, Words};

use super::error::{GuestError, system};
use super::machine::Disk;

/// The file. A read or write that fails is one of memory that is gone, and is told as zero.
#[derive(Debug)]
pub struct BoardFile(File);

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
pub fn make(path: &Path, disks: &[Disk]) -> Result<Board<BoardFile>, GuestError> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true).open(path);
    let file = file.map_err(system("make the board"))?;
    // Allocated, for a guest that writes into a hole of a full disk dies of it.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BYTES)
        .map_err(|error| GuestError::System { action: "make the board", source: error.into() })?;
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
