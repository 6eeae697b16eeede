//! What the fuzz targets share: a small region, and bytes written into it.

use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;

use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, SessionId};
use nebd_abi::region::{Region, SharedMemory};

/// A region with one small queue, whose every byte a short input can reach.
pub fn region() -> Arc<Region> {
    let geometry =
        Geometry { queue_count: 1, queue_depth: 4, iovecs_per_slot: 4, arena_size: 4096 };
    let params = RegionParams {
        version: LayoutVersion::CURRENT,
        session: SessionId([0xf5; 16]),
        geometry,
        volume: "null:fuzz".parse().expect("a constant"),
        client_pid: 1,
        client_version: "fuzz".into(),
    };
    Arc::new(Region::create(params).expect("a memfd"))
}

/// Writes bytes at an offset; what lies beyond the memory is dropped.
pub fn write(memory: &SharedMemory, offset: u64, bytes: &[u8]) {
    for (at, byte) in (offset..).zip(bytes) {
        // SAFETY: an atomic byte; every bit pattern is valid.
        let Some(shared) = (unsafe { memory.atomics::<AtomicU8>(at) }) else { return };
        shared.store(*byte, Relaxed);
    }
}

/// An input, eaten from the front.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte, zero at the end.
    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// At most so many bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        head
    }

    /// Writes up to 255 bytes of the input at an offset that the input names.
    pub fn scribble(&mut self, region: &Region) {
        let geometry = region.geometry();
        // The queue's own bytes, beyond which there are only padding and data.
        let used = geometry.iovecs_offset() + u64::from(geometry.queue_depth) * 64;
        let offset = u64::from(u16::from_le_bytes([self.byte(), self.byte()])) % used;
        let count = usize::from(self.byte());
        write(region.memory(), geometry.queues_offset() + offset, self.bytes(count));
    }
}
