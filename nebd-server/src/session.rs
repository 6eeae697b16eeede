//! A session: one volume attached by one part client.
//!
//! ```text
//!             attach                     detach, or the client died
//!   (none) ──────────► serving ─────────────────────────────────► draining ──► (none)
//!                       │   ▲                                        ▲
//!        three deaths   ▼   │ unpark, abort                          │ nonsense in its region
//!                      parked ───────────────────────────────────────┘
//! ```
//!
//! A takeover finds sessions in the descriptor store (or has them presented by their clients) and
//! starts them again as they were: parked ones stay parked.

pub mod ledger;
mod live;
mod memories;
mod translate;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::control::{AttachFlags, VolumeInfo};
use nebd_abi::layout::{ServerState, SessionId, TRANSFER_BYTES_MAX};
use nebd_abi::region::Region;

use crate::metrics::Totals;
use crate::volume::OpenVolume;
use ledger::Ledger;
pub use live::QueueLive;
pub use memories::{Charge, Memories, MemoryQuota, RegisterError, RegisteredMemory, set_memory};
pub use translate::{Rejected, Translated, translate};

/// A session, shared by the control thread and the shards that serve its queues.
pub struct Session {
    /// Its identity.
    pub id: SessionId,
    /// The client's memory.
    pub region: Arc<Region>,
    /// The volume.
    pub volume: Arc<OpenVolume>,
    /// What outlives this server.
    pub ledger: Ledger,
    /// How it was attached.
    pub flags: AttachFlags,
    /// Rung by the client; one a queue.
    pub kicks: Vec<OwnedFd>,
    /// Rung by the server; one a queue.
    pub calls: Vec<OwnedFd>,
    /// The client's process.
    pub peer: Option<OwnedFd>,
    /// Where its queues are served.
    pub shards: Vec<usize>,
    /// What its queues are doing.
    pub live: Vec<QueueLive>,
    /// Requests taken up from a predecessor.
    pub reissued: u32,
    memories: Mutex<Arc<Memories>>,
    memories_version: AtomicU64,
    /// Queues that still have requests at the backend or are still served.
    pub queues_left: AtomicU32,
    draining: AtomicBool,
    connected: AtomicBool,
    /// Errors and requests that predecessors counted.
    counted_before: (u64, u64),
    /// What its client said of the takeover before.
    blackout_before_us: u64,
    blackout_noted: AtomicBool,
}

/// What a session is made of; see [`Session`] for the fields.
pub struct SessionParts {
    #[allow(missing_docs)]
    pub region: Arc<Region>,
    #[allow(missing_docs)]
    pub volume: Arc<OpenVolume>,
    #[allow(missing_docs)]
    pub ledger: Ledger,
    #[allow(missing_docs)]
    pub flags: AttachFlags,
    #[allow(missing_docs)]
    pub kicks: Vec<OwnedFd>,
    #[allow(missing_docs)]
    pub calls: Vec<OwnedFd>,
    #[allow(missing_docs)]
    pub peer: Option<OwnedFd>,
    #[allow(missing_docs)]
    pub memories: Memories,
    #[allow(missing_docs)]
    pub shards: Vec<usize>,
    #[allow(missing_docs)]
    pub reissued: u32,
}

impl Session {
    /// A session about to be served.
    pub fn new(parts: SessionParts) -> Session {
        let queue_count = parts.region.geometry().queue_count;
        let mut totals = Totals::default();
        totals.add(parts.ledger.counters());
        Session {
            counted_before: (totals.errors(), totals.requests()),
            id: parts.region.params().session,
            live: (0..queue_count).map(|_| QueueLive::default()).collect(),
            blackout_before_us: parts.region.header().blackout_last_us.load(Relaxed),
            blackout_noted: AtomicBool::new(!parts.ledger.is_inherited()),
            queues_left: AtomicU32::new(queue_count),
            region: parts.region,
            volume: parts.volume,
            ledger: parts.ledger,
            flags: parts.flags,
            kicks: parts.kicks,
            calls: parts.calls,
            peer: parts.peer,
            shards: parts.shards,
            reissued: parts.reissued,
            memories: Mutex::new(Arc::new(parts.memories)),
            memories_version: AtomicU64::new(1),
            draining: AtomicBool::new(false),
            connected: AtomicBool::new(false),
        }
    }

    /// What the client is told of its volume.
    pub fn info(&self) -> VolumeInfo {
        VolumeInfo {
            size: self.volume.size(),
            block_size: self.volume.block_size,
            read_only: self.is_read_only(),
            can_discard: self.volume.capabilities.discard,
            can_write_zeroes: self.volume.capabilities.write_zeroes,
            epoch: self.volume.epoch,
            transfer_bytes_max: TRANSFER_BYTES_MAX,
            incarnation: self.volume.incarnation,
        }
    }

    /// Whether mutations are refused.
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(AttachFlags::READ_ONLY)
    }

    /// Says in the region who serves it, and how.
    pub fn publish_state(&self, state: ServerState) {
        let header = self.region.header();
        header.epoch.store(self.volume.epoch.to_bits(), Relaxed);
        header.volume_size.store(self.volume.size(), Relaxed);
        header.server_pid.store(std::process::id(), Relaxed);
        header.death.store(0, Relaxed);
        header.server_state.store(state as u32, Release);
    }

    /// The registered memories as of now.
    pub fn memories(&self) -> Arc<Memories> {
        lock(&self.memories).clone()
    }

    /// Changes with every change of the memories.
    pub fn memories_version(&self) -> u64 {
        self.memories_version.load(Acquire)
    }

    /// Registers a memory, or forgets it, once `store` has done the same in the descriptor store.
    /// False if the session is on its way out, and nothing was done: its store entries are about
    /// to be removed, or have been.
    pub fn set_memory(
        &self,
        id: u32,
        memory: Option<Arc<RegisteredMemory>>,
        store: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut memories = lock(&self.memories);
        if self.is_draining() {
            return Ok(false);
        }
        store()?;
        set_memory(Arc::make_mut(&mut memories), id, memory);
        self.memories_version.fetch_add(1, Release);
        Ok(true)
    }

    /// No request is taken any more; those at the backend are awaited. False if this was said before.
    pub fn start_draining(&self) -> bool {
        let _no_memory_comes = lock(&self.memories);
        !self.draining.swap(true, Relaxed)
    }

    /// Whether it is on its way out.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Whether its client is connected; it need not be, for its rings to be served.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Relaxed)
    }

    /// Its client has connected, or lost its connection.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Relaxed);
    }

    /// Errors and requests since this server serves it.
    pub fn counted_here(&self) -> (u64, u64) {
        let mut totals = Totals::default();
        totals.add(self.ledger.counters());
        let (errors, requests) = self.counted_before;
        (totals.errors().saturating_sub(errors), totals.requests().saturating_sub(requests))
    }

    /// Notes the blackout of the takeover in which this server got the session, as soon as the
    /// client tells of it. Once: what a client says more often reaches nobody.
    pub fn note_blackout(&self) {
        if self.blackout_noted.load(Relaxed) {
            return;
        }
        let blackout_us = self.region.header().blackout_last_us.load(Relaxed);
        if blackout_us != self.blackout_before_us && !self.blackout_noted.swap(true, Relaxed) {
            let blackout = Duration::from_micros(blackout_us);
            crate::metrics::note_client_blackout(&self.volume.name, blackout);
        }
    }

    /// Name of one of its descriptors in the store.
    pub fn store_name(id: SessionId, what: &str) -> String {
        format!("s.{id}.{what}")
    }

    /// The session whose descriptor has this name in the store, if it is a session's.
    pub fn of_store_name(name: &str) -> Option<SessionId> {
        name.strip_prefix("s.")?.split('.').next()?.parse().ok()
    }

    /// Every descriptor that a successor needs, with its name in the store; the region last.
    pub fn stored_fds(&self) -> Vec<(String, BorrowedFd<'_>)> {
        let name = |what: &str| Session::store_name(self.id, what);
        let mut fds = vec![(name("ledger"), self.ledger.fd())];
        for (k, (kick, call)) in self.kicks.iter().zip(&self.calls).enumerate() {
            fds.push((name(&format!("kick{k}")), kick.as_fd()));
            fds.push((name(&format!("call{k}")), call.as_fd()));
        }
        fds.extend(self.peer.as_ref().map(|peer| (name("peer"), peer.as_fd())));
        fds.push((name("region"), self.region.memory().fd()));
        fds
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
