//! The driver's memory: what RAM is to a guest. The one file of the driver that holds `unsafe`.
//!
//! ```text
//!  memfd   │ rings │ requests: header, status, table │ data …      │ … data │
//!  region  │ 0                                                     │ 1      │
//! ```
//!
//! The two regions meet for the guest (some data lies in both), and do not for the hypervisor's process.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use nebd_abi::region::{RegionError, SharedMemory};

/// Where the memory starts for the guest.
const GUEST: u64 = 0x1_0000_0000;
/// Where the regions start for the process that has them, or so it says.
const USER: [u64; 2] = [0x7f00_0000_0000, 0x7e00_0000_0000];

/// A region as messages describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) guest_address: u64,
    pub(super) size: u64,
    pub(super) user_address: u64,
    pub(super) mmap_offset: u64,
}

/// Shared memory, addressed by offsets.
#[derive(Debug)]
pub(super) struct Memory {
    shared: SharedMemory,
    /// Where the second region begins.
    split: u64,
}

macro_rules! access {
    ($load:ident, $store:ident, $type:ty, $atomic:ty) => {
        pub(super) fn $load(&self, at: u64, order: Ordering) -> $type {
            let pointer = self.pointer(at, size_of::<$type>());
            // SAFETY: mapped as `pointer` has checked, aligned as asserted there; the other process
            // changes it by atomics as well.
            unsafe { <$atomic>::from_ptr(pointer.cast()) }.load(order)
        }

        pub(super) fn $store(&self, at: u64, value: $type, order: Ordering) {
            let pointer = self.pointer(at, size_of::<$type>());
            // SAFETY: as above.
            unsafe { <$atomic>::from_ptr(pointer.cast()) }.store(value, order);
        }
    };
}

impl Memory {
    /// So many bytes of zeros, in two regions that meet at `split`.
    pub(super) fn new(bytes: u64, split: u64) -> Result<Memory, RegionError> {
        let shared = SharedMemory::create("vhost-driver", bytes.next_multiple_of(4096))?;
        Ok(Memory { shared, split: split & !4095 })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.shared.fd()
    }

    pub(super) fn regions(&self) -> [Region; 2] {
        let region = |index: usize, start: u64, end: u64| Region {
            guest_address: GUEST + start,
            size: end - start,
            user_address: USER[index],
            mmap_offset: start,
        };
        [region(0, 0, self.split), region(1, self.split, self.shared.size())]
    }

    /// The guest's address of a byte.
    pub(super) fn guest_address(&self, at: u64) -> u64 {
        GUEST + at
    }

    /// The hypervisor's address of a byte of the first region.
    pub(super) fn user_address(&self, at: u64) -> u64 {
        assert!(at < self.split, "rings lie in the first region");
        USER[0] + at
    }

    fn pointer(&self, at: u64, size: usize) -> *mut u8 {
        assert!(at.is_multiple_of(size as u64), "{at:#x} is not aligned");
        self.shared.range(at, size as u64).expect("the driver knows its memory")
    }

    access!(load_u8, store_u8, u8, AtomicU8);
    access!(load_u16, store_u16, u16, AtomicU16);
    access!(load_u32, store_u32, u32, AtomicU32);

    pub(super) fn store_u64(&self, at: u64, value: u64, order: Ordering) {
        let pointer = self.pointer(at, size_of::<u64>());
        // SAFETY: as in `access`.
        unsafe { AtomicU64::from_ptr(pointer.cast()) }.store(value, order);
    }

    /// Copies bytes out.
    pub(super) fn read(&self, at: u64, bytes: &mut [u8]) {
        let from = self.shared.range(at, bytes.len() as u64).expect("the driver knows its memory");
        // SAFETY: `range` has found the bytes; no reference to them is formed, and the destination is
        // private. A device that still writes there makes them wrong, which is what is looked for.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.shared.range(at, bytes.len() as u64).expect("the driver knows its memory");
        // SAFETY: as for `read`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}
