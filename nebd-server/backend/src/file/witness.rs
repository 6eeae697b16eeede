//! Descriptors of a volume's file that were opened while it had no error that anyone had been told
//! of, and that were never synced. See [`super::syncs`] for what they are for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nebd_abi::Generation;
use rustix::fs::SeekFrom;

use super::system::Identity;
use crate::FdStore;

/// How many a volume keeps: as many deaths in a row may fall between using one and replacing it.
pub(super) const WITNESSES: usize = 8;

/// The file offset of a witness that was, or is about to be, synced.
const USED: u64 = 1;

/// The witnesses of one volume, `w.<name>.<k>` in the store.
///
/// `k` is hexadecimal, the server's generation above a count: names of different servers differ, so
/// that a message of a dead one that arrives late cannot touch what its successor stored.
///
/// One that was used has its file offset at [`USED`]: that is the description's, which the store
/// shares, so that a successor knows of it whether or not the store has heard of it.
pub(super) struct Witnesses {
    store: Arc<dyn FdStore>,
    prefix: String,
    path: PathBuf,
    identity: Identity,
    generation: Generation,
    count: AtomicU64,
}

impl Witnesses {
    pub(super) fn new(
        store: Arc<dyn FdStore>,
        name: &str,
        path: PathBuf,
        identity: Identity,
        generation: Generation,
    ) -> Witnesses {
        let prefix = prefix(name);
        Witnesses { store, prefix, path, identity, generation, count: AtomicU64::new(0) }
    }

    /// Names in the store, oldest first.
    pub(super) fn names(&self) -> Vec<String> {
        names(&*self.store, &self.prefix)
    }

    /// Whether the stored witness of this name is of this very file. One that cannot be had (no
    /// descriptor is free) is not held against it.
    pub(super) fn is_of_this_file(&self, name: &str) -> bool {
        self.store.fetch(name).is_none_or(|fd| is_of(fd, self.identity))
    }

    /// New ones, not stored yet.
    pub(super) fn open(&self, count: usize) -> io::Result<Vec<File>> {
        let open = |_| {
            let file = OpenOptions::new().read(true).open(&self.path)?;
            if Identity::of(&file)? != self.identity {
                return Err(io::Error::from_raw_os_error(libc::ESTALE));
            }
            Ok(file)
        };
        (0..count).map(open).collect()
    }

    /// Stores them, and returns once the store holds them.
    pub(super) fn keep(&self, files: &[File]) -> io::Result<()> {
        self.put(files)?;
        self.store.barrier()
    }

    /// Sends them to the store.
    pub(super) fn put(&self, files: &[File]) -> io::Result<()> {
        let present = self.names();
        for file in files {
            let name = loop {
                let count = self.count.fetch_add(1, Relaxed) & 0xFF;
                let k = u64::from(self.generation.0) << 8 | count;
                let name = format!("{}{k:x}", self.prefix);
                if !present.contains(&name) {
                    break name;
                }
            };
            self.store.put(&name, file.as_fd())?;
        }
        Ok(())
    }

    /// How many of the stored ones were not used.
    pub(super) fn unused(&self) -> usize {
        let is_unused = |name: &String| {
            self.store.fetch(name).is_none_or(|fd| rustix::fs::tell(&fd) != Ok(USED))
        };
        self.names().iter().filter(|name| is_unused(name)).count()
    }

    /// Takes the oldest that was not used. Once this returned it, no successor will use it. The
    /// store is not waited for.
    pub(super) fn take_oldest(&self) -> io::Result<Option<OwnedFd>> {
        for name in self.names() {
            // It is there; that we cannot have it (no descriptor is free) is no reason to spend it.
            let fd = self.store.fetch(&name).ok_or(io::Error::from_raw_os_error(libc::EMFILE))?;
            let is_used = rustix::fs::tell(&fd)? == USED;
            rustix::fs::seek(&fd, SeekFrom::Start(USED))?;
            if let Err(error) = self.store.remove(&name) {
                // The mark is enough.
                tracing::warn!(name, %error, "cannot remove a used flush witness from the store");
            }
            if !is_used {
                return Ok(Some(fd));
            }
        }
        Ok(None)
    }

    /// Forgets these.
    pub(super) fn remove(&self, names: &[String]) -> io::Result<()> {
        names.iter().try_for_each(|name| self.store.remove(name))
    }
}

fn is_of(fd: OwnedFd, file: Identity) -> bool {
    Identity::of(fd).is_ok_and(|identity| identity == file)
}

/// Names of the stored witnesses of a volume that are of this file. Looking at each is most of what
/// an open costs, and it stays true for as long as the volume is of this file.
pub(super) fn known(store: &dyn FdStore, name: &str, file: Identity) -> Vec<String> {
    let is_known = |name: &String| store.fetch(name).is_some_and(|fd| is_of(fd, file));
    names(store, &prefix(name)).into_iter().filter(is_known).collect()
}

fn prefix(name: &str) -> String {
    format!("w.{name}.")
}

/// The volume `a` has the prefix `w.a.`, which the witnesses of a volume `a.b` have too; what
/// follows must be a number.
fn names(store: &dyn FdStore, prefix: &str) -> Vec<String> {
    let number = |name: &str| u64::from_str_radix(name.strip_prefix(prefix)?, 16).ok();
    let mut names: Vec<_> =
        store.names(prefix).into_iter().filter_map(|name| Some((number(&name)?, name))).collect();
    names.sort();
    names.into_iter().map(|(_, name)| name).collect()
}

/// Forgets all witnesses of a volume that is deleted.
pub(super) fn forget(store: &dyn FdStore, name: &str) -> io::Result<()> {
    names(store, &prefix(name)).iter().try_for_each(|name| store.remove(name))
}
