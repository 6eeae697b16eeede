//! Packets and fields of the handover.
//!
//! ```text
//!   message = one or more SEQPACKET packets, descriptors along with them
//!   packet  = magic u32 │ kind u16 │ flags u16 │ checksum u32 │ length u32 │ body
//!   body    = field*            (of all packets of the message, one after the other)
//!   field   = tag u16 │ reserved u16 │ length u32 │ value      (all little-endian)
//! ```
//!
//! Bit 15 of a tag says that the receiver must know it: an unknown one of these refuses the whole
//! handover, before anything has moved. Any other unknown field is skipped, and so are kinds of
//! messages without bit 15. Numbers are never given to something else.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// `NBHO`, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NBHO");
/// The receiver must know this tag or kind.
pub const REQUIRED: u16 = 1 << 15;
const LAST: u16 = 1;
const HEADER_BYTES: usize = 16;
const FIELD_HEADER_BYTES: usize = 8;
/// Body bytes of a packet.
const PACKET_BODY_MAX: usize = 32 << 10;
/// Descriptors of a packet; the kernel takes 253.
const PACKET_FDS_MAX: usize = 128;
/// A message of a sane peer is far smaller.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
const MESSAGE_FDS_MAX: usize = 1 << 20;

/// Why a message cannot be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side has closed, or died.
    #[error("the other server has gone")]
    Gone,
    /// The other side takes too long.
    #[error("the other server did not answer within {0:?}")]
    Late(Duration),
    /// A packet is none of ours, or damaged.
    #[error("the other server sent a damaged packet: {0}")]
    Damaged(&'static str),
    /// Something that we must know, and do not.
    #[error("the other server sent {what} {number} that this version does not know")]
    Unknown {
        /// A message, or a field.
        what: &'static str,
        /// Its number.
        number: u16,
    },
    /// The versions of the two do not overlap.
    #[error(
        "it speaks versions {} to {} of the handover, this server {} to {}: upgrade in smaller steps",
        theirs.0, theirs.1, super::message::VERSION_MIN, super::message::VERSION
    )]
    Versions {
        /// Oldest and newest.
        theirs: (u32, u32),
    },
    /// A field that must be there is not.
    #[error("the other server's message lacks field {0}")]
    Missing(u16),
    /// A system call failed.
    #[error("the connection between the servers failed")]
    System(#[source] io::Error),
}

/// A message as received.
#[derive(Debug)]
pub struct Received {
    /// What it is.
    pub kind: u16,
    /// Its fields.
    pub body: Vec<u8>,
    /// Its descriptors, in order.
    pub fds: Vec<OwnedFd>,
}

/// Fields of a message being written.
#[derive(Debug, Default)]
pub struct Fields(Vec<u8>);

impl Fields {
    /// No fields yet.
    pub fn new() -> Fields {
        Fields::default()
    }

    /// Appends a field.
    #[must_use]
    pub fn with(mut self, tag: u16, value: impl AsRef<[u8]>) -> Fields {
        self.push(tag, value);
        self
    }

    /// Appends a field.
    pub fn push(&mut self, tag: u16, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        self.0.extend_from_slice(&tag.to_le_bytes());
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.0.extend_from_slice(value);
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Splits a body into fields; the tags that are `known` are returned, other optional ones skipped.
pub fn parse<'a>(body: &'a [u8], known: &[u16]) -> Result<Vec<(u16, &'a [u8])>, WireError> {
    let mut fields = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let (header, tail) =
            rest.split_at_checked(FIELD_HEADER_BYTES).ok_or(WireError::Damaged("half a field"))?;
        let tag = u16::from_le_bytes([header[0], header[1]]);
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let (value, tail) = tail
            .split_at_checked(length)
            .ok_or(WireError::Damaged("a field beyond its message"))?;
        rest = tail;
        if known.contains(&tag) {
            fields.push((tag, value));
        } else if tag & REQUIRED != 0 {
            return Err(WireError::Unknown { what: "field", number: tag });
        }
    }
    Ok(fields)
}

/// A field that is a number.
pub fn number(value: &[u8]) -> Result<u64, WireError> {
    let mut bytes = [0; 8];
    let target = bytes.get_mut(..value.len()).ok_or(WireError::Damaged("a number too long"))?;
    target.copy_from_slice(value);
    Ok(u64::from_le_bytes(bytes))
}

/// A field that is text.
pub fn text(value: &[u8]) -> Result<String, WireError> {
    String::from_utf8(value.to_vec()).map_err(|_| WireError::Damaged("text that is none"))
}

/// Sends a message; waits no longer than until `deadline` for room.
pub fn send(
    socket: impl AsFd,
    kind: u16,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), WireError> {
    let mut bodies = body.chunks(PACKET_BODY_MAX);
    let mut groups = fds.chunks(PACKET_FDS_MAX);
    let count = bodies.len().max(groups.len()).max(1);
    for index in 0..count {
        let (chunk, group) = (bodies.next().unwrap_or(&[]), groups.next().unwrap_or(&[]));
        let flags = if index + 1 == count { LAST } else { 0 };
        let mut packet = Vec::with_capacity(HEADER_BYTES + chunk.len());
        packet.extend_from_slice(&MAGIC.to_le_bytes());
        packet.extend_from_slice(&kind.to_le_bytes());
        packet.extend_from_slice(&flags.to_le_bytes());
        packet.extend_from_slice(&crc32c::crc32c(chunk).to_le_bytes());
        packet.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        packet.extend_from_slice(chunk);
        send_packet(&socket, &packet, group, deadline)?;
    }
    Ok(())
}

fn send_packet(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), WireError> {
    let start = Instant::now();
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let slices = [IoSlice::new(bytes)];
        match rustix::net::sendmsg(&socket, &slices, &mut ancillary, flags) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => wait(&socket, PollFlags::OUT, start, deadline)?,
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                return Err(WireError::Gone);
            }
            // The receiver is to close what it was sent before more can be in flight.
            Err(rustix::io::Errno::TOOMANYREFS) => {
                if Instant::now() >= deadline {
                    return Err(WireError::Late(start.elapsed()));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(errno) => return Err(WireError::System(errno.into())),
        }
    }
}

/// Receives a message, whole, until `deadline`. Unknown optional kinds are for the caller to skip.
pub fn receive(socket: impl AsFd, deadline: Instant) -> Result<Received, WireError> {
    let start = Instant::now();
    let mut message = Received { kind: 0, body: Vec::new(), fds: Vec::new() };
    let mut is_first = true;
    loop {
        wait(&socket, PollFlags::IN, start, deadline)?;
        let (bytes, fds) = receive_packet(&socket)?;
        message.fds.extend(fds);
        let (header, chunk) =
            bytes.split_at_checked(HEADER_BYTES).ok_or(WireError::Damaged("half a header"))?;
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        if word(0) != MAGIC {
            return Err(WireError::Damaged("no magic"));
        }
        if word(12) as usize != chunk.len() || word(8) != crc32c::crc32c(chunk) {
            return Err(WireError::Damaged("the checksum does not match"));
        }
        if !std::mem::take(&mut is_first) && half(4) != message.kind {
            return Err(WireError::Damaged("a message within a message"));
        }
        message.kind = half(4);
        message.body.extend_from_slice(chunk);
        if message.body.len() > MESSAGE_BYTES_MAX || message.fds.len() > MESSAGE_FDS_MAX {
            return Err(WireError::Damaged("a message without end"));
        }
        if half(6) & LAST != 0 {
            return Ok(message);
        }
        // Packets that say nothing never make the message too long, and each may be there already.
        if Instant::now() >= deadline {
            return Err(WireError::Late(start.elapsed()));
        }
    }
}

fn receive_packet(socket: impl AsFd) -> Result<(Vec<u8>, Vec<OwnedFd>), WireError> {
    let mut bytes = vec![0; HEADER_BYTES + PACKET_BODY_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FDS_MAX))];
    let received = loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&socket, slices, &mut ancillary, flags) {
            Ok(received) => {
                let fds: Vec<OwnedFd> = ancillary
                    .drain()
                    .filter_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                        _ => None,
                    })
                    .flatten()
                    .collect();
                break (received.bytes, received.flags, fds);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Err(WireError::Gone),
            Err(errno) => return Err(WireError::System(errno.into())),
        }
    };
    let (length, flags, fds) = received;
    if length == 0 {
        return Err(WireError::Gone);
    }
    if flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        // CTRUNC is also what a full descriptor table looks like.
        return Err(WireError::Damaged("it was cut off; are there descriptors enough?"));
    }
    bytes.truncate(length);
    Ok((bytes, fds))
}

fn wait(
    socket: impl AsFd,
    events: PollFlags,
    start: Instant,
    deadline: Instant,
) -> Result<(), WireError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(&socket, events)], Some(&timeout)) {
            Ok(0) => return Err(WireError::Late(start.elapsed())),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(WireError::System(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_long_message_with_many_descriptors_arrives_whole() {
        let (here, there) = pair();
        let body: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
        let sent = body.clone();
        let null = std::fs::File::open("/dev/null").unwrap();
        let sender = std::thread::spawn(move || {
            let fds: Vec<BorrowedFd<'_>> = (0..300).map(|_| null.as_fd()).collect();
            send(&here, 7, &sent, &fds, soon()).unwrap();
            send(&here, 8, &[], &[], soon()).unwrap();
        });
        let message = receive(&there, soon()).unwrap();
        assert_eq!((message.kind, message.fds.len()), (7, 300));
        assert!(message.body == body);
        assert_eq!(receive(&there, soon()).unwrap().kind, 8);
        sender.join().unwrap();
        assert!(matches!(receive(&there, soon()), Err(WireError::Gone)));
    }

    #[test]
    fn a_silent_peer_is_late_and_a_deaf_one_too() {
        let (here, _there) = pair();
        let now = Instant::now();
        assert!(matches!(receive(&here, now), Err(WireError::Late(_))));
        let body = vec![0; 8 << 20];
        assert!(matches!(send(&here, 1, &body, &[], now), Err(WireError::Late(_))));
    }

    #[test]
    fn unknown_fields_are_skipped_unless_required() {
        let fields = Fields::new().with(1, [5]).with(77, b"later").with(2, b"x");
        let known = parse(fields.bytes(), &[1, 2]).unwrap();
        assert_eq!(known, [(1, &[5_u8][..]), (2, &b"x"[..])]);
        let fields = fields.with(REQUIRED | 78, []);
        let refused = parse(fields.bytes(), &[1, 2]);
        let number = REQUIRED | 78;
        assert!(matches!(refused, Err(WireError::Unknown { number: n, .. }) if n == number));
    }

    #[test]
    fn damage_is_noticed() {
        let (here, there) = pair();
        for bytes in [&b"short"[..], &[0; 16], &[0xff; 40]] {
            nebd_abi::socket::send(&here, bytes, &[]).unwrap();
            assert!(matches!(receive(&there, soon()), Err(WireError::Damaged(_))));
        }
        assert!(parse(&[1, 0, 0], &[1]).is_err());
        assert!(parse(&[1, 0, 0, 0, 9, 0, 0, 0, 1], &[1]).is_err());
        assert!(number(&[0; 9]).is_err());
    }
}
