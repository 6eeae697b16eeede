//! A virtqueue, seen from its driver: after the virtio specification, and the rules that Linux follows.

mod packed;
mod split;

use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;

use super::memory::Memory;
use packed::PackedRing;
use split::SplitRing;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u64 = 16;
/// What a descriptor names once its request is answered: nobody may look there any more.
const NOWHERE: u64 = u64::MAX - 7;

/// What a ring is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) size: u16,
    pub(super) is_packed: bool,
    pub(super) event_idx: bool,
    pub(super) indirect: bool,
}

/// Where a ring lies, by offsets in the driver's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) descriptors: u64,
    /// Or the driver's event suppression.
    pub(super) available: u64,
    /// Or the device's event suppression.
    pub(super) used: u64,
}

/// Bytes of a ring, and what is where, from an offset that is a multiple of 64.
pub(super) fn place(at: u64, size: u16) -> (Place, u64) {
    let size = u64::from(size);
    let available = at + DESCRIPTOR_BYTES * size;
    let used = (available + 6 + 2 * size).next_multiple_of(64);
    let end = (used + 6 + 8 * size).next_multiple_of(64);
    (Place { descriptors: at, available, used }, end)
}

/// A piece of a request: where, how long, and whether the device writes there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) length: u32,
    pub(super) is_writable: bool,
}

/// The device broke the rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device broke the rules of ring {ring}: {what}")]
pub struct Violation {
    /// Which ring.
    pub ring: usize,
    /// How.
    pub what: String,
}

enum Layout {
    Split(SplitRing),
    Packed(PackedRing),
}

/// One ring. One thread at a time.
pub(super) struct Ring {
    layout: Layout,
    index: usize,
}

/// What both layouts share.
struct Base {
    memory: Arc<Memory>,
    place: Place,
    kind: Kind,
}

impl Base {
    /// Where the pieces of a request are, for the guest: address, length, flags.
    fn described(&self, pieces: &[Piece]) -> Vec<(u64, u32, u16)> {
        let flags = |piece: &Piece| if piece.is_writable { F_WRITE } else { 0 };
        let address = |piece: &Piece| self.memory.guest_address(piece.at);
        pieces.iter().map(|piece| (address(piece), piece.length, flags(piece))).collect()
    }

    /// The two halves of 16 bits lie in the order of the layout.
    fn write_descriptor(&self, at: u64, address: u64, length: u32, third: u16, fourth: u16) {
        self.memory.store_u64(at, address, Relaxed);
        self.memory.store_u32(at + 8, length, Relaxed);
        self.memory.store_u16(at + 12, third, Relaxed);
        self.memory.store_u16(at + 14, fourth, Relaxed);
    }
}

impl Ring {
    pub(super) fn new(index: usize, memory: Arc<Memory>, place: Place, kind: Kind) -> Ring {
        let base = Base { memory, place, kind };
        let layout = match kind.is_packed {
            false => Layout::Split(SplitRing::new(base)),
            true => Layout::Packed(PackedRing::new(base)),
        };
        Ring { layout, index }
    }

    /// Makes a request available; false if there is no room now. A table, if one is used, goes to `table`.
    pub(super) fn push(&mut self, pieces: &[Piece], table: u64, slot: usize) -> bool {
        match &mut self.layout {
            Layout::Split(ring) => ring.push(pieces, table, slot),
            Layout::Packed(ring) => ring.push(pieces, table, slot),
        }
    }

    /// Whether the device wants to be kicked for what was pushed since this was last asked.
    pub(super) fn is_kick_needed(&mut self) -> bool {
        fence(SeqCst);
        match &mut self.layout {
            Layout::Split(ring) => ring.is_kick_needed(),
            Layout::Packed(ring) => ring.is_kick_needed(),
        }
    }

    /// The next answer: its slot, and how many bytes the device says that it wrote.
    pub(super) fn pop(&mut self) -> Result<Option<(usize, u32)>, Violation> {
        let popped = match &mut self.layout {
            Layout::Split(ring) => ring.pop(),
            Layout::Packed(ring) => ring.pop(),
        };
        popped.map_err(|what| Violation { ring: self.index, what })
    }

    /// Calls are of no use for now.
    pub(super) fn want_no_calls(&mut self) {
        match &mut self.layout {
            Layout::Split(ring) => ring.want_no_calls(),
            Layout::Packed(ring) => ring.want_no_calls(),
        }
    }

    /// Asks to be called for the next answer; false if one is there already.
    pub(super) fn want_calls(&mut self) -> bool {
        match &mut self.layout {
            Layout::Split(ring) => ring.want_calls(),
            Layout::Packed(ring) => ring.want_calls(),
        }
        fence(SeqCst);
        !match &self.layout {
            Layout::Split(ring) => ring.has_used(),
            Layout::Packed(ring) => ring.has_used(),
        }
    }
}
