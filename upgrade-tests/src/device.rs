//! The block device under test, as the harness sees it. Implement [`Device`] to point the harness at
//! your own backend.

use std::os::fd::BorrowedFd;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the buffers.
    Read,
    /// Write the buffers.
    Write,
    /// Make everything durable that was acknowledged before this was submitted.
    Flush,
    /// The range may be forgotten: it reads as zeros, or as before.
    Discard,
    /// The range reads as zeros.
    WriteZeroes,
}

impl Op {
    /// Whether it changes what the volume holds.
    pub fn is_change(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// A request.
#[derive(Debug)]
pub struct Io {
    /// What it asks for.
    pub op: Op,
    /// Whether it must be durable once it is acknowledged.
    pub fua: bool,
    /// Bytes from the start of the volume, a multiple of the block size.
    pub offset: u64,
    /// Bytes, a multiple of the block size; the sum of the buffers for reads and writes.
    pub length: u64,
    /// One buffer for each iovec; multiples of 512 bytes.
    pub buffers: Vec<Vec<u8>>,
}

/// A completion. It returns the request's buffers.
#[derive(Debug)]
pub struct Done {
    /// As given at submission.
    pub tag: u64,
    /// Zero, or an errno (positive).
    pub errno: i32,
    /// The buffers of the request, filled if it was a read.
    pub buffers: Vec<Vec<u8>>,
}

/// What a device is and can do.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub block_bytes: u32,
    /// Most requests in flight.
    pub depth: usize,
    /// Most iovecs in a request.
    pub iovecs_max: usize,
    /// Most bytes in a read or write.
    pub transfer_bytes_max: u64,
    /// Whether discard can be asked for.
    pub can_discard: bool,
    /// Whether write-zeroes can be asked for.
    pub can_write_zeroes: bool,
}

/// The device does not work at all: no completion will come of this.
#[derive(Debug, thiserror::Error)]
#[error("the device is gone: {0}")]
pub struct DeviceGone(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// An asynchronous block device. One thread drives it.
pub trait Device: Send {
    /// What it is and can do.
    fn geometry(&self) -> Geometry;

    /// Starts a request; at most `depth` are in flight. It does not wait for the storage.
    fn submit(&mut self, tag: u64, io: Io) -> Result<(), DeviceGone>;

    /// Moves what has completed into `out`. It does not block.
    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone>;

    /// Becomes readable when [`poll`](Self::poll) may find something; without one the harness
    /// polls every millisecond.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl<D: Device + ?Sized> Device for Box<D> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }

    fn submit(&mut self, tag: u64, io: Io) -> Result<(), DeviceGone> {
        (**self).submit(tag, io)
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        (**self).poll(out)
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        (**self).event()
    }
}
