//! Becoming a file's owner, and looking at it before.
//!
//! ```text
//!   becoming it          open ─► lock (wait) ─► still at its path? ─► examine ─► owner
//!   looking, before       open ─► examine ─► read a block ─► close    the predecessor owns it
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nebd_abi::VolumeName;
use rustix::fs::{FileType, FlockOperation};

use super::buffer::Aligned;
use super::open_file::{set_buffered, system_error};
use super::system::{self, Identity, Kind};
use crate::{BackendError, OpenContext};

/// How long a first open waits for a lock; its owner may be on its way out.
const FOREIGN_WAIT: Duration = Duration::from_secs(2);

/// An open file, and what it is.
pub(super) struct Examined {
    pub(super) file: File,
    pub(super) kind: Kind,
    pub(super) identity: Identity,
    /// Memory and offset alignment that direct IO demands, if it is used.
    pub(super) alignment: (u32, u32),
    pub(super) is_direct: bool,
    /// Stored flush witnesses that are known to be of this file.
    pub(super) witnesses: Vec<String>,
}

impl Examined {
    /// Finds out whether direct IO, if the file was opened for it, fits the volume.
    pub(super) fn new(
        name: &VolumeName,
        file: File,
        is_direct: bool,
        block_size: u32,
    ) -> Result<Examined, BackendError> {
        let failed = system_error(name, "examine its file");
        let kind = system::kind(&file).map_err(&failed)?;
        let identity = Identity::of(&file).map_err(&failed)?;
        let alignment = if is_direct { system::direct_alignment(&file) } else { None };
        let mut examined = Examined {
            file,
            kind,
            identity,
            alignment: alignment.unwrap_or((1, 1)),
            is_direct,
            witnesses: Vec::new(),
        };
        if is_direct && alignment.is_none_or(|(_, offset)| offset > block_size) {
            tracing::warn!(
                volume = %name,
                needed = alignment.map(|(_, offset)| offset),
                block_size,
                "direct IO does not fit the volume's block size; using the page cache"
            );
            examined.leave_direct().map_err(&failed)?;
        }
        Ok(examined)
    }

    /// Looks at a file that another process owns. A device is opened for reading alone and without
    /// claiming it: its owner has to open it anew.
    pub(super) fn observe(
        name: &VolumeName,
        path: &Path,
        block_size: u32,
        direct: bool,
    ) -> Result<Examined, BackendError> {
        let failed = system_error(name, "open its file");
        let found = rustix::fs::stat(path).map_err(|errno| failed(errno.into()))?;
        let access = if is_device(found.st_mode) { Access::Look } else { Access::Own };
        let (file, is_direct) = open_file(path, direct, access).map_err(failed)?;
        let mut examined = Examined::new(name, file, is_direct, block_size)?;
        examined.read_block(block_size).map_err(system_error(name, "read a block of its file"))?;
        Ok(examined)
    }

    /// Reads the first block, to see that reading works.
    fn read_block(&mut self, block_size: u32) -> io::Result<()> {
        let bytes = block_size.max(self.alignment.1) as usize;
        let memory = Aligned::new(bytes);
        loop {
            match system::transfer(self.file.as_fd(), &memory.part(0, bytes), 0, false) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Refused in spite of everything.
                Err(error) if self.is_direct && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.leave_direct()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn leave_direct(&mut self) -> io::Result<()> {
        set_buffered(&self.file)?;
        self.is_direct = false;
        Ok(())
    }
}

/// What is known of a file that was observed, and is not open any more.
pub(super) struct Seen {
    pub(super) identity: Identity,
    pub(super) witnesses: Vec<String>,
}

impl From<Examined> for Seen {
    fn from(examined: Examined) -> Seen {
        Seen { identity: examined.identity, witnesses: examined.witnesses }
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Reading and writing.
    Own,
    /// The same, and nobody else may claim the device.
    Claim,
    /// Reading, without waiting for the other end of a FIFO.
    Look,
}

/// Opens for direct IO if wanted and possible; tells whether it is.
fn open_file(path: &Path, direct: bool, access: Access) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(access != Access::Look);
    let flags = match access {
        Access::Own => 0,
        Access::Claim => libc::O_EXCL,
        Access::Look => libc::O_NONBLOCK,
    };
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

fn is_device(mode: u32) -> bool {
    FileType::from_raw_mode(mode) == FileType::BlockDevice
}

/// Whether this very file lies at `path`.
fn is_at(name: &VolumeName, path: &Path, file: &File) -> Result<bool, BackendError> {
    let failed = system_error(name, "open its file again");
    let present = rustix::fs::stat(path).map_err(|errno| failed(errno.into()))?;
    let held = rustix::fs::fstat(file).map_err(|errno| failed(errno.into()))?;
    Ok((present.st_dev, present.st_ino) == (held.st_dev, held.st_ino)
        && is_device(present.st_mode) == is_device(held.st_mode))
}

/// Opens the file and waits for its lock: a little at a first open, for a lock that somebody alive
/// may hold for good; as long as needed after a takeover, for the predecessor is dead or has given
/// it up, and what it had in flight ends.
///
/// The lock of a block device is its node's, and one device can have many nodes: it is claimed as
/// well (`O_EXCL`). A claim is the description's like the lock, pinned by requests in flight, and it
/// keeps away from file systems that are mounted.
pub(super) fn open_locked(
    name: &VolumeName,
    path: &Path,
    direct: bool,
    context: &OpenContext,
) -> Result<(File, bool), BackendError> {
    let mut wait = Wait::new(name, context.previous_major.is_some());
    loop {
        let failed = system_error(name, "open its file");
        let found = rustix::fs::stat(path).map_err(|errno| failed(errno.into()))?;
        let exclusive = is_device(found.st_mode);
        let access = if exclusive { Access::Claim } else { Access::Own };
        let (file, direct) = match open_file(path, direct, access) {
            Err(error) if exclusive && error.raw_os_error() == Some(libc::EBUSY) => {
                wait.pause()?;
                continue;
            }
            result => result.map_err(&failed)?,
        };
        lock(name, &file, &mut wait)?;
        // While we waited, another file may have been put in its place.
        let held = rustix::fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
        if is_at(name, path, &file)? && is_device(held.st_mode) == exclusive {
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
