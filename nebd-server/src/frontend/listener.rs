//! Listening sockets of attachments.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nebd_backend::FdStore;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::fd_store::ServerStore;

/// The kernel allows fewer where its own limit is lower.
const BACKLOG: i32 = 4096;
/// Of a path; an end of text follows.
const PATH_BYTES_MAX: usize = 107;

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there, or another part of this one.
    #[error(
        "socket {}: somebody listens there already; choose another path with --socket",
        path.display()
    )]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// There is something else.
    #[error(
        "{} exists, and is no socket; choose another path with --socket, or remove it",
        path.display()
    )]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// It does not fit into a socket's address.
    #[error(
        "socket {}: the path of a socket has at most {PATH_BYTES_MAX} bytes, this one has {}; \
         choose a shorter one with --socket", path.display(), path.as_os_str().len()
    )]
    TooLong {
        /// Where.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("socket {}: cannot {action} it: {source}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl ListenError {
    pub(super) fn system<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> ListenError + use<E> {
        let path = path.to_owned();
        move |error| ListenError::System { action, path, source: error.into() }
    }

    /// As an errno, for a program.
    pub fn errno(&self) -> nebd_abi::Errno {
        match self {
            ListenError::InUse { .. } => nebd_abi::Errno(libc::EADDRINUSE),
            ListenError::NotASocket { .. } => nebd_abi::Errno(libc::EEXIST),
            ListenError::TooLong { .. } => nebd_abi::Errno(libc::ENAMETOOLONG),
            ListenError::System { source, .. } => nebd_abi::Errno::from_io(source),
        }
    }
}

/// A socket that connections are accepted from.
pub(super) struct Listener {
    /// In the descriptor store.
    pub(super) name: String,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) path: PathBuf,
}

impl Listener {
    pub(super) fn new(name: String, socket: OwnedFd, path: &Path) -> Listener {
        Listener { name, socket: Arc::new(socket), path: path.to_owned() }
    }

    /// One from the descriptor store: it knows where it listens.
    pub(super) fn stored(name: String, socket: OwnedFd) -> io::Result<Listener> {
        let address = rustix::net::getsockname(&socket)?;
        let address = SocketAddrUnix::try_from(address)?;
        let path = address.path().ok_or(io::ErrorKind::InvalidData)?;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(path.to_bytes()));
        Ok(Listener { name, socket: Arc::new(socket), path })
    }

    /// Takes it out of the store.
    pub(super) fn forget(&self, store: &ServerStore) {
        if let Err(error) = store.remove(&self.name) {
            tracing::warn!(name = self.name, %error, "cannot remove a stored socket");
        }
    }
}

/// Whether a socket can be made there; what a dead process left is removed.
pub(super) fn clear(path: &Path) -> Result<(), ListenError> {
    address(path)?;
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ListenError::system("look at", path)(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let probe = open().map_err(ListenError::system("make", path))?;
    match rustix::net::connect(&probe, &address(path)?) {
        Err(rustix::io::Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(ListenError::system("remove the stale", path))
        }
        // It answers, or its backlog is full, or it is of another type: alive in each case.
        _ => Err(ListenError::InUse { path: path.to_owned() }),
    }
}

/// A listening socket, non-blocking.
pub(super) fn bind(path: &Path, mode: u32, gid: Option<u32>) -> Result<OwnedFd, ListenError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .map_err(ListenError::system("make a directory for", path))?;
    }
    clear(path)?;
    let socket = open().map_err(ListenError::system("make", path))?;
    rustix::net::bind(&socket, &address(path)?).map_err(ListenError::system("bind", path))?;
    // Nobody can connect before `listen`, so the mode is right before it matters.
    let ready = std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .and_then(|()| gid.map_or(Ok(()), |gid| std::os::unix::fs::chown(path, None, Some(gid))))
        .and_then(|()| Ok(rustix::net::listen(&socket, BACKLOG)?));
    if let Err(error) = ready {
        unlink(path);
        return Err(ListenError::system("open", path)(error));
    }
    Ok(socket)
}

/// Removes a socket of ours.
pub(super) fn unlink(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove a socket");
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn address(path: &Path) -> Result<SocketAddrUnix, ListenError> {
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(ListenError::TooLong { path: path.to_owned() });
    }
    SocketAddrUnix::new(path).map_err(ListenError::system("use", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/s");
        for _ in 0..2 {
            let socket = bind(&path, 0o660, None).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
            UnixStream::connect(&path).unwrap();
            let error = bind(&path, 0o660, None).unwrap_err();
            assert!(matches!(error, ListenError::InUse { .. }), "{error}");
            assert_eq!(Listener::stored("a.0".into(), socket).unwrap().path, path);
        }
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let error = bind(&file, 0o660, None).unwrap_err();
        assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn the_longest_path_is_that_of_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let rest = PATH_BYTES_MAX - dir.path().as_os_str().len() - 1;
        bind(&dir.path().join("x".repeat(rest)), 0o600, None).unwrap();
        let long = dir.path().join("x".repeat(rest + 1));
        let error = bind(&long, 0o600, None).unwrap_err();
        assert!(matches!(error, ListenError::TooLong { .. }), "{error}");
        assert!(!long.exists());
    }
}
