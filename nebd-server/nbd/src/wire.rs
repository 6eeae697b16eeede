//! The numbers of the protocol. All travel big-endian.

/// `NBDMAGIC`, the first word of the server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the second word of the server and the first of each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag of both sides: options other than `EXPORT_NAME`, and replies to them.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag of both sides: no zeroes after the answer to `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Bytes of an option before its data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request before a write's payload.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply before a read's data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured reply's chunk before its payload.
pub const CHUNK_BYTES: usize = 20;
/// Zeroes after the answer to `EXPORT_NAME` unless `NO_ZEROES` was agreed on.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Longest name, description, query or message.
pub const STRING_BYTES_MAX: usize = 4096;
/// A payload up to here is no attack, whatever was advertised.
pub const PAYLOAD_BYTES_TOLERATED: u32 = 32 << 20;
/// Extents of one reply to `BLOCK_STATUS`.
pub const EXTENTS_MAX: usize = 1 << 20;

/// Options, as numbered by the client.
pub mod option {
    /// End the negotiation with this export; has no reply that could say no.
    pub const EXPORT_NAME: u32 = 1;
    /// Give up.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Go on under TLS.
    pub const STARTTLS: u32 = 5;
    /// What an export is.
    pub const INFO: u32 = 6;
    /// The same, and end the negotiation with it.
    pub const GO: u32 = 7;
    /// Structured replies, please.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Experimental; refused.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Items of information about an export.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// For people.
    pub const DESCRIPTION: u16 = 2;
    /// Size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Types of replies to options.
pub mod reply {
    const ERROR: u32 = 1 << 31;
    /// Done.
    pub const ACK: u32 = 1;
    /// An export of a list.
    pub const SERVER: u32 = 2;
    /// An item of information.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The option is known and not allowed.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option is malformed, or comes at the wrong time.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is going.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// The client must ask for the size constraints.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// Too large to be dealt with.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
}

/// Requests.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows.
    pub const WRITE: u16 = 1;
    /// The client leaves; has no reply.
    pub const DISC: u16 = 2;
    /// What was acknowledged becomes durable.
    pub const FLUSH: u16 = 3;
    /// A range is no longer needed.
    pub const TRIM: u16 = 4;
    /// A range will be needed.
    pub const CACHE: u16 = 5;
    /// A range reads as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Which parts of a range are allocated.
    pub const BLOCK_STATUS: u16 = 7;
    /// Experimental; refused like any other unknown request.
    pub const RESIZE: u16 = 8;
}

/// Chunks of structured replies.
pub mod chunk {
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing but the flag.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Error and message.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// Error, message and offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The one metadata context of the specification.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its id on every connection, so that a successor of this server needs no table.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
/// `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// Bytes eaten from the front; `None` once they do not suffice.
#[derive(Debug)]
pub(crate) struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of the protocol: UTF-8 without NUL, not too long.
    pub fn string(&mut self, length: usize) -> Option<&'a str> {
        let text = std::str::from_utf8(self.bytes(length)?).ok()?;
        is_string(text).then_some(text)
    }
}

/// Whether a text may travel as a string.
pub(crate) fn is_string(text: &str) -> bool {
    text.len() <= STRING_BYTES_MAX && !text.contains('\0')
}
