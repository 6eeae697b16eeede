//! Memory of the host that the server maps as well.
//!
//! The session owns an entry for each memory, so that it can be registered with every new server;
//! the host and the requests in flight share a lease. With the lease the memory is forgotten.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{
    AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};
use std::sync::{Arc, Mutex, Weak};

use nebd_abi::control::Message;
use nebd_abi::layout::{MEMORIES_MAX, PAGE};
use rustix::fs::SealFlags;

use crate::calls::Call;
use crate::core::Core;
use crate::error::CallError;
use crate::memory;
use crate::sync::lock;

/// A sealed memfd of the host, usable as data of requests without copies. Forgotten by the server
/// once it is dropped and no request uses it any more.
#[derive(Debug)]
pub struct Memory {
    lease: Arc<Lease>,
}

impl Memory {
    /// Its id in the session, from 1.
    pub fn id(&self) -> u32 {
        self.lease.entry.id
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.lease.entry.size
    }

    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    pub(crate) fn is_of(&self, core: &Core) -> bool {
        std::ptr::eq(self.lease.core.as_ptr(), core)
    }
}

/// Held by the host and by each request that uses the memory.
pub(crate) struct Lease {
    core: Weak<Core>,
    entry: Arc<Entry>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.entry.fmt(f)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if memory::is_forked_child() {
            return;
        }
        if let Some(core) = self.core.upgrade() {
            core.memories.forget(self.entry.id);
            core.calls
                .push(Arc::new(Call::new(Message::UnregisterMemory { memory: self.entry.id })));
            core.runtime.wake_control();
        }
    }
}

/// What the session keeps of a memory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: u32,
    size: u64,
    fd: OwnedFd,
    /// Where this process has it mapped, if it said so.
    base: Option<usize>,
    /// The connection on which it was registered last.
    pub(crate) asked_on: AtomicU64,
    /// Whether a server ever took it.
    is_known: AtomicBool,
    /// The first registration.
    pub(crate) call: Arc<Call>,
}

impl Entry {
    /// The message that registers it; goes with [`fd`](Self::fd).
    pub(crate) fn message(&self) -> Message {
        Message::RegisterMemory { memory: self.id }
    }

    /// The memfd.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A server took it.
    pub(crate) fn taken(&self) {
        self.is_known.store(true, Release);
    }

    /// Whether requests may refer to it.
    pub(crate) fn is_known(&self) -> bool {
        self.is_known.load(Acquire)
    }
}

/// The memories of a session.
#[derive(Debug, Default)]
pub(crate) struct Memories {
    table: Mutex<Table>,
    has_mapped: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Arc<Entry>>,
    /// Ids in use, or not yet unregistered: bit `id - 1`.
    ids: u64,
    /// Those with a base, for raw pointers.
    mapped: Vec<(usize, u64, Weak<Lease>)>,
}

impl Memories {
    /// Every memory, for registering.
    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.table).entries.clone()
    }

    /// Takes a memory into the session and asks the server to take it too.
    pub(crate) fn register(
        core: &Arc<Core>,
        fd: BorrowedFd<'_>,
        size: u64,
        base: Option<usize>,
    ) -> Result<Memory, CallError> {
        check_memfd(fd, size)?;
        let fd = fd
            .try_clone_to_owned()
            .map_err(|source| CallError::System { action: "duplicate the memfd", source })?;
        let mut table = lock(&core.memories.table);
        let id = 1 + table.ids.trailing_ones();
        if id > MEMORIES_MAX {
            return Err(CallError::Memory { reason: "64 are registered already" });
        }
        table.ids |= 1 << (id - 1);
        let call = Arc::new(Call::new(Message::RegisterMemory { memory: id }));
        let entry = Arc::new(Entry {
            id,
            size,
            fd,
            base,
            asked_on: AtomicU64::new(0),
            is_known: AtomicBool::new(false),
            call: call.clone(),
        });
        table.entries.push(entry.clone());
        drop(table);
        core.runtime.wake_control();
        // From here on the lease's drop takes the memory out again.
        let lease = Arc::new(Lease { core: Arc::downgrade(core), entry });
        core.calls.wait(core, &call, core.options.io_timeout)?;
        if let Some(base) = lease.entry.base {
            lock(&core.memories.table).mapped.push((base, size, Arc::downgrade(&lease)));
            core.memories.has_mapped.store(true, Release);
        }
        Ok(Memory { lease })
    }

    /// The session is not to register this memory any more.
    fn forget(&self, id: u32) {
        let mut table = lock(&self.table);
        table.entries.retain(|entry| entry.id != id);
        table.mapped.retain(|(_, _, lease)| lease.strong_count() > 0);
        self.has_mapped.store(!table.mapped.is_empty(), Relaxed);
    }

    /// The server has forgotten this memory: its id may be used again.
    pub(crate) fn release_id(&self, id: u32) {
        lock(&self.table).ids &= !(1u64.checked_shl(id.wrapping_sub(1)).unwrap_or(0));
    }

    /// The memory in which `length` bytes at `pointer` lie, and where in it.
    pub(crate) fn lookup(&self, pointer: *const u8, length: usize) -> Option<(Arc<Lease>, u64)> {
        if !self.has_mapped.load(Acquire) {
            return None;
        }
        let table = lock(&self.table);
        table.mapped.iter().find_map(|(base, size, lease)| {
            let offset = (pointer as usize).checked_sub(*base)? as u64;
            (offset.checked_add(length as u64)? <= *size)
                .then(|| Some((lease.upgrade()?, offset)))
                .flatten()
        })
    }
}

impl Lease {
    /// The memory's id.
    pub(crate) fn id(&self) -> u32 {
        self.entry.id
    }
}

fn check_memfd(fd: BorrowedFd<'_>, size: u64) -> Result<(), CallError> {
    let wrong = |reason| Err(CallError::Memory { reason });
    let Ok(seals) = rustix::fs::fcntl_get_seals(fd) else { return wrong("it is no memfd") };
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return wrong("it is not sealed with F_SEAL_SHRINK and F_SEAL_GROW");
    }
    let stat = rustix::fs::fstat(fd)
        .map_err(|errno| CallError::System { action: "stat the memfd", source: errno.into() })?;
    if size == 0 || !size.is_multiple_of(PAGE) || u64::try_from(stat.st_size) != Ok(size) {
        return wrong("its size is not the one given, or no whole number of pages");
    }
    Ok(())
}
