//! Attaching a session: anew, again after a server died, or out of the descriptor store.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nebd_abi::control::AttachFlags;
use nebd_abi::layout::{PAGE, ServerState, SessionId, features};
use nebd_abi::region::{Region, RegionError, SharedMemory};
use nebd_abi::ring::ServerQueue;
use nebd_abi::{Epoch, Errno, VolumeName};
use nebd_backend::{BackendError, FdStore, OpenContext};
use nebd_vhost::journal::JournalError;
use rustix::mm::Advice;

use super::{Entry, Server};
use crate::control::Notice;
use crate::hooks;
use crate::quarantine::{DEATHS_PARKED, DEATHS_SUSPECT, Suspect};
use crate::session::ledger::{Attachment, Ledger};
use crate::session::{Memories, Session, SessionParts, set_memory};
use crate::shard::{Adopted, Command, Front, QueueSetup};
use crate::vhost::{Hypervisor, ResumeError, Stored, disk_of};
use crate::volume::OpenVolume;

/// Of a stored session's rings; more is mapped as it is touched.
const POPULATED_BYTES_MAX: u64 = 1 << 20;

/// Where an attach comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A client asks for it.
    Client,
    /// A predecessor left it in the descriptor store.
    Store,
}

/// Everything that makes a session.
pub struct AttachRequest {
    /// Where it comes from.
    pub origin: Origin,
    /// The client's region.
    pub region: Arc<Region>,
    /// Doorbells to the server, one a queue.
    pub kicks: Vec<OwnedFd>,
    /// Doorbells to the client, one a queue.
    pub calls: Vec<OwnedFd>,
    /// The client's process.
    pub peer: Option<OwnedFd>,
    /// The predecessor's ledger.
    pub ledger: Option<Ledger>,
    /// Registered memories.
    pub memories: Memories,
    /// How, and by whom.
    pub attachment: Attachment,
    /// A hypervisor's connection; the region is our own then, and there are no doorbells.
    pub(crate) vhost: Option<Stored>,
}

/// Why a session cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The registry has no such volume.
    #[error("volume {0} does not exist; `nebdctl volume list` shows those that do")]
    NotFound(VolumeName),
    /// The server has no such backend.
    #[error("volume {0}: this server has no such backend")]
    Backend(VolumeName),
    /// The client's user may not.
    #[error("volume {volume}: user {uid} may not attach it; ask its owner or root")]
    Denied {
        /// Which volume.
        volume: VolumeName,
        /// Who asked.
        uid: u32,
    },
    /// Another session has it.
    #[error("volume {0} is attached by another session, and one of the two wants it alone")]
    Busy(VolumeName),
    /// The session is being started by another thread right now.
    #[error("session {0} is being started")]
    Starting(SessionId),
    /// The id belongs to a session with another region.
    #[error("session {0} exists, with another region")]
    Foreign(SessionId),
    /// The contents that the client knew are gone.
    #[error("volume {0}: its contents were in memory that is gone")]
    Lost(VolumeName),
    /// The backend failed.
    #[error(transparent)]
    Storage(#[from] BackendError),
    /// Shared memory failed.
    #[error("session {session}")]
    Memory {
        /// Which session.
        session: SessionId,
        /// Why.
        source: RegionError,
    },
    /// A hypervisor's connection is of no use.
    #[error(transparent)]
    Vhost(#[from] ResumeError),
    /// The descriptor store failed.
    #[error("session {session}: cannot store its descriptors")]
    Store {
        /// Which session.
        session: SessionId,
        /// Why.
        source: std::io::Error,
    },
}

impl AttachError {
    /// As an errno, for the client.
    pub fn errno(&self) -> Errno {
        match self {
            AttachError::NotFound(_) => Errno(2),
            AttachError::Backend(_) => Errno::NOTSUP,
            AttachError::Denied { .. } => Errno(13),
            AttachError::Busy(_) => Errno(16),
            AttachError::Starting(_) => Errno(11),
            AttachError::Foreign(_) => Errno(17),
            AttachError::Lost(_) => Errno(116),
            AttachError::Storage(error) => error.errno(),
            AttachError::Memory { .. } => Errno::INVAL,
            AttachError::Vhost(_) => Errno::IO,
            AttachError::Store { source, .. } => Errno::from_io(source),
        }
    }

    /// Whether waiting may mend it for a session that was attached before.
    pub fn is_transient(&self) -> bool {
        !matches!(
            self,
            AttachError::Denied { .. }
                | AttachError::Foreign(_)
                | AttachError::Lost(_)
                | AttachError::Vhost(_)
                | AttachError::Storage(BackendError::Lost(_))
        ) && !matches!(self, AttachError::Memory { source, .. }
            // What the system refuses today it may grant tomorrow.
            if !matches!(source, RegionError::System { .. }))
    }
}

impl Server {
    /// Attaches a session, or finds it attached already. May block for long.
    pub fn attach(&self, request: AttachRequest) -> Result<Arc<Session>, AttachError> {
        let id = request.region.params().session;
        if let Some(session) = self.reserve(&request)? {
            return Ok(session);
        }
        let (origin, is_hypervisors) = (request.origin, request.vhost.is_some());
        let prepared = match self.open_and_prepare(self.with_stored_ledger(request)) {
            Ok(prepared) => prepared,
            Err(error) => {
                // A stored session keeps its place: its client has not given it up.
                if origin == Origin::Client {
                    if is_hypervisors {
                        // Its id is of our own drawing: nobody has left anything under it before.
                        self.store.remove_all(&Session::store_name(id, ""));
                    }
                    self.entries().remove(&id);
                }
                return Err(error);
            }
        };
        // Known before it is served: what its shards report must find it.
        let session = prepared.session.clone();
        if let Some(entry) = self.entries().get_mut(&id) {
            entry.session = Some(session.clone());
        }
        crate::metrics::track(id, &session.volume.name, &session.ledger);
        self.notices.send(Notice::Live(session.clone()));
        let hypervisor = self.start(prepared);
        if let Some(hypervisor) = hypervisor {
            self.notices.send(Notice::Hypervisor(hypervisor, session.clone()));
        }
        Ok(session)
    }

    /// Takes the session's place, so that nobody else starts it; or finds the session there.
    fn reserve(&self, request: &AttachRequest) -> Result<Option<Arc<Session>>, AttachError> {
        let params = request.region.params();
        let flags = AttachFlags(request.attachment.attach_flags);
        let exclusive = flags.contains(AttachFlags::EXCLUSIVE);
        let mut entries = self.entries();
        if let Some(entry) = entries.get(&params.session) {
            if entry.session.is_none() && request.origin == Origin::Store {
                return Ok(None);
            }
            let session = entry.session.clone().ok_or(AttachError::Starting(params.session))?;
            return match session.region.memory().is_same_as(request.region.memory()) {
                true if session.is_draining() => Err(AttachError::Starting(params.session)),
                true => Ok(Some(session)),
                false => Err(AttachError::Foreign(params.session)),
            };
        }
        let of_volume = |entry: &&Entry| entry.volume == params.volume;
        if entries.values().filter(of_volume).any(|entry| exclusive || entry.exclusive) {
            return Err(AttachError::Busy(params.volume.clone()));
        }
        let (volume, is_hypervisors) = (params.volume.clone(), request.vhost.is_some());
        let entry = Entry { volume, exclusive, is_hypervisors, session: None };
        entries.insert(params.session, entry);
        Ok(None)
    }

    /// A client may be quicker to present its region than the successor to find it in the store;
    /// what the predecessor remembered of the session counts all the same.
    fn with_stored_ledger(&self, mut request: AttachRequest) -> AttachRequest {
        if request.ledger.is_none()
            && let Ok(stored) = self.stored_request(request.region.params().session)
            && stored.region.memory().is_same_as(request.region.memory())
        {
            request.ledger = stored.ledger;
        }
        request
    }

    fn open_and_prepare(&self, request: AttachRequest) -> Result<Prepared, AttachError> {
        let volume = self.acquire_volume(&request)?;
        crate::failpoint!("attach-after-open");
        let name = volume.name.clone();
        let prepared = self.prepare(request, volume);
        if prepared.is_err() {
            self.volumes.release(&name);
        }
        prepared
    }

    fn acquire_volume(&self, request: &AttachRequest) -> Result<Arc<OpenVolume>, AttachError> {
        let name = &request.region.params().volume;
        let attachment = &request.attachment;
        let record =
            self.registry.record(name).ok_or_else(|| AttachError::NotFound(name.clone()))?;
        let read_only = AttachFlags(attachment.attach_flags).contains(AttachFlags::READ_ONLY);
        if !record.permits(attachment.client_uid, attachment.client_gid, !read_only) {
            return Err(AttachError::Denied { volume: name.clone(), uid: attachment.client_uid });
        }
        let backend = self.backend(name).ok_or_else(|| AttachError::Backend(name.clone()))?;
        let context = OpenContext {
            previous_major: request.ledger.as_ref().map(|ledger| ledger.attachment().major),
            host_major: self.host_major,
            generation: self.tenure.generation(),
            store: self.store.clone(),
        };
        let volume = self.volumes.acquire(name, || {
            // Read again now that nobody can resize or delete it.
            let record =
                self.registry.record(name).ok_or_else(|| BackendError::NotFound(name.clone()))?;
            let prepared = self.prepared().remove(name);
            let opened = match prepared {
                Some(prepared) => prepared.open(&record.spec(name), &context)?,
                None => backend.open(&record.spec(name), &context)?,
            };
            let epoch = Epoch::new(opened.major, self.tenure.generation());
            Ok(OpenVolume::new(name.clone(), record.block_size, epoch, opened, &record.limits))
        })?;
        if let Some(record) = self.registry.record(name) {
            // They may have changed while it was being opened.
            volume.throttle.set(&record.limits);
        }
        if attachment.incarnation != 0 && attachment.incarnation != volume.incarnation {
            self.volumes.release(name);
            return Err(AttachError::Lost(name.clone()));
        }
        Ok(volume)
    }

    fn prepare(
        &self,
        request: AttachRequest,
        volume: Arc<OpenVolume>,
    ) -> Result<Prepared, AttachError> {
        let region = request.region;
        let (id, geometry) = (region.params().session, *region.geometry());
        let memory_error = |source| AttachError::Memory { session: id, source };
        let attachment = Attachment {
            major: volume.epoch.major,
            incarnation: volume.incarnation,
            ..request.attachment
        };
        let ledger = match request.ledger {
            Some(ledger) if ledger.slots_total() == geometry.slots_total() => {
                ledger.set_major(volume.epoch.major);
                ledger
            }
            _ => Ledger::create(geometry.slots_total(), &attachment).map_err(memory_error)?,
        };
        // A core dump of the server must not take as long as its clients' memory is large. Of a stored
        // session it was kept out as it was mapped.
        if request.origin == Origin::Client
            && let Err(error) = region.memory().advise(Advice::LinuxDontDump)
        {
            tracing::warn!(session = %id, %error, "the region will be part of core dumps");
        }
        if request.origin == Origin::Client
            && let Some(stored) = &request.vhost
        {
            // Before it is looked at: what is answered must not be forgotten.
            let put = stored.put(&*self.store, id);
            put.map_err(|source| AttachError::Store { session: id, source })?;
        }
        // First: to look at a guest's rings may be the death of this server too.
        self.count_death(&ledger);
        let is_read_only = AttachFlags(attachment.attach_flags).contains(AttachFlags::READ_ONLY);
        let (hypervisor, mut adopted) = match request.vhost {
            None => (None, rings_of(&region, volume.epoch)),
            Some(stored) => {
                let disk = disk_of(&volume, is_read_only, geometry.queue_count);
                let (mut hypervisor, adopted) = stored.resume(id, disk, &volume, &ledger)?;
                hypervisor.charge(&self.memory_quota, attachment.client_uid);
                (Some(Box::new(hypervisor)), adopted)
            }
        };
        crate::failpoint!("attach-after-adopt");
        let shards: Vec<usize> = adopted.iter().map(|_| self.next_shard()).collect();
        let verdicts = self.judge(&ledger, id, &shards, geometry.queue_depth, &mut adopted);
        let reissued = adopted.iter().map(|(_, requests)| requests.len() as u32).sum::<u32>()
            + (verdicts.suspects.len() + verdicts.parked.len()) as u32;
        let session = Arc::new(Session::new(SessionParts {
            region,
            volume,
            ledger,
            flags: AttachFlags(attachment.attach_flags),
            kicks: request.kicks,
            calls: request.calls,
            peer: request.peer,
            memories: request.memories,
            shards,
            reissued,
        }));
        if request.origin == Origin::Client {
            if let Err(error) = self.store_session(&session) {
                self.store.remove_all(&Session::store_name(id, ""));
                return Err(error);
            }
            crate::failpoint!("attach-after-store");
        }
        Ok(Prepared { session, adopted, verdicts, hypervisor })
    }

    fn store_session(&self, session: &Session) -> Result<(), AttachError> {
        let store_error = |source| AttachError::Store { session: session.id, source };
        for (id, memory) in session.memories().iter().enumerate() {
            if let Some(memory) = memory {
                let name = Session::store_name(session.id, &format!("mem{id}"));
                self.store.put(&name, memory.fd()).map_err(store_error)?;
            }
        }
        // The region comes last: what has no region is no session.
        for (name, fd) in session.stored_fds() {
            self.store.put(&name, fd).map_err(store_error)?;
        }
        Ok(())
    }

    /// Whatever the dead server had dispatched was part of its death.
    fn count_death(&self, ledger: &Ledger) {
        let dead = nebd_abi::Generation(self.tenure.generation().0.saturating_sub(1));
        if self.tenure.last_death().counts_against_requests() {
            (0..ledger.slots_total()).for_each(|slot| ledger.count_death(slot, dead));
        }
    }

    /// Takes suspects and those that have killed too often out of what is to be issued again.
    fn judge(
        &self,
        ledger: &Ledger,
        session: SessionId,
        shards: &[usize],
        queue_depth: u32,
        adopted: &mut [Adopted],
    ) -> Verdicts {
        let mut verdicts = Verdicts::default();
        let mut ledger_base = 0;
        for (queue, (_, requests)) in adopted.iter_mut().enumerate() {
            if hooks::reissue_is_off() {
                requests.clear();
            }
            for request in std::mem::take(requests) {
                let deaths = ledger.deaths(ledger_base + request.slot, request.seq);
                let suspect =
                    Suspect { session, queue: queue as u32, shard: shards[queue], request };
                match deaths {
                    DEATHS_PARKED.. => verdicts.parked.push(suspect),
                    DEATHS_SUSPECT.. => verdicts.suspects.push(suspect),
                    _ => requests.push(suspect.request),
                }
            }
            ledger_base += queue_depth;
        }
        verdicts
    }

    /// Has its queues served; returns the hypervisor, if it has one.
    fn start(&self, prepared: Prepared) -> Option<Box<Hypervisor>> {
        let Prepared { session, adopted, verdicts, hypervisor } = prepared;
        let volume = &session.volume;
        if let Some(first) = verdicts.parked.first() {
            let reason = format!(
                "a request (session {}, slot {}, {:?} at byte {}) was in flight in {DEATHS_PARKED} \
                 crashes of the server",
                session.id, first.request.slot, first.request.op, first.request.offset
            );
            crate::metrics::alarm::volume_parked(&volume.name, &reason);
            volume.set_parked(Some(reason));
            self.quarantine().park(&volume.name, verdicts.parked);
            self.park_sessions(&volume.name, true);
        }
        let parked = volume.parked().is_some();
        session.publish_state(if parked { ServerState::Parked } else { ServerState::Serving });
        for (index, (front, reissue)) in adopted.into_iter().enumerate() {
            let session = session.clone();
            let shard = session.shards[index];
            let index = index as u32;
            let setup = QueueSetup { session, index, front, reissue, parked };
            self.shards[shard].send(Command::Serve(Box::new(setup)));
        }
        // The operator may have decided otherwise meanwhile; commands arrive in their order.
        if volume.parked().is_some() != parked {
            self.park_session(&session, !parked);
        }
        self.quarantine().admit(verdicts.suspects);
        self.issue_suspect();
        // One line for each of a thousand sessions would be a good part of a takeover.
        if session.ledger.is_inherited() {
            tracing::debug!(
                session = %session.id, volume = %volume.name, epoch = %volume.epoch,
                reissued = session.reissued, "session served"
            );
        } else {
            tracing::info!(
                session = %session.id, volume = %volume.name, epoch = %volume.epoch, "session served"
            );
        }
        hypervisor
    }

    /// Holds back, or lets go, every session of a volume.
    pub(super) fn park_sessions(&self, volume: &VolumeName, parked: bool) {
        for session in self.sessions_of(volume) {
            self.park_session(&session, parked);
        }
    }

    fn park_session(&self, session: &Session, parked: bool) {
        if session.is_draining() {
            return;
        }
        session.publish_state(if parked { ServerState::Parked } else { ServerState::Serving });
        for shard in session.shards.iter().collect::<std::collections::BTreeSet<_>>() {
            self.shards[*shard].send(Command::Park(session.id, parked));
        }
        self.notices.send(Notice::Parked(session.id, parked));
    }

    /// What makes a stored session. One that is not whole is forgotten: a client that lives presents
    /// its descriptors itself. What is only out of reach for now stays in the store.
    pub(crate) fn stored_request_or_forget(&self, id: SessionId) -> Option<AttachRequest> {
        let request = self.stored_request(id);
        let error = match request {
            Ok(request) => return Some(request),
            Err(error) => error,
        };
        tracing::warn!(session = %id, %error, "cannot resume a stored session");
        if matches!(error, StoredError::Missing(_)) {
            self.store.remove_all(&Session::store_name(id, ""));
        }
        None
    }

    /// The sessions in the store.
    pub(crate) fn stored_sessions(&self) -> BTreeSet<SessionId> {
        let names = self.store.names("s.");
        names.iter().filter_map(|name| Session::of_store_name(name)).collect()
    }

    /// Gives a stored session its place.
    pub(crate) fn reserve_for(&self, request: &AttachRequest) {
        let flags = AttachFlags(request.attachment.attach_flags);
        let entry = Entry {
            volume: request.region.params().volume.clone(),
            exclusive: flags.contains(AttachFlags::EXCLUSIVE),
            is_hypervisors: request.vhost.is_some(),
            session: None,
        };
        let id = request.region.params().session;
        if let Some(ledger) = &request.ledger {
            crate::metrics::track(id, &entry.volume, ledger);
        }
        self.entries().insert(id, entry);
    }

    /// Tries again to start a stored session, until it is served.
    pub(crate) fn resume_stored(&self, id: SessionId) {
        self.persist(id, Err(AttachError::Starting(id)));
    }

    /// Starts the sessions that have their places, each on a thread of its own.
    pub fn resume_all(self: &Arc<Self>, requests: Vec<AttachRequest>) {
        let (start, left) = (Instant::now(), Arc::new(AtomicUsize::new(requests.len())));
        for request in requests {
            let (server, left) = (self.clone(), left.clone());
            self.jobs.spawn(move || {
                server.resume(request);
                if left.fetch_sub(1, AcqRel) == 1 {
                    crate::metrics::note_phase("resume", start.elapsed());
                }
            });
        }
    }

    /// Attaches one stored session, as something that a planned takeover waits for.
    pub(crate) fn attach_stored(
        &self,
        request: AttachRequest,
    ) -> Result<Arc<Session>, AttachError> {
        let _pass =
            self.gate.enter(format!("the resumption of {}", request.region.params().volume));
        crate::failpoint!("resume");
        self.attach(request)
    }

    /// Starts one stored session; waits as long as its storage does not answer.
    fn resume(&self, request: AttachRequest) {
        let id = request.region.params().session;
        let attached = self.attach_stored(request);
        self.persist(id, attached);
    }

    /// Until it is served, or can never be. The gate is not held over the pauses: storage that is
    /// away holds up no planned takeover.
    fn persist(&self, id: SessionId, mut attached: Result<Arc<Session>, AttachError>) {
        let mut pause = Duration::from_millis(1);
        while let Err(error) = attached {
            if !error.is_transient() {
                tracing::error!(session = %id, %error, "session cannot be resumed");
                crate::metrics::retire(id);
                self.store.remove_all(&Session::store_name(id, ""));
                let entry = self.entries().remove(&id);
                if entry.is_some_and(|entry| entry.is_hypervisors) {
                    // The next connection to its volume may wait for its end.
                    self.notices.send(Notice::Ended(id));
                }
                return;
            }
            tracing::warn!(session = %id, %error, "session waits");
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
            attached = match self.stored_request(id) {
                Ok(request) => self.attach_stored(request),
                Err(error) => {
                    tracing::warn!(session = %id, %error, "the stored session is out of reach");
                    Err(AttachError::Starting(id))
                }
            };
        }
    }

    /// What makes a stored session, mapped.
    pub(crate) fn stored_request(&self, id: SessionId) -> Result<AttachRequest, StoredError> {
        let fetch = |what: &'static str, name: &str| {
            let name = Session::store_name(id, name);
            let fd = self.store.fetch(&name);
            fd.ok_or_else(|| match self.store.holds(&name) {
                true => StoredError::OutOfReach(what),
                false => StoredError::Missing(what),
            })
        };
        let region = fetch("region", "region")?;
        let region = Arc::new(Region::open(region)?);
        // From now on: a crash before the session is served is a crash all the same.
        let keep_out_of_dumps = |memory: &SharedMemory| {
            if let Err(error) = memory.advise(Advice::LinuxDontDump) {
                tracing::warn!(session = %id, %error, "memory will be part of core dumps");
            }
        };
        keep_out_of_dumps(region.memory());
        let ledger = Ledger::open(fetch("ledger", "ledger")?)?;
        let queue_count = region.geometry().queue_count;
        let vhost = match is_own(&region) {
            true => {
                let rings = queue_count as usize;
                let stored = Stored::fetch(&*self.store, id, rings, self.guest_memory);
                Some(stored?.ok_or(StoredError::Missing("connection"))?)
            }
            false => None,
        };
        // Not page by page while guests wait. A failure costs time and nothing else. Pages that were
        // holes are this process's: no more of them than honest clients have.
        let rings_end = region.geometry().arena_offset().min(POPULATED_BYTES_MAX);
        let _ = region.memory().populate(if vhost.is_some() { PAGE } else { rings_end });
        let _ = ledger.populate();
        let doorbells = |kind: &'static str| -> Result<Vec<OwnedFd>, StoredError> {
            let queues = if vhost.is_some() { 0..0 } else { 0..queue_count };
            queues
                .map(|k| {
                    let doorbell = fetch(kind, &format!("{kind}{k}"))?;
                    set_nonblocking(&doorbell).map_err(|_| StoredError::Missing(kind))?;
                    Ok(doorbell)
                })
                .collect()
        };
        let mut memories = Memories::new();
        for name in self.store.names(&Session::store_name(id, "mem")) {
            let number = name.rsplit("mem").next().and_then(|number| number.parse().ok());
            if let Some(number) = number {
                let fd = self.store.fetch(&name).ok_or(StoredError::OutOfReach("memory"))?;
                let uid = ledger.attachment().client_uid;
                let memory = self.memory_quota.map_again(fd, uid)?;
                keep_out_of_dumps(&memory);
                set_memory(&mut memories, number, Some(Arc::new(memory)));
            }
        }
        let peer = match fetch("peer", "peer") {
            Err(StoredError::Missing(_)) => None,
            peer => Some(peer?),
        };
        Ok(AttachRequest {
            origin: Origin::Store,
            kicks: doorbells("kick")?,
            calls: doorbells("call")?,
            peer,
            attachment: ledger.attachment(),
            ledger: Some(ledger),
            memories,
            region,
            vhost,
        })
    }
}

/// Whether a server made the region, and its rings are no rings.
pub(crate) fn is_own(region: &Region) -> bool {
    region.header().features_required.load(Relaxed) & features::OWN_REGION != 0
}

/// A session that is complete but for being served.
struct Prepared {
    session: Arc<Session>,
    adopted: Vec<Adopted>,
    verdicts: Verdicts,
    hypervisor: Option<Box<Hypervisor>>,
}

/// The rings of a client's region, and what is to be issued again of each.
fn rings_of(region: &Arc<Region>, epoch: Epoch) -> Vec<Adopted> {
    let queues = (0..region.geometry().queue_count).map_while(|index| region.queue(index));
    let adopted = queues.map(|memory| ServerQueue::adopt(memory, epoch));
    adopted.map(|(ring, requests)| (Front::Ring(ring), requests)).collect()
}

#[derive(Default)]
struct Verdicts {
    suspects: Vec<Suspect>,
    parked: Vec<Suspect>,
}

/// Why the store does not hold a whole session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoredError {
    #[error("its {0} is missing")]
    Missing(&'static str),
    /// It is there, and no descriptor is free.
    #[error("its {0} is out of reach")]
    OutOfReach(&'static str),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// A doorbell whose counter is full must not block a shard.
pub fn set_nonblocking(doorbell: &OwnedFd) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(doorbell)?;
    rustix::fs::fcntl_setfl(doorbell, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(())
}

/// Whether a descriptor is an eventfd: others could block a shard that writes to them.
pub fn is_eventfd(fd: &impl AsFd) -> bool {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}
