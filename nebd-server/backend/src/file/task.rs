//! One request as a series of system calls. It does no IO itself: an engine asks for the next
//! [`Step`], carries it out in its own way, and tells how it went.
//!
//! ```text
//!   read          Move* ───────────────────────────────► Done
//!   write         Move* ──────────────── FUA ─► Sync ──► Done
//!   write zeroes  Allocate ┬──────────── FUA ─► Sync ──► Done
//!                          └ refused ─► Allocate (next way) … ─► Move* of zeros
//!   discard       Allocate or Discard ─────────────────► Done
//!   flush                                       Sync ──► Done
//! ```
//!
//! A short transfer goes on where it stopped, `EINTR` and `EAGAIN` are tried again, and `EINVAL`
//! (memory or offsets that direct IO does not take) leads to a stand-in buffer, then to buffered
//! IO, never to the guest.

use std::sync::Arc;

use nebd_abi::{Errno, Op, OpFlags};
use rustix::fs::FallocateFlags;

use super::buffer::{self, Aligned, BOUNCE_BYTES_MAX, Vectors};
use super::open_file::OpenFile;
use super::system::Kind;
use crate::{Mailbox, Request};

/// Attempts in the ring before a request that gets `EAGAIN` goes where waiting is allowed.
pub(super) const RING_ATTEMPTS_MAX: u32 = 8;

/// Writes in a row that may bring a request no further.
const STALLS_MAX: u32 = 3;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read into, or write from, [`Task::vectors`].
    Move { write: bool, offset: u64 },
    /// `fallocate`.
    Allocate { mode: FallocateFlags, offset: u64, length: u64 },
    /// `BLKDISCARD`.
    Discard { offset: u64, length: u64 },
    /// `fdatasync`.
    Sync,
    /// Answer.
    Done(Result<(), Errno>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Data of the request, `moved` bytes of it done.
    Data,
    /// Zeros in place of data, `moved` bytes of them done.
    Zeros,
    /// Ways to free or zero the range, from this one on.
    Way(u8),
    Sync,
    Done(Result<(), Errno>),
}

/// A request under way in the `file` backend.
pub(crate) struct Task {
    pub(super) request: Request,
    pub(super) file: Arc<OpenFile>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) attempts: u32,
    /// Writes in a row that wrote less than a block.
    stalls: u32,
    stage: Stage,
    moved: u64,
    vectors: Vectors,
    /// The client's memory does not suit direct IO.
    bounced: bool,
    bounce: Option<Aligned>,
    retried_buffered: bool,
    /// Counted among the syncs that run.
    syncing: bool,
}

impl Task {
    pub(super) fn new(request: Request, file: Arc<OpenFile>, mailbox: Arc<Mailbox>) -> Box<Task> {
        let stage = match request.op {
            Op::Read | Op::Write => Stage::Data,
            Op::Flush => Stage::Sync,
            Op::Discard | Op::WriteZeroes => Stage::Way(0),
        };
        let bounced = !file.takes(request.segments.as_slice());
        Box::new(Task {
            request,
            file,
            mailbox,
            attempts: 0,
            stalls: 0,
            stage,
            moved: 0,
            vectors: Vectors::of(&[], 0),
            bounced,
            bounce: None,
            retried_buffered: false,
            syncing: false,
        })
    }

    /// The memory of the present [`Step::Move`].
    pub(super) fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// Stops here.
    pub(super) fn fail(&mut self, errno: Errno) {
        self.stage = Stage::Done(Err(errno));
    }

    /// The next system call.
    pub(super) fn step(&mut self) -> Step {
        let (offset, length) = (self.request.offset, self.request.length);
        loop {
            match self.stage {
                Stage::Data | Stage::Zeros if self.moved >= length => {
                    self.stage = self.after_data()
                }
                Stage::Data => return self.data(),
                Stage::Zeros => {
                    let bytes = (length - self.moved).min(BOUNCE_BYTES_MAX) as usize;
                    self.vectors = buffer::zeros().part(0, bytes);
                    return Step::Move { write: true, offset: offset + self.moved };
                }
                Stage::Way(_) if length == 0 => self.stage = self.after_data(),
                Stage::Way(way) => match self.way(way) {
                    Some(Way::Allocate(mode)) => return Step::Allocate { mode, offset, length },
                    Some(Way::Discard) => return Step::Discard { offset, length },
                    Some(Way::Zeros) => self.stage = Stage::Zeros,
                    Some(Way::Refused) => self.stage = Stage::Way(way + 1),
                    // A discard is a hint: where nothing takes it, the range reads as before.
                    None => self.stage = self.after_data(),
                },
                Stage::Sync => return Step::Sync,
                Stage::Done(result) => return Step::Done(result),
            }
        }
    }

    fn after_data(&self) -> Stage {
        if self.request.op.is_mutation() && self.request.is_fua() {
            Stage::Sync
        } else {
            Stage::Done(Ok(()))
        }
    }

    fn data(&mut self) -> Step {
        let write = self.request.op == Op::Write;
        let segments = self.request.segments.as_slice();
        if self.bounced {
            let bytes = (self.request.length - self.moved).min(BOUNCE_BYTES_MAX) as usize;
            let bounce = self.bounce.get_or_insert_with(|| Aligned::new(bytes));
            if write {
                bounce.gather(segments, self.moved, bytes);
            }
            self.vectors = bounce.part(0, bytes);
        } else {
            self.vectors = Vectors::of(segments, self.moved);
        }
        Step::Move { write, offset: self.request.offset + self.moved }
    }

    /// How to free or zero a range, best first.
    fn way(&self, index: u8) -> Option<Way> {
        const PUNCH: Way =
            Way::Allocate(FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE));
        const ZERO: Way =
            Way::Allocate(FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE));
        let ways: &[Way] = match (self.request.op, self.file.kind()) {
            (Op::Discard, Kind::Regular) => &[PUNCH],
            (Op::Discard, Kind::BlockDevice) => &[Way::Discard],
            _ if self.request.flags.contains(OpFlags::NO_UNMAP) => &[ZERO, Way::Zeros],
            _ => &[PUNCH, ZERO, Way::Zeros],
        };
        let way = *ways.get(usize::from(index))?;
        match way {
            Way::Allocate(mode) if !self.file.knows(mode) => Some(Way::Refused),
            way => Some(way),
        }
    }

    /// Asks whether the `fdatasync` of [`Step::Sync`] may be issued now. `None`: the task is held
    /// back and will be answered from elsewhere.
    pub(super) fn begin_sync(mut self: Box<Self>) -> Option<Box<Task>> {
        #[cfg(feature = "test-hooks")]
        if super::hooks::is_flush_off() {
            self.stage = Stage::Done(Ok(()));
            return Some(self);
        }
        if self.syncing {
            return Some(self);
        }
        if self.file.has_vanished() {
            self.fail(Errno(libc::ENOENT));
            return Some(self);
        }
        self.syncing = true;
        let file = self.file.clone();
        file.syncs().admit(&file, self)
    }

    /// The result of a sync that was issued by whoever held this task back.
    pub(super) fn settle(&mut self, result: Result<(), Errno>) {
        self.syncing = false;
        self.stage = Stage::Done(result);
    }

    /// Answers from wherever this is, with what a sync that was admitted owes to the others.
    pub(super) fn give_up(mut self, errno: Errno) {
        self.apply(-errno.0);
        let result = match self.stage {
            Stage::Done(result) => result,
            _ => Err(errno),
        };
        self.request.complete_remote(result);
    }

    /// How the system call went: a count, or a negative errno.
    pub(super) fn apply(&mut self, result: i32) {
        self.apply_result(result);
        if self.syncing
            && let Stage::Done(result) = self.stage
        {
            self.syncing = false;
            self.file.syncs().end(&self.mailbox, result);
        }
    }

    fn apply_result(&mut self, result: i32) {
        match -result {
            libc::EINTR | libc::EAGAIN => self.attempts += 1,
            errno if errno > 0 => self.apply_error(errno),
            _ => {
                self.attempts = 0;
                self.apply_count(result as u64);
            }
        }
    }

    fn apply_error(&mut self, errno: i32) {
        match self.stage {
            Stage::Way(way) => {
                let refused = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV, libc::ENOTTY];
                // EINVAL is how some devices refuse a range that is not a multiple of their own unit.
                if refused.contains(&errno) || errno == libc::EINVAL {
                    if let Some(Way::Allocate(mode)) = self.way(way)
                        && errno != libc::EINVAL
                    {
                        self.file.forget(mode);
                    }
                    self.stage = Stage::Way(way + 1);
                    return;
                }
            }
            Stage::Data if errno == libc::EINVAL && !self.bounced && self.file.is_direct() => {
                self.bounced = true;
                return;
            }
            Stage::Data | Stage::Zeros if errno == libc::EINVAL && !self.retried_buffered => {
                self.retried_buffered = self.file.leave_direct();
                if self.retried_buffered {
                    return;
                }
            }
            _ => {}
        }
        // What the client asked was valid; that the kernel thinks otherwise is a failed storage.
        self.fail(if errno == libc::EINVAL { Errno::IO } else { Errno(errno) });
    }

    fn apply_count(&mut self, count: u64) {
        match self.stage {
            Stage::Data if self.request.op == Op::Read => self.apply_read(count),
            Stage::Data | Stage::Zeros => {
                let wanted = self.vectors.bytes() as u64;
                let count = count.min(wanted);
                // A direct write that stops within a block is written again from the block's start.
                let usable = if count == wanted { count } else { self.file.whole_blocks(count) };
                self.moved += usable;
                self.stalls = if usable == 0 { self.stalls + 1 } else { 0 };
                if self.stalls > STALLS_MAX {
                    self.fail(Errno::IO);
                }
            }
            Stage::Way(_) => self.stage = self.after_data(),
            Stage::Sync => self.stage = Stage::Done(Ok(())),
            Stage::Done(_) => {}
        }
    }

    fn apply_read(&mut self, count: u64) {
        let wanted = self.vectors.bytes() as u64;
        let count = count.min(wanted);
        let segments = self.request.segments.as_slice();
        if self.bounced
            && let Some(bounce) = &self.bounce
        {
            bounce.scatter(segments, self.moved, count as usize);
        }
        self.moved += count;
        let at_end = count == 0 || count < wanted && self.file.whole_blocks(count) != count;
        if at_end && self.moved < self.request.length {
            match self.file.kind() {
                // The image is shorter than the volume: what was never written reads as zeros.
                Kind::Regular => {
                    buffer::fill_zeros(segments, self.moved);
                    self.moved = self.request.length;
                }
                Kind::BlockDevice => self.fail(Errno::IO),
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Allocate(FallocateFlags),
    Discard,
    Zeros,
    /// The file refused it before.
    Refused,
}
