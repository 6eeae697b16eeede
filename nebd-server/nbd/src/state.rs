//! A connection as bytes, for the successor of this server.
//!
//! ```text
//!   state = `NBDS` │ version u16 │ zero u16 │ field*
//!   field = tag u16 │ zero u16 │ length u32 │ value        (all little-endian, as in our handover)
//! ```
//!
//! Bit 15 of a tag says that the receiver must know it; any other unknown field is skipped. Tags
//! are never given to something else.
//!
//! A connection is handed over once its last reply is under way and none is half encoded:
//!
//! ```text
//!   unread = requests to be carried out again │ append_unread │ input not advanced over
//!   unsent = bytes of replies that the socket did not take
//! ```
//!
//! A request that was dispatched may be carried out again, for all that travel here are idempotent;
//! its header (and payload) then stands in `unread`, under the rules that hold for every takeover.

use crate::export::{ExportFlags, Negotiated, Sizes, Terms};
use crate::wire;

/// `NBDS`, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NBDS");
/// Version of the state.
pub const VERSION: u16 = 1;
/// Most that `unread` and `unsent` may hold, each. A server whose connections have more under way
/// closes them instead.
pub const STREAM_BYTES_MAX: usize = 80 << 20;

const REQUIRED: u16 = 1 << 15;
const TAG_EXPORT: u16 = REQUIRED | 1;
const TAG_SIZE: u16 = REQUIRED | 2;
const TAG_SIZES: u16 = REQUIRED | 3;
const TAG_FLAGS: u16 = REQUIRED | 4;
const TAG_AGREED: u16 = REQUIRED | 5;
const TAG_UNREAD: u16 = REQUIRED | 6;
const TAG_UNSENT: u16 = REQUIRED | 7;
const AGREED_STRUCTURED: u32 = 1 << 0;
const AGREED_ALLOCATION: u32 = 1 << 1;

/// A connection between two messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionState {
    /// What was agreed on. Never under TLS.
    pub negotiated: Negotiated,
    /// Bytes of the client that the successor reads first.
    pub unread: Vec<u8>,
    /// Bytes for the client that the successor sends first.
    pub unsent: Vec<u8>,
}

/// Why a connection cannot be handed over; it is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// Keys and counters of a TLS connection stay in their process.
    #[error("a connection under TLS is not handed over")]
    Tls,
    /// More than [`STREAM_BYTES_MAX`].
    #[error("the connection has too much under way")]
    TooLong,
    /// A name that no client could have sent.
    #[error("the name of the export cannot travel")]
    Name,
}

/// Why bytes are no state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not ours, or cut off.
    #[error("the state of an NBD connection is damaged")]
    Damaged,
    /// A version that this server does not know.
    #[error("version {0} of the state of NBD connections is not known here")]
    Version(u16),
    /// A field that must be understood, and is not.
    #[error("field {0:#x} of the state of an NBD connection is not known here")]
    Unknown(u16),
    /// A field that must be there, and is not.
    #[error("the state of an NBD connection lacks field {0:#x}")]
    Missing(u16),
    /// A value that no server would have agreed to, or that this one does not know.
    #[error("field {0:#x} of the state of an NBD connection has an impossible value")]
    Value(u16),
}

impl ConnectionState {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let Negotiated { export, terms, tls } = &self.negotiated;
        if *tls {
            return Err(EncodeError::Tls);
        }
        if self.unread.len().max(self.unsent.len()) > STREAM_BYTES_MAX {
            return Err(EncodeError::TooLong);
        }
        if !wire::is_string(export) {
            return Err(EncodeError::Name);
        }
        let sizes = terms.sizes;
        let sizes = [sizes.minimum(), sizes.preferred(), sizes.payload_max()].map(u32::to_le_bytes);
        let structured = if terms.structured { AGREED_STRUCTURED } else { 0 };
        let allocation = if terms.allocation { AGREED_ALLOCATION } else { 0 };
        let mut out = Vec::with_capacity(128 + self.unread.len() + self.unsent.len());
        out.extend(MAGIC.to_le_bytes());
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 2]);
        let mut field = |tag: u16, value: &[u8]| {
            out.extend(tag.to_le_bytes());
            out.extend([0; 2]);
            out.extend((value.len() as u32).to_le_bytes());
            out.extend_from_slice(value);
        };
        field(TAG_EXPORT, export.as_bytes());
        field(TAG_SIZE, &terms.size.to_le_bytes());
        field(TAG_SIZES, sizes.as_flattened());
        field(TAG_FLAGS, &terms.flags.bits().to_le_bytes());
        field(TAG_AGREED, &(structured | allocation).to_le_bytes());
        field(TAG_UNREAD, &self.unread);
        field(TAG_UNSENT, &self.unsent);
        Ok(out)
    }

    /// From bytes. What is in them was checked by a server once, and is checked again.
    pub fn decode(bytes: &[u8]) -> Result<ConnectionState, DecodeError> {
        let mut input = Little(bytes);
        if input.u32() != Some(MAGIC) {
            return Err(DecodeError::Damaged);
        }
        let version = input.u16().ok_or(DecodeError::Damaged)?;
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        input.u16().ok_or(DecodeError::Damaged)?;
        let mut fields = Fields::default();
        while !input.0.is_empty() {
            let (tag, value) = input.field().ok_or(DecodeError::Damaged)?;
            fields.take(tag, value)?;
        }
        fields.state()
    }
}

/// Little-endian bytes, eaten from the front.
struct Little<'a>(&'a [u8]);

impl<'a> Little<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn field(&mut self) -> Option<(u16, &'a [u8])> {
        let tag = self.u16()?;
        self.u16()?;
        let length = self.u32()? as usize;
        let (value, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, value))
    }
}

/// Fields as they come; one that comes twice counts as damage.
#[derive(Default)]
struct Fields<'a> {
    export: Option<&'a str>,
    size: Option<u64>,
    sizes: Option<Sizes>,
    flags: Option<ExportFlags>,
    agreed: Option<u32>,
    unread: Option<&'a [u8]>,
    unsent: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    fn take(&mut self, tag: u16, value: &'a [u8]) -> Result<(), DecodeError> {
        let wrong = DecodeError::Value(tag);
        let is_first = match tag {
            TAG_EXPORT => {
                let text = std::str::from_utf8(value).ok().filter(|text| wire::is_string(text));
                self.export.replace(text.ok_or(wrong)?).is_none()
            }
            TAG_SIZE => {
                let size = u64::from_le_bytes(value.try_into().map_err(|_| wrong)?);
                self.size.replace(size).is_none()
            }
            TAG_SIZES => self.sizes.replace(sizes(value).ok_or(wrong)?).is_none(),
            TAG_FLAGS => {
                let bits = u16::from_le_bytes(value.try_into().map_err(|_| wrong)?);
                let flags = ExportFlags::from_bits(bits).ok_or(wrong)?;
                self.flags.replace(flags).is_none()
            }
            TAG_AGREED => {
                let bits = u32::from_le_bytes(value.try_into().map_err(|_| wrong)?);
                // The client relies on what was agreed on: an unknown bit cannot be ignored.
                if bits & !(AGREED_STRUCTURED | AGREED_ALLOCATION) != 0 {
                    return Err(wrong);
                }
                self.agreed.replace(bits).is_none()
            }
            TAG_UNREAD | TAG_UNSENT if value.len() > STREAM_BYTES_MAX => return Err(wrong),
            TAG_UNREAD => self.unread.replace(value).is_none(),
            TAG_UNSENT => self.unsent.replace(value).is_none(),
            _ if tag & REQUIRED != 0 => return Err(DecodeError::Unknown(tag)),
            _ => true,
        };
        if is_first { Ok(()) } else { Err(DecodeError::Damaged) }
    }

    fn state(self) -> Result<ConnectionState, DecodeError> {
        let missing = |tag| move || DecodeError::Missing(tag);
        let agreed = self.agreed.ok_or_else(missing(TAG_AGREED))?;
        let terms = Terms {
            size: self.size.ok_or_else(missing(TAG_SIZE))?,
            sizes: self.sizes.ok_or_else(missing(TAG_SIZES))?,
            flags: self.flags.ok_or_else(missing(TAG_FLAGS))?,
            structured: agreed & AGREED_STRUCTURED != 0,
            allocation: agreed & AGREED_ALLOCATION != 0,
        };
        // A context needs structured replies, and the flags are those that this server would offer.
        if terms.allocation && !terms.structured {
            return Err(DecodeError::Value(TAG_AGREED));
        }
        if terms.flags != terms.flags.offered(terms.structured) {
            return Err(DecodeError::Value(TAG_FLAGS));
        }
        let export = self.export.ok_or_else(missing(TAG_EXPORT))?.to_owned();
        Ok(ConnectionState {
            negotiated: Negotiated { export, terms, tls: false },
            unread: self.unread.ok_or_else(missing(TAG_UNREAD))?.to_vec(),
            unsent: self.unsent.ok_or_else(missing(TAG_UNSENT))?.to_vec(),
        })
    }
}

fn sizes(value: &[u8]) -> Option<Sizes> {
    let mut input = Little(value);
    let (minimum, preferred, payload_max) = (input.u32()?, input.u32()?, input.u32()?);
    if !input.0.is_empty() {
        return None;
    }
    Sizes::new(minimum, preferred, payload_max).ok()
}
