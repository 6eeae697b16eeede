//! Who owns a volume, and since when.

use std::fmt;

/// One value of the host's generation word: it grows by one with each server that takes over.
///
/// Zero means that no server has ever owned this host's volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The generation of the owner of a volume; storage that can fence rejects lower ones.
///
/// `major` is granted by the storage when a volume is opened anew; `minor` is the host's
/// [`Generation`] at which the present server took over, so that a takeover asks nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch {
    /// Granted by the storage at open.
    pub major: u32,
    /// Raised by the host at each takeover.
    pub minor: u32,
}

impl Epoch {
    /// The epoch of a volume opened under `major` by the server of `generation`.
    pub fn new(major: u32, generation: Generation) -> Epoch {
        Epoch { major, minor: generation.0 }
    }

    /// As it stands in shared memory and on the wire: ordered like the epoch itself.
    pub fn to_bits(self) -> u64 {
        (u64::from(self.major) << 32) | u64::from(self.minor)
    }

    /// The inverse of [`Epoch::to_bits`].
    pub fn from_bits(bits: u64) -> Epoch {
        Epoch { major: (bits >> 32) as u32, minor: bits as u32 }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Which operation, from whom, in which order: what lets storage refuse what is late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fence {
    /// The volume's id at its storage.
    pub volume: u64,
    /// The generation of the volume's owner.
    pub epoch: Epoch,
    /// Given out at dispatch, from 1, one counter a (volume, epoch), kept over retries.
    pub seq: u64,
    /// The lowest `seq` not yet answered when this one was given out.
    pub oldest: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_keep_the_order() {
        let older = Epoch { major: 1, minor: u32::MAX };
        let newer = Epoch { major: 2, minor: 0 };
        assert!(older < newer && older.to_bits() < newer.to_bits());
        assert_eq!(Epoch::from_bits(older.to_bits()), older);
    }
}
