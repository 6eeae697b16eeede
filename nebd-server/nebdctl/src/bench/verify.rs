//! Stamps on what is written, and the check of what is read.
//!
//! Each sector carries its volume, its place, the number of its write and a checksum
//! ([`Stamp`]). What this run wrote must be read back as written; what it did not write must at
//! least stay the same, and must not claim to belong elsewhere.

use std::collections::HashMap;

use nebd_upgrade_tests::stamp::{Found, SECTOR_BYTES, Stamp, mix};

/// What a unit (one request's range) is known to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// What write number n of this run left.
    Written(u64),
    /// Unknown, but its checksum was this when it was first read.
    Seen(u32),
    /// A write of it failed: old or new.
    OldOrNew,
}

/// The expected contents of one lane's part of a volume.
#[derive(Debug)]
pub struct Checker {
    volume: u64,
    run: u32,
    unit_bytes: u64,
    writes: u64,
    known: HashMap<u64, Known>,
}

impl Checker {
    /// For the volume of this name; `run` tells this run's stamps from those of earlier ones.
    pub fn new(volume: &str, run: u32, unit_bytes: u64) -> Checker {
        let volume = volume.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
        Checker { volume, run, unit_bytes, writes: 0, known: HashMap::new() }
    }

    /// Fills a buffer for a write of `unit`; returns the number of the write.
    pub fn stamp(&mut self, unit: u64, buffer: &mut [u8]) -> u64 {
        self.writes += 1;
        for (sector, bytes) in buffer.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            self.expected(unit, sector as u64, self.writes).fill(bytes);
        }
        self.writes
    }

    /// Write number `write` of `unit` was answered.
    pub fn written(&mut self, unit: u64, write: u64, is_ok: bool) {
        let known = if is_ok { Known::Written(write) } else { Known::OldOrNew };
        self.known.insert(unit, known);
    }

    /// Checks what a read of `unit` returned; tells what is wrong.
    pub fn check(&mut self, unit: u64, buffer: &[u8]) -> Result<(), String> {
        let known = self.known.get(&unit).copied();
        for (sector, bytes) in buffer.chunks_exact(SECTOR_BYTES).enumerate() {
            let sector = sector as u64;
            let found = Found::decode(bytes);
            let is_right = match (known, found) {
                (Some(Known::Written(write)), Found::Stamp(stamp, 0)) => {
                    stamp == self.expected(unit, sector, write)
                }
                (Some(Known::Written(_)), _) | (_, Found::Damaged(_)) => false,
                // A stamp that this tool left in an earlier run.
                (_, Found::Stamp(stamp, 0)) if stamp.volume == self.volume => {
                    stamp.block == self.place(unit, sector)
                }
                _ => true,
            };
            if !is_right {
                let place = self.place(unit, sector);
                let expected = match known {
                    Some(Known::Written(write)) => self.expected(unit, sector, write).to_string(),
                    _ => "a whole sector of its own place".into(),
                };
                return Err(format!(
                    "sector {place} (byte {}): expected {expected}, found {found}",
                    place * SECTOR_BYTES as u64
                ));
            }
        }
        let sum = crc32c::crc32c(buffer);
        match known {
            Some(Known::Seen(before)) if before != sum => Err(format!(
                "byte {}: it changed from one read to the next, and this run did not write it",
                unit * self.unit_bytes
            )),
            None => {
                self.known.insert(unit, Known::Seen(sum));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The units that this run wrote, in order: to be read again at the end.
    pub fn written_units(&self) -> Vec<u64> {
        let written =
            |(unit, known): (&u64, &Known)| matches!(known, Known::Written(_)).then_some(*unit);
        let mut units: Vec<u64> = self.known.iter().filter_map(written).collect();
        units.sort_unstable();
        units
    }

    fn place(&self, unit: u64, sector: u64) -> u64 {
        unit * (self.unit_bytes / SECTOR_BYTES as u64) + sector
    }

    fn expected(&self, unit: u64, sector: u64, write: u64) -> Stamp {
        let block = self.place(unit, sector);
        Stamp { volume: self.volume, block, write, incarnation: self.run }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_right_and_anything_else_is_wrong() {
        let mut checker = Checker::new("mem:a", 1, 4096);
        let mut first = vec![0; 4096];
        let mut second = vec![0; 4096];
        let one = checker.stamp(3, &mut first);
        let two = checker.stamp(3, &mut second);
        checker.written(3, one, true);
        assert_eq!(checker.check(3, &first), Ok(()));
        checker.written(3, two, true);
        assert!(checker.check(3, &first).unwrap_err().contains("byte 12288"));
        assert_eq!(checker.check(3, &second), Ok(()));
        assert!(checker.check(4, &second).is_err(), "a stamp of another place");
        assert!(checker.check(3, &[0; 4096]).is_err(), "a lost write");
        let mut torn = second.clone();
        torn[2048..].copy_from_slice(&first[2048..]);
        assert!(checker.check(3, &torn).is_err(), "a torn write");
        checker.written(3, one, false);
        assert_eq!(checker.check(3, &first), Ok(()));
        assert_eq!(checker.check(3, &second), Ok(()));
        second[100] ^= 1;
        assert!(checker.check(3, &second).is_err(), "a damaged sector is never right");
        assert_eq!(checker.written_units(), Vec::<u64>::new());
    }

    #[test]
    fn what_nobody_wrote_stays_the_same() {
        let mut checker = Checker::new("mem:a", 1, 512);
        assert_eq!(checker.check(9, &[7; 512]), Ok(()));
        assert_eq!(checker.check(9, &[7; 512]), Ok(()));
        assert!(checker.check(9, &[8; 512]).is_err());
    }
}
