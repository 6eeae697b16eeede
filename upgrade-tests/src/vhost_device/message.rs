//! The frontend's half of the vhost-user protocol: bytes, and a socket that messages go through.
//!
//! Written after the specification, not with the code of the server under test: what both had wrong
//! nobody would notice.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::memory::Region;

/// Numbers of messages.
#[allow(missing_docs)]
pub mod id {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    /// Of those that the backend sends.
    pub const CONFIG_CHANGE: u32 = 2;
}

const HEADER_BYTES: usize = 12;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// Nothing takes longer: a server that died has a successor by then, and requests have ended.
const REPLY_TIME_MAX: Duration = Duration::from_secs(30);
const REPLY_BYTES_MAX: usize = 4096;

/// Why a message has no answer.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The backend has closed the connection, or reset it.
    #[error("the connection was closed")]
    Closed,
    /// It breaks the protocol.
    #[error("{0}")]
    Wrong(String),
    /// A system call failed.
    #[error("cannot {action} the vhost-user socket")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn wrong(text: String) -> MessageError {
    MessageError::Wrong(text)
}

fn broken(action: &'static str) -> impl FnOnce(Errno) -> MessageError {
    move |errno| match errno {
        Errno::PIPE | Errno::CONNRESET => MessageError::Closed,
        errno => MessageError::System { action, source: errno.into() },
    }
}

/// Payloads.
#[derive(Default)]
pub(super) struct Payload(pub(super) Vec<u8>);

impl Payload {
    pub(super) fn u16(mut self, value: u16) -> Payload {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Payload {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Payload {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn region(self, region: &Region) -> Payload {
        self.u64(region.guest_address)
            .u64(region.size)
            .u64(region.user_address)
            .u64(region.mmap_offset)
    }
}

/// A number at the start of a payload.
pub(super) fn number(bytes: &[u8]) -> Result<u64, MessageError> {
    let bytes = bytes.first_chunk().ok_or_else(|| wrong("a reply is too short".into()))?;
    Ok(u64::from_le_bytes(*bytes))
}

/// A message with its header.
pub fn frame(request: u32, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
    let mut bytes = Payload::default().u32(request).u32(flags).u32(payload.len() as u32).0;
    bytes.extend(payload);
    bytes
}

/// Sends bytes, with descriptors, as they are.
pub fn send_bytes(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), MessageError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let slices = [IoSlice::new(bytes)];
    let flags = SendFlags::NOSIGNAL;
    let sent =
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(&socket, &slices, &mut ancillary, flags));
    match sent.map_err(broken("write"))? {
        sent if sent == bytes.len() => Ok(()),
        sent => Err(wrong(format!("{sent} of {} bytes were sent", bytes.len()))),
    }
}

/// A connection to a backend.
#[derive(Debug)]
pub(super) struct Socket(UnixStream);

impl Socket {
    pub(super) fn connect(path: &Path) -> io::Result<Socket> {
        UnixStream::connect(path).map(Socket)
    }

    /// Says something, and reads the answer if one is due.
    pub(super) fn say(
        &self,
        request: u32,
        need_reply: bool,
        payload: &Payload,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MessageError> {
        self.expect_silence()?;
        send_bytes(&self.0, &frame(request, need_reply, &payload.0), fds)
    }

    /// Nothing is answered twice, whoever answers.
    fn expect_silence(&self) -> Result<(), MessageError> {
        let mut byte = [0; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.0, &mut byte, flags) {
            Err(Errno::AGAIN) => Ok(()),
            Ok((0, _)) => Err(MessageError::Closed),
            Ok(_) => Err(wrong("an answer to nothing stands in the socket".into())),
            Err(errno) => Err(broken("read")(errno)),
        }
    }

    /// Reads the answer to `request`.
    pub(super) fn answer(&self, request: u32) -> Result<(Vec<u8>, Option<OwnedFd>), MessageError> {
        let mut header = [0; HEADER_BYTES];
        let fd = self.read(&mut header)?;
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        let (id, flags, size) = (word(0), word(4), word(8) as usize);
        if id != request || flags & (3 | FLAG_REPLY) != VERSION | FLAG_REPLY {
            return Err(wrong(format!("message {request} is answered by {id}, flags {flags:#x}")));
        }
        if size > REPLY_BYTES_MAX {
            return Err(wrong(format!("the answer to {request} has {size} bytes")));
        }
        let mut payload = vec![0; size];
        let late = self.read(&mut payload)?;
        Ok((payload, fd.or(late)))
    }

    fn read(&self, mut bytes: &mut [u8]) -> Result<Option<OwnedFd>, MessageError> {
        let mut fd = None;
        while !bytes.is_empty() {
            if !is_readable(self.0.as_fd(), REPLY_TIME_MAX) {
                return Err(wrong(format!("no answer within {REPLY_TIME_MAX:?}")));
            }
            let (count, came) = receive(self.0.as_fd(), bytes)?;
            fd = fd.or(came);
            if count == 0 {
                return Err(MessageError::Closed);
            }
            bytes = &mut bytes[count..];
        }
        Ok(fd)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether there is something to be read within this time.
pub(super) fn is_readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&limit))).unwrap_or(0) > 0
}

/// Reads what is there, and the last descriptor that came along.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> Result<(usize, Option<OwnedFd>), MessageError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut slices = [IoSliceMut::new(bytes)];
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut slices, &mut ancillary, flags)
    });
    let count = received.map_err(broken("read"))?.bytes;
    let mut fd = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fd = rights.last().or(fd);
        }
    }
    Ok((count, fd))
}
