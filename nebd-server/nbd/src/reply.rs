//! Replies: a few bytes of head for each, to be sent with the caller's own data behind them.
//!
//! ```text
//!  writev:  head │ data │ head │ head (a hole) │ head │ data │ …
//! ```

use std::ops::{Deref, Range};

use crate::error::ReplyError;
use crate::export::Terms;
use crate::request::{Answer, Command, CommandFlags, Request};
use crate::wire::{self, CHUNK_BYTES, EXTENTS_MAX, chunk};

/// Longest head: an error with an offset.
pub const HEAD_BYTES_MAX: usize = CHUNK_BYTES + 14;

/// The bytes of a reply before its data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    length: u8,
}

impl Head {
    const EMPTY: Head = Head { bytes: [0; HEAD_BYTES_MAX], length: 0 };

    fn with<const N: usize>(mut self, bytes: [u8; N]) -> Head {
        let at = usize::from(self.length);
        self.bytes[at..at + N].copy_from_slice(&bytes);
        self.length += N as u8;
        self
    }

    fn simple(error: u32, cookie: u64) -> Head {
        Head::EMPTY
            .with(wire::SIMPLE_REPLY_MAGIC.to_be_bytes())
            .with(error.to_be_bytes())
            .with(cookie.to_be_bytes())
    }

    fn chunk(kind: u16, is_last: bool, cookie: u64, payload_bytes: u32) -> Head {
        let flags = if is_last { chunk::FLAG_DONE } else { 0 };
        Head::EMPTY
            .with(wire::STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .with(flags.to_be_bytes())
            .with(kind.to_be_bytes())
            .with(cookie.to_be_bytes())
            .with(payload_bytes.to_be_bytes())
    }
}

impl Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Head").field(&&self[..]).finish()
    }
}

/// A part of the data of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes.
    pub length: u32,
    /// Reads as zeroes, and need not be sent.
    pub is_hole: bool,
}

/// A head, and which bytes of the read's data follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// To be sent first.
    pub head: Head,
    /// Empty for a hole.
    pub data: Range<usize>,
}

/// What `base:allocation` says of a part of the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// Not allocated.
    pub is_hole: bool,
    /// Reads as zeroes.
    pub is_zero: bool,
}

impl Extent {
    fn state(&self) -> u32 {
        let hole = if self.is_hole { wire::STATE_HOLE } else { 0 };
        let zero = if self.is_zero { wire::STATE_ZERO } else { 0 };
        hole | zero
    }
}

/// Makes the replies on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replies {
    structured: bool,
}

impl Replies {
    /// As agreed on.
    pub fn new(terms: &Terms) -> Replies {
        Replies { structured: terms.structured }
    }

    /// Success of anything but a read and a block status.
    pub fn done(&self, request: &Request) -> Head {
        // The shorter kind; both are allowed where there is no data.
        Head::simple(0, request.cookie)
    }

    /// Failure of any request, of which no part was answered before.
    pub fn error(&self, request: &Request, error: ReplyError) -> Head {
        if !self.structured {
            return Head::simple(error as u32, request.cookie);
        }
        Head::chunk(chunk::ERROR, true, request.cookie, 6)
            .with((error as u32).to_be_bytes())
            .with([0; 2])
    }

    /// Failure at an offset within the request, so that the client knows how far it got. Without
    /// structured replies the offset is lost.
    pub fn error_at(&self, request: &Request, error: ReplyError, offset: u64) -> Head {
        if !self.structured {
            return Head::simple(error as u32, request.cookie);
        }
        let last = request.offset + u64::from(request.length.saturating_sub(1));
        Head::chunk(chunk::ERROR_OFFSET, true, request.cookie, 14)
            .with((error as u32).to_be_bytes())
            .with([0; 2])
            .with(offset.clamp(request.offset, last).to_be_bytes())
    }

    /// Failure with a message for a person at the client, which simple replies cannot carry; it is
    /// cut to what a string may be.
    pub fn error_with(
        &self,
        request: &Request,
        error: ReplyError,
        message: &str,
        out: &mut Vec<u8>,
    ) {
        self.push_error(request.cookie, error, message, out);
    }

    /// What [`Requests`](crate::Requests) says is to be answered at once.
    pub fn answer(&self, answer: &Answer, out: &mut Vec<u8>) {
        match answer.result {
            Ok(()) if answer.is_read && self.structured => {
                out.extend_from_slice(&Head::chunk(chunk::NONE, true, answer.cookie, 0));
            }
            Ok(()) => out.extend_from_slice(&Head::simple(0, answer.cookie)),
            Err(rejection) => {
                self.push_error(answer.cookie, rejection.error(), &rejection.to_string(), out);
            }
        }
    }

    fn push_error(&self, cookie: u64, error: ReplyError, message: &str, out: &mut Vec<u8>) {
        if !self.structured {
            out.extend_from_slice(&Head::simple(error as u32, cookie));
            return;
        }
        let message = message.split('\0').next().unwrap_or("");
        let end = (0..=message.len().min(wire::STRING_BYTES_MAX))
            .rev()
            .find(|end| message.is_char_boundary(*end));
        let message = &message[..end.unwrap_or(0)];
        let length = message.len() as u16;
        let head = Head::chunk(chunk::ERROR, true, cookie, 6 + u32::from(length))
            .with((error as u32).to_be_bytes())
            .with(length.to_be_bytes());
        out.extend_from_slice(&head);
        out.extend_from_slice(message.as_bytes());
    }

    /// A read that went well, all its data in one piece: the head, to be followed by
    /// [`Request::length`] bytes.
    pub fn data(&self, request: &Request) -> Head {
        if !self.structured {
            return Head::simple(0, request.cookie);
        }
        data_chunk(request, 0, request.length, true)
    }

    /// A read that went well, its holes left out where the client takes that. The spans are those
    /// of the data from its start; what they do not reach is data. The ranges are in the read's
    /// data, in which holes have their zeroes too.
    pub fn pieces<'a>(&self, request: &'a Request, spans: &'a [Span]) -> Pieces<'a> {
        let is_whole = !self.structured || request.flags.contains(CommandFlags::DF);
        Pieces { replies: *self, request, spans: if is_whole { &[] } else { spans }, at: 0 }
    }

    /// The reply to a block status, from the start of its range on. What goes beyond the range is
    /// cut off; a client that asked for one extent gets one. Without any extent all is said to be
    /// data, as is always true enough.
    pub fn block_status(
        &self,
        request: &Request,
        extents: impl IntoIterator<Item = Extent>,
        out: &mut Vec<u8>,
    ) {
        let count_max = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { EXTENTS_MAX };
        let head_at = out.len();
        out.extend_from_slice(&[0; CHUNK_BYTES + 4]);
        let mut left = request.length;
        let mut count = 0;
        let mut last: Option<(u32, u32)> = None;
        for extent in extents {
            let length = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
            if length == 0 {
                if left == 0 { break } else { continue }
            }
            match &mut last {
                Some((sum, state)) if *state == extent.state() => *sum += length,
                _ => {
                    if count == count_max {
                        break;
                    }
                    push_extent(last, out);
                    last = Some((length, extent.state()));
                    count += 1;
                }
            }
            left -= length;
        }
        push_extent(last.or(Some((request.length, 0))), out);
        let payload_bytes = out.len() - head_at - CHUNK_BYTES;
        let head = Head::chunk(chunk::BLOCK_STATUS, true, request.cookie, payload_bytes as u32)
            .with(wire::ALLOCATION_CONTEXT_ID.to_be_bytes());
        out[head_at..head_at + head.len()].copy_from_slice(&head);
    }
}

fn push_extent(extent: Option<(u32, u32)>, out: &mut Vec<u8>) {
    if let Some((length, state)) = extent {
        out.extend(length.to_be_bytes());
        out.extend(state.to_be_bytes());
    }
}

fn data_chunk(request: &Request, at: u32, length: u32, is_last: bool) -> Head {
    Head::chunk(chunk::OFFSET_DATA, is_last, request.cookie, length + 8)
        .with((request.offset + u64::from(at)).to_be_bytes())
}

fn hole_chunk(request: &Request, at: u32, length: u32, is_last: bool) -> Head {
    Head::chunk(chunk::OFFSET_HOLE, is_last, request.cookie, 12)
        .with((request.offset + u64::from(at)).to_be_bytes())
        .with(length.to_be_bytes())
}

/// The reply to a read, piece by piece; see [`Replies::pieces`].
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    replies: Replies,
    request: &'a Request,
    spans: &'a [Span],
    at: u32,
}

impl Pieces<'_> {
    /// The next stretch of one kind, within what is left.
    fn stretch(&mut self) -> Span {
        let left = self.request.length - self.at;
        let mut stretch = Span { length: 0, is_hole: false };
        while let Some((span, rest)) = self.spans.split_first() {
            if stretch.length > 0 && span.length > 0 && span.is_hole != stretch.is_hole {
                return stretch;
            }
            if span.length > 0 {
                stretch.is_hole = span.is_hole;
            }
            stretch.length = stretch.length.saturating_add(span.length).min(left);
            self.spans = rest;
        }
        // Beyond the spans all is data.
        if stretch.length == 0 || !stretch.is_hole {
            stretch = Span { length: left, is_hole: false };
        }
        stretch
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let request = self.request;
        debug_assert_eq!(request.command, Command::Read);
        if self.at == request.length {
            return None;
        }
        let at = self.at;
        let Span { length, is_hole } = self.stretch();
        self.at += length;
        let is_last = self.at == request.length;
        let data = if is_hole { 0..0 } else { at as usize..self.at as usize };
        let head = match (is_hole, self.replies.structured) {
            (true, _) => hole_chunk(request, at, length, is_last),
            (false, true) => data_chunk(request, at, length, is_last),
            (false, false) => self.replies.data(request),
        };
        Some(Piece { head, data })
    }
}
