//! Requests of more than one step: those that begin or end inside a block.
//!
//! ```text
//!  write   │····▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓······│     read head, read tail, put the caller's bytes in between,
//!           head              tail          write all
//!  zeroes  │····0000│00000000│00······│     read head, read tail, zero their parts, write both,
//!                                           zero the whole blocks in the middle
//!  read    │····▒▒▒▒│▒▒▒▒▒▒▒▒│▒▒······│     read all, give the caller its part
//! ```
//!
//! Each step starts when the one before is done. Until a job is told, its claim keeps everybody
//! else from changing its blocks.

use std::collections::VecDeque;
use std::ops::Range;

use nebd_client::{Errno, Io, Op, OpFlags};

use crate::claims::Claim;
use crate::completion::Reply;
use crate::image::Data;
use crate::raw::{Caller, submit_owned};

enum Step {
    /// Fills a part of the buffer from the image.
    Read { from: u64, to: Range<usize> },
    /// The buffer gets the caller's bytes.
    TakeFrom(Caller<'static>, usize),
    /// The caller gets bytes of the buffer.
    GiveTo(Caller<'static>, usize),
    /// A part of the buffer becomes zeros.
    Clear(Range<usize>),
    /// Writes a part of the buffer to the image.
    Write { to: u64, from: Range<usize> },
    /// A request without data.
    Plain(Io<'static>),
}

/// Steps that are left, and who is told after the last.
pub struct Job {
    steps: VecDeque<Step>,
    buffer: Vec<u8>,
    flags: OpFlags,
    reply: Reply,
    claim: Option<Claim>,
}

/// Blocks around memory of the caller: hardly longer than that.
fn bytes(blocks: &Range<u64>) -> usize {
    (blocks.end - blocks.start) as usize
}

impl Job {
    fn new(reply: Reply, flags: OpFlags, claim: Option<Claim>, buffer_bytes: usize) -> Job {
        Job { steps: VecDeque::new(), buffer: vec![0; buffer_bytes], flags, reply, claim }
    }

    /// Reads whole blocks for a part of them.
    pub fn read(data: Data, blocks: Range<u64>, caller: Caller<'static>, reply: Reply) -> Job {
        let length = bytes(&blocks);
        let mut job = Job::new(reply, OpFlags::NONE, None, length);
        job.steps.push_back(Step::Read { from: blocks.start, to: 0..length });
        // Less than a block.
        let within = (data.offset - blocks.start) as usize;
        job.steps.push_back(Step::GiveTo(caller, within));
        job
    }

    /// Writes whole blocks of which a part is the caller's.
    pub fn write(
        data: Data,
        blocks: Range<u64>,
        block: u64,
        caller: Caller<'static>,
        reply: Reply,
        claim: Claim,
    ) -> Job {
        let length = bytes(&blocks);
        let mut job = Job::new(reply, data.flags, Some(claim), length);
        let (block_bytes, within) = (block as usize, (data.offset - blocks.start) as usize);
        if within > 0 || length == block_bytes {
            job.steps.push_back(Step::Read { from: blocks.start, to: 0..block_bytes });
        }
        if data.offset + data.length < blocks.end && length > block_bytes {
            let tail = length - block_bytes..length;
            job.steps.push_back(Step::Read { from: blocks.end - block, to: tail });
        }
        job.steps.push_back(Step::TakeFrom(caller, within));
        job.steps.push_back(Step::Write { to: blocks.start, from: 0..length });
        job
    }

    /// Zeros any range.
    pub fn zero(
        (offset, length): (u64, u64),
        flags: OpFlags,
        block: u64,
        reply: Reply,
        claim: Claim,
    ) -> Job {
        let mut job = Job::new(reply, flags, Some(claim), block as usize);
        let end = offset + length;
        let whole = offset.next_multiple_of(block)..end / block * block;
        if whole.start > whole.end {
            // Inside one block.
            job.clear(whole.end, offset..end, block);
            return job;
        }
        if offset < whole.start {
            job.clear(whole.start - block, offset..whole.start, block);
        }
        if whole.end < end {
            job.clear(whole.end, whole.end..end, block);
        }
        if whole.start < whole.end || length == 0 {
            let io = Io::write_zeroes(whole.start, whole.end - whole.start);
            job.steps.push_back(Step::Plain(io.with_flags(flags)));
        }
        job
    }

    /// Zeros a part of the block that begins at `at`.
    fn clear(&mut self, at: u64, part: Range<u64>, block: u64) {
        let all = 0..block as usize;
        let part = (part.start - at) as usize..(part.end - at) as usize;
        self.steps.push_back(Step::Read { from: at, to: all.clone() });
        self.steps.push_back(Step::Clear(part));
        self.steps.push_back(Step::Write { to: at, from: all });
    }

    /// Discards whole blocks.
    pub fn discard((offset, length): (u64, u64), reply: Reply, claim: Claim) -> Job {
        let mut job = Job::new(reply, OpFlags::NONE, Some(claim), 0);
        job.steps.push_back(Step::Plain(Io::discard(offset, length)));
        job
    }

    /// Carries out all steps, and tells.
    pub fn start(mut self) {
        loop {
            match self.steps.pop_front() {
                None => return self.tell(Ok(())),
                Some(Step::TakeFrom(caller, at)) => caller.copy_to(&mut self.buffer[at..]),
                Some(Step::GiveTo(caller, at)) => caller.copy_from(&self.buffer[at..]),
                Some(Step::Clear(part)) => self.buffer[part].fill(0),
                Some(Step::Read { from, to }) => {
                    return self.submit(Op::Read, OpFlags::NONE, from, to);
                }
                Some(Step::Write { to, from }) => {
                    let flags = self.flags_of_write();
                    return self.submit(Op::Write, flags, to, from);
                }
                Some(Step::Plain(io)) => return self.run(io),
            }
        }
    }

    /// A write has no use for the flags of write-zeroes.
    fn flags_of_write(&self) -> OpFlags {
        if self.flags.contains(OpFlags::FUA) { OpFlags::FUA } else { OpFlags::NONE }
    }

    fn run(self, io: Io<'static>) {
        let image = self.reply.image().clone();
        let refused = self.reply.twin();
        let done = Box::new(move |result| self.went(result));
        if let Err(errno) = image.session().submit(io, done) {
            refused.tell(Err(errno));
        }
    }

    fn submit(mut self, op: Op, flags: OpFlags, offset: u64, within: Range<usize>) {
        let image = self.reply.image().clone();
        let refused = self.reply.twin();
        let buffer = std::mem::take(&mut self.buffer);
        let data = Data { op, flags, offset, length: within.len() as u64 };
        let done = move |buffer, result| {
            self.buffer = buffer;
            self.went(result);
        };
        if let Err(errno) = submit_owned(image.session(), data, buffer, within, done) {
            refused.tell(Err(errno));
        }
    }

    fn went(self, result: Result<(), Errno>) {
        match result {
            Ok(()) => self.start(),
            Err(errno) => self.tell(Err(errno)),
        }
    }

    fn tell(self, result: Result<(), Errno>) {
        // What the host does next must not find its own claim in the way.
        drop(self.claim);
        self.reply.tell(result);
    }
}
