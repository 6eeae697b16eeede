//! A disk in memory, with a volatile cache that loses what was not flushed.

use std::collections::BTreeMap;

use crate::stamp::{Dice, SECTOR_BYTES};

type Sector = Box<[u8]>;

/// A disk. Its contents are what a read sees; beside them stands what a power cut may bring back.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    data: Vec<u8>,
    /// For each sector that was written since it was last durable: what it was then.
    unflushed: BTreeMap<usize, Sector>,
    is_volatile: bool,
}

/// The range is not inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange;

impl Disk {
    /// A disk of zeros; `is_volatile` if a power cut is to lose what was not flushed.
    pub fn new(size_bytes: u64, is_volatile: bool) -> Disk {
        Disk { data: vec![0; size_bytes as usize], unflushed: BTreeMap::new(), is_volatile }
    }

    /// Bytes.
    pub fn size_bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// Changes the size; what is new is zeros.
    pub fn resize(&mut self, size_bytes: u64) {
        self.data.resize(size_bytes as usize, 0);
        let sectors = self.data.len() / SECTOR_BYTES;
        self.unflushed.retain(|sector, _| *sector < sectors);
    }

    /// Reads a range.
    pub fn read(&self, offset: u64, length: u64) -> Result<&[u8], OutOfRange> {
        let end = offset.checked_add(length).ok_or(OutOfRange)?;
        self.data.get(offset as usize..end as usize).ok_or(OutOfRange)
    }

    /// Writes a range.
    pub fn write(&mut self, offset: u64, bytes: &[u8], fua: bool) -> Result<(), OutOfRange> {
        self.prepare(offset, bytes.len() as u64, fua)?;
        self.data[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Zeros a range.
    pub fn zero(&mut self, offset: u64, length: u64, fua: bool) -> Result<(), OutOfRange> {
        self.prepare(offset, length, fua)?;
        self.data[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }

    /// What was written is durable.
    pub fn flush(&mut self) {
        self.unflushed.clear();
    }

    /// Some of what was not flushed is gone, sector by sector. Returns how many sectors changed.
    pub fn cut_power(&mut self, seed: u64) -> usize {
        let mut dice = Dice::new(seed);
        let unflushed = std::mem::take(&mut self.unflushed);
        let mut lost = 0;
        for (sector, durable) in unflushed {
            if dice.percent(70) {
                self.data[sector * SECTOR_BYTES..][..SECTOR_BYTES].copy_from_slice(&durable);
                lost += 1;
            }
        }
        lost
    }

    fn prepare(&mut self, offset: u64, length: u64, fua: bool) -> Result<(), OutOfRange> {
        self.read(offset, length)?;
        if !self.is_volatile {
            return Ok(());
        }
        let first = offset as usize / SECTOR_BYTES;
        let end = (offset + length) as usize / SECTOR_BYTES;
        for sector in first..end {
            if fua {
                self.unflushed.remove(&sector);
            } else {
                let data = &self.data[sector * SECTOR_BYTES..][..SECTOR_BYTES];
                self.unflushed.entry(sector).or_insert_with(|| data.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_cut_spares_what_was_flushed_or_forced() {
        let mut disk = Disk::new(1 << 20, true);
        disk.write(0, &[1; 8192], false).unwrap();
        disk.flush();
        disk.write(8192, &[2; 4096], true).unwrap();
        disk.write(16384, &[3; 65536], false).unwrap();
        assert!(disk.cut_power(1) > 0);
        assert!(disk.read(0, 8192).unwrap().iter().all(|byte| *byte == 1));
        assert!(disk.read(8192, 4096).unwrap().iter().all(|byte| *byte == 2));
        assert!(disk.read(16384, 65536).unwrap().contains(&0));
        assert_eq!(disk.write(1 << 20, &[0; 512], false), Err(OutOfRange));
        assert_eq!(disk.read(u64::MAX, 512), Err(OutOfRange));
    }
}
