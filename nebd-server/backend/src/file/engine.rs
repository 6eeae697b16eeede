//! The two ways to carry out a task's steps: in the lane's io_uring, or in a thread that may block.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use io_uring::{opcode, squeue, types};
use nebd_abi::Errno;

use super::system;
use super::task::{RING_ATTEMPTS_MAX, Step, Task};
use crate::Lane;

impl Task {
    /// Goes on, on the shard's thread, until something has to be waited for.
    pub(crate) fn drive(mut self: Box<Self>, lane: &mut Lane) {
        let uses_ring = self.file.uses_uring() && self.attempts < RING_ATTEMPTS_MAX;
        loop {
            let step = self.step();
            match step {
                Step::Done(result) => return self.request.complete(lane, result),
                Step::Sync => match self.begin_sync() {
                    None => return,
                    Some(task) => self = task,
                },
                Step::Discard { .. } => return self.drive_in_pool(),
                Step::Move { .. } | Step::Allocate { .. } => {}
            }
            // Admission may have ended the task.
            let step = if step == Step::Sync { self.step() } else { step };
            match (self.entry(step), lane.ring()) {
                (None, _) => {}
                (Some(entry), Some(ring)) if uses_ring => return ring.issue(self, entry),
                _ => return self.drive_in_pool(),
            }
        }
    }

    /// A system call in the ring is over.
    pub(crate) fn advance_in(mut self: Box<Self>, lane: &mut Lane, result: i32) {
        self.apply(result);
        self.drive(lane);
    }

    fn drive_in_pool(self: Box<Self>) {
        let file = self.file.clone();
        file.pool().run(self);
    }

    /// The step as an entry of io_uring. It refers to memory of this task and of its request only.
    fn entry(&self, step: Step) -> Option<squeue::Entry> {
        let fd = types::Fd(self.file.as_fd().as_raw_fd());
        Some(match step {
            Step::Move { write, offset } => {
                let vectors = self.vectors();
                let (pointer, count) = vectors.raw();
                match (vectors.single(), write) {
                    (Some((pointer, bytes)), true) => {
                        opcode::Write::new(fd, pointer, bytes).offset(offset).build()
                    }
                    (Some((pointer, bytes)), false) => {
                        opcode::Read::new(fd, pointer, bytes).offset(offset).build()
                    }
                    (None, true) => opcode::Writev::new(fd, pointer, count).offset(offset).build(),
                    (None, false) => opcode::Readv::new(fd, pointer, count).offset(offset).build(),
                }
            }
            Step::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(fd, length).offset(offset).mode(mode.bits() as i32).build()
            }
            Step::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Step::Discard { .. } | Step::Done(_) => return None,
        })
    }

    /// Goes on to the end, in a thread of the pool.
    pub(super) fn run_to_end(mut self: Box<Self>) {
        loop {
            let step = self.step();
            let fd = self.file.as_fd();
            let result = match step {
                Step::Done(result) => return self.request.complete_remote(result),
                Step::Sync => {
                    match self.begin_sync() {
                        None => return,
                        Some(task) => self = task,
                    }
                    if self.step() != Step::Sync {
                        continue;
                    }
                    #[cfg(feature = "test-hooks")]
                    super::hooks::delay_sync();
                    rustix::fs::fdatasync(&*self.file).map(|()| 0).map_err(io::Error::from)
                }
                Step::Move { write, offset } => system::transfer(fd, self.vectors(), offset, write),
                Step::Allocate { mode, offset, length } => {
                    system::allocate(fd, mode, offset, length).map(|()| 0)
                }
                Step::Discard { offset, length } => {
                    system::device_discard(fd, offset, length).map(|()| 0)
                }
            };
            self.apply(match result {
                Ok(count) => i32::try_from(count).unwrap_or(i32::MAX),
                Err(error) => -Errno::from_io(&error).0,
            });
            if self.attempts > 1 {
                std::thread::sleep(Duration::from_millis(u64::from(self.attempts.min(100))));
            }
        }
    }
}
