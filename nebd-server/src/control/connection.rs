//! One connection on the client socket, and what its messages do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nebd_abi::control::{AttachFlags, DecodeError, Message};
use nebd_abi::layout::{LayoutVersion, MEMORIES_MAX, SessionId};
use nebd_abi::region::{Region, RegionError};
use nebd_abi::socket::Packet;
use nebd_abi::{Errno, VolumeName};
use nebd_backend::FdStore;
use rustix::net::UCred;
use rustix::process::PidfdFlags;

use super::{Control, Notice};
use crate::server::{AttachRequest, Origin, Server};
use crate::session::ledger::Attachment;
use crate::session::{Memories, RegisterError, Session, set_memory};

/// A client's connection.
pub struct Connection {
    socket: Arc<OwnedFd>,
    peer: UCred,
    greeted: bool,
    session: Option<SessionId>,
    /// An attach is under way: a second one would cost another worker thread.
    attaching: bool,
    /// Registered before the attach.
    memories: Memories,
}

impl Connection {
    /// An accepted, non-blocking socket.
    pub fn new(socket: OwnedFd) -> io::Result<Connection> {
        let peer = rustix::net::sockopt::socket_peercred(&socket)?;
        Ok(Connection {
            socket: Arc::new(socket),
            peer,
            greeted: false,
            session: None,
            attaching: false,
            memories: Memories::new(),
        })
    }

    /// A connection of a predecessor, which its session was attached on.
    pub fn adopted(socket: OwnedFd, session: SessionId) -> io::Result<Connection> {
        let connection = Connection::new(socket)?;
        Ok(Connection { greeted: true, session: Some(session), ..connection })
    }

    /// The socket, to be kept beside the connection.
    pub fn shared_socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The session it speaks for.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Its attach has ended: it speaks for this session from now on, or for none.
    pub fn set_session(&mut self, session: Option<SessionId>) {
        self.session = session;
        self.attaching = false;
    }

    /// Sends without waiting.
    pub fn send(&self, request: u64, message: &Message) -> io::Result<()> {
        nebd_abi::socket::send(&*self.socket, &message.encode(request), &[])
    }
}

fn failed(errno: Errno, text: impl Into<String>) -> Message {
    Message::Failed { errno, retry: false, text: text.into() }
}

/// Acts on a packet; `is_strange` if it had descriptors of a kind that no message has.
pub fn handle(control: &mut Control, key: u64, packet: Packet, is_strange: bool) {
    let (request, message) = match Message::decode(&packet.bytes) {
        Ok(decoded) => decoded,
        Err(DecodeError::Kind { kind, request }) => {
            let text = format!("this server does not know message kind {kind}");
            return control.reply(key, request, &failed(Errno::NOTSUP, text));
        }
        Err(error) => {
            tracing::warn!(%error, "a client that does not speak the protocol is disconnected");
            return control.close(key);
        }
    };
    if is_strange {
        let text = "a descriptor is neither a memfd nor an eventfd";
        return control.reply(key, request, &failed(Errno::INVAL, text));
    }
    // What a worker thread has said comes first: its `Attached` may have been read by the client,
    // and this message sent, before the control thread has heard of the session.
    control.hear();
    let Some(connection) = control.connections.get_mut(&key) else { return };
    if !connection.greeted && !matches!(message, Message::Hello { .. } | Message::Ping) {
        return control.reply(key, request, &failed(Errno::INVAL, "the first message is Hello"));
    }
    match message {
        Message::Hello { layout_min, layout_max, .. } => {
            let answer = greet(control.server.as_ref(), layout_min, layout_max);
            let greeted = matches!(answer, Message::Welcome { .. });
            if let Some(connection) = control.connections.get_mut(&key) {
                connection.greeted = greeted;
            }
            control.reply(key, request, &answer);
        }
        Message::Ping => control.reply(key, request, &Message::Done),
        Message::Attach { .. } => attach(control, key, request, message, packet.fds),
        Message::RegisterMemory { memory } => {
            let answer = register(control, key, memory, packet.fds);
            control.reply(key, request, &answer.unwrap_or_else(|failure| failure));
        }
        Message::UnregisterMemory { memory } => {
            unregister(control, key, memory);
            control.reply(key, request, &Message::Done);
        }
        Message::Info => {
            let session = connection.session.and_then(|id| control.server.session(id));
            let answer = match session {
                Some(session) => Message::Attached(session.info()),
                None => not_attached(),
            };
            control.reply(key, request, &answer);
        }
        Message::Resize { operation, size } => resize(control, key, request, operation, size),
        Message::Detach => detach(control, key, request),
        Message::Welcome { .. }
        | Message::Attached(_)
        | Message::Failed { .. }
        | Message::Done
        | Message::Event(_) => {
            control.reply(key, request, &failed(Errno::INVAL, "this message is the server's"));
        }
    }
}

fn not_attached() -> Message {
    failed(Errno(107), "this connection has no session")
}

fn greet(server: &Server, layout_min: u32, layout_max: u32) -> Message {
    let ours = LayoutVersion::CURRENT as u32;
    if !(layout_min..=layout_max).contains(&ours) {
        let text = format!(
            "the client makes region layouts {layout_min} to {layout_max}, this server knows 1 to {ours}"
        );
        return failed(Errno(93), text);
    }
    Message::Welcome {
        layout: ours,
        generation: server.tenure.generation(),
        features: 0,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn attach(control: &mut Control, key: u64, request: u64, message: Message, fds: Vec<OwnedFd>) {
    let Some(connection) = control.connections.get_mut(&key) else { return };
    let Message::Attach { session, flags, queue_count, incarnation, volume } = message else {
        return;
    };
    if connection.session.is_some() || std::mem::replace(&mut connection.attaching, true) {
        let text = format!("volume {volume}: this connection has a session already");
        return control.reply(key, request, &failed(Errno(17), text));
    }
    let socket = connection.socket.clone();
    let (peer, memories) = (connection.peer, connection.memories.clone());
    let server = control.server.clone();
    // Taken here: between this and the job's beginning nobody may find that nothing is under way.
    let pass = server.gate.enter(format!("an attach of {volume}"));
    control.server.jobs.spawn(move || {
        let _pass = pass;
        let attached = parse_fds(session, queue_count, &volume, fds).and_then(|fds| {
            let attachment = Attachment {
                major: 0,
                attach_flags: flags.0,
                client_uid: peer.uid.as_raw(),
                client_gid: peer.gid.as_raw(),
                client_pid: peer.pid.as_raw_nonzero().get() as u32,
                incarnation,
            };
            // The pid was the peer's when it connected; a client that has died since is noticed
            // by its closed socket.
            let pidfd = rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).ok();
            server
                .attach(AttachRequest {
                    origin: Origin::Client,
                    region: fds.region,
                    kicks: fds.kicks,
                    calls: fds.calls,
                    peer: pidfd,
                    ledger: None,
                    memories: memories.clone(),
                    attachment,
                    vhost: None,
                })
                .map_err(|error| Message::Failed {
                    errno: error.errno(),
                    retry: error.is_transient() && flags.contains(AttachFlags::REATTACH)
                        || error.errno() == Errno(11),
                    text: error.to_string(),
                })
        });
        let answer = match attached {
            Ok(served) => {
                adopt_memories(&server, &served, &memories);
                server.notices.send(Notice::Attached { connection: key, session });
                Message::Attached(served.info())
            }
            Err(failure) => {
                server.notices.send(Notice::Refused { connection: key });
                failure
            }
        };
        crate::failpoint!("attach-before-reply");
        if let Err(error) = nebd_abi::socket::send(&*socket, &answer.encode(request), &[]) {
            tracing::debug!(%error, %session, "the client did not wait for its answer");
        }
    });
}

/// A session that was found alive may lack memories that were registered on this connection.
fn adopt_memories(server: &Server, session: &Session, memories: &Memories) {
    let known = session.memories();
    for (id, memory) in memories.iter().enumerate() {
        let Some(memory) = memory else { continue };
        let same =
            known.get(id).and_then(Option::as_ref).is_some_and(|known| known.is_same_as(memory));
        if !same {
            let name = Session::store_name(session.id, &format!("mem{id}"));
            let store = || server.store.put(&name, memory.fd());
            if let Err(error) = session.set_memory(id as u32, Some(memory.clone()), store) {
                tracing::warn!(%error, name, "cannot store a registered memory");
            }
        }
    }
}

struct AttachFds {
    region: Arc<Region>,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
}

fn parse_fds(
    session: SessionId,
    queue_count: u32,
    volume: &VolumeName,
    fds: Vec<OwnedFd>,
) -> Result<AttachFds, Message> {
    let invalid = |what: &str| failed(Errno::INVAL, format!("volume {volume}: {what}"));
    let mut fds = fds.into_iter();
    let region = fds.next().ok_or_else(|| invalid("the region's descriptor is missing"))?;
    let region = Region::open(region).map_err(|error| invalid(&error.to_string()))?;
    if crate::server::is_own(&region) {
        return Err(invalid("the region is of a kind that only servers make"));
    }
    let params = region.params();
    if params.session != session || params.volume != *volume {
        return Err(invalid("the region belongs to another session or volume"));
    }
    if params.geometry.queue_count != queue_count || fds.len() != 2 * queue_count as usize {
        return Err(invalid("there are not two doorbells for each queue"));
    }
    let mut kicks: Vec<OwnedFd> = fds.collect();
    if !kicks.iter().all(crate::server::is_eventfd) {
        return Err(invalid("a doorbell is no eventfd"));
    }
    for doorbell in &kicks {
        crate::server::set_nonblocking(doorbell).map_err(|e| invalid(&e.to_string()))?;
    }
    let calls = kicks.split_off(queue_count as usize);
    Ok(AttachFds { region: Arc::new(region), kicks, calls })
}

fn register(
    control: &mut Control,
    key: u64,
    id: u32,
    fds: Vec<OwnedFd>,
) -> Result<Message, Message> {
    let mut fds = fds.into_iter();
    let (Some(fd), None) = (fds.next(), fds.next()) else {
        return Err(failed(Errno::INVAL, "a memory comes with one descriptor"));
    };
    if id == 0 || id > MEMORIES_MAX {
        return Err(failed(Errno::INVAL, format!("memory ids run from 1 to {MEMORIES_MAX}")));
    }
    let Some(connection) = control.connections.get(&key) else { return Ok(Message::Done) };
    let memory = control.server.memory_quota.map(fd, connection.peer.uid.as_raw());
    let memory = memory.map_err(|error| Message::Failed {
        errno: match &error {
            RegisterError::Quota { .. } => Errno(122),
            // What the system refuses today it may grant tomorrow.
            RegisterError::Region(RegionError::System { .. }) => Errno(12),
            RegisterError::Region(_) => Errno::INVAL,
        },
        retry: false,
        text: format!("memory {id}: {error}"),
    })?;
    if let Err(error) = memory.advise(rustix::mm::Advice::LinuxDontDump) {
        tracing::warn!(%error, "registered memory will be part of core dumps");
    }
    let memory = Arc::new(memory);
    let Some(connection) = control.connections.get_mut(&key) else { return Ok(Message::Done) };
    match connection.session {
        None => set_memory(&mut connection.memories, id, Some(memory)),
        Some(session) => {
            let session = control.server.session(session).ok_or_else(not_attached)?;
            let name = Session::store_name(session.id, &format!("mem{id}"));
            let store = || control.server.store.put(&name, memory.fd());
            let known = session
                .set_memory(id, Some(memory.clone()), store)
                .map_err(|error| failed(Errno::from_io(&error), format!("memory {id}: {error}")))?;
            if !known {
                return Err(not_attached());
            }
        }
    }
    Ok(Message::Done)
}

fn unregister(control: &mut Control, key: u64, id: u32) {
    let Some(connection) = control.connections.get_mut(&key) else { return };
    set_memory(&mut connection.memories, id, None);
    let session = connection.session.and_then(|id| control.server.session(id));
    if let Some(session) = session {
        let name = Session::store_name(session.id, &format!("mem{id}"));
        let store = || control.server.store.remove(&name);
        if let Err(error) = session.set_memory(id, None, store) {
            tracing::warn!(%error, name, "cannot remove a registered memory from the store");
        }
    }
}

fn resize(control: &mut Control, key: u64, request: u64, operation: [u8; 16], size: u64) {
    let Some(connection) = control.connections.get(&key) else { return };
    let Some(session) = connection.session.and_then(|id| control.server.session(id)) else {
        return control.reply(key, request, &not_attached());
    };
    let (socket, server) = (connection.socket.clone(), control.server.clone());
    let pass = server.gate.enter(format!("a resize of {}", session.volume.name));
    control.server.jobs.spawn(move || {
        let _pass = pass;
        let answer = if session.is_read_only() {
            let text = format!("volume {} is attached read-only", session.volume.name);
            failed(Errno::ROFS, text)
        } else {
            match server.resize(&session.volume.name, &operation, size, true) {
                Ok(_) => Message::Attached(session.info()),
                Err(error) => failed(error.errno(), error.to_string()),
            }
        };
        let _ = nebd_abi::socket::send(&*socket, &answer.encode(request), &[]);
    });
}

fn detach(control: &mut Control, key: u64, request: u64) {
    let Some(connection) = control.connections.get(&key) else { return };
    match connection.session {
        Some(id) if control.server.session(id).is_some() => {
            control.detaching.insert(id, (key, request));
            // Its answer is this server's to give; a successor would not know of it.
            control.server.speakers().remove(&id);
            control.server.end_session(id);
        }
        _ => {
            // A client that gave up waiting for its attach: the session ends as soon as it begins.
            if connection.attaching {
                control.abandoned.insert(key);
            }
            control.reply(key, request, &Message::Done);
        }
    }
}
