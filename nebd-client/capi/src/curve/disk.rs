//! An open volume of Curve's interface: requests of any offset and length.
//!
//! ```text
//!  whole blocks   one request on the caller's memory
//!  partial read   one request on  │ scratch │ caller's memory │ scratch │
//!  partial write  alone in its blocks: reads the first and the last block into the scratch, then
//!                 writes          │ scratch │ caller's memory │ scratch │
//! ```
//!
//! Every request, and every call that is under way, holds a [`Hold`]. The last one to let go of a
//! closed disk leaves it to the closer, or closes it if nobody waits.

use std::mem::ManuallyDrop;
use std::ops::{Deref, Range};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nebd_client::{CallError, Callback, Errno, Io, Op, OpFlags, OpenError, Options, Session};

use crate::curve::context::{Lent, Reply};
use crate::curve::place::{Fringe, NOTHING, Place, Request, Step};
use crate::curve::ranges::{self, Ranges, Right, Use};
use crate::failure::InCallback;

/// An open volume.
pub struct Disk {
    session: Session,
    name: String,
    /// Who opened it: a forked child has nothing to close.
    process: u32,
    block: u64,
    can_discard: bool,
    ranges: Arc<Ranges>,
    departure: Arc<Departure>,
    closed: fn(&str),
}

/// A disk in use.
pub struct Hold(ManuallyDrop<Arc<Disk>>);

impl Clone for Hold {
    fn clone(&self) -> Hold {
        Hold(ManuallyDrop::new(Arc::clone(&self.0)))
    }
}

impl Deref for Hold {
    type Target = Disk;

    fn deref(&self) -> &Disk {
        &self.0
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // SAFETY: taken here and nowhere else.
        let disk = unsafe { ManuallyDrop::take(&mut self.0) };
        if let Some(disk) = Arc::into_inner(disk) {
            disk.leave();
        }
    }
}

/// Where the last user of a disk leaves it.
#[derive(Default)]
struct Departure {
    state: Mutex<Left>,
    changed: Condvar,
}

#[derive(Default)]
struct Left {
    is_awaited: bool,
    disk: Option<Box<Disk>>,
}

impl Departure {
    fn lock(&self) -> MutexGuard<'_, Left> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    /// Attaches a volume; `closed` is called once it is closed.
    pub fn open(name: &str, options: Options, closed: fn(&str)) -> Result<Hold, OpenError> {
        let session = Session::open(name, options)?;
        let info = session.info();
        Ok(Hold(ManuallyDrop::new(Arc::new(Disk {
            session,
            name: name.to_owned(),
            process: std::process::id(),
            block: info.block_size.max(1).into(),
            can_discard: info.can_discard,
            ranges: ranges::of_volume(name),
            departure: Arc::default(),
            closed,
        }))))
    }

    /// The volume's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size of the volume in bytes; `None` where the session cannot be used.
    pub fn size(&self) -> Option<u64> {
        let info = self.session.info();
        (info.block_size > 0).then_some(info.size)
    }

    /// Size of a block in bytes.
    pub fn block_size(&self) -> u64 {
        self.block
    }

    /// Reads into or writes from the caller's memory, and waits.
    ///
    /// # Safety
    /// The memory is valid, and nobody uses it in a conflicting way, until this returns.
    pub unsafe fn run(&self, op: Op, offset: i64, caller: Lent) -> Result<(), Errno> {
        let run = |(op, offset, iovecs): Request| {
            // SAFETY: the caller's promise; the scratch lives in this function.
            unsafe { self.session.run_raw(op, OpFlags::NONE, offset, &iovecs) }
        };
        let place = Place::new(offset, caller.len(), self.block)?;
        if caller.len() == 0 {
            return self.session.run(Io::readv(0, &[]));
        }
        let _right = if op == Op::Write { Some(self.enter(&place)?) } else { None };
        if place.is_whole() {
            return run((op, place.blocks.start, [caller.iovec(), NOTHING, NOTHING]));
        }
        let fringe = Fringe::new(place, self.block, caller);
        if op == Op::Read {
            return run(fringe.read());
        }
        let mut step = Some(fringe.first_step());
        while let Some(now) = step {
            run(fringe.request(now))?;
            step = fringe.step_after(now);
        }
        Ok(())
    }

    /// Waits for the right to write.
    fn enter(&self, place: &Place) -> Result<Right, Errno> {
        self.ranges.try_enter(place.blocks.clone(), place.usage()).or_else(|waiter| {
            // Who is in the way may need the thread that runs callbacks.
            InCallback::refuse()?;
            Ok(self.ranges.wait_here(waiter))
        })
    }

    /// Makes what has completed durable, and waits.
    pub fn flush(&self) -> Result<(), Errno> {
        self.session.flush()
    }

    /// Changes the size.
    pub fn resize(&self, size: u64) -> Result<(), CallError> {
        self.session.resize(size)
    }

    /// The last user is gone.
    fn leave(self) {
        let departure = Arc::clone(&self.departure);
        let mut left = departure.lock();
        if left.is_awaited {
            left.disk = Some(Box::new(self));
            departure.changed.notify_all();
        } else {
            drop(left);
            self.shut();
        }
    }

    fn shut(self) {
        // A server that cannot be told now is told in the background.
        let _ = self.session.close();
        (self.closed)(&self.name);
    }
}

impl Hold {
    /// Lets go of a disk that nobody can find any more, and closes it: now, after waiting for its
    /// requests, or in a callback later.
    pub fn close(self) {
        if InCallback::refuse().is_err() || self.process != std::process::id() {
            return;
        }
        let departure = Arc::clone(&self.departure);
        departure.lock().is_awaited = true;
        drop(self);
        let mut left = departure.lock();
        let disk = loop {
            match left.disk.take() {
                Some(disk) => break disk,
                None => {
                    left = departure.changed.wait(left).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        drop(left);
        disk.shut();
    }

    /// Starts a read or write of the caller's memory. With an error `reply` is never told.
    ///
    /// # Safety
    /// The memory is valid, and nobody uses it in a conflicting way, until `reply` was told.
    pub unsafe fn start(
        self,
        op: Op,
        offset: i64,
        caller: Lent,
        reply: Reply,
    ) -> Result<(), Errno> {
        let place = match Place::new(offset, caller.len(), self.block) {
            Ok(_) if caller.len() == 0 => return self.tell_later(reply, Ok(())),
            Ok(place) => place,
            Err(errno) => return self.tell_later(reply, Err(errno)),
        };
        match (op, place.is_whole()) {
            (Op::Read, true) => {
                let request = (op, place.blocks.start, [caller.iovec(), NOTHING, NOTHING]);
                // SAFETY: the caller's promise.
                unsafe { self.submit(&request, reply, ()) }
            }
            (Op::Read, false) => {
                let fringe = Fringe::new(place, self.block, caller);
                let request = fringe.read();
                // SAFETY: the caller's promise; the scratch is held.
                unsafe { self.submit(&request, reply, fringe) }
            }
            (_, true) => {
                let offset = place.blocks.start;
                self.in_turn(place.blocks, Use::Shared, reply, move |disk, right| {
                    let request = (op, offset, [caller.iovec(), NOTHING, NOTHING]);
                    // SAFETY: the caller's promise.
                    unsafe { disk.submit(&request, reply, right) }
                })
            }
            (_, false) => {
                let blocks = place.blocks.clone();
                let fringe = Fringe::new(place, self.block, caller);
                let step = fringe.first_step();
                self.in_turn(blocks, Use::Alone, reply, move |disk, right| {
                    Patch { disk, fringe, _right: right, reply }.submit(step)
                })
            }
        }
    }

    /// Forgets the whole blocks of a range.
    pub fn start_discard(self, offset: i64, length: usize, reply: Reply) -> Result<(), Errno> {
        let place = match Place::new(offset, length, self.block) {
            Ok(place) => place,
            Err(errno) => return self.tell_later(reply, Err(errno)),
        };
        if self.size().is_none_or(|size| place.blocks.end > size) {
            return self.tell_later(reply, Err(Errno::NOSPC));
        }
        let blocks = place.inner(self.block);
        if blocks.is_empty() || !self.can_discard {
            // Reads as before, which is one of the two things that were asked for.
            return self.tell_later(reply, Ok(()));
        }
        self.in_turn(blocks.clone(), Use::Shared, reply, move |disk, right| {
            let io = Io::discard(blocks.start, blocks.end - blocks.start);
            let done = disk.teller(reply, right);
            disk.session.submit(io, done).or_else(|errno| disk.tell_later(reply, Err(errno)))
        })
    }

    /// Makes what has completed durable.
    pub fn start_flush(self, reply: Reply) -> Result<(), Errno> {
        let done = self.teller(reply, ());
        self.session.submit(Io::flush(), done)
    }

    /// Does what needs the right to write, in its turn. What fails after this has returned is told.
    fn in_turn(
        self,
        blocks: Range<u64>,
        usage: Use,
        reply: Reply,
        go: impl FnOnce(Hold, Right) -> Result<(), Errno> + Send + 'static,
    ) -> Result<(), Errno> {
        let waiter = match self.ranges.try_enter(blocks, usage) {
            Ok(right) => return go(self, right),
            Err(waiter) => waiter,
        };
        let ranges = Arc::clone(&self.ranges);
        ranges.wait(waiter, move |right| {
            let disk = self.clone();
            if let Err(errno) = go(self, right) {
                // The session is over. A callback on this thread is better than none.
                reply.tell(Err(errno));
            }
            drop(disk);
        });
        Ok(())
    }

    /// Submits a request of whole blocks; `held` is dropped when it is done, before that is told.
    ///
    /// # Safety
    /// As for [`start`](Self::start).
    unsafe fn submit<T: Send + 'static>(
        self,
        (op, offset, iovecs): &Request,
        reply: Reply,
        held: T,
    ) -> Result<(), Errno> {
        let done = self.teller(reply, held);
        // SAFETY: the caller's promise.
        let submitted =
            unsafe { self.session.submit_raw(*op, OpFlags::NONE, *offset, iovecs, done) };
        submitted.or_else(|errno| self.tell_later(reply, Err(errno)))
    }

    /// What is to happen when a request is done.
    fn teller<T: Send + 'static>(&self, reply: Reply, held: T) -> Callback {
        let disk = self.clone();
        Box::new(move |result| {
            drop(held);
            reply.tell(result);
            drop(disk);
        })
    }

    /// Tells a result that is known already, on the thread that runs callbacks: the caller may
    /// hold locks that its callback takes. With an error it is not told.
    fn tell_later(self, reply: Reply, result: Result<(), Errno>) -> Result<(), Errno> {
        let disk = self.clone();
        let done = Box::new(move |_| {
            reply.tell(result);
            drop(disk);
        });
        self.session.submit(Io::readv(0, &[]), done)
    }
}

/// A partial write on its way.
struct Patch {
    disk: Hold,
    fringe: Fringe,
    _right: Right,
    reply: Reply,
}

impl Patch {
    fn submit(self, step: Step) -> Result<(), Errno> {
        let (disk, reply) = (self.disk.clone(), self.reply);
        let (op, offset, iovecs) = self.fringe.request(step);
        let done = Box::new(move |result| self.done(step, result));
        // SAFETY: `done` keeps the scratch, and the caller's memory is lent until the reply.
        let submitted =
            unsafe { disk.session.submit_raw(op, OpFlags::NONE, offset, &iovecs, done) };
        submitted.or_else(|errno| disk.tell_later(reply, Err(errno)))
    }

    fn done(self, step: Step, result: Result<(), Errno>) {
        let (disk, reply) = (self.disk.clone(), self.reply);
        let told = match (result, self.fringe.step_after(step)) {
            (Ok(()), Some(next)) => match self.submit(next) {
                Ok(()) => return,
                Err(errno) => Err(errno),
            },
            (result, _) => {
                drop(self);
                result
            }
        };
        reply.tell(told);
        drop(disk);
    }
}
