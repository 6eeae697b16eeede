//! Images as directory entries: made, resized and deleted durably.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FlockOperation};

/// Opens without becoming anything's owner, and without waiting for the other end of a FIFO.
pub(super) fn open_to_look(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Makes a sparse image; never replaces anything. It appears under its name complete or not at all,
/// where the file system can make files without a name.
pub(super) fn create(path: &Path, size: u64) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(parent) {
        Ok(file) => {
            prepare(&file, size)?;
            if !link(&file, path)? {
                create_named(&options, path, size)?;
            }
        }
        // No such feature here.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)
            ) =>
        {
            create_named(&options, path, size)?;
        }
        Err(error) => return Err(error),
    }
    sync_directory(parent)
}

fn prepare(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    file.sync_all()
}

/// Gives a file without a name its name; false if this system cannot.
fn link(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, &source, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Err(rustix::io::Errno::EXIST.into()),
        Err(rustix::io::Errno::NOSPC) => Err(rustix::io::Errno::NOSPC.into()),
        Err(_) => Ok(false),
    }
}

fn create_named(options: &OpenOptions, path: &Path, size: u64) -> io::Result<()> {
    let file = options.clone().create_new(true).open(path)?;
    prepare(&file, size).inspect_err(|_| {
        // It is ours and of no use. A failure leaves an image that a later create reports.
        let _ = std::fs::remove_file(path);
    })
}

/// Deletes an image that nobody has locked (`WouldBlock`).
pub(super) fn delete(path: &Path) -> io::Result<()> {
    let file = open_to_look(path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    std::fs::remove_file(path)?;
    sync_directory(path.parent().unwrap_or(Path::new("/")))
}

/// Sets the size, durably.
pub(super) fn resize(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
