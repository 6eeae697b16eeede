//! A block device in memory, honest or with one planted fault: what the harness is tested against.
//!
//! An honest one still completes out of order and late, moves each request's data a sector at a
//! time between polls, and loses unflushed writes at a power cut.

use crate::device::{Device, DeviceGone, Done, Geometry, Io, Op};
use crate::stamp::{Dice, SECTOR_BYTES};

/// What is wrong with a [`MemoryDevice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Some requests fail with EIO, half done. The device is honest about it.
    Error,
    /// A request is forgotten.
    DropRequest,
    /// A write is acknowledged and not done.
    LoseWrite,
    /// A write is acknowledged, and done later.
    AcknowledgeEarly,
    /// An old write is done again, after newer ones.
    Replay,
    /// A write lands on the next block.
    Misdirect,
    /// A write is acknowledged with its last sector missing.
    Tear,
    /// A bit flips.
    FlipBit,
    /// A read is answered from an earlier state of the volume.
    StaleRead,
    /// A read is answered with the data of another volume.
    ForeignRead,
    /// A read is answered without its data.
    EmptyRead,
    /// A request is answered twice.
    AnswerTwice,
    /// Write-zeroes does nothing.
    IgnoreWriteZeroes,
    /// A discard leaves rubbish.
    RubbishDiscard,
    /// Flush does nothing.
    IgnoreFlush,
    /// FUA is ignored.
    IgnoreFua,
}

impl Fault {
    /// Every fault that must be found by reading, or by waiting.
    pub const FOUND_UNDER_LOAD: [Fault; 13] = [
        Fault::DropRequest,
        Fault::LoseWrite,
        Fault::AcknowledgeEarly,
        Fault::Replay,
        Fault::Misdirect,
        Fault::Tear,
        Fault::FlipBit,
        Fault::StaleRead,
        Fault::ForeignRead,
        Fault::EmptyRead,
        Fault::AnswerTwice,
        Fault::IgnoreWriteZeroes,
        Fault::RubbishDiscard,
    ];

    /// Every fault that only a power cut shows.
    pub const FOUND_AFTER_POWER_CUT: [Fault; 2] = [Fault::IgnoreFlush, Fault::IgnoreFua];
}

struct Pending {
    tag: u64,
    io: Io,
    /// Sectors moved so far.
    moved: usize,
    /// Already acknowledged; only the work is left.
    is_answered: bool,
}

/// A volume in memory.
pub struct MemoryDevice {
    geometry: Geometry,
    fault: Fault,
    /// How many of a million requests meet the fault.
    per_million: u32,
    dice: Dice,
    data: Vec<u8>,
    /// What survives a power cut.
    durable: Vec<u8>,
    /// An earlier state, for [`Fault::StaleRead`].
    earlier: Vec<u8>,
    pending: Vec<Pending>,
    old_writes: Vec<(u64, Vec<u8>)>,
}

impl MemoryDevice {
    /// A volume of zeros.
    pub fn new(size_bytes: u64, block_bytes: u32, fault: Fault, seed: u64) -> MemoryDevice {
        let zeros = || vec![0; size_bytes as usize];
        MemoryDevice {
            geometry: Geometry {
                size_bytes,
                block_bytes,
                depth: 64,
                iovecs_max: 16,
                transfer_bytes_max: 1 << 20,
                can_discard: true,
                can_write_zeroes: true,
            },
            fault,
            per_million: 20_000,
            dice: Dice::new(seed),
            data: zeros(),
            durable: zeros(),
            earlier: zeros(),
            pending: Vec::new(),
            old_writes: Vec::new(),
        }
    }

    /// Everything unflushed may be gone: each sector is as it was at the last flush, or as written.
    pub fn cut_power(&mut self) {
        let (data, durable) = (&mut self.data, &mut self.durable);
        for (data, durable) in
            data.chunks_exact_mut(SECTOR_BYTES).zip(durable.chunks_exact_mut(SECTOR_BYTES))
        {
            if self.dice.percent(70) {
                data.copy_from_slice(durable);
            } else {
                durable.copy_from_slice(data);
            }
        }
    }

    fn meets(&mut self, fault: Fault) -> bool {
        self.fault == fault && self.dice.per_million(self.per_million)
    }

    /// Moves the next sector of a request; true once it is whole.
    fn advance(&mut self, at: usize) -> bool {
        let Pending { io, moved, .. } = &mut self.pending[at];
        let sectors = (io.length as usize) / SECTOR_BYTES;
        if *moved >= sectors {
            return true;
        }
        let place = io.offset as usize + *moved * SECTOR_BYTES;
        let stored = &mut self.data[place..place + SECTOR_BYTES];
        match io.op {
            Op::Read => sector_of(&mut io.buffers, *moved).copy_from_slice(stored),
            Op::Write => stored.copy_from_slice(sector_of(&mut io.buffers, *moved)),
            Op::WriteZeroes if self.fault != Fault::IgnoreWriteZeroes => stored.fill(0),
            Op::Discard if self.fault == Fault::RubbishDiscard => stored.fill(0xDB),
            // A discard may zero some sectors and leave others.
            Op::Discard if !(place / SECTOR_BYTES).is_multiple_of(3) => stored.fill(0),
            Op::Discard | Op::WriteZeroes | Op::Flush => {}
        }
        *moved += 1;
        *moved >= sectors
    }

    fn finish(&mut self, mut pending: Pending, out: &mut Vec<Done>) {
        self.make_durable(&pending.io);
        match pending.io.op {
            Op::Write => self.spoil_write(&pending.io),
            Op::Read => self.spoil_read(&mut pending.io),
            _ => {}
        }
        if pending.is_answered {
            return;
        }
        if self.meets(Fault::AnswerTwice) {
            out.push(Done { tag: pending.tag, errno: 0, buffers: Vec::new() });
        }
        out.push(Done { tag: pending.tag, errno: 0, buffers: pending.io.buffers });
    }

    fn make_durable(&mut self, io: &Io) {
        if io.op == Op::Flush && self.fault != Fault::IgnoreFlush {
            // Requests in flight are moved half way; a flush may make that durable as well.
            self.durable.copy_from_slice(&self.data);
        }
        if io.fua && self.fault != Fault::IgnoreFua {
            let range = io.offset as usize..(io.offset + io.length) as usize;
            self.durable[range.clone()].copy_from_slice(&self.data[range]);
        }
    }

    /// What goes wrong with a write that was done.
    fn spoil_write(&mut self, io: &Io) {
        let range = io.offset as usize..(io.offset + io.length) as usize;
        if self.meets(Fault::FlipBit) {
            let bit = self.dice.below(io.length * 8);
            self.data[range.start + bit as usize / 8] ^= 1 << (bit % 8);
        }
        if self.fault == Fault::Replay {
            self.old_writes.push((io.offset, io.buffers.concat()));
            if self.dice.per_million(self.per_million) {
                let which = self.dice.below(self.old_writes.len() as u64) as usize;
                let (offset, bytes) = self.old_writes.swap_remove(which);
                self.data[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
            }
        }
        if self.fault == Fault::StaleRead && self.dice.percent(2) {
            self.earlier.copy_from_slice(&self.data);
        }
    }

    fn spoil_read(&mut self, io: &mut Io) {
        let offset = io.offset as usize;
        if self.meets(Fault::StaleRead) {
            fill(io, &self.earlier[offset..offset + io.length as usize]);
        }
        if self.meets(Fault::ForeignRead) {
            let stamp = crate::stamp::Stamp { volume: 999, block: 0, write: 1, incarnation: 1 };
            let mut other = vec![0; io.length as usize];
            stamp.fill(&mut other);
            fill(io, &other);
        }
    }

    /// What goes wrong with a request before it is begun; true if it is not to be queued.
    fn spoil_submission(&mut self, tag: u64, io: &mut Io) -> Option<Pending> {
        let sectors = io.length as usize / SECTOR_BYTES;
        let is_write = io.op == Op::Write;
        let mut pending = Pending { tag, io: empty(), moved: 0, is_answered: false };
        if is_write && self.meets(Fault::LoseWrite)
            || io.op == Op::Read && self.meets(Fault::EmptyRead)
        {
            pending.moved = sectors;
        }
        if is_write && self.meets(Fault::Tear) {
            pending.moved = 1;
        }
        if is_write && self.meets(Fault::Misdirect) {
            let block = u64::from(self.geometry.block_bytes);
            io.offset = (io.offset + block).min(self.geometry.size_bytes - io.length);
        }
        (!self.meets(Fault::DropRequest)).then_some(pending)
    }

    /// Answers what is honest to fail, and what is answered before its time.
    fn answer_now(&mut self, at: usize, out: &mut Vec<Done>) -> bool {
        let is_write = self.pending[at].io.op == Op::Write;
        if self.pending[at].moved > 0 && self.meets(Fault::Error) {
            let Pending { tag, io, .. } = self.pending.swap_remove(at);
            out.push(Done { tag, errno: 5, buffers: io.buffers });
            return true;
        }
        if is_write && !self.pending[at].is_answered && self.meets(Fault::AcknowledgeEarly) {
            let pending = &mut self.pending[at];
            pending.is_answered = true;
            out.push(Done { tag: pending.tag, errno: 0, buffers: Vec::new() });
        }
        false
    }
}

impl Device for MemoryDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u64, mut io: Io) -> Result<(), DeviceGone> {
        if let Some(pending) = self.spoil_submission(tag, &mut io) {
            self.pending.push(Pending { io, ..pending });
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        for _ in 0..16 {
            if self.pending.is_empty() {
                break;
            }
            let at = self.dice.below(self.pending.len() as u64) as usize;
            if self.answer_now(at, out) {
                continue;
            }
            // A request that was answered before its time takes its time.
            let dawdles = self.pending[at].is_answered && !self.dice.percent(2);
            if !dawdles && self.advance(at) {
                let pending = self.pending.swap_remove(at);
                self.finish(pending, out);
            }
        }
        Ok(())
    }
}

fn empty() -> Io {
    Io { op: Op::Flush, fua: false, offset: 0, length: 0, buffers: Vec::new() }
}

/// Sector number `index` of the data in these buffers.
fn sector_of(buffers: &mut [Vec<u8>], index: usize) -> &mut [u8] {
    let mut at = index * SECTOR_BYTES;
    for buffer in buffers {
        if at < buffer.len() {
            return &mut buffer[at..at + SECTOR_BYTES];
        }
        at -= buffer.len();
    }
    &mut []
}

fn fill(io: &mut Io, bytes: &[u8]) {
    let mut at = 0;
    for buffer in &mut io.buffers {
        let end = at + buffer.len();
        buffer.copy_from_slice(&bytes[at..end]);
        at = end;
    }
}
