//! Creating the sockets.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::config::{KeeperConfig, KeeperError};

/// The listening sockets, non-blocking.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) client: OwnedFd,
    pub(crate) admin: OwnedFd,
}

impl Sockets {
    /// Creates both. The one remains as it was if the other cannot be made, but for a stale file.
    pub(crate) fn create(config: &KeeperConfig) -> Result<Sockets, KeeperError> {
        let client = listen(config, &config.socket, SocketType::SEQPACKET)?;
        let admin = listen(config, &config.admin_socket, SocketType::STREAM)
            .inspect_err(|_| super::files::remove(&config.socket))?;
        Ok(Sockets { client, admin })
    }
}

fn open(kind: SocketType) -> Result<OwnedFd, KeeperError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
        .map_err(KeeperError::system("create a socket"))
}

fn listen(config: &KeeperConfig, path: &Path, kind: SocketType) -> Result<OwnedFd, KeeperError> {
    remove_stale(path, kind)?;
    let socket = open(kind)?;
    bind(&socket, path, config.socket_mode)?;
    let changed = std::os::unix::fs::chown(path, config.socket_uid, config.socket_gid);
    changed.map_err(KeeperError::file("change the owner of", path))?;
    // Only the final mode is ever connectable: nobody listens before.
    rustix::net::listen(&socket, i32::MAX).map_err(KeeperError::file("listen on", path))?;
    Ok(socket)
}

/// Binds with exactly these permission bits. The keeper has one thread, so the umask is its own.
fn bind(socket: impl AsFd, path: &Path, mode: u32) -> Result<(), KeeperError> {
    let address =
        SocketAddrUnix::new(path).map_err(KeeperError::file("use as an address", path))?;
    let before = rustix::process::umask(Mode::from_raw_mode(0o777 & !mode));
    let bound = rustix::net::bind(socket, &address);
    rustix::process::umask(before);
    bound.map_err(KeeperError::file("bind", path))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(mode))
        .map_err(KeeperError::file("set the mode of", path))
}

/// Removes what a dead keeper left; refuses where somebody listens.
fn remove_stale(path: &Path, kind: SocketType) -> Result<(), KeeperError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(KeeperError::file("look at", path)(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(KeeperError::NotASocket { path: path.to_owned() });
    }
    let address =
        SocketAddrUnix::new(path).map_err(KeeperError::file("use as an address", path))?;
    match rustix::net::connect(open(kind)?, &address) {
        Err(rustix::io::Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(KeeperError::file("remove the stale", path))
        }
        // It answers, or its backlog is full, or it is of another type: alive in each case.
        _ => Err(KeeperError::SocketInUse { path: path.to_owned() }),
    }
}

/// The socket for notifications: for this user alone, credentials attached to each datagram.
pub(crate) fn notify(path: &Path) -> Result<OwnedFd, KeeperError> {
    super::files::remove(path);
    let socket = open(SocketType::DGRAM)?;
    rustix::net::sockopt::set_socket_passcred(&socket, true)
        .map_err(KeeperError::system("ask for credentials"))?;
    bind(&socket, path, 0o600)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config(directory: &Path) -> KeeperConfig {
        KeeperConfig::new(vec!["server".into()], directory.join("sock"), directory)
    }

    #[test]
    fn sockets_are_never_world_writable_and_stale_ones_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        for _ in 0..2 {
            let sockets = Sockets::create(&config).unwrap();
            for path in [&config.socket, &config.admin_socket] {
                let mode = std::fs::metadata(path).unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o660);
            }
            let error = Sockets::create(&config).unwrap_err();
            assert!(matches!(error, KeeperError::SocketInUse { .. }), "{error}");
            drop(sockets);
        }
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        std::fs::write(&config.admin_socket, "precious").unwrap();
        let error = Sockets::create(&config).unwrap_err();
        assert!(matches!(error, KeeperError::NotASocket { .. }), "{error}");
        assert!(!config.socket.exists());
        assert_eq!(std::fs::read(&config.admin_socket).unwrap(), b"precious");
    }
}
