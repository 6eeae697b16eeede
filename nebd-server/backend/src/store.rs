//! Where descriptors outlive the process.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The descriptor store of the keeper or of the service manager, as backends see it.
///
/// Names are of letters, digits, `.`, `_` and `-`, at most 200 bytes, one descriptor a name.
pub trait FdStore: Send + Sync {
    /// Keeps a duplicate of `fd` under `name`, in place of any it kept before. Held for certain
    /// only after [`barrier`](Self::barrier).
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Forgets `name`; no error if there is none.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Returns once everything put before is held.
    fn barrier(&self) -> io::Result<()>;

    /// A duplicate of what is kept under `name`, from this process's start or since.
    fn fetch(&self, name: &str) -> Option<OwnedFd>;

    /// Names that start with `prefix`.
    fn names(&self, prefix: &str) -> Vec<String>;

    /// Whether descriptors really outlive the process.
    fn is_durable(&self) -> bool;
}

/// No store: nothing outlives the process. Descriptors are kept within it all the same.
#[derive(Debug, Default)]
pub struct NoStore(std::sync::Mutex<std::collections::BTreeMap<String, OwnedFd>>);

impl NoStore {
    fn map(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<String, OwnedFd>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl FdStore for NoStore {
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        self.map().insert(name.to_owned(), fd);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.map().remove(name);
        Ok(())
    }

    fn barrier(&self) -> io::Result<()> {
        Ok(())
    }

    fn fetch(&self, name: &str) -> Option<OwnedFd> {
        self.map().get(name)?.try_clone().ok()
    }

    fn names(&self, prefix: &str) -> Vec<String> {
        self.map().keys().filter(|name| name.starts_with(prefix)).cloned().collect()
    }

    fn is_durable(&self) -> bool {
        false
    }
}
