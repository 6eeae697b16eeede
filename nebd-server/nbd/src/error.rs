//! Errors as they travel in replies.

use crate::request::{CommandFlags, Request};

/// The error values that the protocol has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ReplyError {
    /// Not permitted, also on a read-only export.
    Perm = 1,
    /// The storage failed.
    Io = 5,
    /// No memory.
    NoMem = 12,
    /// The request breaks a rule.
    Inval = 22,
    /// No space, also beyond the end of the export.
    NoSpc = 28,
    /// The request is too long.
    Overflow = 75,
    /// Zeroing would not be fast.
    NotSup = 95,
    /// The server is going.
    Shutdown = 108,
}

impl ReplyError {
    /// Every error, in the order of its number.
    pub const ALL: [ReplyError; 8] = {
        use ReplyError::*;
        [Perm, Io, NoMem, Inval, NoSpc, Overflow, NotSup, Shutdown]
    };

    /// The error for an errno of the storage (positive) in the reply to this request.
    ///
    /// `EOVERFLOW` and `ENOTSUP` mean something special to a client and are kept for requests that
    /// it may expect them of.
    pub fn from_errno(errno: i32, request: &Request) -> ReplyError {
        const EACCES: i32 = 13;
        const EFBIG: i32 = 27;
        const EROFS: i32 = 30;
        const EDQUOT: i32 = 122;
        match errno {
            1 | EACCES | EROFS => ReplyError::Perm,
            12 => ReplyError::NoMem,
            22 => ReplyError::Inval,
            28 | EFBIG | EDQUOT => ReplyError::NoSpc,
            75 if request.flags.contains(CommandFlags::DF) => ReplyError::Overflow,
            95 if request.flags.contains(CommandFlags::FAST_ZERO) => ReplyError::NotSup,
            95 => ReplyError::Inval,
            108 => ReplyError::Shutdown,
            _ => ReplyError::Io,
        }
    }
}
