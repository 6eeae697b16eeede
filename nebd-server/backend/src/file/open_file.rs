//! A volume's file, open and locked: see [`super::own`] for how it becomes so.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU8,
    Ordering::{Relaxed, SeqCst},
};

use nebd_abi::VolumeName;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags};

use super::buffer;
use super::own::{Examined, Seen, open_locked};
use super::pool::Pool;
use super::syncs::Syncs;
use super::system::{self, Identity, Kind};
use super::witness::Witnesses;
use crate::{BackendError, OpenContext, Segment};

pub(super) struct OpenFile {
    /// Holds the lock, until it is relinquished. Requests in flight use this very description, so that they pin the lock even
    /// after the process died; it is neither passed nor stored. A forked child must close it.
    file: File,
    name: VolumeName,
    kind: Kind,
    /// Memory and offset alignment that direct IO demands, if it is used.
    alignment: (u32, u32),
    direct: AtomicBool,
    /// `fallocate` modes that the file system refused.
    refused: AtomicU8,
    /// It is a successor's.
    relinquished: AtomicBool,
    watches_links: bool,
    uses_uring: bool,
    pool: Pool,
    syncs: Syncs,
}

/// How files are opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenOptionsOfBackend {
    pub(super) direct: bool,
    pub(super) uring: bool,
    pub(super) pool_threads: usize,
}

impl OpenFile {
    /// Opens and locks; blocks until the file is ours. What an observer saw before is used if it is
    /// the file still.
    pub(super) fn open(
        name: &VolumeName,
        path: PathBuf,
        block_size: u32,
        options: OpenOptionsOfBackend,
        context: &OpenContext,
        prepared: Option<Seen>,
    ) -> Result<Arc<OpenFile>, BackendError> {
        let (file, direct) = open_locked(name, &path, options.direct, context)?;
        let mut examined = Examined::new(name, file, direct, block_size)?;
        if let Some(seen) = prepared.filter(|seen| seen.identity == examined.identity) {
            examined.witnesses = seen.witnesses;
        }
        let Examined { file, kind, identity, alignment, is_direct, witnesses } = examined;
        let syncs = open_syncs(name, path, identity, &witnesses, context)?;
        Ok(Arc::new(OpenFile {
            watches_links: kind == Kind::Regular && system::has_cheap_attributes(&file),
            file,
            name: name.clone(),
            kind,
            alignment,
            direct: AtomicBool::new(is_direct),
            refused: AtomicU8::new(0),
            relinquished: AtomicBool::new(false),
            uses_uring: options.uring,
            pool: Pool::new(options.pool_threads),
            syncs,
        }))
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn syncs(&self) -> &Syncs {
        &self.syncs
    }

    pub(super) fn uses_uring(&self) -> bool {
        self.uses_uring
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Relaxed)
    }

    /// Whether the kernel takes this memory as it is.
    pub(super) fn takes(&self, segments: &[Segment]) -> bool {
        !self.is_direct() || buffer::is_aligned(segments, self.alignment.0, self.alignment.1)
    }

    /// What of a short transfer's count can be built upon.
    pub(super) fn whole_blocks(&self, count: u64) -> u64 {
        if self.is_direct() { count - count % u64::from(self.alignment.1) } else { count }
    }

    /// Direct IO was refused in spite of everything: the page cache from now on.
    pub(super) fn leave_direct(&self) -> bool {
        match set_buffered(&self.file) {
            Ok(()) => {
                if self.direct.swap(false, Relaxed) {
                    tracing::warn!(volume = %self.name, "direct IO was refused; using the page cache");
                }
                true
            }
            Err(error) => {
                tracing::error!(volume = %self.name, %error, "cannot leave direct IO");
                false
            }
        }
    }

    /// Whether the file has no name any more. What is written to it then, no successor would find,
    /// so a flush must not claim that it is durable. Asked only where asking costs no IO.
    pub(super) fn has_vanished(&self) -> bool {
        self.watches_links && rustix::fs::fstat(&self.file).is_ok_and(|stat| stat.st_nlink == 0)
    }

    /// Whether this way to free or zero a range is worth trying.
    pub(super) fn knows(&self, mode: FallocateFlags) -> bool {
        self.refused.load(Relaxed) & bit(mode) == 0
    }

    /// It is not.
    pub(super) fn forget(&self, mode: FallocateFlags) {
        self.refused.fetch_or(bit(mode), Relaxed);
    }

    /// The last session is gone.
    pub(super) fn close(&self) {
        if self.relinquished.load(SeqCst) {
            return;
        }
        self.syncs.close();
        self.unlock();
    }

    /// A successor is to own the file. The claim of a device ends with its last descriptor only, and
    /// a request that came after the lock was given up would corrupt what the successor writes: so
    /// the descriptor becomes one that nothing can be done with.
    pub(super) fn relinquish(&self) {
        if self.relinquished.swap(true, SeqCst) {
            return;
        }
        self.syncs.relinquish();
        self.unlock();
        if let Err(error) = system::disconnect(&self.file) {
            tracing::warn!(volume = %self.name, %error, "its file stays open until this process ends");
        }
    }

    /// Whoever still holds the file open must not keep the lock with it.
    fn unlock(&self) {
        if let Err(error) = rustix::fs::flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(volume = %self.name, %error, "cannot unlock");
        }
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn bit(mode: FallocateFlags) -> u8 {
    if mode.contains(FallocateFlags::PUNCH_HOLE) { 1 } else { 2 }
}

pub(super) fn system_error(
    name: &VolumeName,
    action: &'static str,
) -> impl Fn(io::Error) -> BackendError {
    let volume = name.clone();
    move |source| match source.kind() {
        io::ErrorKind::NotFound => BackendError::NotFound(volume.clone()),
        _ => BackendError::System { volume: volume.clone(), action, source },
    }
}

pub(super) fn set_buffered(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?)
}

/// Finds the witnesses of earlier epochs, or makes the first.
fn open_syncs(
    name: &VolumeName,
    path: PathBuf,
    identity: Identity,
    known: &[String],
    context: &OpenContext,
) -> Result<Syncs, BackendError> {
    if !context.store.is_durable() {
        tracing::warn!(
            volume = %name,
            "no descriptor store: a failed flush whose report dies with the server goes unnoticed"
        );
        return Ok(Syncs::new(None, false));
    }
    let failed = system_error(name, "keep its flush witnesses");
    let store = context.store.clone();
    let witnesses = Witnesses::new(store, name.name(), path, identity, context.generation);
    let stored = witnesses.names();
    let mut earlier = !stored.is_empty();
    let is_foreign = |name: &&String| !known.contains(name) && !witnesses.is_of_this_file(name);
    if stored.iter().any(|name| is_foreign(&name)) {
        if context.previous_major.is_some() {
            return Err(failed(io::Error::from_raw_os_error(libc::ESTALE)));
        }
        // Of a file that was deleted since.
        witnesses.remove(&stored).map_err(&failed)?;
        earlier = false;
    }
    let mut owed = earlier || context.previous_major.is_some();
    let unused = if context.previous_major.is_none() { witnesses.unused() } else { 0 };
    if earlier && (1..super::witness::WITNESSES).contains(&unused) {
        // A server was killed while it made or removed a set. The session that begins now is to outlive
        // as many deaths as others: the set is made whole, as by a first flush.
        let fresh = witnesses.open(super::witness::WITNESSES).map_err(&failed)?;
        let oldest = witnesses.take_oldest().map_err(&failed)?;
        if oldest.is_some_and(|oldest| super::syncs::sync(oldest).is_ok()) {
            witnesses.keep(&fresh).map_err(&failed)?;
            owed = false;
        }
    }
    if !owed && !earlier {
        let fresh = witnesses.open(super::witness::WITNESSES).map_err(&failed)?;
        witnesses.keep(&fresh).map_err(&failed)?;
    }
    Ok(Syncs::new(Some(witnesses), owed))
}
