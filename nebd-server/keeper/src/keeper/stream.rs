//! What a standby is sent: a queue in front of a socket that may be full.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use super::store::Store;

#[derive(Debug)]
enum Packet {
    Store(String, Rc<OwnedFd>),
    Remove(String),
    Sync,
    Activate,
}

/// The keeper's end of a standby's channel.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    queue: VecDeque<Packet>,
    /// Whether epoll tells when there is room again.
    pub(crate) armed: bool,
}

impl Stream {
    /// For a standby that knows the whole store (after the keeper replaced itself).
    pub(crate) fn resumed(socket: OwnedFd) -> Stream {
        Stream { socket, queue: VecDeque::new(), armed: false }
    }

    /// For a new standby: everything first.
    pub(crate) fn new(socket: OwnedFd, store: &Store) -> Stream {
        let mut stream = Stream::resumed(socket);
        for (name, fd) in store.iter() {
            stream.store(name, fd);
        }
        stream.queue.push_back(Packet::Sync);
        stream
    }

    pub(crate) fn store(&mut self, name: &str, fd: &Rc<OwnedFd>) {
        self.queue.push_back(Packet::Store(name.to_owned(), fd.clone()));
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.queue.push_back(Packet::Remove(name.to_owned()));
    }

    pub(crate) fn activate(&mut self) {
        self.queue.push_back(Packet::Activate);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends as much as there is room for.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while let Some(packet) = self.queue.front() {
            let sent = match packet {
                Packet::Store(name, fd) => {
                    let text = format!("STORE=1\nFDNAME={name}");
                    nebd_abi::socket::send(&self.socket, text.as_bytes(), &[fd.as_fd()])
                }
                Packet::Remove(name) => {
                    let text = format!("REMOVE=1\nFDNAME={name}");
                    nebd_abi::socket::send(&self.socket, text.as_bytes(), &[])
                }
                Packet::Sync => nebd_abi::socket::send(&self.socket, b"SYNC=1", &[]),
                Packet::Activate => nebd_abi::socket::send(&self.socket, b"ACTIVATE=1", &[]),
            };
            match sent {
                Ok(()) => drop(self.queue.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
