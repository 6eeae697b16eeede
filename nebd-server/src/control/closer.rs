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

/// The thread that closes.
pub struct Closer(Sender<Vec<OwnedFd>>);

impl Closer {
    /// Starts it; it sleeps until there is something to close.
    pub fn start() -> io::Result<Closer> {
        let (sender, receiver) = unbounded::<Vec<OwnedFd>>();
        std::thread::Builder::new()
            .name("nebd-closer".into())
            .spawn(move || receiver.into_iter().for_each(drop))?;
        Ok(Closer(sender))
    }

    /// The packet, if it is whole and all of its descriptors are of the kinds that the protocol
    /// passes; otherwise they are on their way out.
    pub fn accept(&self, packet: Packet) -> Option<Packet> {
        if !packet.is_cut_off && packet.fds.iter().all(closes_at_once) {
            return Some(packet);
        }
        // The thread ends only with the process.
        let _ = self.0.send(packet.fds);
        None
    }
}

/// Memory can have seals, and nothing but memory.
fn closes_at_once(fd: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok() || crate::server::is_eventfd(fd)
}
