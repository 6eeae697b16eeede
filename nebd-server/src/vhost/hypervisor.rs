//! A hypervisor's connection, and what its messages do.
//!
//! ```text
//!  peek ─► device ─► descriptors into the store ─► journal ─► shards ─► reply, taken ─► rings start
//!            │ refused                                         │ each answers by a VirtEvent
//!            ▼                                                 ▼
//!        told so, or the connection ends              one message at a time: the next one waits
//! ```
//!
//! A server that dies at any point of this leaves a message that its successor finds again, or a reply
//! in doubt, and then it closes the connection, once (see [`nebd_vhost::connection`]).

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nebd_abi::layout::SessionId;
use nebd_backend::FdStore;
use nebd_vhost::connection::{Connection, ConnectionError, Envelope, Peeked};
use nebd_vhost::device::{Action, Device, Doorbell, Refusal};
use nebd_vhost::inflight::{InflightRecord, Layout, QueueRecord, RecordError};
use nebd_vhost::memory::{Backing, GuestMemory, MappedRegion, MemoryError, RegionSpec};
use nebd_vhost::message::{InflightDescription, Reply, config_changed};
use nebd_vhost::queue::{F_RING_PACKED, StartError, VirtQueue};
use rustix::net::{AddressFamily, SendFlags};

use super::kept::{Kept, KeptRecord, Serial};
use super::stored::QUEUE_SIZE_MAX;
use crate::server::Server;
use crate::session::{Charge, MemoryQuota, RegisterError, Session};
use crate::shard::{Command, VirtCommand, VirtNews, VirtStart};

/// Why a hypervisor is disconnected.
#[derive(Debug, thiserror::Error)]
pub(super) enum Breach {
    #[error("it has hung up")]
    HungUp,
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("its message {message} is refused: {refusal}")]
    Refused { message: u32, refusal: Refusal },
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Quota(#[from] RegisterError),
    #[error("{0}")]
    Record(#[from] RecordError),
    #[error("cannot keep what it sent")]
    Store(#[source] std::io::Error),
    #[error("ring {0} is to be polled, or its doorbell is no eventfd")]
    Doorbell(u32),
    #[error("it sends descriptors that nobody asked for, and whose close waits")]
    Flood,
    #[error("it gives back an inflight record while its rings run")]
    Running,
    #[error("its message {0} comes with a descriptor that is no memfd, eventfd or Unix socket")]
    Strange(u32),
    #[error(transparent)]
    Lost(#[from] LostDoorbell),
}

/// A doorbell that the journal names is not in the store.
#[derive(Debug, thiserror::Error)]
#[error("a doorbell of ring {0} is not in the store any more")]
pub struct LostDoorbell(u32);

/// Whether a ring is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Stopped,
    Running,
    /// It could not start; tried again once the hypervisor says something new of it.
    Broken,
}

/// A message that shards have to act on before it is answered.
struct Waiting {
    envelope: Envelope,
    then: Then,
    /// Queues that have not answered.
    queues: HashSet<u32>,
    /// No ring has failed to follow.
    is_done: bool,
}

/// What is left to be done for a message.
enum Then {
    Acknowledge,
    Reply(Reply, Option<OwnedFd>),
    /// `GET_VRING_BASE`.
    Stopped(u32),
    /// The record is as good as new.
    Forget,
}

/// See the [module](self).
pub(crate) struct Hypervisor {
    id: SessionId,
    /// Once it is served.
    session: Option<Arc<Session>>,
    connection: Connection,
    device: Device,
    kept: Kept,
    memory: Arc<GuestMemory>,
    /// Whose memory it is, and what it takes of this user's quota.
    uid: u32,
    charges: BTreeMap<Serial, Charge>,
    record: Option<InflightRecord>,
    channel: Option<OwnedFd>,
    lives: Vec<Life>,
    /// A ring has stopped with chains in its record.
    has_left: bool,
    waiting: Option<Waiting>,
}

impl Hypervisor {
    pub(super) fn new(
        id: SessionId,
        connection: Connection,
        device: Device,
        kept: Kept,
        memory: Arc<GuestMemory>,
        record: Option<InflightRecord>,
        channel: Option<OwnedFd>,
    ) -> Hypervisor {
        let lives = vec![Life::Stopped; kept.rings.len()];
        let (session, waiting) = (None, None);
        Hypervisor {
            id,
            session,
            connection,
            device,
            kept,
            memory,
            uid: 0,
            charges: BTreeMap::new(),
            record,
            channel,
            lives,
            has_left: false,
            waiting,
        }
    }

    /// The guest's memory is this user's.
    pub(crate) fn charge(&mut self, quota: &Arc<MemoryQuota>, uid: u32) {
        self.uid = uid;
        let regions = self.kept.regions.iter();
        let charges = regions.map(|(spec, serial)| (*serial, quota.charge_again(uid, spec.size)));
        self.charges = charges.collect();
    }

    /// Its session is served.
    pub(super) fn set_session(&mut self, session: Arc<Session>) {
        self.session = Some(session);
    }

    pub(super) fn session_id(&self) -> SessionId {
        self.id
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.connection.socket()
    }

    /// Whether a message waits for shards.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// How a ring is to be started, if it is to run and does not; it counts as running from now on.
    pub(super) fn start_of(
        &mut self,
        ring: u32,
        fetch: &dyn Fn(Serial) -> Option<OwnedFd>,
    ) -> Result<Option<VirtStart>, LostDoorbell> {
        let is_stopped = self.lives.get(ring as usize) == Some(&Life::Stopped);
        let (Some(setup), Some(kept)) =
            (self.device.ring_setup(ring), self.kept.rings.get(ring as usize).copied())
        else {
            return Ok(None);
        };
        if !is_stopped || kept.kick == 0 {
            return Ok(None);
        }
        // A guest that nobody hears, or calls, waits for ever.
        let kick = fetch(kept.kick).ok_or(LostDoorbell(ring))?;
        let call = match kept.call {
            0 => None,
            serial => Some(fetch(serial).ok_or(LostDoorbell(ring))?),
        };
        let started = if u32::from(setup.size) > QUEUE_SIZE_MAX {
            Err(StartError::Size(setup.size))
        } else {
            let record = match &self.record {
                Some(record) => record.queue(setup.layout(), ring as u16),
                None => Ok(QueueRecord::private(setup.layout(), setup.size)),
            };
            record
                .map_err(StartError::from)
                .and_then(|record| VirtQueue::start(&setup, self.memory.clone(), record))
        };
        match started {
            Ok((queue, chains)) => {
                self.lives[ring as usize] = Life::Running;
                let agreement = self.device.agreement();
                Ok(Some(VirtStart { queue, chains, kick, call, agreement }))
            }
            Err(error) => {
                self.lives[ring as usize] = Life::Broken;
                tracing::warn!(session = %self.id, ring, %error, "a guest's ring cannot be served");
                Ok(None)
            }
        }
    }

    /// Deals with what it says, until there is nothing, or a message waits for shards; true if there
    /// may be more.
    pub(super) fn converse(
        &mut self,
        server: &Server,
        strays: &mut Vec<OwnedFd>,
        messages_max: usize,
    ) -> Result<bool, Breach> {
        for _ in 0..messages_max {
            if self.waiting.is_some() {
                return Ok(false);
            }
            match self.connection.peek(strays)? {
                Peeked::Message(envelope) => self.deal_with(envelope, server, strays)?,
                Peeked::Nothing => return Ok(false),
                Peeked::Closed => return Err(Breach::HungUp),
            }
        }
        Ok(true)
    }

    fn deal_with(
        &mut self,
        mut envelope: Envelope,
        server: &Server,
        strays: &mut Vec<OwnedFd>,
    ) -> Result<(), Breach> {
        let fds = std::mem::take(&mut envelope.fds);
        let message = envelope.message.id();
        // From here on they may be closed anywhere. Whose operator maps any file has no such wish.
        let is_known = |fd| closes_at_once(fd) || server.guest_memory == Backing::AnyFile;
        if !fds.iter().all(is_known) {
            strays.extend(fds);
            return Err(Breach::Strange(message));
        }
        let action = match self.device.handle(&envelope.message, fds) {
            Ok(action) => action,
            Err(refusal) => return self.refuse(envelope, server, message, refusal),
        };
        crate::failpoint!("vhost-after-act");
        let mut then = Then::Acknowledge;
        let mut commands = Vec::new();
        match action {
            Action::None => {}
            Action::Reply(reply) => then = Then::Reply(reply, None),
            Action::SetMemory(regions) => {
                self.set_memory(regions, server)?;
                commands = self.to_running(|| VirtCommand::SetMemory(self.memory.clone()));
            }
            Action::AddMemory(spec, fd) => {
                let (region, charge) = self.map(spec, &fd, server)?;
                let memory = self.memory.with(region)?;
                let serial = self.keep(server, fd.as_fd())?;
                self.charges.insert(serial, charge);
                self.kept.regions.retain(|(known, _)| !known.is_same_as(&spec));
                self.kept.regions.push((spec, serial));
                self.memory = memory;
                self.mend_all();
                commands = self.to_running(|| VirtCommand::SetMemory(self.memory.clone()));
            }
            Action::RemoveMemory(spec) => {
                self.kept.regions.retain(|(known, _)| !known.is_same_as(&spec));
                self.memory = self.memory.without(&spec);
                commands = self.to_running(|| VirtCommand::SetMemory(self.memory.clone()));
            }
            Action::Doorbell(ring, doorbell, fd) => {
                commands = self.set_doorbell(ring, doorbell, fd, server)?;
            }
            Action::Enable(ring, true) => self.mend(ring),
            Action::Enable(ring, false) => commands = self.stop(ring),
            Action::Stop(ring) => {
                commands = self.stop(ring);
                then = Then::Stopped(ring);
            }
            Action::CreateInflight(asked) => {
                let record = self.create_record(asked.queues, asked.queue_size)?;
                let fd = record.fd().try_clone_to_owned().map_err(Breach::Store)?;
                then = Then::Reply(self.device.recorded(&asked, record.size()), Some(fd));
            }
            Action::SetInflight(described, fd) => self.set_record(described, fd, server)?,
            Action::SetChannel(fd) => {
                self.kept.channel = self.keep(server, fd.as_fd())?;
                self.channel = Some(fd);
            }
            Action::Writeback(_) => {
                let agreement = self.device.agreement();
                commands = self.to_running(|| VirtCommand::SetAgreement(agreement));
            }
            Action::Reset => {
                commands = (0..self.lives.len() as u32).flat_map(|ring| self.stop(ring)).collect();
                then = Then::Forget;
            }
        }
        if commands.is_empty() {
            return self.complete(envelope, then, true, server);
        }
        // Known to a successor before a shard acts on it: what is taken from a ring in memory that only
        // this server knows of would be lost. But a ring that is about to stop has not stopped: a
        // successor that believed it had would not know where it goes on.
        let stops = commands.iter().any(|(_, command)| matches!(command, VirtCommand::Stop));
        if !stops {
            self.connection.journal().save(&self.state()).map_err(ConnectionError::from)?;
        }
        crate::failpoint!("vhost-after-save");
        let queues = commands.iter().map(|(ring, _)| *ring).collect();
        self.waiting = Some(Waiting { envelope, then, queues, is_done: true });
        self.send(server, commands);
        Ok(())
    }

    fn refuse(
        &mut self,
        envelope: Envelope,
        server: &Server,
        message: u32,
        refusal: Refusal,
    ) -> Result<(), Breach> {
        let told = self.device.acknowledgement(&envelope.message, envelope.need_reply, false);
        if told.is_none() && refusal.is_fatal() {
            return Err(Breach::Refused { message, refusal });
        }
        tracing::warn!(session = %self.id, message, %refusal, "a hypervisor's message is refused");
        self.finish(envelope, told.map(|reply| (reply, None)), server)
    }

    fn state(&self) -> Vec<u8> {
        self.kept.encode(&self.device.state().encode())
    }

    /// Into the store, under a name of its own.
    fn keep(&mut self, server: &Server, fd: BorrowedFd<'_>) -> Result<Serial, Breach> {
        let serial = self.kept.next_serial();
        let name = Session::store_name(self.id, &Kept::name(serial));
        server.store.put(&name, fd).map_err(Breach::Store)?;
        Ok(serial)
    }

    /// Maps a piece of the guest's memory, which counts towards its user's quota.
    fn map(
        &self,
        spec: RegionSpec,
        fd: &OwnedFd,
        server: &Server,
    ) -> Result<(Arc<MappedRegion>, Charge), Breach> {
        let charge = server.memory_quota.charge(self.uid, spec.size)?;
        Ok((MappedRegion::map(spec, fd.as_fd(), server.guest_memory)?, charge))
    }

    fn set_memory(
        &mut self,
        regions: Vec<(RegionSpec, OwnedFd)>,
        server: &Server,
    ) -> Result<(), Breach> {
        // The old ones are gone for the hypervisor, and unmapped as soon as nothing is in flight there.
        self.charges.clear();
        let mut mapped = Vec::with_capacity(regions.len());
        for (spec, fd) in &regions {
            mapped.push(self.map(*spec, fd, server)?);
        }
        let memory = GuestMemory::new(mapped.iter().map(|(region, _)| region.clone()).collect())?;
        let mut kept = Vec::with_capacity(mapped.len());
        for ((spec, fd), (_, charge)) in regions.into_iter().zip(mapped) {
            let serial = self.keep(server, fd.as_fd())?;
            self.charges.insert(serial, charge);
            kept.push((spec, serial));
        }
        self.kept.regions = kept;
        self.memory = memory;
        self.mend_all();
        Ok(())
    }

    fn set_doorbell(
        &mut self,
        ring: u32,
        doorbell: Doorbell,
        fd: Option<OwnedFd>,
        server: &Server,
    ) -> Result<Vec<(u32, VirtCommand)>, Breach> {
        let at = ring as usize;
        match (doorbell, fd) {
            (_, Some(fd)) if !crate::server::is_eventfd(&fd) => return Err(Breach::Doorbell(ring)),
            (Doorbell::Kick, None) => return Err(Breach::Doorbell(ring)),
            (Doorbell::Kick, Some(fd)) => {
                self.kept.rings[at].kick = self.keep(server, fd.as_fd())?;
                self.mend(ring);
                return Ok(self.if_running(ring, VirtCommand::SetKick(fd)));
            }
            (Doorbell::Call, fd) => {
                if let Some(fd) = &fd {
                    crate::server::set_nonblocking(fd).map_err(Breach::Store)?;
                }
                self.kept.rings[at].call = match &fd {
                    Some(fd) => self.keep(server, fd.as_fd())?,
                    None => 0,
                };
                return Ok(self.if_running(ring, VirtCommand::SetCall(fd)));
            }
            // Nobody reads it.
            (Doorbell::Error, _) => {}
        }
        Ok(Vec::new())
    }

    fn layout(&self) -> Layout {
        match self.device.state().features & F_RING_PACKED {
            0 => Layout::Split,
            _ => Layout::Packed,
        }
    }

    fn create_record(&self, queues: u16, queue_size: u16) -> Result<InflightRecord, Breach> {
        Ok(InflightRecord::create(self.layout(), queues, queue_size)?)
    }

    fn set_record(
        &mut self,
        described: InflightDescription,
        fd: OwnedFd,
        server: &Server,
    ) -> Result<(), Breach> {
        if self.lives.contains(&Life::Running) {
            return Err(Breach::Running);
        }
        let serial = self.keep(server, fd.as_fd())?;
        let InflightDescription { mmap_offset: offset, queues, queue_size, .. } = described;
        self.record = Some(InflightRecord::map(fd, offset, queues, queue_size)?);
        self.kept.record = KeptRecord { serial, queues, queue_size, offset };
        Ok(())
    }

    /// A hypervisor that does not ask for a record has one all the same: its connection outlives us.
    fn ensure_record(&mut self, server: &Server) -> Result<(), Breach> {
        let rings = self.lives.len() as u32;
        let is_wanted = (0..rings).any(|ring| self.device.ring_setup(ring).is_some());
        if self.record.is_some() || !is_wanted {
            return Ok(());
        }
        let (queues, queue_size) = (rings as u16, QUEUE_SIZE_MAX as u16);
        let record = self.create_record(queues, queue_size)?;
        let serial = self.keep(server, record.fd())?;
        self.kept.record = KeptRecord { serial, queues, queue_size, offset: 0 };
        self.record = Some(record);
        Ok(())
    }

    /// One of our own says nothing about the next life of the rings, which begin where the driver likes;
    /// unless something that they took was not answered.
    fn forget_own_record(&mut self) {
        let is_own = self.device.state().inflight.is_none();
        if is_own && !self.has_left && !self.lives.contains(&Life::Running) {
            self.record = None;
            self.kept.record = KeptRecord::default();
        }
    }

    /// A ring that could not start may be tried again.
    fn mend(&mut self, ring: u32) {
        if let Some(life) = self.lives.get_mut(ring as usize).filter(|life| **life == Life::Broken)
        {
            *life = Life::Stopped;
        }
    }

    fn mend_all(&mut self) {
        (0..self.lives.len() as u32).for_each(|ring| self.mend(ring));
    }

    fn to_running(&self, command: impl Fn() -> VirtCommand) -> Vec<(u32, VirtCommand)> {
        let lives = self.lives.iter().enumerate();
        lives
            .filter(|(_, life)| **life == Life::Running)
            .map(|(ring, _)| (ring as u32, command()))
            .collect()
    }

    fn if_running(&self, ring: u32, command: VirtCommand) -> Vec<(u32, VirtCommand)> {
        match self.lives.get(ring as usize) {
            Some(Life::Running) => vec![(ring, command)],
            _ => Vec::new(),
        }
    }

    fn stop(&mut self, ring: u32) -> Vec<(u32, VirtCommand)> {
        self.mend(ring);
        self.if_running(ring, VirtCommand::Stop)
    }

    fn send(&self, server: &Server, commands: Vec<(u32, VirtCommand)>) {
        let Some(session) = &self.session else { return };
        for (ring, command) in commands {
            let shard = session.shards[ring as usize];
            server.shards[shard].send(Command::Virt(self.id, ring, command));
        }
    }

    /// A shard has something to tell of a ring.
    pub(super) fn hear(
        &mut self,
        ring: u32,
        news: VirtNews,
        server: &Server,
    ) -> Result<(), Breach> {
        let life = self.lives.get_mut(ring as usize);
        match news {
            VirtNews::Broken(violation) => {
                tracing::warn!(
                    session = %self.id, ring, %violation,
                    "a guest's ring is not served any more: its driver broke the rules"
                );
                return Ok(());
            }
            VirtNews::Failed(error) => {
                tracing::warn!(session = %self.id, ring, %error, "a guest's ring has lost its memory");
                if let Some(waiting) = &mut self.waiting {
                    waiting.is_done = false;
                }
            }
            VirtNews::Stopped { base, left } => {
                if let Some(life) = life {
                    *life = Life::Stopped;
                }
                self.has_left |= left > 0;
                let is_reset = matches!(self.waiting, Some(Waiting { then: Then::Forget, .. }));
                if let Some(base) = base.filter(|_| !is_reset) {
                    self.device.paused(ring, base);
                }
            }
            VirtNews::Done => {}
        }
        let Some(waiting) = &mut self.waiting else { return Ok(()) };
        waiting.queues.remove(&ring);
        if !waiting.queues.is_empty() {
            return Ok(());
        }
        let Some(Waiting { envelope, then, is_done, .. }) = self.waiting.take() else {
            return Ok(());
        };
        self.complete(envelope, then, is_done, server)
    }

    fn complete(
        &mut self,
        envelope: Envelope,
        then: Then,
        is_done: bool,
        server: &Server,
    ) -> Result<(), Breach> {
        let reply = match then {
            Then::Acknowledge => None,
            Then::Reply(reply, fd) => Some((reply, fd)),
            Then::Stopped(ring) => {
                self.forget_own_record();
                Some((self.device.stopped(ring, None), None))
            }
            Then::Forget => {
                // Whoever keeps it over the reset finds it empty.
                if let Some(record) = self.record.take() {
                    record.reset();
                }
                self.kept.record = KeptRecord::default();
                self.has_left = false;
                None
            }
        };
        let acknowledge =
            || self.device.acknowledgement(&envelope.message, envelope.need_reply, is_done);
        let reply = reply.or_else(|| Some((acknowledge()?, None)));
        self.ensure_record(server)?;
        self.finish(envelope, reply, server)
    }

    /// Replies, takes the message, lets go of what is kept no longer, and starts what is to run.
    fn finish(
        &mut self,
        envelope: Envelope,
        reply: Option<(Reply, Option<OwnedFd>)>,
        server: &Server,
    ) -> Result<(), Breach> {
        let request = envelope.message.id();
        let reply = reply.as_ref().map(|(reply, fd)| (reply.encode(request), fd.as_ref()));
        let reply = reply.as_ref().map(|(bytes, fd)| (bytes.as_slice(), fd.map(AsFd::as_fd)));
        crate::failpoint!("vhost-before-reply");
        self.connection.finish(envelope, &self.state(), reply, || Ok(()))?;
        crate::failpoint!("vhost-after-reply");
        self.forget_unnamed(server);
        self.start_rings(server)
    }

    pub(super) fn forget_unnamed(&mut self, server: &Server) {
        let kept = &self.kept;
        self.charges.retain(|serial, _| kept.names(*serial));
        for (serial, name) in super::stored::kept_names(&*server.store, self.id) {
            if !self.kept.names(serial)
                && let Err(error) = server.store.remove(&name)
            {
                tracing::warn!(name, %error, "cannot remove a stored descriptor");
            }
        }
    }

    fn start_rings(&mut self, server: &Server) -> Result<(), Breach> {
        let id = self.id;
        let fetch = |serial| server.store.fetch(&Session::store_name(id, &Kept::name(serial)));
        let mut starts = Vec::new();
        for ring in 0..self.lives.len() as u32 {
            if let Some(start) = self.start_of(ring, &fetch)? {
                starts.push((ring, VirtCommand::Start(Box::new(start))));
            }
        }
        self.send(server, starts);
        Ok(())
    }

    /// The volume has another size.
    pub(super) fn resized(&mut self, size: u64) {
        if !self.device.resize(size) {
            return;
        }
        let Some(channel) = &self.channel else { return };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if let Err(error) = rustix::net::send(channel, &config_changed(), flags) {
            tracing::warn!(session = %self.id, %error, "a hypervisor does not hear of a resize");
        }
    }

    /// Whoever holds the socket still: it is over.
    pub(super) fn hang_up(&self) {
        let _ = rustix::net::shutdown(self.connection.socket(), rustix::net::Shutdown::Both);
    }
}

/// A Unix socket has no storage behind it, either.
fn closes_at_once(fd: &OwnedFd) -> bool {
    crate::control::closes_at_once(fd)
        || rustix::net::sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
}
