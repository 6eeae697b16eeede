//! What a workload writes: every 512-byte sector says who wrote it, where, and when.
//!
//! ```text
//!  0           8           16          24          32     36     40                 508    512
//!  ├ NEBDSTMP ─┼ volume ───┼ block ────┼ write ────┼ incar┼sector┼ pattern ─────────┼ crc32c┤
//! ```
//!
//! The sector is the unit of the stamp, the block (4096 or 512 bytes) the unit of the
//! harness's oracle: a torn block is told apart from a stale one, and its halves are named.

use std::fmt;

/// Bytes of a stamp.
pub const SECTOR_BYTES: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"NEBDSTMP");
const CRC_AT: usize = SECTOR_BYTES - 4;

/// What one write leaves in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The volume, as the harness numbers them.
    pub volume: u64,
    /// The block in that volume.
    pub block: u64,
    /// The number of the write in its workload, from 1.
    pub write: u64,
    /// The run that wrote it: blocks left by an earlier run are recognised.
    pub incarnation: u32,
}

/// What was found in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros throughout.
    Zeros,
    /// A whole stamp, and the number of the sector within its block.
    Stamp(Stamp, u32),
    /// It begins like a stamp, and its checksum is off.
    Damaged(Stamp),
    /// Something that no workload wrote: its first bytes.
    Alien([u8; 16]),
}

impl Stamp {
    /// Fills a block with this stamp. Its length is a multiple of [`SECTOR_BYTES`].
    pub fn fill(&self, block: &mut [u8]) {
        for (sector, bytes) in block.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            self.fill_sector(sector as u32, bytes);
        }
    }

    /// Fills one sector: number `sector` of the stamp's block.
    pub fn fill_sector(&self, sector: u32, bytes: &mut [u8]) {
        let tail = u64::from(self.incarnation) | u64::from(sector) << 32;
        let head = [MAGIC, self.volume, self.block, self.write, tail];
        let mut pattern = mix(self.write ^ mix(self.block ^ mix(self.volume)) ^ tail);
        for (i, word) in bytes[..CRC_AT - 4].chunks_exact_mut(8).enumerate() {
            let value = head.get(i).copied().unwrap_or_else(|| {
                pattern = pattern.wrapping_add(0x9E37_79B9_7F4A_7C15);
                pattern
            });
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes[CRC_AT - 4..CRC_AT].copy_from_slice(&(pattern as u32).to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }
}

impl Found {
    /// What stands in a sector.
    pub fn decode(bytes: &[u8]) -> Found {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        if word(0) != MAGIC {
            if bytes.iter().all(|byte| *byte == 0) {
                return Found::Zeros;
            }
            let mut head = [0; 16];
            head.copy_from_slice(&bytes[..16]);
            return Found::Alien(head);
        }
        let (volume, block, write, tail) = (word(8), word(16), word(24), word(32));
        let stamp = Stamp { volume, block, write, incarnation: tail as u32 };
        let crc = (word(SECTOR_BYTES - 8) >> 32) as u32;
        if crc32c::crc32c(&bytes[..CRC_AT]) != crc {
            return Found::Damaged(stamp);
        }
        Found::Stamp(stamp, (tail >> 32) as u32)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { volume, block, write, incarnation } = self;
        write!(f, "write {write} of volume {volume}, block {block}, run {incarnation}")
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Zeros => f.write_str("zeros"),
            Found::Stamp(stamp, sector) => write!(f, "{stamp}, sector {sector}"),
            Found::Damaged(stamp) => write!(f, "a damaged sector that claims {stamp}"),
            Found::Alien(head) => {
                f.write_str("bytes that no workload wrote: ")?;
                head.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// A good 64-bit mixer (splitmix64): every draw of the harness comes from it.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A small deterministic generator of draws.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The dice of this seed.
    pub fn new(seed: u64) -> Dice {
        Dice(mix(seed))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// True in `percent` of 100 draws.
    pub fn percent(&mut self, percent: u32) -> bool {
        self.below(100) < u64::from(percent)
    }

    /// True in `per_million` of 1,000,000 draws.
    pub fn per_million(&mut self, per_million: u32) -> bool {
        self.below(1_000_000) < u64::from(per_million)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { volume: 3, block: 77, write: 1001, incarnation: 2 };

    #[test]
    fn a_stamp_comes_back_from_each_sector_of_its_block() {
        let mut block = vec![0; 4096];
        assert_eq!(Found::decode(&block[..512]), Found::Zeros);
        STAMP.fill(&mut block);
        for (sector, bytes) in block.chunks_exact(SECTOR_BYTES).enumerate() {
            assert_eq!(Found::decode(bytes), Found::Stamp(STAMP, sector as u32));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut sector = vec![0; SECTOR_BYTES];
        STAMP.fill(&mut sector);
        for bit in 0..SECTOR_BYTES * 8 {
            sector[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(Found::decode(&sector), Found::Stamp(..) | Found::Zeros), "{bit}");
            sector[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
