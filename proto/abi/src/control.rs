//! Messages on the client socket: one `SOCK_SEQPACKET` packet each, fixed little-endian layout.
//!
//! ```text
//!  client                          server
//!  Hello ────────────────────────► versions and features
//!        ◄──────────────────────── Welcome, or Failed
//!  Attach + fds ─────────────────► region, kick × q, call × q
//!        ◄──────────────────────── Attached, or Failed (retry or not)
//!  RegisterMemory + fd, Resize, Info, Ping, Detach: one answer each, by request id
//!        ◄──────────────────────── Event, at any time (request id 0)
//! ```
//!
//! Decoding never trusts a length; unknown kinds are answered with `Failed(EOPNOTSUPP)` by the
//! server and ignored by the client. Fields are appended to a body, never moved: a decoder takes
//! what it knows and ignores what follows.

use crate::layout::{CLIENT_VERSION_BYTES, SessionId};
use crate::name::NAME_BYTES_MAX;
use crate::{Epoch, Errno, Generation, VolumeName};

/// `NEBD`, little-endian, at the start of each message.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NEBD");
/// Version of the message layout.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes before the body.
pub const HEADER_BYTES: usize = 24;
/// Largest message.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Most descriptors with a message: a region and two doorbells for each queue.
pub const FDS_MAX: usize = 1 + 2 * crate::layout::QUEUES_MAX as usize;

/// How a client attaches a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachFlags(pub u32);

impl AttachFlags {
    /// No other session may hold the volume.
    pub const EXCLUSIVE: AttachFlags = AttachFlags(1 << 0);
    /// Mutations are refused with `EROFS`.
    pub const READ_ONLY: AttachFlags = AttachFlags(1 << 1);
    /// The session was attached before: its region holds requests in flight, and an error is no option.
    pub const REATTACH: AttachFlags = AttachFlags(1 << 2);

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: AttachFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for AttachFlags {
    type Output = AttachFlags;

    fn bitor(self, other: AttachFlags) -> AttachFlags {
        AttachFlags(self.0 | other.0)
    }
}

/// What an attached volume is and can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Bytes.
    pub size: u64,
    /// 512 or 4096: alignment of offsets and lengths.
    pub block_size: u32,
    /// Whether mutations are refused.
    pub read_only: bool,
    /// Whether the backend can discard.
    pub can_discard: bool,
    /// Whether the backend can write zeroes faster than by writing them.
    pub can_write_zeroes: bool,
    /// Who serves it.
    pub epoch: Epoch,
    /// Most bytes of one read or write.
    pub transfer_bytes_max: u64,
    /// Identity of the volume's contents where they can be lost (`mem`); a reattach names it, and
    /// is refused with `ESTALE` if it changed. Zero where contents are durable.
    pub incarnation: u64,
}

/// What happened to a session, told without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The volume has another size, in bytes.
    Resized(u64),
    /// The volume is parked: requests wait for the operator.
    Parked,
    /// The volume is served again.
    Unparked,
    /// The server detached the session because its region breaks a rule.
    Detached(Errno),
}

/// One message, in either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Client: the first message.
    Hello {
        /// Oldest region layout the client can make.
        layout_min: u32,
        /// Newest region layout the client can make.
        layout_max: u32,
        /// Optional features the client offers; none is given out yet.
        features: u64,
        /// Process id, for people.
        pid: u32,
        /// Version of the client library.
        version: String,
    },
    /// Server: answer to [`Message::Hello`].
    Welcome {
        /// Layout to be used.
        layout: u32,
        /// Generation of the server.
        generation: Generation,
        /// Those of the offered features that the server takes.
        features: u64,
        /// Process id, for people.
        pid: u32,
        /// Version of the server.
        version: String,
    },
    /// Client: attach a volume; descriptors: region, kick of each queue, call of each queue.
    Attach {
        /// Identity of the session.
        session: SessionId,
        /// How.
        flags: AttachFlags,
        /// Queues, hence doorbells.
        queue_count: u32,
        /// `incarnation` as told at the first attach; zero at the first.
        incarnation: u64,
        /// The volume.
        volume: VolumeName,
    },
    /// Server: answer to [`Message::Attach`] and [`Message::Info`].
    Attached(VolumeInfo),
    /// Server: the request failed.
    Failed {
        /// Why.
        errno: Errno,
        /// Whether waiting may mend it.
        retry: bool,
        /// What happened, to which volume, and what to do.
        text: String,
    },
    /// Client: use a sealed memfd of its own as data buffers; descriptor: the memfd.
    RegisterMemory {
        /// Id in iovecs, from 1.
        memory: u32,
    },
    /// Client: forget a registered memory.
    UnregisterMemory {
        /// Its id.
        memory: u32,
    },
    /// Server: done, with nothing to say.
    Done,
    /// Client: change the size. Not idempotent, hence with an operation id and a durable answer.
    Resize {
        /// Chosen by the client, the same over retries.
        operation: [u8; 16],
        /// New size in bytes.
        size: u64,
    },
    /// Client: ask for [`Message::Attached`] again.
    Info,
    /// Client: the session ends.
    Detach,
    /// Client: is anybody there?
    Ping,
    /// Server: something happened.
    Event(Event),
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than its header or its body needs.
    #[error("the message is cut short")]
    Short,
    /// Not `NEBD`.
    #[error("the message does not start with NEBD")]
    Magic,
    /// A version this build does not speak.
    #[error("message version {0} is not spoken here")]
    Version(u16),
    /// A kind this build does not know; the request id can still be answered.
    #[error("message kind {kind} is not known here")]
    Kind {
        /// The kind.
        kind: u16,
        /// To be answered.
        request: u64,
    },
    /// A field has an impossible value.
    #[error("message field {0} has an impossible value")]
    Field(&'static str),
}

impl Message {
    fn kind(&self) -> u16 {
        match self {
            Message::Hello { .. } => 1,
            Message::Welcome { .. } => 2,
            Message::Attach { .. } => 3,
            Message::Attached(_) => 4,
            Message::Failed { .. } => 5,
            Message::RegisterMemory { .. } => 6,
            Message::UnregisterMemory { .. } => 7,
            Message::Done => 8,
            Message::Resize { .. } => 9,
            Message::Info => 10,
            Message::Detach => 11,
            Message::Ping => 12,
            Message::Event(_) => 13,
        }
    }

    /// The packet for this message, as answer to (or with) `request`.
    pub fn encode(&self, request: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + 256);
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        out.extend_from_slice(&self.kind().to_le_bytes());
        out.extend_from_slice(&request.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        self.encode_body(&mut out);
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        let u32 = |value: u32, out: &mut Vec<u8>| out.extend_from_slice(&value.to_le_bytes());
        let u64 = |value: u64, out: &mut Vec<u8>| out.extend_from_slice(&value.to_le_bytes());
        match self {
            Message::Hello { layout_min, layout_max, features, pid, version } => {
                u32(*layout_min, out);
                u32(*layout_max, out);
                u64(*features, out);
                u32(*pid, out);
                u32(0, out);
                padded(version, CLIENT_VERSION_BYTES, out);
            }
            Message::Welcome { layout, generation, features, pid, version } => {
                u32(*layout, out);
                u32(generation.0, out);
                u64(*features, out);
                u32(*pid, out);
                u32(0, out);
                padded(version, CLIENT_VERSION_BYTES, out);
            }
            Message::Attach { session, flags, queue_count, incarnation, volume } => {
                out.extend_from_slice(&session.0);
                u32(flags.0, out);
                u32(*queue_count, out);
                u64(*incarnation, out);
                padded(volume.as_str(), NAME_BYTES_MAX, out);
            }
            Message::Attached(info) => {
                u64(info.size, out);
                u32(info.block_size, out);
                let flags = [info.read_only, info.can_discard, info.can_write_zeroes];
                u32(flags.iter().rev().fold(0, |bits, flag| bits << 1 | u32::from(*flag)), out);
                u64(info.epoch.to_bits(), out);
                u64(info.transfer_bytes_max, out);
                u64(info.incarnation, out);
            }
            Message::Failed { errno, retry, text } => {
                u32(errno.0 as u32, out);
                u32(u32::from(*retry), out);
                let mut end = text.len().min(MESSAGE_BYTES_MAX - HEADER_BYTES - 8);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                out.extend_from_slice(&text.as_bytes()[..end]);
            }
            Message::RegisterMemory { memory } | Message::UnregisterMemory { memory } => {
                u32(*memory, out);
                u32(0, out);
            }
            Message::Resize { operation, size } => {
                out.extend_from_slice(operation);
                u64(*size, out);
            }
            Message::Event(event) => {
                let (kind, value) = match event {
                    Event::Resized(size) => (1, *size),
                    Event::Parked => (2, 0),
                    Event::Unparked => (3, 0),
                    Event::Detached(errno) => (4, errno.0 as u64),
                };
                u32(kind, out);
                u32(0, out);
                u64(value, out);
            }
            Message::Done | Message::Info | Message::Detach | Message::Ping => {}
        }
    }

    /// The message in a packet, and its request id.
    pub fn decode(packet: &[u8]) -> Result<(u64, Message), DecodeError> {
        let mut body = Reader(packet);
        if body.u32()? != MAGIC {
            return Err(DecodeError::Magic);
        }
        let (version, kind) = (body.u16()?, body.u16()?);
        if version != PROTOCOL_VERSION {
            return Err(DecodeError::Version(version));
        }
        let request = body.u64()?;
        body.u64()?;
        Ok((request, Message::decode_body(kind, request, &mut body)?))
    }

    fn decode_body(kind: u16, request: u64, body: &mut Reader<'_>) -> Result<Message, DecodeError> {
        Ok(match kind {
            1 => {
                let (layout_min, layout_max) = (body.u32()?, body.u32()?);
                let (features, pid, _) = (body.u64()?, body.u32()?, body.u32()?);
                let version = body.text(CLIENT_VERSION_BYTES, "version")?;
                Message::Hello { layout_min, layout_max, features, pid, version }
            }
            2 => {
                let (layout, generation) = (body.u32()?, Generation(body.u32()?));
                let (features, pid, _) = (body.u64()?, body.u32()?, body.u32()?);
                let version = body.text(CLIENT_VERSION_BYTES, "version")?;
                Message::Welcome { layout, generation, features, pid, version }
            }
            3 => Message::Attach {
                session: SessionId(body.array()?),
                flags: AttachFlags(body.u32()?),
                queue_count: body.u32()?,
                incarnation: body.u64()?,
                volume: body
                    .text(NAME_BYTES_MAX, "volume")?
                    .parse()
                    .map_err(|_| DecodeError::Field("volume"))?,
            },
            4 => {
                let (size, block_size, flags) = (body.u64()?, body.u32()?, body.u32()?);
                Message::Attached(VolumeInfo {
                    size,
                    block_size,
                    read_only: flags & 1 != 0,
                    can_discard: flags & 2 != 0,
                    can_write_zeroes: flags & 4 != 0,
                    epoch: Epoch::from_bits(body.u64()?),
                    transfer_bytes_max: body.u64()?,
                    incarnation: body.u64()?,
                })
            }
            5 => Message::Failed {
                errno: Errno(body.u32()? as i32),
                retry: body.u32()? & 1 != 0,
                text: String::from_utf8_lossy(body.0).into_owned(),
            },
            6 => Message::RegisterMemory { memory: body.u32()? },
            7 => Message::UnregisterMemory { memory: body.u32()? },
            8 => Message::Done,
            9 => Message::Resize { operation: body.array()?, size: body.u64()? },
            10 => Message::Info,
            11 => Message::Detach,
            12 => Message::Ping,
            13 => {
                let (kind, _, value) = (body.u32()?, body.u32()?, body.u64()?);
                Message::Event(match kind {
                    1 => Event::Resized(value),
                    2 => Event::Parked,
                    3 => Event::Unparked,
                    4 => Event::Detached(Errno(value as i32)),
                    _ => return Err(DecodeError::Field("event")),
                })
            }
            kind => return Err(DecodeError::Kind { kind, request }),
        })
    }
}

fn padded(text: &str, width: usize, out: &mut Vec<u8>) {
    let bytes = &text.as_bytes()[..text.len().min(width)];
    out.extend_from_slice(bytes);
    out.resize(out.len() + width - bytes.len(), 0);
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Text padded with zeros to `width` bytes.
    fn text(&mut self, width: usize, field: &'static str) -> Result<String, DecodeError> {
        let (bytes, rest) = self.0.split_at_checked(width).ok_or(DecodeError::Short)?;
        self.0 = rest;
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(width);
        let text = std::str::from_utf8(&bytes[..end]).map_err(|_| DecodeError::Field(field))?;
        Ok(text.to_owned())
    }
}
