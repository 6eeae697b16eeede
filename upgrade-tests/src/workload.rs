//! What is asked of a volume, in which order: a script drawn from a seed.
//!
//! The script does not depend on timing. A step that would overlap a change in flight (its outcome
//! would be undefined) is [parked](crate::stream) until the change has ended, and so is every later
//! step that overlaps the parked one.

use crate::device::{Geometry, Op};
use crate::stamp::{Dice, SECTOR_BYTES};

/// How a workload mixes its requests; shares are in percent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Of all steps: reads. The rest, less the following, are writes.
    pub read: u32,
    /// Of all steps: flushes.
    pub flush: u32,
    /// Of all steps: discards.
    pub discard: u32,
    /// Of all steps: write-zeroes.
    pub write_zeroes: u32,
    /// Of the writes and write-zeroes: with FUA.
    pub fua: u32,
    /// Of the steps with a range: in the hot blocks.
    pub hot: u32,
    /// Of the steps with a range: the next of a sequential run.
    pub sequential: u32,
    /// Of the steps with a range: more than one block.
    pub multi_block: u32,
    /// Of the reads and writes: more than one iovec.
    pub multi_iovec: u32,
    /// Of the acknowledged changes: read again at once.
    pub reread: u32,
    /// Blocks that are rewritten over and over.
    pub hot_blocks: u64,
    /// Most blocks in a request.
    pub blocks_max: u64,
}

impl Default for Mix {
    fn default() -> Mix {
        Mix {
            read: 20,
            flush: 2,
            discard: 2,
            write_zeroes: 2,
            fua: 5,
            hot: 45,
            sequential: 25,
            multi_block: 20,
            multi_iovec: 15,
            reread: 25,
            hot_blocks: 48,
            blocks_max: 8,
        }
    }
}

impl Mix {
    /// Writes alone, of one block: the most pressure on a fence, and the most writes in flight.
    pub fn writes() -> Mix {
        Mix { read: 5, flush: 1, discard: 1, write_zeroes: 1, multi_block: 5, ..Mix::default() }
    }

    /// Nothing but what every device can do.
    pub fn reads_and_writes() -> Mix {
        Mix { flush: 0, discard: 0, write_zeroes: 0, fua: 0, ..Mix::default() }
    }
}

/// One step of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number, from 1; what a write leaves in its stamps.
    pub number: u64,
    /// What is asked.
    pub op: Op,
    /// With FUA.
    pub fua: bool,
    /// First block.
    pub block: u64,
    /// Blocks; zero for a flush.
    pub count: u64,
    /// Where the data is cut into iovecs: the length of each, in bytes.
    pub iovecs: Vec<usize>,
}

impl Step {
    /// The blocks it touches.
    pub fn blocks(&self) -> std::ops::Range<u64> {
        self.block..self.block + self.count
    }

    /// Whether two steps must not be in flight together. A read beside a change is fine: it may
    /// see either value.
    pub fn excludes(&self, other: &Step) -> bool {
        self.op.is_change()
            && other.op.is_change()
            && self.block < other.block + other.count
            && other.block < self.block + self.count
    }
}

/// The steps of one volume's workload, without end.
#[derive(Clone, Debug)]
pub struct Script {
    mix: Mix,
    dice: Dice,
    geometry: Geometry,
    block_count: u64,
    number: u64,
    run_next: u64,
    run_left: u64,
}

impl Script {
    /// The script of this seed.
    pub fn new(seed: u64, mix: Mix, geometry: Geometry) -> Script {
        let block_count = geometry.size_bytes / u64::from(geometry.block_bytes);
        assert!(block_count > 0, "a volume without blocks cannot be tested");
        let dice = Dice::new(seed);
        Script { mix, dice, geometry, block_count, number: 0, run_next: 0, run_left: 0 }
    }

    /// The next step.
    pub fn step(&mut self) -> Step {
        self.number += 1;
        let op = self.draw_op();
        let fua = matches!(op, Op::Write | Op::WriteZeroes) && self.dice.percent(self.mix.fua);
        let (block, count) = if op == Op::Flush { (0, 0) } else { self.draw_range() };
        let iovecs = self.draw_iovecs(op, count);
        Step { number: self.number, op, fua, block, count, iovecs }
    }

    /// A step that reads blocks again; it carries the number of the step that it checks.
    pub fn reread(step: &Step, block_bytes: u32) -> Step {
        let length = (step.count * u64::from(block_bytes)) as usize;
        Step { op: Op::Read, fua: false, iovecs: vec![length], ..step.clone() }
    }

    fn draw_op(&mut self) -> Op {
        let Mix { read, flush, discard, write_zeroes, .. } = self.mix;
        let draw = self.dice.below(100) as u32;
        let mut bound = 0;
        for (op, share, can) in [
            (Op::Read, read, true),
            (Op::Flush, flush, true),
            (Op::Discard, discard, self.geometry.can_discard),
            (Op::WriteZeroes, write_zeroes, self.geometry.can_write_zeroes),
        ] {
            bound += share;
            if draw < bound {
                return if can { op } else { Op::Write };
            }
        }
        Op::Write
    }

    fn draw_range(&mut self) -> (u64, u64) {
        let transfer = self.geometry.transfer_bytes_max / u64::from(self.geometry.block_bytes);
        let most = self.mix.blocks_max.min(transfer).min(self.block_count).max(1);
        let count =
            if self.dice.percent(self.mix.multi_block) { 1 + self.dice.below(most) } else { 1 };
        let place = self.dice.below(100) as u32;
        let last = self.block_count - count;
        let block = if place < self.mix.hot {
            self.dice.below(self.mix.hot_blocks.min(last + 1))
        } else if place < self.mix.hot + self.mix.sequential {
            self.sequential(count).min(last)
        } else {
            self.dice.below(last + 1)
        };
        (block, count)
    }

    fn sequential(&mut self, count: u64) -> u64 {
        if self.run_left == 0 || self.run_next + count > self.block_count {
            self.run_next = self.dice.below(self.block_count);
            self.run_left = 4 + self.dice.below(28);
        }
        let block = self.run_next;
        self.run_next = (block + count).min(self.block_count - 1);
        self.run_left -= 1;
        block
    }

    fn draw_iovecs(&mut self, op: Op, count: u64) -> Vec<usize> {
        if !matches!(op, Op::Read | Op::Write) {
            return Vec::new();
        }
        let length = (count * u64::from(self.geometry.block_bytes)) as usize;
        let sectors = length / SECTOR_BYTES;
        let most = self.geometry.iovecs_max.min(sectors).min(6);
        if most < 2 || !self.dice.percent(self.mix.multi_iovec) {
            return vec![length];
        }
        let pieces = 2 + self.dice.below(most as u64 - 1) as usize;
        let mut cuts: Vec<usize> =
            (1..pieces).map(|_| 1 + self.dice.below(sectors as u64 - 1) as usize).collect();
        cuts.extend([0, sectors]);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|pair| (pair[1] - pair[0]) * SECTOR_BYTES).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(block_bytes: u32, size_bytes: u64) -> Geometry {
        Geometry {
            size_bytes,
            block_bytes,
            depth: 8,
            iovecs_max: 16,
            transfer_bytes_max: 1 << 20,
            can_discard: true,
            can_write_zeroes: true,
        }
    }

    #[test]
    fn a_seed_gives_the_same_steps_and_every_step_fits() {
        for (block_bytes, size_bytes) in [(512, 512), (512, 1 << 20), (4096, 4096), (4096, 1 << 24)]
        {
            let geometry = geometry(block_bytes, size_bytes);
            let mut script = Script::new(7, Mix::default(), geometry);
            let mut again = Script::new(7, Mix::default(), geometry);
            for _ in 0..5000 {
                let step = script.step();
                assert_eq!(step, again.step());
                assert!(
                    (step.block + step.count) * u64::from(block_bytes) <= size_bytes,
                    "{step:?}"
                );
                let data: usize = step.iovecs.iter().sum();
                if matches!(step.op, Op::Read | Op::Write) {
                    assert_eq!(data as u64, step.count * u64::from(block_bytes), "{step:?}");
                    assert!(step.iovecs.iter().all(|n| *n > 0 && n % SECTOR_BYTES == 0));
                }
            }
        }
    }

    #[test]
    fn every_kind_of_request_is_drawn() {
        let mut script = Script::new(1, Mix::default(), geometry(4096, 1 << 24));
        let steps: Vec<Step> = (0..2000).map(|_| script.step()).collect();
        for op in [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes] {
            assert!(steps.iter().any(|step| step.op == op), "{op:?}");
        }
        assert!(steps.iter().any(|step| step.fua));
        assert!(steps.iter().any(|step| step.iovecs.len() > 1 && step.count > 1));
    }
}
