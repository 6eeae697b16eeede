//! The descriptor store, as backends and sessions see it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nebd_backend::FdStore;
use nebd_keeper::notify::Notifier;

/// Longest wait for the keeper to confirm that it holds what it was given.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between attempts while there is no keeper.
const ORPHAN_PAUSE: Duration = Duration::from_millis(20);

/// Bytes of all names in a service manager's store, separators included. They are passed in one
/// environment variable, and execve refuses one of 128 KiB: the successor could not start at all.
/// The rest is for the names of what is not in this store.
const NAMES_BYTES_MAX: usize = 120 << 10;

fn is_orphaned(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected, NotFound};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected | NotFound
    )
}

/// Without a keeper a change is kept here; the next keeper is sent all there is.
fn unless_orphaned(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_orphaned(&error) => {
            tracing::warn!(%error, "no keeper; the next one will be told");
            Ok(())
        }
        result => result,
    }
}

/// What this process holds, mirrored at the keeper (or service manager) if there is one.
pub struct ServerStore {
    held: Mutex<BTreeMap<String, OwnedFd>>,
    notifier: Option<Arc<Notifier>>,
    /// Names that changed since somebody began to ask.
    journal: Mutex<Option<BTreeSet<String>>>,
}

impl ServerStore {
    /// A store that starts with what was inherited.
    pub fn new(
        inherited: BTreeMap<String, OwnedFd>,
        notifier: Option<Arc<Notifier>>,
    ) -> ServerStore {
        ServerStore { held: Mutex::new(inherited), notifier, journal: Mutex::new(None) }
    }

    fn note(&self, name: &str) {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(journal) = &mut *journal {
            journal.insert(name.to_owned());
        }
    }

    /// The names that changed since the last call, which was the first if there is no answer. From
    /// now on changes are noted.
    pub fn changes(&self) -> Option<BTreeSet<String>> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.replace(BTreeSet::new())
    }

    /// Changes are noted no longer.
    pub fn forget_changes(&self) {
        *self.journal.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether it holds something of this name.
    pub fn holds(&self, name: &str) -> bool {
        self.held().contains_key(name)
    }

    /// Holds what a predecessor hands over; the keeper has it already.
    pub fn adopt(&self, name: String, fd: OwnedFd) {
        self.held().insert(name, fd);
    }

    /// Lets go of what a predecessor has removed.
    pub fn disown(&self, name: &str) {
        self.held().remove(name);
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes every name that starts with `prefix`.
    pub fn remove_all(&self, prefix: &str) {
        for name in self.names(prefix) {
            if let Err(error) = self.remove(&name) {
                tracing::warn!(name, %error, "cannot remove a stored descriptor");
            }
        }
    }

    /// Shows everything held, while nothing can change.
    pub fn each(
        &self,
        send: &mut dyn FnMut(&str, BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.held().iter().try_for_each(|(name, fd)| send(name, fd.as_fd()))
    }
}

impl FdStore for ServerStore {
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let duplicate = fd.try_clone_to_owned()?;
        // The lock is kept over the send, so that the keeper hears of changes in their order. Held
        // first, sent second: whatever a dying keeper missed is sent again to the next one.
        let mut held = self.held();
        let is_bounded = self.notifier.as_ref().is_some_and(|notifier| !notifier.is_keeper());
        if is_bounded && !held.contains_key(name) {
            let bytes: usize = held.keys().map(|name| name.len() + 1).sum();
            if bytes + name.len() >= NAMES_BYTES_MAX {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        held.insert(name.to_owned(), duplicate);
        self.note(name);
        match &self.notifier {
            Some(notifier) => unless_orphaned(notifier.store(name, fd)),
            None => Ok(()),
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut held = self.held();
        self.note(name);
        match (held.remove(name), &self.notifier) {
            (Some(_), Some(notifier)) => unless_orphaned(notifier.remove(name)),
            _ => Ok(()),
        }
    }

    fn barrier(&self) -> io::Result<()> {
        let Some(notifier) = &self.notifier else { return Ok(()) };
        let deadline = Instant::now() + BARRIER_TIMEOUT;
        loop {
            match notifier.barrier(BARRIER_TIMEOUT) {
                // The keeper died; its successor will be sent everything.
                Err(error) if is_orphaned(&error) && Instant::now() < deadline => {
                    std::thread::sleep(ORPHAN_PAUSE);
                }
                result => return result,
            }
        }
    }

    fn fetch(&self, name: &str) -> Option<OwnedFd> {
        self.held().get(name)?.try_clone().ok()
    }

    fn names(&self, prefix: &str) -> Vec<String> {
        let held = self.held();
        held.range(prefix.to_owned()..)
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(prefix))
            .cloned()
            .collect()
    }

    fn is_durable(&self) -> bool {
        self.notifier.is_some()
    }
}
