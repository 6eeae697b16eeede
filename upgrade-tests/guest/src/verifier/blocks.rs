//! Blocks of stamps in memory: filled, and read back.

use nebd_guest::board::{BLOCK_BYTES, Value};
use nebd_guest::stamp::{Found, SECTOR_BYTES, Stamp};

/// Memory that begins at a page, for direct requests.
pub struct Aligned {
    bytes: Vec<u8>,
    from: usize,
}

impl Aligned {
    /// Room for so many blocks.
    pub fn new(blocks: usize) -> Aligned {
        let bytes = vec![0; (blocks + 1) * BLOCK_BYTES];
        let from = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Aligned { bytes, from }
    }

    /// The first so many blocks.
    pub fn blocks(&mut self, count: usize) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + count * BLOCK_BYTES]
    }
}

/// Stamps a block.
pub fn fill(bytes: &mut [u8], volume: usize, block: u64, value: Value) {
    if value.is_nothing() {
        bytes.fill(0);
        return;
    }
    let number = value.number();
    let incarnation = (number >> 32) as u32;
    Stamp { volume: volume as u64, block, write: number, incarnation }.fill(bytes);
}

/// The number of the write that a block holds throughout, or `None` for zeros throughout; else what is
/// wrong with it.
pub fn number(bytes: &[u8], volume: usize, block: u64) -> Result<Option<u64>, String> {
    let mut of_block = None;
    for (index, sector) in bytes.chunks_exact(SECTOR_BYTES).enumerate() {
        let found = Found::decode(sector);
        let number = match found {
            Found::Zeros => None,
            Found::Stamp(stamp, at)
                if stamp.volume == volume as u64
                    && stamp.block == block
                    && at as usize == index =>
            {
                Some(stamp.write)
            }
            _ => return Err(format!("block {block}, sector {index}: {found}")),
        };
        match of_block {
            None => of_block = Some(number),
            Some(first) if first == number => {}
            Some(first) => {
                return Err(format!("block {block} is torn: {first:?}, sector {index}: {found}"));
            }
        }
    }
    Ok(of_block.flatten())
}
