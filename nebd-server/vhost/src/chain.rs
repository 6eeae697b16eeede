//! From descriptors to a request: its header, copied once, and where its data is.
//!
//! A driver may cut header, data and status into descriptors as it likes (`VIRTIO_F_ANY_LAYOUT`,
//! implied by `VERSION_1`): the first 16 readable bytes are the header, the last writable byte is the
//! status, all between is data.

use std::sync::Arc;

pub use crate::access::Segment;
use crate::memory::GuestMemory;

/// Descriptors that a chain may have, those of an indirect table among them.
pub const CHAIN_LENGTH_MAX: u32 = 1024;

pub(crate) const DESCRIPTOR_BYTES: usize = 16;
pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;
const HEADER_BYTES: usize = 16;

/// The driver broke the rules of a virtqueue; its disk stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More chains are available than the ring has room for.
    #[error("the driver is {0} entries ahead in its ring")]
    Ahead(u32),
    /// A chain starts beyond the table.
    #[error("a chain starts at descriptor {0}, beyond the table")]
    Head(u16),
    /// A chain was made available again before it was answered.
    #[error("chain {0} is available while it is in flight")]
    HeadInFlight(u16),
    /// A descriptor names a next one beyond the table.
    #[error("a chain goes on at descriptor {0}, beyond its table")]
    Next(u16),
    /// A loop, or simply too many descriptors.
    #[error("a chain has more than {0} descriptors")]
    TooLong(u32),
    /// A descriptor of no bytes.
    #[error("a descriptor has no bytes")]
    Empty,
    /// Memory that the guest does not have.
    #[error("{length} bytes at {address:#x} are not memory of the guest")]
    Address {
        /// Where.
        address: u64,
        /// How many.
        length: u32,
    },
    /// A readable descriptor after a writable one.
    #[error("a chain is to be read after it was to be written")]
    Order,
    /// Indirect descriptors that were not agreed on, lead to others, or are followed by others.
    #[error("an indirect descriptor where there may be none")]
    Indirect,
    /// A table that is no whole number of descriptors.
    #[error("an indirect table has {0} bytes")]
    Table(u32),
    /// Fewer readable bytes than a header has.
    #[error("a request has a header of {0} bytes")]
    Header(usize),
    /// No writable byte for the status.
    #[error("a request has no room for its status")]
    Status,
}

/// A descriptor, copied once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub address: u64,
    pub length: u32,
    /// Of a split ring; the buffer id of a packed one.
    pub next_or_id: u16,
    pub flags: u16,
}

impl Descriptor {
    /// From its place in a split table: address, length, flags, next.
    pub(crate) fn from_split(bytes: &[u8; DESCRIPTOR_BYTES]) -> Descriptor {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = *bytes;
        Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next_or_id: u16::from_le_bytes([n0, n1]),
        }
    }

    /// From its place in a packed ring or table: address, length, id, flags.
    pub(crate) fn from_packed(bytes: &[u8; DESCRIPTOR_BYTES]) -> Descriptor {
        let split = Descriptor::from_split(bytes);
        Descriptor { flags: split.next_or_id, next_or_id: split.flags, ..split }
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Segments in order; one is the common case and costs no allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Segments {
    /// No data.
    #[default]
    None,
    /// One piece.
    One(Segment),
    /// Several pieces.
    Many(Vec<Segment>),
}

impl Segments {
    /// As a slice.
    pub fn as_slice(&self) -> &[Segment] {
        match self {
            Segments::None => &[],
            Segments::One(segment) => std::slice::from_ref(segment),
            Segments::Many(segments) => segments,
        }
    }

    /// Bytes in all of them.
    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|segment| segment.len() as u64).sum()
    }

    fn push(&mut self, segment: Segment) {
        if segment.len() == 0 {
            return;
        }
        match self {
            Segments::None => *self = Segments::One(segment),
            Segments::One(first) => *self = Segments::Many(vec![*first, segment]),
            Segments::Many(segments) => segments.push(segment),
        }
    }

    /// Copies their first bytes out; returns how many.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in self.as_slice() {
            done += segment.read(&mut bytes[done..]);
        }
        done
    }

    /// Copies bytes to where they are; returns how many.
    pub(crate) fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for segment in self.as_slice() {
            done += segment.write(&bytes[done..]);
        }
        done
    }
}

/// What a driver asks for, copied and checked as far as a virtqueue goes.
#[derive(Debug)]
pub struct Chain {
    /// The request's type, as it stands in the header.
    pub kind: u32,
    /// Its sector, as it stands in the header.
    pub sector: u64,
    /// Data that the driver wrote.
    pub readable: Segments,
    /// Where the driver wants data.
    pub writable: Segments,
    /// By which it is answered.
    pub ticket: Ticket,
}

/// What is left to be done for a chain: an answer, by [`publish`](crate::queue::VirtQueue::publish).
///
/// One that is dropped leaves its chain in flight, for the next server to issue again. It keeps the
/// chain's memory mapped.
#[derive(Debug)]
#[must_use = "a chain must be answered"]
pub struct Ticket {
    pub(crate) head: u16,
    pub(crate) status: Segment,
    _memory: Arc<GuestMemory>,
}

impl Ticket {
    /// Which chain of its queue: below the queue's size, and unique while it is in flight.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// A chain as its descriptors come in.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    memory: &'a Arc<GuestMemory>,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    readable: Segments,
    writable: Segments,
    /// The last writable piece: the status is its last byte.
    last: Option<Segment>,
    count: u32,
    indirect: bool,
}

impl<'a> Builder<'a> {
    /// Of a queue with or without indirect descriptors.
    pub(crate) fn new(memory: &'a Arc<GuestMemory>, indirect: bool) -> Builder<'a> {
        Builder {
            memory,
            header: [0; HEADER_BYTES],
            header_filled: 0,
            readable: Segments::None,
            writable: Segments::None,
            last: None,
            count: 0,
            indirect,
        }
    }

    /// The next descriptor.
    pub(crate) fn push(&mut self, descriptor: &Descriptor) -> Result<(), Violation> {
        self.count += 1;
        if self.count > CHAIN_LENGTH_MAX {
            return Err(Violation::TooLong(CHAIN_LENGTH_MAX));
        }
        if descriptor.length == 0 {
            return Err(Violation::Empty);
        }
        let writable = descriptor.has(F_WRITE);
        if !writable && self.last.is_some() {
            return Err(Violation::Order);
        }
        let (address, length) = (descriptor.address, descriptor.length);
        let memory = self.memory;
        memory
            .find(address, length.into(), |piece| match writable {
                true => self.push_writable(piece),
                false => self.push_readable(piece),
            })
            .ok_or(Violation::Address { address, length })
    }

    fn push_readable(&mut self, piece: Segment) {
        let filled = piece.read(&mut self.header[self.header_filled..]);
        self.header_filled += filled;
        self.readable.push(piece.slice(filled, usize::MAX));
    }

    fn push_writable(&mut self, piece: Segment) {
        if let Some(previous) = self.last.replace(piece) {
            self.writable.push(previous);
        }
    }

    /// All descriptors of an indirect table, each copied once. Others may stand before it, none after.
    pub(crate) fn push_table(
        &mut self,
        table: &Descriptor,
        is_split: bool,
    ) -> Result<(), Violation> {
        if !self.indirect || table.has(F_NEXT) {
            return Err(Violation::Indirect);
        }
        let entry = DESCRIPTOR_BYTES as u32;
        if table.length == 0 || !table.length.is_multiple_of(entry) {
            return Err(Violation::Table(table.length));
        }
        let entries = table.length / entry;
        let mut at = 0u32;
        loop {
            let descriptor = self.table_entry(table, at, is_split)?;
            if descriptor.has(F_INDIRECT) {
                return Err(Violation::Indirect);
            }
            self.push(&descriptor)?;
            at = match is_split {
                // A loop ends at the limit of a chain's length.
                true if descriptor.has(F_NEXT) => descriptor.next_or_id.into(),
                true => return Ok(()),
                // All of a packed table, one after the other.
                false => at + 1,
            };
            if at >= entries {
                return if is_split { Err(Violation::Next(at as u16)) } else { Ok(()) };
            }
        }
    }

    fn table_entry(
        &self,
        table: &Descriptor,
        at: u32,
        is_split: bool,
    ) -> Result<Descriptor, Violation> {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        let mut filled = 0;
        let offset = u64::from(at) * DESCRIPTOR_BYTES as u64;
        table
            .address
            .checked_add(offset)
            .and_then(|address| {
                self.memory.find(address, DESCRIPTOR_BYTES as u64, |piece| {
                    filled += piece.read(&mut bytes[filled..]);
                })
            })
            .ok_or(Violation::Address { address: table.address, length: table.length })?;
        Ok(match is_split {
            true => Descriptor::from_split(&bytes),
            false => Descriptor::from_packed(&bytes),
        })
    }

    /// The chain, once all its descriptors are in.
    pub(crate) fn finish(mut self, head: u16) -> Result<Chain, Violation> {
        if self.header_filled < HEADER_BYTES {
            return Err(Violation::Header(self.header_filled));
        }
        let last = self.last.ok_or(Violation::Status)?;
        let data = last.len() - 1;
        self.writable.push(last.slice(0, data));
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = self.header;
        Ok(Chain {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            readable: self.readable,
            writable: self.writable,
            ticket: Ticket { head, status: last.slice(data, 1), _memory: self.memory.clone() },
        })
    }
}
