//! The server: which sessions there are, which volumes, and how they come and go.
//!
//! ```text
//!  attach:  reserve id ─► open volume ─► store descriptors ─► adopt queues ─► serve
//!  end:     drain queues ─► forget descriptors ─► close volume if it was the last
//! ```
//!
//! Methods here may block; the control thread calls them on worker threads ([`crate::jobs`]).

mod attach;
pub(crate) mod operator;
mod status;

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nebd_abi::VolumeName;
use nebd_abi::layout::{ServerState, SessionId};
use nebd_backend::{Backend, FdStore, PreparedVolume};
use nebd_vhost::memory::Backing;

use crate::fd_store::ServerStore;
use crate::frontend::Frontends;
use crate::gate::Gate;
use crate::jobs::Jobs;
use crate::quarantine::Quarantine;
use crate::registry::Registry;
use crate::session::{MemoryQuota, Session};
use crate::shard::{Command, ShardHandle};
use crate::tenure::Tenure;
use crate::upgrade::Upgrades;
use crate::volume::VolumeTable;
use crate::work_sign::WorkSign;
pub(crate) use attach::is_own;
pub use attach::{AttachError, AttachRequest, Origin, is_eventfd, set_nonblocking};

/// What a server is made of.
pub struct Server {
    /// Volumes and their owners.
    pub registry: Registry,
    /// Descriptors that outlive this process.
    pub store: Arc<ServerStore>,
    /// Where threads note that they have work.
    pub work_sign: WorkSign,
    /// This server's.
    pub tenure: Arc<Tenure>,
    /// Major epoch where storage grants none.
    pub host_major: u32,
    /// Kinds of storage.
    pub backends: Vec<Box<dyn Backend>>,
    /// How `file` volumes do their IO, for `status`.
    pub file_engine: String,
    /// The shards.
    pub shards: Vec<ShardHandle>,
    /// What each user may register.
    pub memory_quota: Arc<MemoryQuota>,
    /// Which memory of guests is mapped.
    pub guest_memory: Backing,
    /// Worker threads.
    pub jobs: Jobs,
    /// Open volumes.
    pub volumes: VolumeTable,
    /// Where notices to the control thread go.
    pub notices: crate::control::NoticeSink,
    /// Attachments for hypervisors without our library.
    pub frontends: Frontends,
    sessions: Mutex<HashMap<SessionId, Entry>>,
    /// The connections that speak for sessions; a successor gets them.
    speakers: Mutex<HashMap<SessionId, Arc<OwnedFd>>>,
    next_shard: AtomicUsize,
    quarantine: Mutex<Quarantine>,
    resize: Mutex<()>,
    /// Passed by whatever changes more than data.
    pub gate: Arc<Gate>,
    /// Planned takeovers.
    pub upgrades: Upgrades,
    /// Volumes that a candidate has prepared and not opened yet.
    prepared: Mutex<HashMap<VolumeName, Box<dyn PreparedVolume>>>,
}

/// The parts of a [`Server`] that are given to it; see there.
#[allow(missing_docs)]
pub struct ServerParts {
    pub registry: Registry,
    pub store: Arc<ServerStore>,
    pub work_sign: WorkSign,
    pub tenure: Arc<Tenure>,
    pub host_major: u32,
    pub backends: Vec<Box<dyn Backend>>,
    pub file_engine: String,
    pub shards: Vec<ShardHandle>,
    pub memory_quota: Arc<MemoryQuota>,
    pub guest_memory: Backing,
    pub notices: crate::control::NoticeSink,
    pub frontends: Frontends,
}

struct Entry {
    volume: VolumeName,
    exclusive: bool,
    /// It is a hypervisor's: there is one a volume.
    is_hypervisors: bool,
    /// `None` while it is being opened.
    session: Option<Arc<Session>>,
}

impl Server {
    /// A server without sessions.
    pub fn new(parts: ServerParts) -> Server {
        Server {
            registry: parts.registry,
            store: parts.store,
            work_sign: parts.work_sign,
            tenure: parts.tenure,
            host_major: parts.host_major,
            backends: parts.backends,
            file_engine: parts.file_engine,
            shards: parts.shards,
            notices: parts.notices,
            frontends: parts.frontends,
            memory_quota: parts.memory_quota,
            guest_memory: parts.guest_memory,
            jobs: Jobs::default(),
            volumes: VolumeTable::default(),
            sessions: Mutex::default(),
            speakers: Mutex::default(),
            next_shard: AtomicUsize::new(0),
            quarantine: Mutex::default(),
            resize: Mutex::default(),
            gate: Arc::default(),
            upgrades: Upgrades::default(),
            prepared: Mutex::default(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connections that speak for sessions.
    pub(crate) fn speakers(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<OwnedFd>>> {
        self.speakers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Volumes that were prepared and not opened yet.
    pub(crate) fn prepared(&self) -> MutexGuard<'_, HashMap<VolumeName, Box<dyn PreparedVolume>>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn quarantine(&self) -> MutexGuard<'_, Quarantine> {
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every session that is served.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.entries().values().filter_map(|entry| entry.session.clone()).collect()
    }

    /// The session with this id, if it is served.
    pub fn session(&self, id: SessionId) -> Option<Arc<Session>> {
        self.entries().get(&id)?.session.clone()
    }

    /// Sessions of a volume that are served or about to be.
    pub fn sessions_of(&self, volume: &VolumeName) -> Vec<Arc<Session>> {
        let entries = self.entries();
        let of_volume = entries.values().filter(|entry| entry.volume == *volume);
        of_volume.filter_map(|entry| entry.session.clone()).collect()
    }

    /// Volumes of sessions that are not served yet.
    pub(crate) fn waiting_sessions(&self) -> Vec<VolumeName> {
        let entries = self.entries();
        let waiting = entries.values().filter(|entry| entry.session.is_none());
        waiting.map(|entry| entry.volume.clone()).collect()
    }

    /// Whether this session is served or about to be.
    pub(crate) fn has_place(&self, id: SessionId) -> bool {
        self.entries().contains_key(&id)
    }

    /// How many sessions have a volume attached, or are attaching it.
    pub fn session_count(&self, volume: &VolumeName) -> u32 {
        self.entries().values().filter(|entry| entry.volume == *volume).count() as u32
    }

    /// The hypervisor's session of a volume, from the moment that a successor knows of it until nothing
    /// of it is in flight.
    pub(crate) fn hypervisor_of(&self, volume: &VolumeName) -> Option<SessionId> {
        let entries = self.entries();
        let of_volume = |entry: &Entry| entry.is_hypervisors && entry.volume == *volume;
        entries.iter().find(|(_, entry)| of_volume(entry)).map(|(id, _)| *id)
    }

    /// The backend of a volume.
    pub fn backend(&self, volume: &VolumeName) -> Option<&dyn Backend> {
        self.backends.iter().map(|b| &**b).find(|backend| backend.kind() == volume.backend())
    }

    fn next_shard(&self) -> usize {
        self.next_shard.fetch_add(1, Relaxed) % self.shards.len()
    }

    /// Starts the end of a session: nothing more is taken from its rings.
    pub fn end_session(&self, id: SessionId) {
        let Some(session) = self.session(id) else { return };
        if !session.start_draining() {
            return;
        }
        self.quarantine().forget(id);
        let shards: BTreeSet<usize> = session.shards.iter().copied().collect();
        for shard in shards {
            self.shards[shard].send(Command::Drain(id));
        }
    }

    /// One queue of a draining session is done; the last one releases the session, and returns
    /// true. May block.
    pub fn queue_drained(&self, id: SessionId) -> bool {
        let Some(session) = self.session(id) else { return false };
        if session.queues_left.fetch_sub(1, AcqRel) > 1 {
            return false;
        }
        let state = session.region.header().server_state.load(Relaxed);
        if ServerState::from_bits(state) != ServerState::Detached {
            session.publish_state(ServerState::Absent);
        }
        session.note_blackout();
        crate::metrics::retire(id);
        self.store.remove_all(&Session::store_name(id, ""));
        let volume = session.volume.name.clone();
        drop(session);
        self.entries().remove(&id);
        self.volumes.release(&volume);
        tracing::info!(session = %id, %volume, "session ended");
        true
    }

    /// Issues the next suspect, if none is out.
    pub fn issue_suspect(&self) {
        let Some(suspect) = self.quarantine().next() else { return };
        tracing::warn!(
            session = %suspect.session, slot = suspect.request.slot,
            "issuing a request alone that was in flight in two crashes"
        );
        self.shards[suspect.shard].send(Command::Suspect {
            session: suspect.session,
            queue: suspect.queue,
            request: suspect.request,
        });
    }

    /// The suspect of this session was answered.
    pub fn suspect_answered(&self, session: SessionId) {
        self.quarantine().answered(session);
        self.issue_suspect();
    }

    /// Whether descriptors outlive this process.
    pub fn has_store(&self) -> bool {
        self.store.is_durable()
    }
}
