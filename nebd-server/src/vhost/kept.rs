//! What of a hypervisor's connection is in the descriptor store, and what its journal says of that.
//!
//! Each descriptor that a hypervisor sends gets a name that was never used in its session, `v<serial>`.
//! The journal says which serial is what, and is written, whole, after the descriptors were stored and
//! before those that it names no longer are removed. So a server may die anywhere in between: its
//! successor finds what the journal names, and removes the rest.
//!
//! ```text
//!  0   version u32    4 next serial u32    8 regions u32    12 rings u32
//!  16  record: serial u32, queues u16, entries of each u16, offset in its memfd u64
//!  32  channel: serial u32, 0 u32
//!  40  regions: guest address u64, size u64, user address u64, offset in its file u64, serial u32, 0 u32
//!   …  rings: kick u32, call u32
//!   …  the device's state: nebd_vhost::device::State
//! ```
//!
//! Little-endian; serial 0 is none.

use nebd_vhost::memory::RegionSpec;

const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const REGION_BYTES: usize = 40;
const RING_BYTES: usize = 8;

/// A descriptor's number among all that its session ever kept.
pub(super) type Serial = u32;

/// The inflight record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KeptRecord {
    pub(super) serial: Serial,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) offset: u64,
}

/// The doorbells of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KeptRing {
    pub(super) kick: Serial,
    pub(super) call: Serial,
}

/// Which descriptor is what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    last: Serial,
    pub(super) record: KeptRecord,
    pub(super) channel: Serial,
    pub(super) regions: Vec<(RegionSpec, Serial)>,
    pub(super) rings: Vec<KeptRing>,
}

impl Kept {
    /// Nothing is kept yet.
    pub(super) fn new(rings: usize) -> Kept {
        Kept { rings: vec![KeptRing::default(); rings], ..Kept::default() }
    }

    /// The name of a descriptor, within those of its session.
    pub(super) fn name(serial: Serial) -> String {
        format!("v{serial}")
    }

    /// The number that goes with a name.
    pub(super) fn serial_of(name: &str) -> Option<Serial> {
        name.strip_prefix('v')?.parse().ok()
    }

    /// A number that was never used.
    pub(super) fn next_serial(&mut self) -> Serial {
        self.last += 1;
        self.last
    }

    /// Whether a descriptor is needed still.
    pub(super) fn names(&self, serial: Serial) -> bool {
        serial == self.record.serial
            || serial == self.channel
            || self.regions.iter().any(|(_, region)| *region == serial)
            || self.rings.iter().any(|ring| serial == ring.kick || serial == ring.call)
    }

    /// Its bytes, with those of the device's state.
    pub(super) fn encode(&self, state: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + state.len() + 512);
        for word in [VERSION, self.last, self.regions.len() as u32, self.rings.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        let KeptRecord { serial, queues, queue_size, offset } = self.record;
        bytes.extend(serial.to_le_bytes());
        bytes.extend(queues.to_le_bytes());
        bytes.extend(queue_size.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend(u64::from(self.channel).to_le_bytes());
        for (region, serial) in &self.regions {
            let RegionSpec { guest_address, size, user_address, mmap_offset } = *region;
            for word in [guest_address, size, user_address, mmap_offset, u64::from(*serial)] {
                bytes.extend(word.to_le_bytes());
            }
        }
        for ring in &self.rings {
            bytes.extend(ring.kick.to_le_bytes());
            bytes.extend(ring.call.to_le_bytes());
        }
        bytes.extend(state);
        bytes
    }

    /// From its bytes, with what is left of them, the device's state; no bytes are a new connection's.
    /// `None` if they are something else, or speak of another number of rings.
    pub(super) fn decode(bytes: &[u8], rings: usize) -> Option<(Kept, &[u8])> {
        if bytes.is_empty() {
            return Some((Kept::new(rings), bytes));
        }
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let word = |at: usize| header[at..].first_chunk().map(|word| u32::from_le_bytes(*word));
        let half = |at: usize| header[at..].first_chunk().map(|half| u16::from_le_bytes(*half));
        if word(0)? != VERSION || word(12)? as usize != rings {
            return None;
        }
        let regions_bytes = (word(8)? as usize).checked_mul(REGION_BYTES)?;
        let (regions, rest) = rest.split_at_checked(regions_bytes)?;
        let (ring_bytes, state) = rest.split_at_checked(rings.checked_mul(RING_BYTES)?)?;
        let region = |bytes: &[u8; REGION_BYTES]| {
            let (words, _) = bytes.as_chunks();
            let [guest_address, size, user_address, mmap_offset, serial] =
                [0, 1, 2, 3, 4].map(|at: usize| u64::from_le_bytes(words[at]));
            (RegionSpec { guest_address, size, user_address, mmap_offset }, serial as u32)
        };
        let ring = |bytes: &[u8; RING_BYTES]| {
            let (words, _) = bytes.as_chunks();
            KeptRing { kick: u32::from_le_bytes(words[0]), call: u32::from_le_bytes(words[1]) }
        };
        let offset = u64::from_le_bytes(*header[24..].first_chunk()?);
        let record =
            KeptRecord { serial: word(16)?, queues: half(20)?, queue_size: half(22)?, offset };
        let kept = Kept {
            last: word(4)?,
            record,
            channel: word(32)?,
            regions: regions.as_chunks().0.iter().map(region).collect(),
            rings: ring_bytes.as_chunks().0.iter().map(ring).collect(),
        };
        Some((kept, state))
    }
}

#[cfg(test)]
mod tests;
