//! Frontends: volumes for hypervisors that do not have nebd's library.
//!
//! ```text
//!  attach:  record ─► listener bound, in the descriptor store ─► watched
//!  start:   for each record the stored listener, or one made anew ─► watched
//!  detach:  connections ended ─► listener out of the store, unlinked ─► record removed
//! ```
//!
//! A listening socket lives in the descriptor store as `a.<k>`: whoever connects while no server
//! runs waits in its backlog. Listeners are watched by an epoll of their own, which the control
//! thread watches; that one accepts, and gives the connection to the frontend of its kind.

mod attachment;
mod listener;
mod nbd;
mod operator;
#[cfg(test)]
mod tests;
mod vhost;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::VolumeName;
use nebd_backend::FdStore;
use rustix::event::{Timespec, epoll};
use rustix::net::SocketFlags;

use crate::config::{Config, ConfigError};
use crate::control::Control;
use crate::fd_store::ServerStore;
use crate::registry::{AttachmentKey, AttachmentKind, AttachmentRecord};
use crate::server::Server;
pub use attachment::{Attachment, Connected};
pub use listener::ListenError;
use listener::Listener;

/// Names of listeners in the descriptor store: this, and a number.
const STORE_PREFIX: &str = "a.";
/// Connections that are accepted before other work of the control thread has its turn.
const ACCEPTED_AT_ONCE: usize = 16;
/// A pause if no descriptors are left, so that the control thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Where sockets are made, and who may connect.
#[derive(Clone, Debug)]
pub struct Places {
    /// Of the client socket; absolute.
    dir: PathBuf,
    mode: u32,
    gid: Option<u32>,
}

impl Places {
    /// As configured.
    pub fn of(config: &Config) -> Result<Places, ConfigError> {
        let socket = std::path::absolute(&config.socket).unwrap_or_else(|_| config.socket.clone());
        let dir = socket.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Places { dir, mode: config.socket_mode()?, gid: config.access.gid })
    }

    /// Where an attachment is if nobody says otherwise.
    fn default_socket(&self, volume: &VolumeName, kind: AttachmentKind) -> PathBuf {
        match kind {
            AttachmentKind::VhostUser => {
                let file = format!("{}-{}.sock", volume.backend(), volume.name());
                self.dir.join("vhost-user").join(file)
            }
            AttachmentKind::Nbd => self.dir.join("nbd.sock"),
        }
    }
}

/// Attachments and their listeners.
pub struct Frontends {
    places: Places,
    epoll: OwnedFd,
    state: Mutex<State>,
    /// Attaching, detaching: one at a time.
    turn: Mutex<()>,
}

#[derive(Default)]
struct State {
    attachments: BTreeMap<AttachmentKey, Arc<Attachment>>,
    listeners: BTreeMap<u64, Listener>,
    /// Why there is none.
    problems: BTreeMap<PathBuf, String>,
    /// Volumes that are being deleted.
    deletions: BTreeSet<VolumeName>,
}

impl State {
    fn listener_at(&self, path: &Path) -> Option<(u64, &Listener)> {
        let mut listeners = self.listeners.iter();
        listeners.find(|(_, listener)| listener.path == path).map(|(key, found)| (*key, found))
    }
}

impl Frontends {
    /// None yet.
    pub fn new(places: Places) -> io::Result<Frontends> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Frontends { places, epoll, state: Mutex::default(), turn: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable while somebody waits to be accepted.
    pub fn ready_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The attachment with this key, if there is one.
    pub fn attachment(&self, key: &AttachmentKey) -> Option<Arc<Attachment>> {
        self.state().attachments.get(key).cloned()
    }

    /// The attachments at this socket, by volume; none that is being detached.
    pub fn attachments_at(&self, socket: &Path) -> Vec<Arc<Attachment>> {
        let state = self.state();
        let here = state
            .attachments
            .values()
            .filter(|attachment| attachment.record.socket == socket && !attachment.is_ending());
        here.cloned().collect()
    }

    /// Every attachment of the registry: for a server that has become the owner, before it resumes
    /// sessions.
    pub(crate) fn load(&self, server: &Server) {
        let mut state = self.state();
        for (key, record) in server.registry.attachments() {
            let volume = server.registry.record(&key.0);
            if volume.is_none_or(|volume| volume.birth != record.volume_birth) {
                tracing::error!(volume = %key.0, kind = %key.1, "the attached volume is gone");
                continue;
            }
            let attachment = || Arc::new(Attachment::new(key.0.clone(), record));
            state.attachments.entry(key.clone()).or_insert_with(attachment);
        }
    }

    /// Listens for every attachment: at the stored sockets, or at new ones. One that cannot be made
    /// is told to whoever lists the attachments, and holds up no other.
    pub(crate) fn open(&self, store: &ServerStore) {
        let mut stored = stored_listeners(store);
        let wanted: BTreeSet<PathBuf> =
            self.state().attachments.values().map(|known| known.record.socket.clone()).collect();
        for path in wanted {
            // A path that is gone, or something else now, leads nobody to its socket.
            let exists =
                std::fs::symlink_metadata(&path).is_ok_and(|found| found.file_type().is_socket());
            let listening = match stored.entry(path.clone()) {
                Entry::Occupied(found) if exists => self.watch(found.remove()),
                _ => self.listen(store, &path),
            };
            if let Err(error) = listening {
                tracing::error!(%error, "an attachment cannot be reached");
                self.state().problems.insert(path, error.to_string());
            }
        }
        for (path, listener) in stored {
            tracing::warn!(path = %path.display(), "a socket that leads nowhere is closed");
            listener.forget(store);
        }
    }

    /// Makes a listener, stores it, and watches it.
    fn listen(&self, store: &ServerStore, path: &Path) -> Result<(), ListenError> {
        let socket = listener::bind(path, self.places.mode, self.places.gid)?;
        let is_free = |k: &u64| !store.holds(&format!("{STORE_PREFIX}{k}"));
        let number = (0..).find(is_free).unwrap_or(u64::MAX);
        let listener = Listener::new(format!("{STORE_PREFIX}{number}"), socket, path);
        let name = listener.name.clone();
        let kept = store.put(&name, listener.socket.as_fd());
        let listening =
            kept.map_err(ListenError::system("store", path)).and_then(|()| self.watch(listener));
        if listening.is_err() {
            let _ = store.remove(&name);
            listener::unlink(path);
        }
        listening
    }

    fn watch(&self, listener: Listener) -> Result<(), ListenError> {
        let mut state = self.state();
        let key = state.listeners.last_key_value().map_or(0, |(key, _)| key + 1);
        let data = epoll::EventData::new_u64(key);
        epoll::add(&self.epoll, &listener.socket, data, epoll::EventFlags::IN)
            .map_err(ListenError::system("watch", &listener.path))?;
        state.problems.remove(&listener.path);
        state.listeners.insert(key, listener);
        Ok(())
    }

    /// Ends the listener at this path.
    fn close(&self, store: &ServerStore, path: &Path) {
        let mut state = self.state();
        state.problems.remove(path);
        let key = state.listener_at(path).map(|(key, _)| key);
        let Some(listener) = key.and_then(|key| state.listeners.remove(&key)) else { return };
        let _ = epoll::delete(&self.epoll, &listener.socket);
        listener.forget(store);
        // First nobody listens, then nobody finds it: another may take its place at once.
        drop(listener);
        listener::unlink(path);
    }

    /// Listeners at which somebody waits.
    fn ready(&self) -> Vec<(PathBuf, Arc<OwnedFd>)> {
        let mut events = Vec::with_capacity(ACCEPTED_AT_ONCE);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spare = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.epoll, spare, Some(&now)).is_err() {
            return Vec::new();
        }
        let state = self.state();
        let keys = events.iter().map(|event| event.data.u64());
        let listeners = keys.filter_map(|key| state.listeners.get(&key));
        listeners.map(|listener| (listener.path.clone(), listener.socket.clone())).collect()
    }
}

/// By path.
fn stored_listeners(store: &ServerStore) -> BTreeMap<PathBuf, Listener> {
    let mut stored = BTreeMap::new();
    for name in store.names(STORE_PREFIX) {
        let Some(socket) = store.fetch(&name) else { continue };
        match Listener::stored(name.clone(), socket) {
            Ok(listener) => _ = stored.insert(listener.path.clone(), listener),
            Err(error) => tracing::warn!(name, %error, "a stored socket cannot be used"),
        }
    }
    stored
}

/// Accepts one connection at each listener where somebody waits.
pub(crate) fn accept(control: &mut Control) {
    let server = control.server().clone();
    for (path, socket) in server.frontends.ready() {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connection = match rustix::net::accept_with(&socket, flags) {
            Ok(connection) => connection,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                tracing::error!("no descriptors left: a hypervisor cannot be accepted for now");
                std::thread::sleep(ACCEPT_PAUSE);
                return;
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "accept failed");
                continue;
            }
        };
        let attachments = server.frontends.attachments_at(&path);
        match attachments.first().map(|attachment| (attachment.kind(), attachment)) {
            Some((AttachmentKind::VhostUser, attachment)) => {
                if !permits(&server, attachment, &connection) {
                    continue;
                }
                vhost::accept(control, attachment, connection);
            }
            Some((AttachmentKind::Nbd, _)) => nbd::accept(control, &path, connection),
            // It was detached meanwhile.
            None => {}
        }
    }
}

/// Whether the volume's owner and mode let this peer have it, as they would let it attach the volume.
fn permits(server: &Server, attachment: &Attachment, connection: &OwnedFd) -> bool {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(connection) else { return false };
    let (uid, gid) = (peer.uid.as_raw(), peer.gid.as_raw());
    let volume = server.registry.record(&attachment.volume);
    let is_permitted =
        volume.is_some_and(|volume| volume.permits(uid, gid, !attachment.record.read_only));
    if !is_permitted {
        tracing::warn!(volume = %attachment.volume, uid, "a hypervisor may not have this volume");
    }
    is_permitted
}

/// Ends the connections of an attachment that is being detached.
pub(crate) fn end(control: &mut Control, attachment: &Arc<Attachment>) {
    match attachment.kind() {
        AttachmentKind::VhostUser => vhost::end(control, attachment),
        AttachmentKind::Nbd => nbd::end(control, attachment),
    }
}
