//! The descriptors of a server that are no session's and no volume's.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nebd_abi::host::HostPage;
use nebd_keeper::notify::Notifier;

use crate::fd_store::ServerStore;
use crate::tenure::Tenure;

/// What a successor gets, and the next keeper if this one dies.
pub struct Holdings {
    /// By the names of [`nebd_keeper::names`], and [`LOCK`].
    pub fds: BTreeMap<&'static str, OwnedFd>,
    /// Sessions' and volumes'.
    pub store: Arc<ServerStore>,
    /// The host page.
    pub host: Arc<HostPage>,
    /// This server's.
    pub tenure: Arc<Tenure>,
    /// The way to the keeper or service manager.
    pub notifier: Option<Arc<Notifier>>,
    /// The executable of this server, as it was started.
    pub binary: PathBuf,
    /// Where the report of planned takeovers lies.
    pub state_dir: PathBuf,
    /// How long requests at their storage are waited for before a planned takeover.
    pub freeze: Duration,
    /// How long each step before that may take.
    pub step: Duration,
}

/// The lock of a server without a keeper: it goes to the successor with its description.
pub const LOCK: &str = "nebd.lock";

impl nebd_keeper::notify::Holdings for Holdings {
    fn each(&self, send: &mut dyn FnMut(&str, BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
        if self.host.generation() != self.tenure.generation() {
            // Handed over: the new owner is the one to register.
            return Err(io::Error::other("this server has been taken over"));
        }
        for (name, fd) in self.fds.iter().filter(|(name, _)| **name != LOCK) {
            send(name, fd.as_fd())?;
        }
        self.store.each(send)
    }
}
