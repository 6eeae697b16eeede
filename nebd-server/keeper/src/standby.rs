//! The channel on which a warm standby follows the store.
//!
//! ```text
//!   STORE=1  REMOVE=1 …        the store as it is, in order
//!   SYNC=1                     the standby now knows all of it
//!   STORE=1  REMOVE=1 …        as it changes
//!   ACTIVATE=1                 the server is dead, and this is its whole store
//!   end of file                the keeper died: a standby without keeper exits
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A packet of the channel.
#[derive(Debug)]
pub enum StandbyMessage {
    /// The store holds this descriptor under this name, in place of any before.
    Store(String, OwnedFd),
    /// The store has no such name any more.
    Remove(String),
    /// Everything the store held when this standby started has been sent.
    Sync,
    /// The server is dead and its whole store was sent: claim the generation and serve.
    Activate,
}

/// The standby's end.
#[derive(Debug)]
pub struct StandbyChannel {
    socket: OwnedFd,
}

impl StandbyChannel {
    /// Wraps [`crate::inherit::Inherited::standby`].
    pub fn new(socket: OwnedFd) -> StandbyChannel {
        StandbyChannel { socket }
    }

    /// Waits for the next message; `None` once the keeper is gone. Messages of a later keeper are
    /// skipped.
    pub fn recv(&self) -> io::Result<Option<StandbyMessage>> {
        loop {
            let Some(packet) = nebd_abi::socket::receive(&self.socket)? else {
                return Ok(None);
            };
            if let Some(message) = parse(&packet.bytes, packet.fds) {
                return Ok(Some(message));
            }
        }
    }
}

impl AsFd for StandbyChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn parse(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<StandbyMessage> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (verb, rest) = text.split_once('\n').unwrap_or((text, ""));
    let name = || rest.strip_prefix("FDNAME=").map(str::to_owned);
    match verb {
        "STORE=1" => Some(StandbyMessage::Store(name()?, fds.into_iter().next()?)),
        "REMOVE=1" => Some(StandbyMessage::Remove(name()?)),
        "SYNC=1" => Some(StandbyMessage::Sync),
        "ACTIVATE=1" => Some(StandbyMessage::Activate),
        _ => None,
    }
}
