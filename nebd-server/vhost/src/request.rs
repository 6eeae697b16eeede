//! virtio-blk: features, configuration space, and what a chain asks of a disk.

use crate::chain::{Chain, Segments, Ticket};
use crate::queue::{F_RING_EVENT_IDX, F_RING_INDIRECT, F_RING_PACKED, F_VERSION_1};

/// Bytes of a sector, the unit of every number in virtio-blk.
pub const SECTOR: u64 = 512;
/// Bytes of a disk's serial.
pub const SERIAL_BYTES: usize = 20;
/// Bytes of the configuration space; beyond are zeros.
pub const CONFIG_BYTES: usize = 60;
/// Bytes that a hypervisor may ask for.
pub const CONFIG_BYTES_MAX: usize = 256;
/// Ranges that one discard or write-zeroes may name.
pub const RANGES_MAX: u32 = 256;

const F_SEG_MAX: u64 = 1 << 2;
const F_SIZE_MAX: u64 = 1 << 1;
const F_GEOMETRY: u64 = 1 << 4;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// `VHOST_USER_F_PROTOCOL_FEATURES`: there are protocol features to be agreed on.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Where the byte is that a driver may write.
const WRITEBACK_AT: usize = 32;
const RANGE_BYTES: usize = 16;
const RANGE_UNMAP: u32 = 1;

/// The last byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// It failed, or was out of bounds.
    IoError = 1,
    /// No such operation.
    Unsupported = 2,
}

/// A disk, as its drivers are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes.
    pub size: u64,
    /// Bytes of a block: the unit in which the backend wants its requests.
    pub block_size: u32,
    /// Bytes of a physical block: what writes without a read-modify-write.
    pub physical_block_size: u32,
    /// Bytes that are best moved at once; 0 if unknown.
    pub optimal_io_size: u32,
    /// Whether mutations are refused.
    pub read_only: bool,
    /// Queues.
    pub queues: u16,
    /// Data segments in a request.
    pub segments_max: u32,
    /// Bytes of a data segment; 0 for no limit.
    pub segment_bytes_max: u32,
    /// Bytes that one discard or write-zeroes range may have; 0 if there are no such operations.
    pub discard_bytes_max: u64,
    /// Ranges in one of them, up to [`RANGES_MAX`].
    pub discard_ranges_max: u32,
    /// Its serial, padded with zeros.
    pub serial: [u8; SERIAL_BYTES],
}

impl Disk {
    /// What may be agreed on; `VHOST_F_LOG_ALL` is not among it, so a guest with such a disk cannot be
    /// migrated live by the hypervisor's dirty log.
    pub fn features(&self) -> u64 {
        let discard = if self.discard_bytes_max > 0 && !self.read_only {
            F_DISCARD | F_WRITE_ZEROES
        } else {
            0
        };
        let optional = [
            (self.read_only, F_RO),
            (self.queues > 1, F_MQ),
            (self.segment_bytes_max > 0, F_SIZE_MAX),
        ];
        let optional: u64 = optional.iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum();
        let disk = F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE;
        let rings = F_RING_INDIRECT | F_RING_EVENT_IDX | F_VERSION_1 | F_RING_PACKED;
        disk | rings | optional | discard | F_PROTOCOL_FEATURES
    }

    /// The configuration space, with the guest's choice of write-back caching.
    pub fn config(&self, writeback: bool) -> [u8; CONFIG_BYTES] {
        let sectors = self.size / SECTOR;
        let (heads, per_track) = (16u64, 63u64);
        let cylinders = (sectors / (heads * per_track)).min(65535) as u16;
        let block = u64::from(self.block_size.max(1));
        let physical_exponent =
            (u64::from(self.physical_block_size) / block).max(1).ilog2().min(15) as u8;
        let in_blocks = |bytes: u32| u64::from(bytes) / block;
        let discard_sectors = (self.discard_bytes_max / SECTOR).min(u32::MAX.into()) as u32;
        let ranges = self.discard_ranges_max.min(RANGES_MAX);
        let mut bytes = [0; CONFIG_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&sectors.to_le_bytes());
        put(&self.segment_bytes_max.to_le_bytes());
        put(&self.segments_max.to_le_bytes());
        put(&cylinders.to_le_bytes());
        put(&[heads as u8, per_track as u8]);
        put(&self.block_size.to_le_bytes());
        put(&[physical_exponent, 0]);
        put(&(in_blocks(self.physical_block_size).min(u16::MAX.into()) as u16).to_le_bytes());
        put(&(in_blocks(self.optimal_io_size) as u32).to_le_bytes());
        put(&[u8::from(writeback), 0]);
        put(&self.queues.to_le_bytes());
        put(&discard_sectors.to_le_bytes());
        put(&ranges.to_le_bytes());
        put(&((block / SECTOR) as u32).to_le_bytes());
        put(&discard_sectors.to_le_bytes());
        put(&ranges.to_le_bytes());
        put(&[1, 0, 0, 0]);
        bytes
    }

    /// What a driver wants to write into the configuration space: its choice of write-back caching,
    /// the one thing that it may; `None` for anything else.
    pub fn config_write(&self, offset: u32, bytes: &[u8]) -> Option<bool> {
        match bytes {
            [value @ (0 | 1)] if offset as usize == WRITEBACK_AT => Some(*value == 1),
            _ => None,
        }
    }
}

/// What was agreed on with a driver, as far as requests are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Feature bits.
    pub features: u64,
    /// The driver's choice of write-back caching.
    pub writeback: bool,
}

impl Agreement {
    /// Whether every write must be durable before it is answered: the driver knows no flush, or wants
    /// write-through.
    pub fn is_write_through(&self) -> bool {
        let has = |feature| self.features & feature != 0;
        !(has(F_FLUSH) && (self.writeback || !has(F_CONFIG_WCE)))
    }
}

/// A range to be discarded or zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Whether its space may be given back.
    pub unmap: bool,
}

/// Ranges of a request, none of them empty; one is the common case and costs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ranges {
    /// One.
    One(Range),
    /// Several, or none.
    Many(Vec<Range>),
}

impl Ranges {
    /// As a slice.
    pub fn as_slice(&self) -> &[Range] {
        match self {
            Ranges::One(range) => std::slice::from_ref(range),
            Ranges::Many(ranges) => ranges,
        }
    }
}

/// What a disk is asked for: in range, in whole blocks, permitted, its segments as long as its data.
#[derive(Debug)]
pub enum Operation {
    /// Bytes into the segments.
    Read {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Bytes; `written` of the answer.
        length: u32,
        /// Where to.
        segments: Segments,
    },
    /// Bytes out of the segments.
    Write {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Where from.
        segments: Segments,
        /// Whether it must be durable before it is answered.
        fua: bool,
    },
    /// All answered writes are to be durable.
    Flush,
    /// The contents of ranges are of no interest any more.
    Discard(Ranges),
    /// Ranges are to read as zeros.
    WriteZeroes {
        /// Which.
        ranges: Ranges,
        /// Whether it must be durable before it is answered.
        fua: bool,
    },
    /// It is done already: the answer is `Ok` with so many bytes.
    Done(u32),
}

/// A request that is answered without asking a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub Status);

const REFUSED: Refused = Refused(Status::IoError);
const UNSUPPORTED: Refused = Refused(Status::Unsupported);

/// From a chain to what it asks for. The ticket must be published in any case.
pub fn parse(
    chain: Chain,
    disk: &Disk,
    agreement: &Agreement,
) -> (Result<Operation, Refused>, Ticket) {
    let Chain { kind, sector, readable, writable, ticket } = chain;
    let operation = match kind {
        T_IN => read(disk, sector, writable),
        T_OUT => write(disk, agreement, sector, readable),
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID => identify(disk, &writable),
        T_DISCARD => ranges(disk, &readable, 0).map(Operation::Discard),
        T_WRITE_ZEROES => ranges(disk, &readable, RANGE_UNMAP)
            .map(|ranges| Operation::WriteZeroes { ranges, fua: agreement.is_write_through() }),
        _ => Err(UNSUPPORTED),
    };
    (operation, ticket)
}

fn read(disk: &Disk, sector: u64, segments: Segments) -> Result<Operation, Refused> {
    let (offset, length) = extent(disk, sector, &segments)?;
    if length == 0 {
        return Ok(Operation::Done(0));
    }
    Ok(Operation::Read { offset, length, segments })
}

fn write(
    disk: &Disk,
    agreement: &Agreement,
    sector: u64,
    segments: Segments,
) -> Result<Operation, Refused> {
    if disk.read_only {
        return Err(REFUSED);
    }
    let (offset, length) = extent(disk, sector, &segments)?;
    if length == 0 {
        return Ok(Operation::Done(0));
    }
    Ok(Operation::Write { offset, length, segments, fua: agreement.is_write_through() })
}

fn extent(disk: &Disk, sector: u64, segments: &Segments) -> Result<(u64, u32), Refused> {
    // The answer, status included, says how much was written in 32 bits.
    let length = u32::try_from(segments.bytes()).ok().filter(|length| *length < u32::MAX);
    let length = length.ok_or(REFUSED)?;
    let offset = check(disk, sector, length.into())?;
    Ok((offset, length))
}

/// Checks a range in sectors and bytes; returns its offset.
fn check(disk: &Disk, sector: u64, length: u64) -> Result<u64, Refused> {
    let offset = sector.checked_mul(SECTOR).ok_or(REFUSED)?;
    let end = offset.checked_add(length).ok_or(REFUSED)?;
    let block = u64::from(disk.block_size.max(1));
    if end > disk.size || !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        return Err(REFUSED);
    }
    Ok(offset)
}

fn identify(disk: &Disk, writable: &Segments) -> Result<Operation, Refused> {
    if writable.bytes() < SERIAL_BYTES as u64 {
        return Err(REFUSED);
    }
    Ok(Operation::Done(writable.write(&disk.serial) as u32))
}

fn ranges(disk: &Disk, readable: &Segments, flags_known: u32) -> Result<Ranges, Refused> {
    if disk.discard_bytes_max == 0 {
        return Err(UNSUPPORTED);
    }
    if disk.read_only {
        return Err(REFUSED);
    }
    let bytes = readable.bytes();
    let count = bytes / RANGE_BYTES as u64;
    let count_max = u64::from(disk.discard_ranges_max.min(RANGES_MAX));
    if count == 0 || count > count_max || !bytes.is_multiple_of(RANGE_BYTES as u64) {
        return Err(REFUSED);
    }
    if count == 1 {
        let mut entry = [0; RANGE_BYTES];
        readable.read(&mut entry);
        let range = range(disk, &entry, flags_known)?;
        return Ok(if range.length == 0 { Ranges::Many(Vec::new()) } else { Ranges::One(range) });
    }
    // One copy: what the guest changes afterwards is not seen.
    let mut entries = vec![0; count as usize * RANGE_BYTES];
    readable.read(&mut entries);
    let (entries, _) = entries.as_chunks();
    let ranges: Result<Vec<Range>, Refused> =
        entries.iter().map(|entry| range(disk, entry, flags_known)).collect();
    Ok(Ranges::Many(ranges?.into_iter().filter(|range| range.length > 0).collect()))
}

fn range(disk: &Disk, entry: &[u8; RANGE_BYTES], flags_known: u32) -> Result<Range, Refused> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *entry;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let length = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
    let flags = u32::from_le_bytes(flags);
    if flags & !flags_known != 0 {
        return Err(UNSUPPORTED);
    }
    if length > disk.discard_bytes_max {
        return Err(REFUSED);
    }
    let offset = check(disk, sector, length)?;
    // To discard is to give space back.
    Ok(Range { offset, length, unmap: flags_known == 0 || flags & RANGE_UNMAP != 0 })
}

#[cfg(test)]
mod tests;
