//! The control thread: connections of part clients, and the lives of their sessions.
//!
//! ```text
//!  connection:  accepted ─Hello─► greeted ─Attach─► (worker) ─► attached ─Detach, EOF─► closed
//!  session:     ends on Detach, on the death of the client's process, or on nonsense in its region;
//!               a closed connection alone ends nothing: the client may come back with its region
//! ```
//!
//! One epoll loop; whatever may block runs on a worker thread and answers on the connection
//! itself. Nothing a client sends, and nothing it fails to read, holds up another.

mod closer;
mod connection;
mod notice;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crossbeam::channel::Receiver;
use nebd_abi::Errno;
use nebd_abi::control::{Event, Message};
use nebd_abi::layout::{ServerState, SessionId};
use rustix::event::epoll;
use rustix::net::SocketFlags;

use crate::server::Server;
use crate::session::Session;
use crate::shard::{Command, ShardEvent};
use crate::vhost::Hypervisors;
use closer::Closer;
pub(crate) use closer::closes_at_once;
use connection::Connection;
pub use notice::{Notice, NoticeSink, doorbell};

const LISTENER: u64 = 0;
const DOORBELL: u64 = 1;
const PROBE: u64 = 2;
const FRONTENDS: u64 = 3;
/// Keys of connections have this bit, keys of client processes have not.
const CONNECTION: u64 = 1 << 63;
/// Keys of hypervisors' connections.
const HYPERVISOR: u64 = 1 << 62;
/// Connections at most; a client needs one for each session.
const CONNECTIONS_MAX: usize = 8192;

/// Descriptors and channels that the control thread listens to.
pub struct ControlInputs {
    /// The client socket.
    pub listener: OwnedFd,
    /// Rung for each notice and shard event.
    pub doorbell: Arc<OwnedFd>,
    /// Notices of worker threads.
    pub notices: Receiver<Notice>,
    /// Events of shards.
    pub shard_events: Receiver<ShardEvent>,
    /// Rung by the keeper when it wants a sign of life.
    pub probe: Option<OwnedFd>,
}

/// The control thread's state.
pub struct Control {
    pub(crate) server: Arc<Server>,
    inputs: ControlInputs,
    epoll: OwnedFd,
    next_key: u64,
    connections: HashMap<u64, Connection>,
    /// The connection that speaks for a session.
    speakers: HashMap<SessionId, u64>,
    /// Client processes that are watched.
    peers: HashMap<u64, (SessionId, OwnedFd)>,
    /// Who waits for the end of a session: connection and request.
    detaching: HashMap<SessionId, (u64, u64)>,
    closer: Closer,
    /// Connections that sent Detach while their attach was still under way.
    abandoned: HashSet<u64>,
    pub(crate) hypervisors: Hypervisors,
}

impl Control {
    /// Ready to run.
    pub fn new(server: Arc<Server>, inputs: ControlInputs) -> io::Result<Control> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = rustix::fs::fcntl_getfl(&inputs.listener)?;
        rustix::fs::fcntl_setfl(&inputs.listener, flags | rustix::fs::OFlags::NONBLOCK)?;
        let watch = |fd: &OwnedFd, key, flags| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(key), epoll::EventFlags::IN | flags)
        };
        watch(&inputs.listener, LISTENER, epoll::EventFlags::empty())?;
        watch(&inputs.doorbell, DOORBELL, epoll::EventFlags::ET)?;
        let data = epoll::EventData::new_u64(FRONTENDS);
        epoll::add(&epoll, server.frontends.ready_fd(), data, epoll::EventFlags::IN)?;
        if let Some(probe) = &inputs.probe {
            watch(probe, PROBE, epoll::EventFlags::ET)?;
        }
        Ok(Control {
            server,
            inputs,
            epoll,
            next_key: 16,
            connections: HashMap::new(),
            speakers: HashMap::new(),
            peers: HashMap::new(),
            detaching: HashMap::new(),
            closer: Closer::start()?,
            abandoned: HashSet::new(),
            hypervisors: Hypervisors::default(),
        })
    }

    /// Runs until the process ends.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let server = self.server.clone();
            let _pass = server.gate.enter("a client's message");
            if events.iter().any(|event| event.data.u64() != PROBE) {
                self.server.work_sign.note();
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    DOORBELL => {}
                    PROBE => self.show_life(),
                    FRONTENDS => crate::frontend::accept(&mut self),
                    key if key & CONNECTION != 0 => self.receive(key),
                    key if key & HYPERVISOR != 0 => self.hypervisor_says(key),
                    key => self.peer_died(key),
                }
            }
            self.hear();
        }
    }

    pub(crate) fn server(&self) -> &Arc<Server> {
        &self.server
    }

    fn show_life(&self) {
        // Whatever else has come is noted already.
        self.server.work_sign.pong(0, false);
        for shard in &self.server.shards {
            shard.send(Command::Probe);
        }
    }

    fn new_key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    pub(crate) fn new_hypervisor_key(&mut self) -> u64 {
        self.new_key() | HYPERVISOR
    }

    pub(crate) fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// Descriptors that belong to no message.
    pub(crate) fn close_strays(&self, strays: Vec<OwnedFd>) {
        strays.into_iter().for_each(|fd| self.closer.close(fd));
    }

    /// Whether such descriptors wait to be closed, many of them.
    pub(crate) fn is_closer_held_up(&self) -> bool {
        self.closer.is_held_up()
    }

    fn accept(&mut self) {
        // One for each event: the listener is level-triggered, and other work gets its turn.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::accept_with(&self.inputs.listener, flags) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                tracing::error!("no descriptors left: a client cannot be accepted for now");
                std::thread::sleep(std::time::Duration::from_millis(10));
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                return;
            }
        };
        if self.connections.len() >= CONNECTIONS_MAX {
            tracing::error!("{CONNECTIONS_MAX} connections: a client is turned away");
            return;
        }
        let key = self.new_key() | CONNECTION;
        match Connection::new(socket) {
            Ok(connection) => {
                let data = epoll::EventData::new_u64(key);
                if epoll::add(&self.epoll, connection.socket(), data, epoll::EventFlags::IN).is_ok()
                {
                    self.connections.insert(key, connection);
                }
            }
            Err(error) => tracing::warn!(%error, "a client without credentials"),
        }
    }

    /// Goes on with connections of a predecessor.
    pub fn adopt(&mut self, connections: Vec<(SessionId, OwnedFd)>) {
        for (session, socket) in connections {
            let key = self.new_key() | CONNECTION;
            let Ok(connection) = Connection::adopted(socket, session) else { continue };
            let data = epoll::EventData::new_u64(key);
            if epoll::add(&self.epoll, connection.socket(), data, epoll::EventFlags::IN).is_ok() {
                self.server.speakers().insert(session, connection.shared_socket());
                self.speakers.insert(session, key);
                self.connections.insert(key, connection);
            }
        }
    }

    fn receive(&mut self, key: u64) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match nebd_abi::socket::receive_from_stranger(connection.socket()) {
            Ok(Some(mut packet)) => {
                let is_strange = self.closer.take_strange(&mut packet);
                if packet.is_cut_off || is_strange && self.closer.is_held_up() {
                    tracing::warn!("a client that sends what no message has is disconnected");
                    return self.close(key);
                }
                connection::handle(self, key, packet, is_strange);
            }
            Ok(None) => self.close(key),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // A client that closed with our answer unread: told once, ahead of the packets it sent
            // before (its Detach, for one). They come next, and then the end.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => {
                tracing::debug!(%error, "connection lost");
                self.close(key);
            }
        }
    }

    fn close(&mut self, key: u64) {
        let Some(connection) = self.connections.remove(&key) else { return };
        let _ = epoll::delete(&self.epoll, connection.socket().as_fd());
        if let Some(session) = connection.session() {
            if self.speakers.get(&session) == Some(&key) {
                self.speakers.remove(&session);
                self.server.speakers().remove(&session);
                if let Some(session) = self.server.session(session) {
                    session.set_connected(false);
                }
            }
            // Without its process's pidfd there is no other sign that a client is gone for good.
            if self.server.session(session).is_some_and(|session| session.peer.is_none()) {
                self.server.end_session(session);
            }
        }
    }

    /// Answers a request; a client that does not read loses its connection, not our time.
    fn reply(&mut self, key: u64, request: u64, message: &Message) {
        let Some(connection) = self.connections.get(&key) else { return };
        if connection.send(request, message).is_err() {
            self.close(key);
        }
    }

    fn tell(&mut self, session: SessionId, event: Event) {
        if let Some(&key) = self.speakers.get(&session) {
            self.reply(key, 0, &Message::Event(event));
        }
    }

    fn peer_died(&mut self, key: u64) {
        let Some((session, pidfd)) = self.peers.remove(&key) else { return };
        let _ = epoll::delete(&self.epoll, pidfd.as_fd());
        tracing::info!(%session, "the client's process has ended");
        self.server.end_session(session);
    }

    fn watch_peer(&mut self, session: &Session) {
        let Some(peer) = session.peer.as_ref().and_then(|peer| peer.try_clone().ok()) else {
            return;
        };
        let key = self.new_key();
        let data = epoll::EventData::new_u64(key);
        match epoll::add(&self.epoll, &peer, data, epoll::EventFlags::IN) {
            Ok(()) => _ = self.peers.insert(key, (session.id, peer)),
            Err(error) => tracing::warn!(%error, "cannot watch a client's process"),
        }
    }

    fn unwatch_peer(&mut self, session: SessionId) {
        let key = self.peers.iter().find(|(_, (id, _))| *id == session).map(|(key, _)| *key);
        if let Some((_, pidfd)) = key.and_then(|key| self.peers.remove(&key)) {
            let _ = epoll::delete(&self.epoll, pidfd.as_fd());
        }
    }

    /// Takes what worker threads and shards have to say.
    fn hear(&mut self) {
        while let Ok(notice) = self.inputs.notices.try_recv() {
            self.notice(notice);
        }
        while let Ok(event) = self.inputs.shard_events.try_recv() {
            match event {
                ShardEvent::Violation(session, violation) => self.violation(session, violation),
                ShardEvent::Virt(event) => self.hear_ring(event),
                ShardEvent::SuspectAnswered(session) => self.server.suspect_answered(session),
                ShardEvent::Drained(session) => {
                    let server = self.server.clone();
                    let pass = server.gate.enter("the end of a session");
                    self.server.jobs.spawn(move || {
                        let _pass = pass;
                        if server.queue_drained(session) {
                            server.notices.send(Notice::Ended(session));
                        }
                    });
                }
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Live(session) => {
                session.set_connected(self.speakers.contains_key(&session.id));
                self.watch_peer(&session);
            }
            Notice::Hypervisor(hypervisor, session) => self.adopt_hypervisor(hypervisor, session),
            Notice::Attached { connection, session } => {
                if self.abandoned.remove(&connection) {
                    self.server.end_session(session);
                } else if let Some(known) = self.connections.get_mut(&connection) {
                    known.set_session(Some(session));
                    self.server.speakers().insert(session, known.shared_socket());
                    self.speakers.insert(session, connection);
                    if let Some(session) = self.server.session(session) {
                        session.set_connected(true);
                    }
                } else if self.server.session(session).is_some_and(|s| s.peer.is_none()) {
                    // The client has gone while its volume was being opened.
                    self.server.end_session(session);
                }
            }
            Notice::Refused { connection } => {
                self.abandoned.remove(&connection);
                if let Some(connection) = self.connections.get_mut(&connection) {
                    connection.set_session(None);
                }
            }
            Notice::Parked(session, parked) => {
                self.tell(session, if parked { Event::Parked } else { Event::Unparked });
            }
            Notice::Resized(session, size) => {
                self.hypervisor_resized(session, size);
                self.tell(session, Event::Resized(size));
            }
            Notice::Detached(attachment) => crate::frontend::end(self, &attachment),
            Notice::Ended(session) => {
                self.hypervisor_ended(session);
                self.unwatch_peer(session);
                if let Some((key, request)) = self.detaching.remove(&session) {
                    self.reply(key, request, &Message::Done);
                }
                self.server.speakers().remove(&session);
                let speaker = self.speakers.remove(&session);
                if let Some(speaker) = speaker.and_then(|key| self.connections.get_mut(&key)) {
                    speaker.set_session(None);
                }
            }
        }
    }

    fn violation(&mut self, id: SessionId, violation: nebd_abi::ring::RingViolation) {
        let Some(session) = self.server.session(id) else { return };
        tracing::warn!(
            session = %id, volume = %session.volume.name, client_pid = session.region.params().client_pid,
            %violation, "session detached: its client broke the rules of the ring"
        );
        session.publish_state(ServerState::Detached);
        self.tell(id, Event::Detached(Errno::INVAL));
        self.server.end_session(id);
    }
}
