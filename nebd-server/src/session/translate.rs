//! From a request as the client wrote it to one that a backend may trust.

use nebd_abi::layout::TRANSFER_BYTES_MAX;
use nebd_abi::ring::{Buffer, Buffers, Request as RingRequest};
use nebd_abi::{Errno, Op, OpFlags};
use nebd_backend::{Segment, Segments};

use super::{Memories, Session};

/// A request that is answered without asking the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// It breaks a rule.
    Errno(Errno),
    /// It asks for nothing.
    Empty,
}

/// What a backend gets to see of a request.
#[derive(Debug)]
pub struct Translated {
    /// The operation.
    pub op: Op,
    /// Its modifiers.
    pub flags: OpFlags,
    /// Where its data is.
    pub segments: Segments,
    /// Whether a segment lies in a registered memory.
    pub uses_memories: bool,
}

const EFAULT: Errno = Errno(14);

/// Checks everything that the client said; `found` is where the data is, if that is known already.
pub fn translate(
    session: &Session,
    memories: &Memories,
    request: &RingRequest,
    found: Option<Segments>,
) -> Result<Translated, Rejected> {
    let op = request.op.map_err(|_| Rejected::Errno(Errno::NOTSUP))?;
    let flags = request.flags.map_err(|_| Rejected::Errno(Errno::INVAL))?;
    if session.is_read_only() && op.is_mutation() {
        return Err(Rejected::Errno(Errno::ROFS));
    }
    if op == Op::Flush {
        return Ok(Translated { op, flags, segments: Segments::None, uses_memories: false });
    }
    check_range(session, op, request)?;
    if !op.has_data() {
        return Ok(Translated { op, flags, segments: Segments::None, uses_memories: false });
    }
    if request.length > TRANSFER_BYTES_MAX {
        return Err(Rejected::Errno(Errno::INVAL));
    }
    if let Some(segments) = found {
        return Ok(Translated { op, flags, segments, uses_memories: false });
    }
    let segments = segments(session, memories, request)?;
    let uses_memories = request.buffers.as_slice().iter().any(|buffer| buffer.memory != 0);
    Ok(Translated { op, flags, segments, uses_memories })
}

fn check_range(session: &Session, op: Op, request: &RingRequest) -> Result<(), Rejected> {
    let block = u64::from(session.volume.block_size);
    if !request.offset.is_multiple_of(block) || !request.length.is_multiple_of(block) {
        return Err(Rejected::Errno(Errno::INVAL));
    }
    let beyond = if op == Op::Read { Errno::INVAL } else { Errno::NOSPC };
    let end = request.offset.checked_add(request.length).ok_or(Rejected::Errno(beyond))?;
    if end > session.volume.size() {
        return Err(Rejected::Errno(beyond));
    }
    if request.length == 0 {
        return Err(Rejected::Empty);
    }
    Ok(())
}

fn segments(
    session: &Session,
    memories: &Memories,
    request: &RingRequest,
) -> Result<Segments, Rejected> {
    let segment = |buffer: &Buffer| {
        let length = u64::from(buffer.length);
        let pointer = match buffer.memory {
            0 => session.region.arena(buffer.offset, length),
            id => memories
                .get(id as usize)
                .and_then(Option::as_ref)
                .and_then(|memory| memory.range(buffer.offset, length)),
        };
        let pointer = pointer.ok_or(Rejected::Errno(EFAULT))?;
        Ok(Segment { pointer, length: buffer.length as usize })
    };
    let total: u64 = request.buffers.as_slice().iter().map(|b| u64::from(b.length)).sum();
    if total != request.length {
        return Err(Rejected::Errno(Errno::INVAL));
    }
    match &request.buffers {
        Buffers::None | Buffers::TooMany => Err(Rejected::Errno(Errno::INVAL)),
        Buffers::One(buffer) => Ok(Segments::One(segment(buffer)?)),
        Buffers::Many(buffers) => {
            Ok(Segments::Many(buffers.iter().map(segment).collect::<Result<_, _>>()?))
        }
    }
}
