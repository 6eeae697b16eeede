//! Hypervisors that attach a disk by vhost-user-blk.
//!
//! ```text
//!  accept ─► session (volume opened, socket and journal stored) ─► converse ─► … ─► hung up ─► drained
//!    │ its predecessor is not drained yet: waits for that
//!
//!  control thread: one Hypervisor a connection      shards: its rings, as Front::Virt
//!  successor:      Stored, from the descriptor store ─► Hypervisor, rings that run
//! ```
//!
//! A hypervisor's session is a session like any other: the region is the server's own, and only its
//! header is used. What it is worth to know of the protocol is in [`nebd_vhost`].

mod hypervisor;
mod kept;
mod stored;

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nebd_abi::VolumeName;
use nebd_abi::control::AttachFlags;
use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, SessionId, features};
use nebd_abi::region::{Region, RegionError};
use nebd_vhost::memory::Backing;
use rustix::event::epoll;

use crate::control::Control;
use crate::frontend::{Attachment, Connected};
use crate::registry::AttachmentKind;
use crate::server::{AttachError, AttachRequest, Origin};
use crate::session::{Memories, Session, ledger};
use crate::shard::VirtEvent;
use hypervisor::Breach;
pub(crate) use hypervisor::Hypervisor;
pub use stored::ResumeError;
pub(crate) use stored::{QUEUE_SIZE_MAX, Stored, disk_of};

/// Messages of one hypervisor before others get their turn.
const MESSAGES_MAX: usize = 64;

/// The hypervisors of the control thread.
#[derive(Default)]
pub(crate) struct Hypervisors {
    by_key: HashMap<u64, Hypervisor>,
    keys: HashMap<SessionId, u64>,
    /// Volumes whose session is being opened, served, or drained, and who comes next.
    busy: HashMap<VolumeName, Busy>,
}

struct Busy {
    session: SessionId,
    next: Option<(Arc<Attachment>, OwnedFd)>,
    /// Until the session is drained.
    connected: Connected,
}

impl Control {
    /// A hypervisor has connected.
    pub(crate) fn accept_hypervisor(&mut self, attachment: &Arc<Attachment>, socket: OwnedFd) {
        let Some(busy) = self.hypervisors.busy.get(&attachment.volume) else {
            return match self.server.hypervisor_of(&attachment.volume) {
                Some(session) => self.await_inherited(attachment, session, socket),
                None => self.attach_hypervisor(attachment, socket),
            };
        };
        // It may have hung up, and its end not have been looked at.
        if let Some(key) = self.hypervisors.keys.get(&busy.session).copied() {
            self.hypervisor_says(key);
            if self.hypervisors.by_key.get(&key).is_some_and(|known| !known.is_waiting()) {
                tracing::warn!(
                    volume = %attachment.volume,
                    "a second hypervisor is turned away: the first is connected still"
                );
                return;
            }
        }
        match self.hypervisors.busy.get_mut(&attachment.volume) {
            Some(busy) => busy.next = Some((attachment.clone(), socket)),
            None => self.attach_hypervisor(attachment, socket),
        }
    }

    /// A predecessor's session of this volume has its place, and is not served yet: two of them would
    /// answer the same rings.
    fn await_inherited(
        &mut self,
        attachment: &Arc<Attachment>,
        session: SessionId,
        socket: OwnedFd,
    ) {
        let Some(connected) = attachment.connect() else { return };
        let next = Some((attachment.clone(), socket));
        let busy = Busy { session, next, connected };
        self.hypervisors.busy.insert(attachment.volume.clone(), busy);
    }

    fn attach_hypervisor(&mut self, attachment: &Arc<Attachment>, socket: OwnedFd) {
        let volume = attachment.volume.clone();
        let Some(connected) = attachment.connect() else { return };
        let request = match request_of(attachment, socket, self.server.guest_memory) {
            Ok(request) => request,
            Err(error) => return refuse(attachment, &error),
        };
        let session = request.region.params().session;
        let busy = Busy { session, next: None, connected };
        self.hypervisors.busy.insert(volume.clone(), busy);
        let server = self.server.clone();
        let pass = server.gate.enter(format!("an attach of {volume}"));
        let attachment = attachment.clone();
        self.server.jobs.spawn(move || {
            let _pass = pass;
            if let Err(error) = server.attach(request) {
                refuse(&attachment, &error);
                server.notices.send(crate::control::Notice::Ended(session));
            }
        });
    }

    /// A hypervisor's session is served.
    pub(crate) fn adopt_hypervisor(
        &mut self,
        mut hypervisor: Box<Hypervisor>,
        session: Arc<Session>,
    ) {
        let key = self.new_hypervisor_key();
        let id = session.id;
        if !self.expect_hypervisor(&session) {
            // Nobody wants it any more.
            hypervisor.hang_up();
            return self.server.end_session(id);
        }
        session.set_connected(true);
        let (is_inherited, size) = (session.ledger.is_inherited(), session.volume.size());
        hypervisor.set_session(session);
        hypervisor.forget_unnamed(&self.server);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
        let data = epoll::EventData::new_u64(key);
        if let Err(error) = epoll::add(self.epoll(), hypervisor.socket(), data, flags) {
            tracing::error!(session = %id, %error, "cannot watch a hypervisor's connection");
            hypervisor.hang_up();
            return self.server.end_session(id);
        }
        if is_inherited {
            // A predecessor may have died before it told.
            hypervisor.resized(size);
        }
        self.hypervisors.keys.insert(id, key);
        self.hypervisors.by_key.insert(key, *hypervisor);
    }

    /// Whether this session's attachment is there still; one of a predecessor counts as connected now.
    fn expect_hypervisor(&mut self, session: &Session) -> bool {
        let volume = &session.volume.name;
        if let Some(busy) = self.hypervisors.busy.get(volume) {
            return busy.session == session.id;
        }
        let key = (volume.clone(), AttachmentKind::VhostUser);
        let attachment = self.server.frontends.attachment(&key);
        let connected = attachment.and_then(|attachment| attachment.connect());
        let Some(connected) = connected.filter(|_| session.ledger.is_inherited()) else {
            return false;
        };
        let busy = Busy { session: session.id, next: None, connected };
        self.hypervisors.busy.insert(volume.clone(), busy);
        true
    }

    /// Something stands in a hypervisor's socket.
    pub(crate) fn hypervisor_says(&mut self, key: u64) {
        let Some(hypervisor) = self.hypervisors.by_key.get_mut(&key) else { return };
        let mut strays = Vec::new();
        let result = hypervisor.converse(&self.server, &mut strays, MESSAGES_MAX);
        let is_flooded = !strays.is_empty() && self.is_closer_held_up();
        self.close_strays(strays);
        match result {
            Ok(_) if is_flooded => self.dismiss(key, &Breach::Flood),
            Err(breach) => self.dismiss(key, &breach),
            Ok(_) => self.watch_hypervisor(key),
        }
    }

    fn watch_hypervisor(&mut self, key: u64) {
        let Some(hypervisor) = self.hypervisors.by_key.get(&key) else { return };
        if hypervisor.is_waiting() {
            return;
        }
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
        let data = epoll::EventData::new_u64(key);
        let _ = epoll::modify(self.epoll(), hypervisor.socket(), data, flags);
    }

    /// A ring has something to tell.
    pub(crate) fn hear_ring(&mut self, event: VirtEvent) {
        let Some(key) = self.hypervisors.keys.get(&event.session).copied() else { return };
        let Some(hypervisor) = self.hypervisors.by_key.get_mut(&key) else { return };
        match hypervisor.hear(event.queue, event.news, &self.server) {
            Err(breach) => self.dismiss(key, &breach),
            Ok(()) if hypervisor.is_waiting() => {}
            Ok(()) => self.hypervisor_says(key),
        }
    }

    /// The end of a connection is the end of its session: the hypervisor knows what was in flight.
    fn dismiss(&mut self, key: u64, breach: &Breach) {
        let Some(hypervisor) = self.hypervisors.by_key.remove(&key) else { return };
        let id = hypervisor.session_id();
        let busy = self.hypervisors.busy.values().find(|busy| busy.session == id);
        let attachment = busy.map(|busy| busy.connected.attachment());
        match (breach, attachment) {
            (Breach::HungUp, attachment) => {
                attachment.inspect(|attachment| attachment.forget_refusal());
                tracing::info!(session = %id, "a hypervisor has hung up");
            }
            (_, Some(attachment)) => refuse(attachment, breach),
            (_, None) => tracing::warn!(session = %id, %breach, "a hypervisor is disconnected"),
        }
        self.hypervisors.keys.remove(&id);
        let _ = epoll::delete(self.epoll(), hypervisor.socket().as_fd());
        hypervisor.hang_up();
        if let Some(session) = self.server.session(id) {
            session.set_connected(false);
        }
        self.server.end_session(id);
    }

    /// Ends the connection to a volume, and nobody comes next.
    pub(crate) fn end_hypervisor(&mut self, volume: &VolumeName) {
        let Some(busy) = self.hypervisors.busy.get_mut(volume) else { return };
        busy.next = None;
        let session = busy.session;
        match self.hypervisors.keys.get(&session).copied() {
            Some(key) => self.dismiss(key, &Breach::HungUp),
            None if self.server.session(session).is_some() => self.server.end_session(session),
            // It is being opened.
            None => _ = self.hypervisors.busy.remove(volume),
        }
    }

    /// A session has ended, or never began: whoever waits for its volume is next.
    pub(crate) fn hypervisor_ended(&mut self, session: SessionId) {
        if let Some(key) = self.hypervisors.keys.get(&session).copied() {
            self.dismiss(key, &Breach::HungUp);
        }
        let volume = self.hypervisors.busy.iter().find(|(_, busy)| busy.session == session);
        let Some(volume) = volume.map(|(volume, _)| volume.clone()) else { return };
        if let Some(Busy { next: Some((attachment, socket)), .. }) =
            self.hypervisors.busy.remove(&volume)
        {
            self.attach_hypervisor(&attachment, socket);
        }
    }

    /// A session's volume has another size.
    pub(crate) fn hypervisor_resized(&mut self, session: SessionId, size: u64) {
        let key = self.hypervisors.keys.get(&session);
        if let Some(hypervisor) = key.and_then(|key| self.hypervisors.by_key.get_mut(key)) {
            hypervisor.resized(size);
        }
    }
}

/// A hypervisor is turned away; said once in a while, for it may come back ten times a second.
fn refuse(attachment: &Attachment, reason: &dyn fmt::Display) {
    if attachment.refuse(reason.to_string(), Instant::now()) {
        tracing::warn!(volume = %attachment.volume, %reason, "a hypervisor is turned away");
    }
}

/// The region of a session that the server makes for somebody who has none.
pub(crate) fn own_region(
    volume: &VolumeName,
    queue_count: u32,
    client_pid: u32,
    client_version: &str,
) -> Result<Region, RegionError> {
    let mut id = [0; 16];
    let drawn = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    drawn.map_err(|source| RegionError::System {
        action: "draw a session id",
        source: source.into(),
    })?;
    let geometry =
        Geometry { queue_count, queue_depth: QUEUE_SIZE_MAX, iovecs_per_slot: 1, arena_size: 4096 };
    let region = Region::create(RegionParams {
        version: LayoutVersion::CURRENT,
        session: SessionId(id),
        geometry,
        volume: volume.clone(),
        client_pid,
        client_version: client_version.into(),
    })?;
    let required = &region.header().features_required;
    required.store(features::OWN_REGION, std::sync::atomic::Ordering::Release);
    Ok(region)
}

fn request_of(
    attachment: &Attachment,
    socket: OwnedFd,
    backing: Backing,
) -> Result<AttachRequest, AttachError> {
    let peer = rustix::net::sockopt::socket_peercred(&socket).ok();
    let client_pid = peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get() as u32);
    let (record, volume) = (&attachment.record, &attachment.volume);
    let region = own_region(volume, record.queues, client_pid, "vhost-user");
    let region =
        region.map_err(|source| AttachError::Memory { session: SessionId([0; 16]), source })?;
    let flags = if record.read_only { AttachFlags::READ_ONLY } else { AttachFlags::default() };
    let vhost = Stored::new(socket, backing).map_err(ResumeError::from)?;
    Ok(AttachRequest {
        origin: Origin::Client,
        region: Arc::new(region),
        kicks: Vec::new(),
        calls: Vec::new(),
        peer: None,
        ledger: None,
        memories: Memories::new(),
        attachment: ledger::Attachment {
            major: 0,
            attach_flags: flags.0,
            client_uid: peer.map_or(0, |peer| peer.uid.as_raw()),
            client_gid: peer.map_or(0, |peer| peer.gid.as_raw()),
            client_pid,
            incarnation: 0,
        },
        vhost: Some(vhost),
    })
}
