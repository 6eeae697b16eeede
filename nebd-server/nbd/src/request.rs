//! Requests of the transmission: a stream of bytes in, checked requests out.
//!
//! ```text
//!            ┌────────── Event::Request, Answer, Disconnect
//!  Header ───┼─ write ─► Payload ── payload_arrived ─► Header      Event::Write
//!            └─ refused write ─► Skip ─────────────► Header        Event::Answer, once it is skipped
//! ```
//!
//! The payload of a write never passes through here: the caller reads it into the memory that the
//! backend gets, best with the same `readv` that reads the headers after it, and says how many
//! bytes came.

use crate::error::ReplyError;
use crate::export::{ExportFlags, Terms};
use crate::wire::{self, Cursor, PAYLOAD_BYTES_TOLERATED, REQUEST_BYTES, command};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Read.
    Read = command::READ,
    /// Write the payload.
    Write = command::WRITE,
    /// What was acknowledged becomes durable.
    Flush = command::FLUSH,
    /// The range is no longer needed.
    Trim = command::TRIM,
    /// The range will be needed; may be answered at once.
    Cache = command::CACHE,
    /// The range reads as zeroes.
    WriteZeroes = command::WRITE_ZEROES,
    /// Which parts of the range are allocated.
    BlockStatus = command::BLOCK_STATUS,
}

impl Command {
    /// Every command, in the order of its number.
    pub const ALL: [Command; 7] = {
        use Command::*;
        [Read, Write, Flush, Trim, Cache, WriteZeroes, BlockStatus]
    };

    fn from_bits(bits: u16) -> Option<Command> {
        Command::ALL.into_iter().find(|command| *command as u16 == bits)
    }

    fn is_mutation(self) -> bool {
        matches!(self, Command::Write | Command::Trim | Command::WriteZeroes)
    }
}

/// Modifiers of a [`Command`]; a bit set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CommandFlags(u16);

impl CommandFlags {
    /// No modifier.
    pub const NONE: CommandFlags = CommandFlags(0);
    /// The result is durable once it is reported. Any command may carry it.
    pub const FUA: CommandFlags = CommandFlags(1 << 0);
    /// Write-zeroes keeps the range allocated.
    pub const NO_HOLE: CommandFlags = CommandFlags(1 << 1);
    /// A read is answered in one piece.
    pub const DF: CommandFlags = CommandFlags(1 << 2);
    /// One extent suffices to a block status.
    pub const REQ_ONE: CommandFlags = CommandFlags(1 << 3);
    /// Write-zeroes fails with [`ReplyError::NotSup`] at once unless it is faster than a write.
    pub const FAST_ZERO: CommandFlags = CommandFlags(1 << 4);

    /// As they travel.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: CommandFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// What this command may carry on these terms.
    fn allowed(command: Command, terms: &Terms) -> CommandFlags {
        let if_offered = |offer: ExportFlags, flag: CommandFlags| {
            if terms.flags.contains(offer) { flag } else { CommandFlags::NONE }
        };
        let own = match command {
            Command::Read => if_offered(ExportFlags::SEND_DF, CommandFlags::DF),
            Command::WriteZeroes => {
                CommandFlags::NO_HOLE
                    | if_offered(ExportFlags::SEND_FAST_ZERO, CommandFlags::FAST_ZERO)
            }
            Command::BlockStatus => CommandFlags::REQ_ONE,
            Command::Write | Command::Flush | Command::Trim | Command::Cache => CommandFlags::NONE,
        };
        own | if_offered(ExportFlags::SEND_FUA, CommandFlags::FUA)
    }
}

impl std::ops::BitOr for CommandFlags {
    type Output = CommandFlags;

    fn bitor(self, other: CommandFlags) -> CommandFlags {
        CommandFlags(self.0 | other.0)
    }
}

/// A request, checked: offered, permitted, in range, aligned, neither empty (but for a flush) nor
/// too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it.
    pub cookie: u64,
    /// What it asks for.
    pub command: Command,
    /// Its modifiers.
    pub flags: CommandFlags,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Bytes. Reads and writes are within the payload limit, the others within the export alone.
    pub length: u32,
}

impl Request {
    /// The header that it came with: a request that a successor is to carry out stands with it, and
    /// a write's payload behind it, at the front of [`ConnectionState::unread`].
    ///
    /// [`ConnectionState::unread`]: crate::ConnectionState::unread
    pub fn header(&self) -> [u8; REQUEST_BYTES] {
        let Request { cookie, command, flags, offset, length } = *self;
        RawHeader { flags: flags.0, command: command as u16, cookie, offset, length }.encode()
    }

    /// Whether the result must be durable before it is reported.
    pub fn is_fua(&self) -> bool {
        self.flags.contains(CommandFlags::FUA)
    }
}

/// Why a request is answered without asking the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// A command that this server does not know, or that the client was not offered.
    #[error("the command is not known here")]
    Command,
    /// A flag that is not known, was not offered, or does not go with the command.
    #[error("a flag is not known here")]
    Flags,
    /// A change of a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// Offset or length is no multiple of the minimum block size.
    #[error("the range is not aligned to blocks")]
    Unaligned,
    /// A write beyond the end of the export.
    #[error("the range is beyond the end of the export")]
    NoSpace,
    /// Anything else beyond the end of the export, or a flush with a range.
    #[error("the range is not one of the export")]
    Range,
    /// A payload beyond what was advertised.
    #[error("the payload would be too long")]
    TooLong,
    /// The same, of a read that the client may repeat in pieces.
    #[error("the data would be too long for one reply")]
    Overflow,
    /// A block status without a metadata context, or of nothing.
    #[error("there is no status to report")]
    NoStatus,
}

impl Rejection {
    /// As it travels.
    pub fn error(self) -> ReplyError {
        match self {
            Rejection::ReadOnly => ReplyError::Perm,
            Rejection::NoSpace => ReplyError::NoSpc,
            Rejection::Overflow => ReplyError::Overflow,
            Rejection::Command
            | Rejection::Flags
            | Rejection::Unaligned
            | Rejection::Range
            | Rejection::TooLong
            | Rejection::NoStatus => ReplyError::Inval,
        }
    }
}

/// A request that is to be answered at once: refused, or there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The client's name for it.
    pub cookie: u64,
    /// Reads have replies of their own.
    pub is_read: bool,
    /// Success if it asked for nothing.
    pub result: Result<(), Rejection>,
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Event {
    /// All input was taken; wait for more.
    Input,
    /// Carry it out. It has no payload.
    Request(Request),
    /// Carry it out with the next [`Request::length`] bytes of the stream, see
    /// [`Requests::payload_arrived`].
    Write(Request),
    /// So many bytes of a payload are awaited before anything else; nothing was taken.
    Payload(u32),
    /// Answer with [`Replies::answer`](crate::Replies::answer).
    Answer(Answer),
    /// The client leaves: complete what is under way, send its replies, close. Also what every call
    /// after an error says.
    Disconnect,
}

/// What no reply can mend; the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No request where one was due.
    #[error("the client sent no request: {0:#x}")]
    Magic(u32),
    /// A payload that nobody would send in good faith.
    #[error("the client sent a write of {0} bytes")]
    Payload(u32),
}

#[derive(Clone, Copy, Debug)]
struct RawHeader {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl RawHeader {
    fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<RawHeader, StreamError> {
        let mut cursor = Cursor(bytes);
        let magic = cursor.u32().unwrap_or(0);
        let header = (|| {
            Some(RawHeader {
                flags: cursor.u16()?,
                command: cursor.u16()?,
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                length: cursor.u32()?,
            })
        })();
        match header {
            Some(header) if magic == wire::REQUEST_MAGIC => Ok(header),
            _ => Err(StreamError::Magic(magic)),
        }
    }

    fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut out = [0; REQUEST_BYTES];
        out[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// The request, or what it is answered with: `Ok` if it asks for nothing.
    fn check(&self, terms: &Terms) -> Result<Request, Result<(), Rejection>> {
        let command = Command::from_bits(self.command).ok_or(Err(Rejection::Command))?;
        let needed = match command {
            Command::Read | Command::Write | Command::BlockStatus => ExportFlags::NONE,
            Command::Flush => ExportFlags::SEND_FLUSH,
            Command::Trim => ExportFlags::SEND_TRIM,
            Command::Cache => ExportFlags::SEND_CACHE,
            Command::WriteZeroes => ExportFlags::SEND_WRITE_ZEROES,
        };
        if command.is_mutation() && terms.flags.contains(ExportFlags::READ_ONLY) {
            return Err(Err(Rejection::ReadOnly));
        }
        if !terms.flags.contains(needed) {
            return Err(Err(Rejection::Command));
        }
        let flags = CommandFlags(self.flags);
        if !CommandFlags::allowed(command, terms).contains(flags) {
            return Err(Err(Rejection::Flags));
        }
        self.check_range(command, flags, terms)?;
        let RawHeader { cookie, offset, length, .. } = *self;
        Ok(Request { cookie, command, flags, offset, length })
    }

    fn check_range(
        &self,
        command: Command,
        flags: CommandFlags,
        terms: &Terms,
    ) -> Result<(), Result<(), Rejection>> {
        if command == Command::Flush {
            let is_whole = self.offset == 0 && self.length == 0;
            return if is_whole { Ok(()) } else { Err(Err(Rejection::Range)) };
        }
        if command == Command::BlockStatus && (!terms.allocation || self.length == 0) {
            return Err(Err(Rejection::NoStatus));
        }
        let minimum = terms.sizes.minimum();
        if !self.offset.is_multiple_of(u64::from(minimum)) || !self.length.is_multiple_of(minimum) {
            return Err(Err(Rejection::Unaligned));
        }
        let end = self.offset.checked_add(u64::from(self.length));
        if end.is_none_or(|end| end > terms.size) {
            let is_write = matches!(command, Command::Write | Command::WriteZeroes);
            return Err(Err(if is_write { Rejection::NoSpace } else { Rejection::Range }));
        }
        if self.length > terms.sizes.payload_max() {
            match command {
                Command::Read if flags.contains(CommandFlags::DF) || terms.structured => {
                    return Err(Err(Rejection::Overflow));
                }
                Command::Read | Command::Write => return Err(Err(Rejection::TooLong)),
                _ => {}
            }
        }
        if self.length == 0 { Err(Ok(())) } else { Ok(()) }
    }
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Header,
    Payload { request: Request, left: u32 },
    Skip { answer: Answer, left: u32 },
    Over,
}

/// The payload of a refused write is still to be skipped. There is nothing to hand over then that a
/// successor could use; close the connection, or wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client is sending {0} more bytes of a write that was refused")]
pub struct Skipping(pub u32);

/// The stream of requests on one connection.
#[derive(Debug)]
pub struct Requests {
    terms: Terms,
    phase: Phase,
    held: [u8; REQUEST_BYTES],
    held_bytes: usize,
}

impl Requests {
    /// What follows a negotiation.
    pub fn new(terms: Terms) -> Requests {
        Requests { terms, phase: Phase::Header, held: [0; REQUEST_BYTES], held_bytes: 0 }
    }

    /// What was agreed on, with the present size.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// The export has another size now. Clients do not learn of it before they connect again, but
    /// those that know it otherwise may use it at once.
    pub fn resize(&mut self, size: u64) {
        self.terms.size = size;
    }

    /// Takes bytes from the front of `input`, up to the next event, and says how many.
    pub fn advance(&mut self, input: &[u8]) -> (usize, Result<Event, StreamError>) {
        match self.phase {
            Phase::Header => {}
            Phase::Payload { left, .. } => return (0, Ok(Event::Payload(left))),
            Phase::Skip { answer, left } => return self.skip(input, answer, left),
            Phase::Over => return (0, Ok(Event::Disconnect)),
        }
        if self.held_bytes == 0
            && let Some(header) = input.first_chunk::<REQUEST_BYTES>()
        {
            // The common case: no copy.
            let event = self.header(header);
            return self.after_header(REQUEST_BYTES, input, event);
        }
        let taken = input.len().min(REQUEST_BYTES - self.held_bytes);
        self.held[self.held_bytes..self.held_bytes + taken].copy_from_slice(&input[..taken]);
        self.held_bytes += taken;
        if self.held_bytes < REQUEST_BYTES {
            return (taken, Ok(Event::Input));
        }
        self.held_bytes = 0;
        let header = self.held;
        let event = self.header(&header);
        self.after_header(taken, input, event)
    }

    /// A refused write goes on to its payload at once.
    fn after_header(
        &mut self,
        taken: usize,
        input: &[u8],
        event: Result<Event, StreamError>,
    ) -> (usize, Result<Event, StreamError>) {
        match self.phase {
            Phase::Skip { answer, left } => {
                let (skipped, event) = self.skip(&input[taken..], answer, left);
                (taken + skipped, event)
            }
            _ => (taken, event),
        }
    }

    fn skip(
        &mut self,
        input: &[u8],
        answer: Answer,
        left: u32,
    ) -> (usize, Result<Event, StreamError>) {
        let taken = input.len().min(left as usize);
        let left = left - taken as u32;
        if left > 0 {
            self.phase = Phase::Skip { answer, left };
            return (taken, Ok(Event::Input));
        }
        self.phase = Phase::Header;
        (taken, Ok(Event::Answer(answer)))
    }

    fn header(&mut self, bytes: &[u8; REQUEST_BYTES]) -> Result<Event, StreamError> {
        let header = match RawHeader::decode(bytes) {
            Ok(header) => header,
            Err(error) => {
                self.phase = Phase::Over;
                return Err(error);
            }
        };
        if header.command == command::DISC {
            self.phase = Phase::Over;
            return Ok(Event::Disconnect);
        }
        let is_write = header.command == command::WRITE;
        let tolerated = self.terms.sizes.payload_max().max(PAYLOAD_BYTES_TOLERATED);
        if is_write && header.length > tolerated {
            self.phase = Phase::Over;
            return Err(StreamError::Payload(header.length));
        }
        match header.check(&self.terms) {
            Ok(request) if is_write => {
                self.phase = Phase::Payload { request, left: request.length };
                Ok(Event::Write(request))
            }
            Ok(request) => Ok(Event::Request(request)),
            Err(result) => {
                let is_read = header.command == command::READ;
                let answer = Answer { cookie: header.cookie, is_read, result };
                if is_write {
                    // Clients that send before they read would take an early answer amiss.
                    self.phase = Phase::Skip { answer, left: header.length };
                }
                Ok(Event::Answer(answer))
            }
        }
    }

    /// Bytes of a write's payload that have not come yet; no event comes before they have.
    pub fn payload_left(&self) -> u32 {
        match self.phase {
            Phase::Payload { left, .. } => left,
            _ => 0,
        }
    }

    /// So many bytes came that began with the payload. Returns how many of them belong to it: the
    /// rest are requests, for [`advance`](Self::advance).
    pub fn payload_arrived(&mut self, bytes: usize) -> usize {
        let Phase::Payload { request, left } = self.phase else { return 0 };
        let taken = bytes.min(left as usize);
        let left = left - taken as u32;
        self.phase = if left > 0 { Phase::Payload { request, left } } else { Phase::Header };
        taken
    }

    /// What a successor must read again: the part of a header that has come, or the header of the
    /// write whose payload is coming and, from the caller, what has come of that.
    pub fn append_unread(&self, payload: &[u8], unread: &mut Vec<u8>) -> Result<(), Skipping> {
        match &self.phase {
            Phase::Header => unread.extend_from_slice(&self.held[..self.held_bytes]),
            Phase::Payload { request, .. } => {
                unread.extend(request.header());
                unread.extend_from_slice(payload);
            }
            Phase::Skip { left, .. } => return Err(Skipping(*left)),
            Phase::Over => {}
        }
        Ok(())
    }
}
