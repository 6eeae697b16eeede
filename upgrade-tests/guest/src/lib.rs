//! Guests of the tests: what is in them, how they are put together, and how they talk with the host.
//!
//! ```text
//!  install.sh ─► kernel ─► kernel::Kernel ─┐
//!  guest-verifier, a static program ───────┼─► image ─► archive ─► initrd ─► QEMU
//!  mkfs.xfs, e2fsck, … and their libraries ┘
//!
//!   host ── board: a file ══ memory of a PCI device (ivshmem) ── guest-verifier ── disks
//! ```

pub mod archive;
pub mod board;
pub mod image;
pub mod kernel;
pub mod stamp;
