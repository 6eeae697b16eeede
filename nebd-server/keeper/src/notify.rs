//! What a server tells its keeper, or systemd: the `sd_notify` protocol.

use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::pipe::PipeFlags;

pub use crate::reregister::{Holdings, Reregister, ReregisterError};

/// Set for servers of a keeper. Its barriers are answered with a byte before the descriptor is
/// closed, so that a keeper's death is not taken for an answer.
pub(crate) const KEEPER_VARIABLE: &str = "NEBD_KEEPER";

/// Sends datagrams to `$NOTIFY_SOCKET`. To be shared among threads.
///
/// The socket is not connected: after a keeper was replaced, the next datagram reaches the new one.
#[derive(Debug)]
pub struct Notifier {
    socket: OwnedFd,
    address: SocketAddrUnix,
    path: Option<PathBuf>,
    keeper: bool,
}

impl Notifier {
    /// The notifier of this process; `None` if nobody listens.
    pub fn from_env() -> Option<Notifier> {
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|a| !a.is_empty())?;
        let keeper = std::env::var_os(KEEPER_VARIABLE).is_some();
        match Notifier::new(address, keeper) {
            Ok(notifier) => Some(notifier),
            Err(error) => {
                tracing::warn!(%error, "the address in NOTIFY_SOCKET cannot be used");
                None
            }
        }
    }

    pub(crate) fn new(address: OsString, keeper: bool) -> io::Result<Notifier> {
        let bytes = address.as_bytes();
        let (address, path) = match bytes.strip_prefix(b"@") {
            Some(name) => (SocketAddrUnix::new_abstract_name(name)?, None),
            None => (SocketAddrUnix::new(bytes)?, Some(PathBuf::from(&address))),
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(Notifier { socket, address, path, keeper })
    }

    /// Whether a keeper of ours listens, and not a service manager.
    pub fn is_keeper(&self) -> bool {
        self.keeper
    }

    /// The socket, which never becomes readable.
    pub(crate) fn socket_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The directory the socket lies in.
    pub(crate) fn directory(&self) -> Option<&Path> {
        self.path.as_deref()?.parent()
    }

    /// Serving: the listening sockets are being accepted from.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// Going away on purpose.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// A sign of life, for a service manager's watchdog.
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// There is work, after a while without. Nothing in it is read: that it comes wakes a keeper, which
    /// then looks at the host page. One that is too busy to take it is awake.
    pub fn work(&self) {
        let _lost = self.send("X_NEBD_WORK=1", None, SendFlags::DONTWAIT);
    }

    /// A line for the operator. Lost rather than waited for.
    pub fn status(&self, status: &str) {
        let line = format!("STATUS={}", status.replace('\n', " "));
        if let Err(error) = self.send(&line, None, SendFlags::DONTWAIT) {
            tracing::debug!(%error, "the status was not delivered");
        }
    }

    /// Another process is the server from now on.
    pub fn main_pid(&self, pid: u32) {
        self.tell(&format!("MAINPID={pid}"));
    }

    /// This child may become the server: it is not to outlive us unseen. 0: there is none any more.
    /// To be followed by a [`barrier`](Self::barrier), before it is given the means.
    pub fn candidate(&self, pid: u32) {
        self.tell(&format!("X_NEBD_CANDIDATE={pid}"));
    }

    /// Later servers and standbys are to be started from this program.
    pub fn binary(&self, path: &Path) {
        match path.to_str().filter(|path| !path.contains('\n')) {
            Some(path) => self.tell(&format!("X_NEBD_BINARY={path}")),
            None => tracing::warn!(path = %path.display(), "the keeper cannot be told this path"),
        }
    }

    /// Keeps a duplicate of `fd` under `name`, in place of any kept before. Held for certain only
    /// after [`barrier`](Self::barrier).
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        if !self.keeper {
            // systemd would keep both.
            self.remove(name)?;
        }
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        self.send(&message, Some(fd), SendFlags::empty())
    }

    /// Forgets `name`; no error if there is none.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None, SendFlags::empty())
    }

    /// Returns once everything sent before was processed. Fails with `TimedOut`, or with
    /// `ConnectionReset` if the keeper died first (then [`Reregister`] sends everything again).
    pub fn barrier(&self, timeout: Duration) -> io::Result<()> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        self.send("BARRIER=1", Some(write.as_fd()), SendFlags::empty())?;
        drop(write);
        if !wait(&read, PollFlags::IN, Some(timeout))? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let answered = rustix::io::read(&read, &mut [0_u8; 1])? == 1;
        if self.keeper && !answered {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }

    fn tell(&self, message: &str) {
        if let Err(error) = self.send(message, None, SendFlags::empty()) {
            tracing::warn!(%error, message, "the keeper was not told");
        }
    }

    pub(crate) fn send(
        &self,
        message: &str,
        fd: Option<BorrowedFd<'_>>,
        flags: SendFlags,
    ) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let fds: &[BorrowedFd<'_>] = fd.as_slice();
        loop {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
            }
            let slices = [IoSlice::new(message.as_bytes())];
            let flags = flags | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg_addr(
                &self.socket,
                &self.address,
                &slices,
                &mut ancillary,
                flags,
            ) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Polls one descriptor; false when the time is over. `None` waits without limit.
pub(crate) fn wait(
    fd: impl AsFd,
    events: PollFlags,
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let deadline = timeout.map(|t| std::time::Instant::now() + t);
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(std::time::Instant::now()));
        let left = left.map(timespec);
        match rustix::event::poll(&mut [PollFd::new(&fd, events)], left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    // A day is for ever here; the conversion of anything less cannot fail.
    let duration = duration.min(Duration::from_secs(86_400));
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}
