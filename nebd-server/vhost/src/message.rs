//! Messages of the vhost-user protocol that a block device takes part in, and their bytes.
//!
//! ```text
//!       0       1       2       3       4       5       6       7
//!   0  │ request                       │ flags: version 1, reply, need │
//!   8  │ size of the payload           │ payload …
//! ```
//!
//! Numbers are in the machine's order, which is little-endian wherever this runs. Nothing is trusted:
//! lengths and numbers of descriptors are checked, and what is unknown stays a number.

use crate::memory::RegionSpec;
use crate::request::CONFIG_BYTES_MAX;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;
/// Bytes of the longest payload that is read: unknown messages may be longer than known ones.
pub const PAYLOAD_BYTES_MAX: usize = 4096;
/// Descriptors that one message carries.
pub const FDS_MAX: usize = 8;

const VERSION: u32 = 1;
const FLAG_VERSION: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In the payload of `SET_VRING_KICK` and its kin: the ring's index, and that no descriptor comes.
const RING_INDEX: u64 = 0xff;
const RING_NO_FD: u64 = 1 << 8;

/// Protocol features.
pub mod protocol {
    /// Several queues, `GET_QUEUE_NUM`.
    pub const MQ: u64 = 1 << 0;
    /// Any message may ask for an acknowledgement.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// A second socket for what we have to say.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// `GET_CONFIG`, `SET_CONFIG`, and that the configuration has changed.
    pub const CONFIG: u64 = 1 << 9;
    /// The inflight record.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// `RESET_DEVICE`.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Regions of memory one at a time.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// `GET_STATUS`, `SET_STATUS`.
    pub const STATUS: u64 = 1 << 16;
    /// What we offer. Not the dirty log (`LOG_SHMFD`), not postcopy (`PAGEFAULT`).
    pub const OFFERED: u64 = MQ
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}

mod id {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const POSTCOPY_LISTEN: u32 = 29;
    pub const POSTCOPY_END: u32 = 30;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    /// Of the messages that we send.
    pub const CONFIG_CHANGE: u32 = 2;
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Another version, or a reply where a request should be.
    #[error("a message with the flags {0:#x}")]
    Flags(u32),
    /// A payload that is longer than any.
    #[error("a payload of {0} bytes is too long")]
    TooLong(u32),
    /// A payload of the wrong length.
    #[error("message {request} has a payload of {bytes} bytes")]
    Length {
        /// Which message.
        request: u32,
        /// Bytes of its payload.
        bytes: usize,
    },
    /// Too few descriptors, or too many.
    #[error("message {request} came with {count} descriptors")]
    Fds {
        /// Which message.
        request: u32,
        /// How many came.
        count: usize,
    },
}

/// The first bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message.
    pub request: u32,
    /// Whether an acknowledgement is wanted, if that was agreed on.
    pub need_reply: bool,
    /// Bytes that follow.
    pub payload_bytes: usize,
}

impl Header {
    /// Reads a request's header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, MessageError> {
        let mut input = Input(bytes);
        let (request, flags, size) = (input.u32(), input.u32(), input.u32());
        if flags & FLAG_VERSION != VERSION || flags & FLAG_REPLY != 0 {
            return Err(MessageError::Flags(flags));
        }
        let payload_bytes = size as usize;
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(MessageError::TooLong(size));
        }
        Ok(Header { request, need_reply: flags & FLAG_NEED_REPLY != 0, payload_bytes })
    }
}

/// A ring and a number that belongs to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingState {
    /// Which ring.
    pub index: u32,
    /// The number.
    pub number: u32,
}

/// Where a ring is: user addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Which ring.
    pub index: u32,
    /// Bit 0: writes to the used ring are to be logged.
    pub flags: u32,
    /// The descriptor table, or the packed ring.
    pub descriptors: u64,
    /// The used ring, or the device's event suppression.
    pub used: u64,
    /// The available ring, or the driver's event suppression.
    pub available: u64,
    /// For the dirty log.
    pub log: u64,
}

/// A ring, and whether a descriptor came for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFd {
    /// Which ring.
    pub index: u32,
    /// False: poll, or do not ring.
    pub has_fd: bool,
}

/// A piece of the configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigPiece {
    /// Where it starts.
    pub offset: u32,
    /// 0, or 1 for a live migration.
    pub flags: u32,
    /// Its bytes; in `GET_CONFIG` only their number counts.
    pub bytes: Vec<u8>,
}

/// Where an inflight record is, and how large.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightDescription {
    /// Bytes.
    pub mmap_size: u64,
    /// Where it starts in its memfd.
    pub mmap_offset: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Whether the structure was sent with its padding: 24 bytes, as by QEMU, or 20, as specified.
    pub is_padded: bool,
}

/// What a hypervisor says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the specification")]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    ResetDevice,
    SetMemTable(Vec<RegionSpec>),
    GetMaxMemSlots,
    AddMemReg(RegionSpec),
    RemMemReg(RegionSpec),
    SetLogBase,
    SetLogFd,
    SetVringNum(RingState),
    SetVringAddr(RingAddresses),
    SetVringBase(RingState),
    GetVringBase(RingState),
    SetVringKick(RingFd),
    SetVringCall(RingFd),
    SetVringErr(RingFd),
    SetVringEnable(RingState),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetBackendReqFd,
    GetConfig(ConfigPiece),
    SetConfig(ConfigPiece),
    GetInflightFd(InflightDescription),
    SetInflightFd(InflightDescription),
    SetStatus(u64),
    GetStatus,
    /// Postcopy migration, which was not offered.
    Postcopy(u32),
    /// Anything else.
    Unknown(u32),
}

impl Message {
    /// Its number.
    pub fn id(&self) -> u32 {
        match self {
            Message::GetFeatures => id::GET_FEATURES,
            Message::SetFeatures(_) => id::SET_FEATURES,
            Message::SetOwner => id::SET_OWNER,
            Message::ResetOwner => id::RESET_OWNER,
            Message::ResetDevice => id::RESET_DEVICE,
            Message::SetMemTable(_) => id::SET_MEM_TABLE,
            Message::GetMaxMemSlots => id::GET_MAX_MEM_SLOTS,
            Message::AddMemReg(_) => id::ADD_MEM_REG,
            Message::RemMemReg(_) => id::REM_MEM_REG,
            Message::SetLogBase => id::SET_LOG_BASE,
            Message::SetLogFd => id::SET_LOG_FD,
            Message::SetVringNum(_) => id::SET_VRING_NUM,
            Message::SetVringAddr(_) => id::SET_VRING_ADDR,
            Message::SetVringBase(_) => id::SET_VRING_BASE,
            Message::GetVringBase(_) => id::GET_VRING_BASE,
            Message::SetVringKick(_) => id::SET_VRING_KICK,
            Message::SetVringCall(_) => id::SET_VRING_CALL,
            Message::SetVringErr(_) => id::SET_VRING_ERR,
            Message::SetVringEnable(_) => id::SET_VRING_ENABLE,
            Message::GetProtocolFeatures => id::GET_PROTOCOL_FEATURES,
            Message::SetProtocolFeatures(_) => id::SET_PROTOCOL_FEATURES,
            Message::GetQueueNum => id::GET_QUEUE_NUM,
            Message::SetBackendReqFd => id::SET_BACKEND_REQ_FD,
            Message::GetConfig(_) => id::GET_CONFIG,
            Message::SetConfig(_) => id::SET_CONFIG,
            Message::GetInflightFd(_) => id::GET_INFLIGHT_FD,
            Message::SetInflightFd(_) => id::SET_INFLIGHT_FD,
            Message::SetStatus(_) => id::SET_STATUS,
            Message::GetStatus => id::GET_STATUS,
            Message::Postcopy(id) | Message::Unknown(id) => *id,
        }
    }

    /// Reads a payload, with as many descriptors as came along. Where none belong, any number may come:
    /// a peek brings those of the next message too.
    pub fn decode(request: u32, payload: &[u8], fds: usize) -> Result<Message, MessageError> {
        let message = decode_payload(request, payload)
            .ok_or(MessageError::Length { request, bytes: payload.len() })?;
        if message.fds().is_some_and(|count| count != fds) {
            return Err(MessageError::Fds { request, count: fds });
        }
        Ok(message)
    }

    /// How many descriptors come along; `None` if any that do are of no use, and to be closed.
    pub fn fds(&self) -> Option<usize> {
        match self {
            Message::SetMemTable(regions) => Some(regions.len()),
            Message::SetVringKick(ring)
            | Message::SetVringCall(ring)
            | Message::SetVringErr(ring) => ring.has_fd.then_some(1),
            Message::AddMemReg(_) | Message::SetBackendReqFd | Message::SetInflightFd(_) => Some(1),
            _ => None,
        }
    }

    /// A whole message, as a hypervisor sends it.
    pub fn encode(&self, need_reply: bool) -> Vec<u8> {
        let flags = VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
        frame(self.id(), flags, |output| self.encode_payload(output))
    }

    fn encode_payload(&self, output: &mut Output) {
        match self {
            Message::SetFeatures(number)
            | Message::SetProtocolFeatures(number)
            | Message::SetStatus(number) => output.u64(*number),
            Message::SetMemTable(regions) => {
                output.u32(regions.len() as u32).u32(0);
                regions.iter().fold(output, Output::region)
            }
            Message::AddMemReg(region) | Message::RemMemReg(region) => output.u64(0).region(region),
            Message::SetVringNum(state)
            | Message::SetVringBase(state)
            | Message::GetVringBase(state)
            | Message::SetVringEnable(state) => output.u32(state.index).u32(state.number),
            Message::SetVringAddr(addresses) => output
                .u32(addresses.index)
                .u32(addresses.flags)
                .u64(addresses.descriptors)
                .u64(addresses.used)
                .u64(addresses.available)
                .u64(addresses.log),
            Message::SetVringKick(ring)
            | Message::SetVringCall(ring)
            | Message::SetVringErr(ring) => {
                let no_fd = if ring.has_fd { 0 } else { RING_NO_FD };
                output.u64(u64::from(ring.index) | no_fd)
            }
            Message::GetConfig(piece) | Message::SetConfig(piece) => output.config(piece),
            Message::GetInflightFd(inflight) | Message::SetInflightFd(inflight) => {
                output.inflight(inflight)
            }
            Message::SetLogBase => output.u64(0),
            _ => output,
        };
    }

    /// Whether it has a reply of its own, and so is never acknowledged.
    pub fn has_reply(&self) -> bool {
        matches!(
            self,
            Message::GetFeatures
                | Message::GetProtocolFeatures
                | Message::GetQueueNum
                | Message::GetMaxMemSlots
                | Message::GetVringBase(_)
                | Message::GetConfig(_)
                | Message::GetInflightFd(_)
                | Message::GetStatus
        )
    }
}

fn decode_payload(request: u32, payload: &[u8]) -> Option<Message> {
    let mut input = Input(payload);
    let length = payload.len();
    let exactly = |bytes: usize| (length == bytes).then_some(());
    let message = match request {
        id::GET_FEATURES => Message::GetFeatures,
        id::SET_OWNER => Message::SetOwner,
        id::RESET_OWNER => Message::ResetOwner,
        id::RESET_DEVICE => Message::ResetDevice,
        id::GET_MAX_MEM_SLOTS => Message::GetMaxMemSlots,
        id::GET_PROTOCOL_FEATURES => Message::GetProtocolFeatures,
        id::GET_QUEUE_NUM => Message::GetQueueNum,
        id::GET_STATUS => Message::GetStatus,
        _ => return decode_body(request, &mut input, exactly),
    };
    // Some send a number of zero where the specification has nothing.
    (length == 0 || length == 8).then_some(message)
}

fn decode_body(
    request: u32,
    input: &mut Input<'_>,
    exactly: impl Fn(usize) -> Option<()>,
) -> Option<Message> {
    let number = |input: &mut Input<'_>| exactly(8).map(|()| input.u64());
    let state = |input: &mut Input<'_>| {
        exactly(8).map(|()| RingState { index: input.u32(), number: input.u32() })
    };
    let ring = |input: &mut Input<'_>| {
        let bits = number(input)?;
        let index = (bits & RING_INDEX) as u32;
        Some(RingFd { index, has_fd: bits & RING_NO_FD == 0 })
    };
    let region = |input: &mut Input<'_>| {
        exactly(40)?;
        input.u64();
        Some(input.region())
    };
    Some(match request {
        id::SET_FEATURES => Message::SetFeatures(number(input)?),
        id::SET_PROTOCOL_FEATURES => Message::SetProtocolFeatures(number(input)?),
        id::SET_STATUS => Message::SetStatus(number(input)?),
        id::SET_MEM_TABLE => {
            let count = (input.u32() as usize, input.u32()).0;
            if count > FDS_MAX {
                return None;
            }
            // QEMU has been known to send its whole array.
            let whole = exactly(8 + 32 * FDS_MAX);
            exactly(8 + 32 * count).or(whole)?;
            Message::SetMemTable((0..count).map(|_| input.region()).collect())
        }
        id::ADD_MEM_REG => Message::AddMemReg(region(input)?),
        id::REM_MEM_REG => Message::RemMemReg(region(input)?),
        id::SET_LOG_BASE => Message::SetLogBase,
        id::SET_LOG_FD => Message::SetLogFd,
        id::SET_VRING_NUM => Message::SetVringNum(state(input)?),
        id::SET_VRING_BASE => Message::SetVringBase(state(input)?),
        id::GET_VRING_BASE => Message::GetVringBase(state(input)?),
        id::SET_VRING_ENABLE => Message::SetVringEnable(state(input)?),
        id::SET_VRING_ADDR => {
            exactly(40)?;
            Message::SetVringAddr(RingAddresses {
                index: input.u32(),
                flags: input.u32(),
                descriptors: input.u64(),
                used: input.u64(),
                available: input.u64(),
                log: input.u64(),
            })
        }
        id::SET_VRING_KICK => Message::SetVringKick(ring(input)?),
        id::SET_VRING_CALL => Message::SetVringCall(ring(input)?),
        id::SET_VRING_ERR => Message::SetVringErr(ring(input)?),
        id::SET_BACKEND_REQ_FD => Message::SetBackendReqFd,
        id::GET_CONFIG => Message::GetConfig(input.config()?),
        id::SET_CONFIG => Message::SetConfig(input.config()?),
        id::GET_INFLIGHT_FD => Message::GetInflightFd(input.inflight()?),
        id::SET_INFLIGHT_FD => Message::SetInflightFd(input.inflight()?),
        id::POSTCOPY_ADVISE..=id::POSTCOPY_END => Message::Postcopy(request),
        _ => Message::Unknown(request),
    })
}

const _: () = assert!(id::POSTCOPY_LISTEN == id::POSTCOPY_ADVISE + 1);

/// What we say to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number: features, an acknowledgement (0 is good).
    Number(u64),
    /// Where a ring has stopped.
    Ring(RingState),
    /// A piece of the configuration space; `None` if there is no such piece.
    Config(Option<ConfigPiece>),
    /// An inflight record, whose descriptor goes along.
    Inflight(InflightDescription),
}

impl Reply {
    /// Its bytes, as the answer to message `request`.
    pub fn encode(&self, request: u32) -> Vec<u8> {
        frame(request, VERSION | FLAG_REPLY, |output| {
            match self {
                Reply::Number(number) => output.u64(*number),
                Reply::Ring(state) => output.u32(state.index).u32(state.number),
                Reply::Config(Some(piece)) => output.config(piece),
                Reply::Config(None) => output,
                Reply::Inflight(inflight) => output.inflight(inflight),
            };
        })
    }
}

/// What we say of our own accord: the configuration space has changed. No answer is asked for.
pub fn config_changed() -> Vec<u8> {
    frame(id::CONFIG_CHANGE, VERSION, |_| {})
}

fn frame(request: u32, flags: u32, payload: impl FnOnce(&mut Output)) -> Vec<u8> {
    let mut output = Output(Vec::with_capacity(64));
    output.u32(request).u32(flags).u32(0);
    payload(&mut output);
    let size = (output.0.len() - HEADER_BYTES) as u32;
    output.0[8..HEADER_BYTES].copy_from_slice(&size.to_le_bytes());
    output.0
}

pub(crate) struct Output(pub(crate) Vec<u8>);

impl Output {
    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn region(&mut self, region: &RegionSpec) -> &mut Self {
        self.u64(region.guest_address)
            .u64(region.size)
            .u64(region.user_address)
            .u64(region.mmap_offset)
    }

    fn config(&mut self, piece: &ConfigPiece) -> &mut Self {
        self.u32(piece.offset).u32(piece.bytes.len() as u32).u32(piece.flags);
        self.0.extend(&piece.bytes);
        self
    }

    fn inflight(&mut self, inflight: &InflightDescription) -> &mut Self {
        self.u64(inflight.mmap_size).u64(inflight.mmap_offset);
        self.u16(inflight.queues).u16(inflight.queue_size);
        if inflight.is_padded { self.u32(0) } else { self }
    }
}

/// Bytes, read from the front; zeros at the end, so lengths are to be checked.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((bytes, rest)) => {
                self.0 = rest;
                *bytes
            }
            None => [0; N],
        }
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub(crate) fn region(&mut self) -> RegionSpec {
        RegionSpec {
            guest_address: self.u64(),
            size: self.u64(),
            user_address: self.u64(),
            mmap_offset: self.u64(),
        }
    }

    fn config(&mut self) -> Option<ConfigPiece> {
        if self.0.len() < 12 {
            return None;
        }
        let (offset, size, flags) = (self.u32(), self.u32() as usize, self.u32());
        (size == self.0.len() && size <= CONFIG_BYTES_MAX).then(|| ConfigPiece {
            offset,
            flags,
            bytes: self.0.to_vec(),
        })
    }

    fn inflight(&mut self) -> Option<InflightDescription> {
        let is_padded = match self.0.len() {
            20 => false,
            24 => true,
            _ => return None,
        };
        Some(InflightDescription {
            mmap_size: self.u64(),
            mmap_offset: self.u64(),
            queues: self.u16(),
            queue_size: self.u16(),
            is_padded,
        })
    }
}

#[cfg(test)]
mod tests;
