//! Where a request lies among the blocks of its volume, and what else it takes to move whole ones.

use std::ops::Range;

use nebd_client::{Errno, Op, RawIovec};

use crate::curve::context::{Lent, Scratch};
use crate::curve::ranges::Use;

/// A request's place: whole blocks, and how much of the first and the last is not asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// From the first byte's block to the last one's.
    pub blocks: Range<u64>,
    /// Bytes of the first block in front of the request.
    pub head: usize,
    /// Bytes of the last block behind the request.
    pub tail: usize,
}

impl Place {
    /// `length` bytes at `offset`, of a volume with blocks of `block` bytes.
    pub fn new(offset: i64, length: usize, block: u64) -> Result<Place, Errno> {
        let start = u64::try_from(offset).map_err(|_| Errno::INVAL)?;
        let end = start.checked_add(length as u64).ok_or(Errno::INVAL)?;
        let blocks =
            start - start % block..end.checked_next_multiple_of(block).ok_or(Errno::INVAL)?;
        // Both are less than a block.
        Ok(Place {
            head: (start - blocks.start) as usize,
            tail: (blocks.end - end) as usize,
            blocks,
        })
    }

    /// How a write uses the blocks.
    pub fn usage(&self) -> Use {
        if self.is_whole() { Use::Shared } else { Use::Alone }
    }

    /// Whether it is whole blocks.
    pub fn is_whole(&self) -> bool {
        self.head == 0 && self.tail == 0
    }

    /// The blocks that lie in the request whole.
    pub fn inner(&self, block: u64) -> Range<u64> {
        let whole = |part: usize| if part == 0 { 0 } else { block };
        let start = self.blocks.start + whole(self.head);
        start..self.blocks.end.saturating_sub(whole(self.tail)).max(start)
    }
}

/// Operation, offset and data of a request of whole blocks.
pub type Request = (Op, u64, [RawIovec; 3]);

/// No memory.
pub const NOTHING: RawIovec = RawIovec { pointer: std::ptr::null_mut(), length: 0 };

/// Blocks around a request that is no whole number of them.
pub struct Fringe {
    place: Place,
    block: u64,
    scratch: Scratch,
    caller: Lent,
}

/// Steps of a partial write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The first block.
    ReadFirst,
    /// The last block, if that is another.
    ReadLast,
    /// All of it.
    Write,
}

impl Fringe {
    /// `caller` is as long as the request.
    pub fn new(place: Place, block: u64, caller: Lent) -> Fringe {
        // Not beyond two of the server's blocks.
        Fringe { place, block, scratch: Scratch::new(2 * block as usize), caller }
    }

    /// All of the blocks, as a read wants them.
    pub fn read(&self) -> Request {
        (Op::Read, self.place.blocks.start, self.iovecs())
    }

    fn iovecs(&self) -> [RawIovec; 3] {
        let last = if self.has_one_block() { self.block } else { 2 * self.block };
        let Place { head, tail, .. } = self.place;
        let after = self.scratch.iovec(last as usize - tail, tail);
        [self.scratch.iovec(0, head), self.caller.iovec(), after]
    }

    fn has_one_block(&self) -> bool {
        self.place.blocks.end - self.place.blocks.start == self.block
    }

    /// What a write begins with.
    pub fn first_step(&self) -> Step {
        if self.place.head > 0 || self.has_one_block() { Step::ReadFirst } else { Step::ReadLast }
    }

    /// What a write does next.
    pub fn step_after(&self, step: Step) -> Option<Step> {
        match step {
            Step::ReadFirst if self.place.tail > 0 && !self.has_one_block() => Some(Step::ReadLast),
            Step::ReadFirst | Step::ReadLast => Some(Step::Write),
            Step::Write => None,
        }
    }

    /// What a step asks of the volume.
    pub fn request(&self, step: Step) -> Request {
        let block = self.block as usize;
        let read = |at, place| (Op::Read, place, [self.scratch.iovec(at, block), NOTHING, NOTHING]);
        match step {
            Step::ReadFirst => read(0, self.place.blocks.start),
            Step::ReadLast => read(block, self.place.blocks.end - self.block),
            Step::Write => (Op::Write, self.place.blocks.start, self.iovecs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_widened_to_blocks() {
        let place = |blocks, head, tail| Ok(Place { blocks, head, tail });
        assert_eq!(Place::new(0, 4096, 4096), place(0..4096, 0, 0));
        assert_eq!(Place::new(1, 1, 4096), place(0..4096, 1, 4094));
        assert_eq!(Place::new(4095, 2, 4096), place(0..8192, 4095, 4095));
        assert_eq!(Place::new(512, 1024, 512), place(512..1536, 0, 0));
        assert_eq!(Place::new(-1, 1, 512), Err(Errno::INVAL));
        assert_eq!(Place::new(i64::MAX, usize::MAX, 512), Err(Errno::INVAL));
        assert_eq!(Place::new(1, usize::MAX - 8, 4096), Err(Errno::INVAL));
    }

    #[test]
    fn whole_blocks_within_a_range() {
        let inner = |offset, length| Place::new(offset, length, 512).unwrap().inner(512);
        assert_eq!(inner(0, 1024), 0..1024);
        assert_eq!(inner(1, 1023), 512..1024);
        assert_eq!(inner(1, 1535), 512..1536);
        assert_eq!(inner(0, 1000), 0..512);
        assert!(inner(1, 1000).is_empty() && inner(1, 2).is_empty() && inner(7, 0).is_empty());
    }

    #[test]
    fn a_partial_write_reads_the_blocks_it_does_not_fill() {
        let steps = |offset, length: usize| {
            let caller = Lent::new(std::ptr::dangling_mut::<u8>().cast(), length).unwrap();
            let fringe = Fringe::new(Place::new(offset, length, 512).unwrap(), 512, caller);
            let mut steps = vec![fringe.first_step()];
            while let Some(next) = fringe.step_after(*steps.last().unwrap()) {
                steps.push(next);
            }
            let bytes: usize = fringe.iovecs().iter().map(|iovec| iovec.length).sum();
            assert_eq!(bytes as u64, fringe.place.blocks.end - fringe.place.blocks.start);
            steps
        };
        use Step::{ReadFirst, ReadLast, Write};
        assert_eq!(steps(1, 2), [ReadFirst, Write]);
        assert_eq!(steps(0, 2), [ReadFirst, Write]);
        assert_eq!(steps(1, 511), [ReadFirst, Write]);
        assert_eq!(steps(1, 1023), [ReadFirst, Write]);
        assert_eq!(steps(0, 1023), [ReadLast, Write]);
        assert_eq!(steps(1, 1022), [ReadFirst, ReadLast, Write]);
    }
}
