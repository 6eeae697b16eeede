//! A connection that outlives its server: the rule by which each message is dealt with.
//!
//! ```text
//!  peek ─► act ─► persist ─► save ─► Replying ─► send ─► Done ─► take ─► next
//!  (its descriptors are duplicates)     ▲                         ▲
//!                                       └─ a death: Close         └─ a death: take what is left
//!  a death anywhere else: Continue, the message is peeked again
//! ```
//!
//! A successor that holds the socket and the [`Journal`] can tell three cases apart:
//! - *Open*: no reply went out, and the message is still in the socket (or another one is, which makes
//!   no difference). It is acted on again, so acts must be idempotent.
//! - *Replying*: whether the reply went out cannot be known. The connection is closed, once; the
//!   hypervisor connects again, with its inflight record.
//! - *Done*: the reply went out. Whether the message was taken from the socket the kernel knows: the
//!   socket's peek offset was set to the message's length, and a read moves it back by what it takes,
//!   in the same system call. So what is left of it is taken, and the connection goes on.
//!
//! A message that takes long to act on (to stop a ring, what is in flight must end first) simply stays
//! in its envelope meanwhile.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::journal::{Journal, JournalError, Phase};
use crate::message::{FDS_MAX, HEADER_BYTES, Header, Message, MessageError};
use crate::peek_offset;

/// Why a connection has come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// A system call failed.
    #[error("cannot {action} the hypervisor's socket")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What came is no message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More descriptors than any message has.
    #[error("more descriptors came than any message has")]
    TooManyFds,
    /// Its state could not be kept.
    #[error("cannot keep the connection's state")]
    Journal(#[from] JournalError),
    /// Its descriptors could not be kept.
    #[error("cannot keep the connection's descriptors")]
    Persist(#[source] io::Error),
    /// A reply did not fit into the socket: the hypervisor does not read.
    #[error("the hypervisor does not read its replies")]
    Deaf,
    /// In tests: the process is dead.
    #[cfg(test)]
    #[error("dead")]
    Dead,
}

fn system(action: &'static str) -> impl FnOnce(Errno) -> ConnectionError {
    move |errno| ConnectionError::System { action, source: errno.into() }
}

fn system_io(action: &'static str) -> impl FnOnce(io::Error) -> ConnectionError {
    move |source| ConnectionError::System { action, source }
}

/// A message that is still in the socket.
#[derive(Debug)]
pub struct Envelope {
    /// What it says.
    pub message: Message,
    /// Whether an acknowledgement is wanted, if that was agreed on.
    pub need_reply: bool,
    /// Duplicates of the descriptors that came along.
    pub fds: Vec<OwnedFd>,
    length: usize,
}

/// Descriptors that came with bytes.
struct Came<'a> {
    /// Of the first piece that has any.
    first: Vec<OwnedFd>,
    others: &'a mut Vec<OwnedFd>,
}

/// What stands in a socket.
#[derive(Debug)]
pub enum Peeked {
    /// A whole message.
    Message(Envelope),
    /// Nothing, or the beginning of a message.
    Nothing,
    /// The hypervisor has closed it.
    Closed,
}

/// What a successor is to do with a connection.
#[derive(Debug)]
pub enum Resumed {
    /// Go on in the middle.
    Continue(Connection),
    /// Whether a reply went out is in doubt: close it, and the hypervisor will connect again.
    Close,
}

/// A kept connection.
pub struct Connection {
    socket: OwnedFd,
    journal: Journal,
    #[cfg(test)]
    steps_left: std::cell::Cell<u32>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Connection").field(&self.socket).finish()
    }
}

impl Connection {
    /// A new connection, whose socket and journal are to be kept before its first message is answered.
    pub fn new(socket: OwnedFd, journal: Journal) -> Connection {
        Connection {
            socket,
            journal,
            #[cfg(test)]
            steps_left: std::cell::Cell::new(u32::MAX),
        }
    }

    /// A connection that a dead server has left, or one that handed it over.
    pub fn resume(socket: OwnedFd, journal: Journal) -> Result<Resumed, ConnectionError> {
        let connection = Connection::new(socket, journal);
        let (phase, length) = connection.journal.phase().ok_or(JournalError::Damaged)?;
        match phase {
            Phase::Replying => return Ok(Resumed::Close),
            Phase::Open => {}
            Phase::Done => {
                let left = peek_offset::of(connection.socket()).map_err(system_io("ask"))?;
                let left = usize::try_from(left).unwrap_or(0).min(length);
                connection.take(left)?;
                connection.journal.close_message();
            }
        }
        connection.set_peek_offset(peek_offset::OFF)?;
        Ok(Resumed::Continue(connection))
    }

    /// The socket, to wait for.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The journal, to be kept.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Looks at the next message without taking it. Descriptors that belong to no message are added to
    /// `strays`, also on an error: to close them may take its time.
    pub fn peek(&self, strays: &mut Vec<OwnedFd>) -> Result<Peeked, ConnectionError> {
        let mut header = [0; HEADER_BYTES];
        let (filled, is_closed) = self.peek_bytes(&mut header, None)?;
        if filled < HEADER_BYTES {
            return Ok(if is_closed { Peeked::Closed } else { Peeked::Nothing });
        }
        let header = Header::decode(&header)?;
        let length = HEADER_BYTES + header.payload_bytes;
        let mut bytes = vec![0; length];
        let mut came = Came { first: Vec::new(), others: strays };
        let peeked = self.peek_bytes(&mut bytes, Some(&mut came));
        let fds = came.first;
        let message = match peeked {
            Ok((filled, _)) if filled == length => {
                Message::decode(header.request, &bytes[HEADER_BYTES..], fds.len())
            }
            other => {
                strays.extend(fds);
                let (_, is_closed) = other?;
                return Ok(if is_closed { Peeked::Closed } else { Peeked::Nothing });
            }
        };
        match message {
            Ok(message) if message.fds().is_some() => {
                let need_reply = header.need_reply;
                Ok(Peeked::Message(Envelope { message, need_reply, fds, length }))
            }
            other => {
                strays.extend(fds);
                let (message, need_reply) = (other?, header.need_reply);
                Ok(Peeked::Message(Envelope { message, need_reply, fds: Vec::new(), length }))
            }
        }
    }

    /// Bytes from the front, how many there were, and whether no more will come; with `came`, duplicates
    /// of the descriptors that go with them.
    ///
    /// The kernel ends a peek behind the first piece that carries descriptors, so one message may take
    /// several peeks. It does not end it where the bytes end: the descriptors of the next piece, the next
    /// message perhaps, come along. So those of the first piece that has any are the message's, if it is
    /// one that has descriptors at all; an honest hypervisor sends them with its bytes.
    fn peek_bytes(
        &self,
        bytes: &mut [u8],
        mut came: Option<&mut Came<'_>>,
    ) -> Result<(usize, bool), ConnectionError> {
        let (mut filled, mut is_closed) = (0, false);
        let mut result = Ok(());
        while filled < bytes.len() {
            if filled > 0 {
                self.set_peek_offset(filled as i32)?;
            }
            match self.peek_piece(&mut bytes[filled..], came.as_deref_mut()) {
                Ok(Some(0)) => is_closed = true,
                Ok(Some(count)) => {
                    filled += count;
                    continue;
                }
                Ok(None) => {}
                Err(error) => result = Err(error),
            }
            break;
        }
        // Whoever reads, we or a successor, begins at the front.
        self.set_peek_offset(peek_offset::OFF)?;
        result.map(|()| (filled, is_closed))
    }

    /// `None` if there is nothing, `Some(0)` if there never will be.
    fn peek_piece(
        &self,
        bytes: &mut [u8],
        came: Option<&mut Came<'_>>,
    ) -> Result<Option<usize>, ConnectionError> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let Some(came) = came else {
            // Without room for descriptors none is made, and none has to be closed.
            return match retry(|| rustix::net::recv(&self.socket, &mut *bytes, flags)) {
                Ok((count, _)) => Ok(Some(count)),
                Err(Errno::AGAIN) => Ok(None),
                Err(errno) => Err(system("read")(errno)),
            };
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = retry(|| {
            rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags)
        });
        let received = match received {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(system("read")(errno)),
        };
        let is_first = came.first.is_empty();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                let to = if is_first { &mut came.first } else { &mut *came.others };
                to.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ConnectionError::TooManyFds);
        }
        Ok(Some(received.bytes))
    }

    /// Deals with a message that was acted on: has its descriptors kept by `persist`, which returns once
    /// they are durable; saves `state`; sends the reply, if there is one; takes the message.
    pub fn finish(
        &self,
        envelope: Envelope,
        state: &[u8],
        reply: Option<(&[u8], Option<BorrowedFd<'_>>)>,
        persist: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), ConnectionError> {
        let length = envelope.length;
        self.step()?;
        persist().map_err(ConnectionError::Persist)?;
        self.step()?;
        self.journal.save(state)?;
        self.step()?;
        self.set_peek_offset(i32::try_from(length).unwrap_or(i32::MAX))?;
        self.step()?;
        if let Some((bytes, fd)) = reply {
            self.journal.enter(Phase::Replying, length);
            self.step()?;
            self.send(bytes, fd)?;
            self.step()?;
        }
        self.journal.enter(Phase::Done, length);
        self.step()?;
        self.take(length)?;
        self.step()?;
        self.journal.close_message();
        self.step()?;
        self.set_peek_offset(peek_offset::OFF)
    }

    fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let slices = [IoSlice::new(bytes)];
        match retry(|| rustix::net::sendmsg(&self.socket, &slices, &mut ancillary, flags)) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) | Err(Errno::AGAIN) => Err(ConnectionError::Deaf),
            Err(errno) => Err(system("write")(errno)),
        }
    }

    /// Takes so many bytes, and drops them; descriptors that come along are closed by the kernel.
    fn take(&self, length: usize) -> Result<(), ConnectionError> {
        let mut bytes = vec![0; length];
        let mut left = length;
        while left > 0 {
            let flags = RecvFlags::DONTWAIT;
            let (count, _) = retry(|| rustix::net::recv(&self.socket, &mut bytes[..left], flags))
                .map_err(system("read"))?;
            if count == 0 {
                break;
            }
            left -= count;
        }
        Ok(())
    }

    fn set_peek_offset(&self, offset: i32) -> Result<(), ConnectionError> {
        peek_offset::set(self.socket(), offset).map_err(system_io("prepare"))
    }

    #[cfg(not(test))]
    #[inline(always)]
    fn step(&self) -> Result<(), ConnectionError> {
        Ok(())
    }

    /// A place where a test ends the process.
    #[cfg(test)]
    fn step(&self) -> Result<(), ConnectionError> {
        let left = self.steps_left.get();
        self.steps_left.set(left.saturating_sub(1));
        if left == 0 { Err(ConnectionError::Dead) } else { Ok(()) }
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
