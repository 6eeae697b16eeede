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

use std::collections::HashSet;
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
use rustix::net::SendFlags;

use super::kept::{Kept, KeptRecord, Serial};
use super::stored::QUEUE_SIZE_MAX;
use crate::server::Server;
use crate::session::Session;
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
    #[error("{0}")]
    Record(#[from] RecordError),
    #[error("cannot keep what it sent")]
    Store(#[source] std::io::Error),
    #[error("ring {0} is to be polled, or its doorbell is no eventfd")]
    Doorbell(u32),
    #[error("it gives back an inflight record while its rings run")]
    Running,
    #[error("its inflight record is no memfd")]
    NoMemory,
    #[error("its channel is no socket")]
    NoSocket,
}

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
    record: Option<InflightRecord>,
    channel: Option<OwnedFd>,
    lives: Vec<Life>,
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
            record,
            channel,
            lives,
            waiting,
        }
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
    ) -> Option<VirtStart> {
        let life = self.lives.get(ring as usize)?;
        if *life != Life::Stopped {
            return None;
        }
        let setup = self.device.ring_setup(ring)?;
        let kept = *self.kept.rings.get(ring as usize)?;
        let kick = fetch(kept.kick)?;
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
                let (call, agreement) = (fetch(kept.call), self.device.agreement());
                Some(VirtStart { queue, chains, kick, call, agreement })
            }
            Err(error) => {
                self.lives[ring as usize] = Life::Broken;
                tracing::warn!(session = %self.id, ring, %error, "a guest's ring cannot be served");
                None
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
            match self.connection.peek()? {
                Peeked::Message(mut envelope) => {
                    strays.append(&mut envelope.strays);
                    self.deal_with(envelope, server, strays)?;
                }
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
                self.set_memory(regions, server, strays)?;
                commands = self.to_running(|| VirtCommand::SetMemory(self.memory.clone()));
            }
            Action::AddMemory(spec, fd) => {
                let region = map(spec, fd, server.guest_memory, strays)?;
                let memory = self.memory.with(region.0)?;
                let serial = self.keep(server, region.1.as_fd())?;
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
                commands = self.set_doorbell(ring, doorbell, fd, server, strays)?;
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
            Action::SetInflight(_, fd) if rustix::fs::fcntl_get_seals(&fd).is_err() => {
                strays.push(fd);
                return Err(Breach::NoMemory);
            }
            Action::SetInflight(described, fd) => self.set_record(described, fd, server)?,
            Action::SetChannel(fd) if rustix::net::sockopt::socket_type(&fd).is_err() => {
                strays.push(fd);
                return Err(Breach::NoSocket);
            }
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
            return self.complete(envelope, then, server);
        }
        // Known to a successor before a shard acts on it: what is taken from a ring in memory that only
        // this server knows of would be lost.
        self.connection.journal().save(&self.state()).map_err(ConnectionError::from)?;
        crate::failpoint!("vhost-after-save");
        let queues = commands.iter().map(|(ring, _)| *ring).collect();
        self.waiting = Some(Waiting { envelope, then, queues });
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
        tracing::warn!(session = %self.id, message, %refusal, "a hypervisor's message is refused");
        let told = self.device.acknowledgement(&envelope.message, envelope.need_reply, false);
        match told {
            Some(reply) => self.finish(envelope, Some((reply, None)), server),
            None if refusal.is_fatal() => Err(Breach::Refused { message, refusal }),
            None => self.finish(envelope, None, server),
        }
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

    fn set_memory(
        &mut self,
        regions: Vec<(RegionSpec, OwnedFd)>,
        server: &Server,
        strays: &mut Vec<OwnedFd>,
    ) -> Result<(), Breach> {
        let mut mapped = Vec::with_capacity(regions.len());
        for (spec, fd) in regions {
            mapped.push((spec, map(spec, fd, server.guest_memory, strays)?));
        }
        let memory =
            GuestMemory::new(mapped.iter().map(|(_, (region, _))| region.clone()).collect())?;
        let mut kept = Vec::with_capacity(mapped.len());
        for (spec, (_, fd)) in mapped {
            kept.push((spec, self.keep(server, fd.as_fd())?));
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
        strays: &mut Vec<OwnedFd>,
    ) -> Result<Vec<(u32, VirtCommand)>, Breach> {
        let at = ring as usize;
        match (doorbell, fd) {
            (_, Some(fd)) if !crate::server::is_eventfd(&fd) => {
                strays.push(fd);
                return Err(Breach::Doorbell(ring));
            }
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

    /// One of our own says nothing about the next life of the rings, which begin where the driver likes.
    fn forget_own_record(&mut self) {
        if self.device.state().inflight.is_none() && !self.lives.contains(&Life::Running) {
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
            }
            VirtNews::Stopped(base) => {
                if let Some(life) = life {
                    *life = Life::Stopped;
                }
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
        let Some(Waiting { envelope, then, .. }) = self.waiting.take() else { return Ok(()) };
        self.complete(envelope, then, server)
    }

    fn complete(&mut self, envelope: Envelope, then: Then, server: &Server) -> Result<(), Breach> {
        let reply = match then {
            Then::Acknowledge => None,
            Then::Reply(reply, fd) => Some((reply, fd)),
            Then::Stopped(ring) => {
                self.forget_own_record();
                Some((self.device.stopped(ring, None), None))
            }
            Then::Forget => {
                self.forget_own_record();
                if let Some(record) = &self.record {
                    record.reset();
                }
                None
            }
        };
        let acknowledge =
            || self.device.acknowledgement(&envelope.message, envelope.need_reply, true);
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
        self.start_rings(server);
        Ok(())
    }

    pub(super) fn forget_unnamed(&self, server: &Server) {
        let prefix = Session::store_name(self.id, "v");
        for name in server.store.names(&prefix) {
            let serial = Kept::serial_of(&name[prefix.len() - 1..]);
            if serial.is_some_and(|serial| !self.kept.names(serial))
                && let Err(error) = server.store.remove(&name)
            {
                tracing::warn!(name, %error, "cannot remove a stored descriptor");
            }
        }
    }

    fn start_rings(&mut self, server: &Server) {
        let id = self.id;
        let fetch = |serial| server.store.fetch(&Session::store_name(id, &Kept::name(serial)));
        let starts: Vec<_> = (0..self.lives.len() as u32)
            .filter_map(|ring| Some((ring, self.start_of(ring, &fetch)?)))
            .map(|(ring, start)| (ring, VirtCommand::Start(Box::new(start))))
            .collect();
        self.send(server, starts);
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

/// Maps a region. What is not to be mapped may be of a kind whose close waits.
fn map(
    spec: RegionSpec,
    fd: OwnedFd,
    backing: Backing,
    strays: &mut Vec<OwnedFd>,
) -> Result<(Arc<MappedRegion>, OwnedFd), Breach> {
    match MappedRegion::map(spec, fd.as_fd(), backing) {
        Ok(region) => Ok((region, fd)),
        Err(error) => {
            strays.push(fd);
            Err(error.into())
        }
    }
}
