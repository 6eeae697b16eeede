//! A volume's file, open and locked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nebd_abi::VolumeName;
use rustix::fs::{FallocateFlags, FileType, FlockOperation, OFlags};

use super::buffer;
use super::pool::Pool;
use super::syncs::Syncs;
use super::system::{self, Identity, Kind};
use super::witness::Witnesses;
use crate::{BackendError, OpenContext, Segment};

/// How long a first open waits for a lock; its owner may be on its way out.
const FOREIGN_WAIT: Duration = Duration::from_secs(2);

pub(super) struct OpenFile {
    /// Holds the lock. Requests in flight use this very description, so that they pin the lock even
    /// after the process died; it is neither passed nor stored. A forked child must close it.
    file: File,
    name: VolumeName,
    kind: Kind,
    /// Memory and offset alignment that direct IO demands, if it is used.
    alignment: (u32, u32),
    direct: AtomicBool,
    /// `fallocate` modes that the file system refused.
    refused: AtomicU8,
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
    /// Opens and locks; blocks until the file is ours.
    pub(super) fn open(
        name: &VolumeName,
        path: PathBuf,
        block_size: u32,
        options: OpenOptionsOfBackend,
        context: &OpenContext,
    ) -> Result<Arc<OpenFile>, BackendError> {
        let (file, mut direct) = open_locked(name, &path, options.direct, context)?;
        let failed = system_error(name, "examine its file");
        let kind = system::kind(&file).map_err(&failed)?;
        let identity = Identity::of(&file).map_err(&failed)?;
        let alignment = if direct { system::direct_alignment(&file) } else { None };
        if direct && alignment.is_none_or(|(_, offset)| offset > block_size) {
            tracing::warn!(
                volume = %name,
                needed = alignment.map(|(_, offset)| offset),
                block_size,
                "direct IO does not fit the volume's block size; using the page cache"
            );
            set_buffered(&file).map_err(&failed)?;
            direct = false;
        }
        let syncs = open_syncs(name, path, identity, context)?;
        Ok(Arc::new(OpenFile {
            watches_links: kind == Kind::Regular && system::has_cheap_attributes(&file),
            file,
            name: name.clone(),
            kind,
            alignment: alignment.unwrap_or((1, 1)),
            direct: AtomicBool::new(direct),
            refused: AtomicU8::new(0),
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
        self.syncs.close();
        // Whoever still holds the file open must not keep the lock with it.
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

fn set_buffered(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?)
}

/// Opens for direct IO if wanted and possible; tells whether it is.
fn open_file(path: &Path, direct: bool, exclusive: bool) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let flags = if exclusive { libc::O_EXCL } else { 0 };
    if direct {
        match options.clone().custom_flags(libc::O_DIRECT | flags).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(path = %path.display(), "no direct IO here; using the page cache");
            }
            result => return result.map(|file| (file, true)),
        }
    }
    options.custom_flags(flags).open(path).map(|file| (file, false))
}

/// Opens the file and waits for its lock: a little at a first open, for a lock that somebody alive
/// may hold for good; as long as needed after a takeover, for the predecessor is dead and what it
/// had in flight ends.
///
/// The lock of a block device is its node's, and one device can have many nodes: it is claimed as
/// well (`O_EXCL`). A claim is the description's like the lock, pinned by requests in flight, and it
/// keeps away from file systems that are mounted.
fn open_locked(
    name: &VolumeName,
    path: &Path,
    direct: bool,
    context: &OpenContext,
) -> Result<(File, bool), BackendError> {
    let mut wait = Wait::new(name, context.previous_major.is_some());
    loop {
        let failed = system_error(name, "open its file");
        let is_device = |mode| FileType::from_raw_mode(mode) == FileType::BlockDevice;
        let found = rustix::fs::stat(path).map_err(|errno| failed(errno.into()))?;
        let exclusive = is_device(found.st_mode);
        let (file, direct) = match open_file(path, direct, exclusive) {
            Err(error) if exclusive && error.raw_os_error() == Some(libc::EBUSY) => {
                wait.pause()?;
                continue;
            }
            result => result.map_err(failed)?,
        };
        lock(name, &file, &mut wait)?;
        // While we waited, another file may have been put in its place.
        let failed = system_error(name, "open its file again");
        let present = rustix::fs::stat(path).map_err(|errno| failed(errno.into()))?;
        let held = rustix::fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
        if (present.st_dev, present.st_ino) == (held.st_dev, held.st_ino)
            && is_device(held.st_mode) == exclusive
        {
            return Ok((file, direct));
        }
    }
}

fn lock(name: &VolumeName, file: &File, wait: &mut Wait<'_>) -> Result<(), BackendError> {
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => wait.pause()?,
            Err(errno) => return Err(system_error(name, "lock its file")(errno.into())),
        }
    }
}

/// Patience with another owner.
struct Wait<'a> {
    name: &'a VolumeName,
    is_takeover: bool,
    start: Instant,
    pause: Duration,
    logged_s: u64,
}

impl Wait<'_> {
    fn new(name: &VolumeName, is_takeover: bool) -> Wait<'_> {
        let pause = Duration::from_micros(100);
        Wait { name, is_takeover, start: Instant::now(), pause, logged_s: 0 }
    }

    /// Sleeps a little, unless patience has ended.
    fn pause(&mut self) -> Result<(), BackendError> {
        let waited = self.start.elapsed();
        if !self.is_takeover && waited >= FOREIGN_WAIT {
            let detail = "its file is locked or in use".to_owned();
            return Err(BackendError::Busy { volume: self.name.clone(), detail });
        }
        if waited.as_secs() > self.logged_s {
            self.logged_s = waited.as_secs();
            tracing::warn!(volume = %self.name, waited_s = self.logged_s, "waiting for the lock");
        }
        std::thread::sleep(self.pause);
        let longest = Duration::from_millis(if waited.as_secs() == 0 { 2 } else { 50 });
        self.pause = (self.pause * 2).min(longest);
        Ok(())
    }
}

/// Finds the witnesses of earlier epochs, or makes the first.
fn open_syncs(
    name: &VolumeName,
    path: PathBuf,
    identity: Identity,
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
    let mut earlier = !witnesses.names().is_empty();
    if earlier && !witnesses.are_of_this_file() {
        if context.previous_major.is_some() {
            return Err(failed(io::Error::from_raw_os_error(libc::ESTALE)));
        }
        // Of a file that was deleted since.
        witnesses.remove(&witnesses.names()).map_err(&failed)?;
        earlier = false;
    }
    let owed = earlier || context.previous_major.is_some();
    if !owed {
        let fresh = witnesses.open(super::witness::WITNESSES).map_err(&failed)?;
        witnesses.keep(&fresh).map_err(&failed)?;
    }
    Ok(Syncs::new(Some(witnesses), owed))
}
