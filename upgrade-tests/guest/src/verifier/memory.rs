//! The board as the guest sees it: memory of a PCI device.

use std::fs::File;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nebd_guest::board::{BYTES, Words};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// The board, mapped until the guest ends.
#[derive(Clone, Copy)]
pub struct Mapping(NonNull<AtomicU64>);

// SAFETY: the memory is never unmapped, and all that is done with it is atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the device's memory, which has [`BYTES`] bytes at least.
    pub fn new(resource: &File) -> io::Result<Mapping> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: at an address that the kernel chooses; whoever else has this memory does not matter, for
        // it is taken for atomics only.
        let address =
            unsafe { mmap(null_mut(), BYTES as usize, protection, MapFlags::SHARED, resource, 0)? };
        NonNull::new(address.cast()).map(Mapping).ok_or_else(|| io::ErrorKind::Other.into())
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        assert!(word < BYTES as usize / 8, "no such word of the board");
        // SAFETY: within the mapping, which is page-aligned and never unmapped.
        unsafe { self.0.add(word).as_ref() }
    }
}

impl Words for Mapping {
    fn load(&self, word: usize) -> u64 {
        self.word(word).load(SeqCst)
    }

    fn store(&self, word: usize, value: u64) {
        self.word(word).store(value, SeqCst);
    }
}
