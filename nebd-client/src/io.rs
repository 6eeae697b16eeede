//! One request, in the words of the caller.

use std::sync::Arc;

use nebd_abi::ring::Buffer as RingBuffer;
use nebd_abi::{Errno, Op, OpFlags};

use crate::arena::Buffer;
use crate::core::Core;
use crate::memory::Span;
use crate::registered::Memory;
use crate::transfer::{Keep, Segment};

/// Where data of a request is, for requests that are not copied.
#[derive(Clone, Copy, Debug)]
pub struct DataRange<'a> {
    pub(crate) place: Place<'a>,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    Arena(&'a Buffer),
    Memory(&'a Memory),
}

impl<'a> From<&'a Buffer> for DataRange<'a> {
    fn from(buffer: &'a Buffer) -> DataRange<'a> {
        // A buffer is never longer than a `u32` says; see `Session::alloc`.
        DataRange { place: Place::Arena(buffer), offset: 0, length: buffer.len() as u32 }
    }
}

impl Buffer {
    /// A part of the buffer. One that leaves the buffer is refused (`EINVAL`) when it is submitted.
    pub fn range(&self, offset: u64, length: u32) -> DataRange<'_> {
        DataRange { place: Place::Arena(self), offset, length }
    }
}

impl Memory {
    /// A part of the memory. One that leaves the memory is refused (`EINVAL`) when it is submitted.
    pub fn range(&self, offset: u64, length: u32) -> DataRange<'_> {
        DataRange { place: Place::Memory(self), offset, length }
    }
}

/// A request whose data, if any, lies in memory that the server can reach.
///
/// Making one costs nothing and promises nothing; the buffers it names stay allocated while it is
/// in flight, whatever the caller drops.
#[derive(Clone, Copy, Debug)]
pub struct Io<'a> {
    pub(crate) op: Op,
    pub(crate) flags: OpFlags,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) data: Data<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'a> {
    None,
    One(DataRange<'a>),
    Many(&'a [DataRange<'a>]),
}

impl<'a> Data<'a> {
    pub(crate) fn as_slice(&self) -> &[DataRange<'a>] {
        match self {
            Data::None => &[],
            Data::One(range) => std::slice::from_ref(range),
            Data::Many(ranges) => ranges,
        }
    }
}

impl<'a> Io<'a> {
    /// Reads at `offset` of the volume into `data`.
    pub fn read(offset: u64, data: impl Into<DataRange<'a>>) -> Io<'a> {
        Io::with_data(Op::Read, offset, Data::One(data.into()))
    }

    /// Writes `data` at `offset` of the volume.
    pub fn write(offset: u64, data: impl Into<DataRange<'a>>) -> Io<'a> {
        Io::with_data(Op::Write, offset, Data::One(data.into()))
    }

    /// Reads into several ranges, one after the other.
    pub fn readv(offset: u64, data: &'a [DataRange<'a>]) -> Io<'a> {
        Io::with_data(Op::Read, offset, Data::Many(data))
    }

    /// Writes several ranges, one after the other.
    pub fn writev(offset: u64, data: &'a [DataRange<'a>]) -> Io<'a> {
        Io::with_data(Op::Write, offset, Data::Many(data))
    }

    /// Forgets a range of the volume: it reads as zeros or as before.
    pub fn discard(offset: u64, length: u64) -> Io<'static> {
        Io { op: Op::Discard, flags: OpFlags::NONE, offset, length, data: Data::None }
    }

    /// Makes a range of the volume read as zeros.
    pub fn write_zeroes(offset: u64, length: u64) -> Io<'static> {
        Io { op: Op::WriteZeroes, flags: OpFlags::NONE, offset, length, data: Data::None }
    }

    /// Makes every write that was acknowledged before durable.
    pub fn flush() -> Io<'static> {
        Io { op: Op::Flush, flags: OpFlags::NONE, offset: 0, length: 0, data: Data::None }
    }

    /// The same request with `flags`: [`OpFlags::FUA`] on writes and write-zeroes,
    /// [`OpFlags::NO_UNMAP`] on write-zeroes.
    pub fn with_flags(mut self, flags: OpFlags) -> Io<'a> {
        self.flags = flags;
        self
    }

    fn with_data(op: Op, offset: u64, data: Data<'a>) -> Io<'a> {
        let length = data.as_slice().iter().map(|range| u64::from(range.length)).sum();
        Io { op, flags: OpFlags::NONE, offset, length, data }
    }
}

impl DataRange<'_> {
    /// As the server is told of it, what keeps it allocated, and where this process can reach it.
    pub(crate) fn resolve(&self, core: &Core) -> Result<(RingBuffer, Keep, Option<Span>), Errno> {
        let length = u64::from(self.length);
        let end = self.offset.checked_add(length).ok_or(Errno::INVAL)?;
        let buffer = |memory, offset| RingBuffer { memory, length: self.length, offset };
        match self.place {
            Place::Arena(place) if place.is_of(&core.arena) && end <= place.len() as u64 => {
                let allocation = place.allocation();
                let span = allocation.span(self.offset, length);
                let buffer = buffer(0, allocation.offset() + self.offset);
                Ok((buffer, Keep::Arena(allocation.clone()), span))
            }
            Place::Memory(place) if place.is_of(core) && end <= place.size() => {
                let buffer = buffer(place.id(), self.offset);
                Ok((buffer, Keep::Memory(Arc::clone(place.lease())), None))
            }
            _ => Err(Errno::INVAL),
        }
    }
}

impl Io<'_> {
    /// The data as a transfer wants it.
    pub(crate) fn segments(&self, core: &Core) -> Result<(Vec<Segment>, Keep), Errno> {
        let ranges = self.data.as_slice();
        let mut segments = Vec::with_capacity(ranges.len());
        let mut keeps = Vec::new();
        for range in ranges {
            let (buffer, keep, span) = range.resolve(core)?;
            let direct = Some((buffer.memory, buffer.offset));
            segments.push(Segment { direct, span, length: buffer.length.into() });
            if ranges.len() == 1 {
                return Ok((segments, keep));
            }
            keeps.push(keep);
        }
        Ok((segments, Keep::Many(keeps.into())))
    }
}
