//! What `nebd_volume` is: a session, and what C cannot keep for itself.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_client::{
    Buffer, CallError, CompletionMode, Errno, Memory, OpenError, Queue, Session, VolumeInfo, errno,
};

use crate::failure::{InCallback, explain};
use crate::options::{EventGate, Options};
use crate::raw::{Callback, RawInfo, RawStats, Target};

/// While closing with several queues, the longest sleep on one of them.
const CLOSE_STEP: Duration = Duration::from_millis(10);

/// `nebd_volume`.
pub struct Volume {
    pub(crate) session: Session,
    /// Empty unless the host polls.
    queues: Vec<Queue>,
    /// By address, as C frees them.
    buffers: Mutex<HashMap<usize, Buffer>>,
    /// By id.
    memories: Mutex<HashMap<u32, Memory>>,
    accepted: Arc<Accepted>,
    events: Arc<EventGate>,
    /// Who opened it: a forked child cannot wait for its parent's requests.
    process: u32,
}

/// Counts requests whose callback has not returned.
#[derive(Default)]
struct Accepted {
    count: AtomicUsize,
    closing: AtomicBool,
    lock: Mutex<()>,
    none_left: Condvar,
}

impl Accepted {
    fn wait_for_none(&self) {
        self.closing.store(true, SeqCst);
        let mut guard = lock(&self.lock);
        while self.count.load(SeqCst) > 0 {
            guard = self.none_left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// An asynchronous request's way back to its host. Dropped without [`tell`](Self::tell), the
/// request was not accepted.
pub struct Reply {
    target: Target<Callback>,
    accepted: Arc<Accepted>,
}

impl Reply {
    /// Runs the callback.
    pub fn tell(self, result: Result<(), Errno>) {
        self.target.call(result);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let was = self.accepted.count.fetch_sub(1, SeqCst);
        // The closer stores its flag before it looks at the count, so one of the two sees the other.
        if was == 1 && self.accepted.closing.load(SeqCst) {
            drop(lock(&self.accepted.lock));
            self.accepted.none_left.notify_all();
        }
    }
}

impl Volume {
    /// Attaches a volume.
    pub fn open(name: &str, options: &Options) -> Result<Volume, OpenError> {
        let (inner, events) = options.for_volume();
        let session = Session::open(name, inner)?;
        let queues = match options.mode() {
            CompletionMode::Threaded => Vec::new(),
            CompletionMode::Manual => {
                (0..session.queue_count()).filter_map(|index| session.queue(index)).collect()
            }
        };
        Ok(Volume {
            session,
            queues,
            buffers: Mutex::default(),
            memories: Mutex::default(),
            accepted: Arc::default(),
            events,
            process: std::process::id(),
        })
    }

    /// Waits for everything accepted, and detaches.
    pub fn close(self) -> Result<(), Errno> {
        if self.usable().is_ok() {
            self.drain();
            self.events.shut();
        }
        drop((self.buffers, self.memories, self.queues));
        told(self.session.close())
    }

    /// Fails in a forked child, for what the session does not refuse there by itself: its locks
    /// may be held by threads that the child does not have.
    fn usable(&self) -> Result<(), Errno> {
        if self.process == std::process::id() { Ok(()) } else { Err(errno::FORKED) }
    }

    fn drain(&self) {
        if self.queues.is_empty() {
            return self.accepted.wait_for_none();
        }
        while self.accepted.count.load(SeqCst) > 0 {
            let completed: usize = self.queues.iter().map(crate::exports_io::reap).sum();
            let busy = self.queues.iter().find(|queue| queue.in_flight() > 0);
            match busy.or(self.queues.first()) {
                Some(queue) if completed == 0 => drop(queue.wait(Some(CLOSE_STEP))),
                _ => {}
            }
        }
    }

    /// A request is about to be submitted.
    pub fn reply(&self, target: Target<Callback>) -> Reply {
        self.accepted.count.fetch_add(1, SeqCst);
        Reply { target, accepted: Arc::clone(&self.accepted) }
    }

    /// A queue that the host polls.
    pub fn queue(&self, index: u32) -> Result<&Queue, Errno> {
        if self.queues.is_empty() {
            return Err(Errno::NOTSUP);
        }
        let queue = self.queues.get(index as usize).ok_or(Errno::INVAL)?;
        // Cheaper than `usable`, and asked with each poll.
        match queue.failure() {
            Some(errno::FORKED) => Err(errno::FORKED),
            _ => Ok(queue),
        }
    }

    /// Runs callbacks of what completed, after waiting for it if there is nothing yet.
    pub fn poll(&self, index: u32, timeout_ms: c_int) -> Result<c_int, Errno> {
        let queue = self.queue(index)?;
        InCallback::refuse()?;
        let mut completed = crate::exports_io::reap(queue);
        if completed == 0 && timeout_ms != 0 {
            let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
            queue.wait(timeout);
            completed = crate::exports_io::reap(queue);
        }
        Ok(c_int::try_from(completed).unwrap_or(c_int::MAX))
    }

    /// Prepares a queue for sleeping on its eventfd.
    pub fn arm(&self, index: u32) -> Result<c_int, Errno> {
        Ok(c_int::from(self.queue(index)?.arm()))
    }

    /// The eventfd of a queue.
    pub fn event_fd(&self, index: u32) -> Result<c_int, Errno> {
        Ok(self.queue(index)?.event_fd().as_raw_fd())
    }

    /// What the volume is, asking the server or not.
    pub fn info(&self, refresh: bool) -> Result<RawInfo, Errno> {
        self.usable()?;
        let info = if refresh { told(self.session.refresh())? } else { self.session.info() };
        Ok(self.raw_info(&info))
    }

    fn raw_info(&self, info: &VolumeInfo) -> RawInfo {
        let flags = [info.read_only, info.can_discard, info.can_write_zeroes];
        RawInfo {
            size_bytes: info.size,
            transfer_bytes_max: info.transfer_bytes_max,
            block_size: info.block_size,
            flags: (0..).zip(flags).map(|(bit, set)| u32::from(set) << bit).sum(),
            epoch_major: info.epoch.major,
            epoch_minor: info.epoch.minor,
            queue_count: self.session.queue_count(),
            reserved: 0,
        }
    }

    /// What the session has seen.
    pub fn stats(&self) -> Result<RawStats, Errno> {
        self.usable()?;
        let stats = self.session.stats();
        Ok(RawStats {
            generation: stats.generation.0.into(),
            connected: stats.connected.into(),
            reconnects: stats.reconnects,
            in_flight: stats.in_flight,
            takeovers: stats.takeovers,
            blackout_last_us: stats.blackout_last_us,
            blackout_worst_us: stats.blackout_worst_us,
        })
    }

    /// Changes the size.
    pub fn resize(&self, size: u64) -> Result<(), Errno> {
        told(self.session.resize(size))
    }

    /// A buffer in the arena, kept here until it is freed.
    pub fn alloc(&self, length: usize) -> Result<*mut u8, Errno> {
        let buffer = self.session.alloc(length)?;
        let address = buffer.as_ptr();
        lock(&self.buffers).insert(address.addr(), buffer);
        Ok(address)
    }

    /// Frees what [`alloc`](Self::alloc) returned.
    pub fn free(&self, address: usize) {
        if self.usable().is_ok() {
            // Dropped at the end, outside the lock.
            let _buffer = lock(&self.buffers).remove(&address);
        }
    }

    /// Registers a mapped memfd.
    pub fn register(
        &self,
        memfd: BorrowedFd<'_>,
        length: u64,
        address: *mut u8,
    ) -> Result<c_int, Errno> {
        let memory = told(self.session.register_mapped_memory(memfd, length, address))?;
        let id = memory.id();
        lock(&self.memories).insert(id, memory);
        c_int::try_from(id).map_err(|_| Errno::IO)
    }

    /// Forgets registered memory.
    pub fn unregister(&self, id: c_int) -> Result<(), Errno> {
        self.usable()?;
        let id = u32::try_from(id).map_err(|_| Errno::INVAL)?;
        let memory = lock(&self.memories).remove(&id);
        memory.map(drop).ok_or(Errno::INVAL)
    }
}

/// The errno of a failed call, whose explanation is kept for the thread.
fn told<T>(result: Result<T, CallError>) -> Result<T, Errno> {
    result.map_err(|error| {
        explain(&error);
        error.errno()
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics half way through a change under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
