//! Closing descriptors that clients sent, and that belong to no message.
//!
//! The close of a file on a FUSE file system asks its server to flush, and waits for the answer, for
//! ever if it must. Whoever may open the client socket can be such a server. What the protocol
//! passes (memfds and eventfds) is closed without waiting, so all else is closed on a thread that
//! may be lost.

use std::io;
use std::os::fd::OwnedFd;

use crossbeam::channel::{Sender, unbounded};
use nebd_abi::socket::Packet;

/// Descriptors that may wait to be closed before a client that sends another one is shut out.
const WAITING_MAX: usize = 64;

/// The thread that closes.
pub struct Closer(Sender<OwnedFd>);

impl Closer {
    /// Starts it; it sleeps until there is something to close.
    pub fn start() -> io::Result<Closer> {
        let (sender, receiver) = unbounded::<OwnedFd>();
        std::thread::Builder::new()
            .name("nebd-closer".into())
            .spawn(move || receiver.into_iter().for_each(drop))?;
        Ok(Closer(sender))
    }

    /// Takes out all descriptors unless each is of a kind that the protocol passes, and says whether
    /// it did.
    pub fn take_strange(&self, packet: &mut Packet) -> bool {
        if packet.fds.iter().all(closes_at_once) {
            return false;
        }
        packet.fds.drain(..).for_each(|fd| self.close(fd));
        true
    }

    /// Closes it, whatever it is.
    pub fn close(&self, fd: OwnedFd) {
        // The thread ends only with the process.
        let _ = self.0.send(fd);
    }

    /// Whether one of them does wait, and many behind it.
    pub fn is_held_up(&self) -> bool {
        self.0.len() > WAITING_MAX
    }
}

/// Memory can have seals, and nothing but memory.
pub(crate) fn closes_at_once(fd: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok() || crate::server::is_eventfd(fd)
}
