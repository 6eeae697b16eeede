//! A disk without a file system: reads, writes, zeros and flushes of blocks that are stamped.
//!
//! Each thread has a range of blocks of its own and one request at a time, so that for each block it
//! is known what was acknowledged.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use anyhow::{Context, Result};
use nebd_guest::board::{BLOCK_BYTES, Board, ENTRIES_MAX, Entry, OfDisk, Value};
use nebd_guest::stamp::Dice;
use rustix::fs::{FallocateFlags, fallocate};

use crate::blocks::{self, Aligned};
use crate::memory::Mapping;
use crate::meter::Meter;

const BLOCKS_MAX: usize = 16;
/// After a request that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// A disk, and the range of it that one thread has.
pub struct RawDisk {
    file: File,
    board: Board<Mapping>,
    disk: usize,
    meter: Arc<Meter>,
}

impl RawDisk {
    /// Opens the disk.
    pub fn open(
        path: &Path,
        board: Board<Mapping>,
        disk: usize,
        meter: Arc<Meter>,
    ) -> Result<Self> {
        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(path);
        Ok(RawDisk { file: file.context("open the disk")?, board, disk, meter })
    }

    /// How many blocks of this disk are used.
    pub fn blocks(&self) -> u64 {
        let blocks = self.board.of_disk(self.disk, OfDisk::Bytes) / BLOCK_BYTES as u64;
        blocks.min(ENTRIES_MAX as u64)
    }

    /// Keeps one request in flight.
    pub fn work(&self, range: Range<u64>, seed: u64, rest: Duration, stop: &AtomicBool) {
        let mut dice = Dice::new(seed);
        let mut memory = Aligned::new(BLOCKS_MAX);
        while !stop.load(SeqCst) {
            let longest = (range.end - range.start).min(BLOCKS_MAX as u64);
            let count = if dice.percent(60) { 1 } else { 1 + dice.below(longest) };
            let first = range.start + dice.below(range.end - range.start - count + 1);
            let blocks = first..first + count;
            // What it is unknown of is found out first.
            let is_in_doubt = blocks.clone().any(|block| self.entry(block).is_in_doubt());
            match dice.below(100) {
                _ if is_in_doubt => self.read(blocks, &mut memory),
                0..55 => self.write(blocks, &mut memory),
                55..90 => self.read(blocks, &mut memory),
                90..95 => self.zero(blocks),
                _ => self.flush(),
            }
            if !rest.is_zero() {
                std::thread::sleep(rest);
            }
        }
    }

    /// Compares all blocks with what was acknowledged.
    pub fn compare(&self) {
        let mut memory = Aligned::new(BLOCKS_MAX);
        let mut first = 0;
        while first < self.blocks() {
            let end = (first + BLOCKS_MAX as u64).min(self.blocks());
            self.read(first..end, &mut memory);
            first = end;
        }
    }

    fn entry(&self, block: u64) -> Entry {
        self.board.entry(self.disk, block as usize)
    }

    fn write(&self, blocks: Range<u64>, memory: &mut Aligned) {
        let value = Value::new(self.meter.number(), false);
        let bytes = memory.blocks((blocks.end - blocks.start) as usize);
        for (block, bytes) in blocks.clone().zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            blocks::fill(bytes, self.disk, block, value);
        }
        let at = blocks.start * BLOCK_BYTES as u64;
        self.change(blocks, value, "write", || self.file.write_all_at(bytes, at));
    }

    fn zero(&self, blocks: Range<u64>) {
        let value = Value::new(self.meter.number(), true);
        let at = blocks.start * BLOCK_BYTES as u64;
        let length = (blocks.end - blocks.start) * BLOCK_BYTES as u64;
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        self.change(blocks, value, "zeros", || Ok(fallocate(&self.file, flags, at, length)?));
    }

    fn change(
        &self,
        blocks: Range<u64>,
        value: Value,
        what: &str,
        request: impl FnOnce() -> io::Result<()>,
    ) {
        for block in blocks.clone() {
            self.board.begin(self.disk, block as usize, value);
        }
        match self.meter.measure(request) {
            Ok(()) => {
                for block in blocks {
                    self.board.acknowledge(self.disk, block as usize, value);
                }
            }
            Err(error) => self.failed(what, &error),
        }
    }

    fn read(&self, blocks: Range<u64>, memory: &mut Aligned) {
        let bytes = memory.blocks((blocks.end - blocks.start) as usize);
        let at = blocks.start * BLOCK_BYTES as u64;
        if let Err(error) = self.meter.measure(|| self.file.read_exact_at(bytes, at)) {
            return self.failed("read", &error);
        }
        self.meter.add(OfDisk::Checked, blocks.end - blocks.start);
        for (block, bytes) in blocks.zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let entry = self.entry(block);
            let number = match blocks::number(bytes, self.disk, block) {
                Ok(number) => number,
                Err(what) => {
                    self.meter.mismatch(&what);
                    continue;
                }
            };
            match entry.settle(number) {
                Some(value) if entry.is_in_doubt() => {
                    self.board.acknowledge(self.disk, block as usize, value);
                }
                Some(_) => {}
                None => self.meter.mismatch(&format!("block {block}: {number:?}, not {entry:?}")),
            }
        }
    }

    fn flush(&self) {
        if let Err(error) = self.meter.measure(|| self.file.sync_data()) {
            self.failed("flush", &error);
        }
    }

    fn failed(&self, what: &str, error: &io::Error) {
        self.meter.error(what, error);
        std::thread::sleep(PAUSE);
    }
}
