//! What a keeper is told, and why it may refuse.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a keeper keeps, and for whom.
#[derive(Clone, Debug)]
pub struct KeeperConfig {
    /// Program and arguments of a server. A standby gets `--standby` in addition, at the end.
    pub server_argv: Vec<OsString>,
    /// Program and arguments with which the keeper replaces itself on SIGHUP; by default the
    /// present ones, from the path of the present executable.
    pub keeper_argv: Option<Vec<OsString>>,
    /// Client socket.
    pub socket: PathBuf,
    /// Admin socket.
    pub admin_socket: PathBuf,
    /// Where the lock, the pid files and `notify.sock` lie.
    pub state_dir: PathBuf,
    /// Permission bits of both sockets; within 0660.
    pub socket_mode: u32,
    /// Owner of both sockets, if not the keeper's user.
    pub socket_uid: Option<u32>,
    /// Group of both sockets, if not the keeper's.
    pub socket_gid: Option<u32>,
    /// Whether a second server stands by.
    pub standby: bool,
    /// How long a probed server may stay silent before it is killed; also how long an activated
    /// standby may take to serve.
    pub hang_timeout: Duration,
    /// How long a server started cold may take to say that it serves.
    pub start_timeout: Duration,
    /// How long a server may take to exit when the keeper is stopped.
    pub stop_timeout: Duration,
    /// How long a server that outlived its keeper has to register with the next.
    pub adopt_timeout: Duration,
    /// Delay after the first server that died before it served.
    pub restart_delay_min: Duration,
    /// What that delay grows to, by doubling.
    pub restart_delay_max: Duration,
}

impl KeeperConfig {
    /// The defaults. The admin socket is the client socket's path and `.admin`.
    pub fn new(
        server_argv: Vec<OsString>,
        socket: impl Into<PathBuf>,
        state_dir: impl Into<PathBuf>,
    ) -> KeeperConfig {
        let socket = socket.into();
        let mut admin_socket = socket.clone().into_os_string();
        admin_socket.push(".admin");
        KeeperConfig {
            server_argv,
            keeper_argv: None,
            socket,
            admin_socket: admin_socket.into(),
            state_dir: state_dir.into(),
            socket_mode: 0o660,
            socket_uid: None,
            socket_gid: None,
            standby: false,
            hang_timeout: Duration::from_secs(2),
            start_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(10),
            adopt_timeout: Duration::from_secs(5),
            restart_delay_min: Duration::from_millis(100),
            restart_delay_max: Duration::from_secs(10),
        }
    }

    pub(crate) fn notify_socket(&self) -> PathBuf {
        self.state_dir.join("notify.sock")
    }
}

/// Why a keeper cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Another keeper has this state directory.
    #[error("the state directory {} belongs to the keeper with pid {pid}", path.display())]
    Locked {
        /// The state directory.
        path: PathBuf,
        /// Its pid, as it wrote it; 0 if that cannot be read.
        pid: u32,
    },
    /// A process that is no server of ours listens there.
    #[error("{} is in use: a live process listens there", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in the way.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The configured permission bits are not within 0660.
    #[error("socket mode {mode:04o} is not within 0660")]
    Mode {
        /// As configured.
        mode: u32,
    },
    /// There is no such program.
    #[error("cannot find the program {}", program.display())]
    Program {
        /// As configured.
        program: PathBuf,
    },
    /// Something with a path failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The host page cannot be made or mapped.
    #[error("cannot set up the host page")]
    HostPage(#[from] nebd_abi::region::RegionError),
    /// What the keeper's earlier image left behind does not make sense.
    #[error("the keeper's earlier image left no complete state: {what} is missing")]
    Image {
        /// The first thing missing.
        what: &'static str,
    },
}

impl KeeperError {
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| KeeperError::System { action, source: source.into() }
    }

    pub(crate) fn file<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self {
        move |source| KeeperError::File { action, path: path.to_owned(), source: source.into() }
    }
}
