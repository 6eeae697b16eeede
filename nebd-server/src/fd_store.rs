//! The descriptor store, as backends and sessions see it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_backend::FdStore;
use nebd_keeper::notify::Notifier;

/// Longest wait for the keeper to confirm that it holds what it was given.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(30);

/// What this process holds, mirrored at the keeper (or service manager) if there is one.
pub struct ServerStore {
    held: Mutex<BTreeMap<String, OwnedFd>>,
    notifier: Option<Arc<Notifier>>,
}

impl ServerStore {
    /// A store that starts with what was inherited.
    pub fn new(
        inherited: BTreeMap<String, OwnedFd>,
        notifier: Option<Arc<Notifier>>,
    ) -> ServerStore {
        ServerStore { held: Mutex::new(inherited), notifier }
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
        // The lock is kept over the send, so that the keeper hears of changes in their order.
        let mut held = self.held();
        if let Some(notifier) = &self.notifier {
            notifier.store(name, duplicate.as_fd())?;
        }
        held.insert(name.to_owned(), duplicate);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut held = self.held();
        if held.remove(name).is_some() {
            if let Some(notifier) = &self.notifier {
                notifier.remove(name)?;
            }
        }
        Ok(())
    }

    fn barrier(&self) -> io::Result<()> {
        self.notifier.as_ref().map_or(Ok(()), |notifier| notifier.barrier(BARRIER_TIMEOUT))
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
