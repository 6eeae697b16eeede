//! The fence of one volume: who may change it, and what was applied already.

use std::collections::BTreeSet;

use nebd_abi::{Epoch, Fence};

/// Most applied seqs remembered above the watermark.
pub const APPLIED_MAX: usize = 1 << 20;

/// What is to be done with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is new: apply it.
    Apply,
    /// It was applied: acknowledge it again, and apply nothing.
    Again,
    /// Its owner has been replaced.
    Stale,
    /// It was answered long ago: its seq is below the watermark.
    Answered,
    /// Too many operations are between the oldest outstanding one and this: ask again later.
    Crowded,
}

/// The fence of one volume.
#[derive(Clone, Debug, Default)]
pub struct VolumeFence {
    epoch: Epoch,
    watermark: u64,
    applied: BTreeSet<u64>,
    is_off: bool,
}

impl VolumeFence {
    /// A fence; with `is_off` one that lets everything through, to prove that tests would notice.
    pub fn new(is_off: bool) -> VolumeFence {
        VolumeFence { is_off, ..VolumeFence::default() }
    }

    /// The highest epoch seen.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Judges an operation, reads too. A higher epoch is committed here, before anything is served
    /// under it; a change that is to be applied is remembered, so the caller applies it at once,
    /// under the same lock.
    pub fn admit(&mut self, fence: &Fence, is_change: bool) -> Verdict {
        if self.is_off {
            return Verdict::Apply;
        }
        if fence.epoch < self.epoch {
            return Verdict::Stale;
        }
        if fence.epoch > self.epoch {
            self.epoch = fence.epoch;
            self.watermark = 0;
            self.applied.clear();
        }
        if fence.oldest > self.watermark {
            self.watermark = fence.oldest;
            self.applied = self.applied.split_off(&self.watermark);
        }
        if fence.seq < self.watermark {
            return Verdict::Answered;
        }
        if !is_change {
            return Verdict::Apply;
        }
        if self.applied.contains(&fence.seq) {
            return Verdict::Again;
        }
        if self.applied.len() >= APPLIED_MAX {
            return Verdict::Crowded;
        }
        self.applied.insert(fence.seq);
        Verdict::Apply
    }
}

/// Who was granted a volume, by whoever grants major epochs (the MDS of a real cluster). It is not
/// the fence: operations alone tell the fence of a new epoch, as they do on a chunkserver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grant {
    granted: Epoch,
}

impl Grant {
    /// An open. An opener that presents the major it had before, and a higher minor, takes over
    /// under the same major; one without gets a new one. `None`: it was replaced meanwhile.
    pub fn open(&mut self, asked: Epoch) -> Option<u32> {
        let Epoch { major, minor } = self.granted;
        if asked.major == 0 || asked == self.granted {
            self.granted = Epoch { major: major + 1, minor: asked.minor };
        } else if asked.major == major && asked.minor > minor {
            self.granted = asked;
        } else {
            return None;
        }
        Some(self.granted.major)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(major: u32, minor: u32, seq: u64, oldest: u64) -> Fence {
        Fence { volume: 1, epoch: Epoch { major, minor }, seq, oldest }
    }

    #[test]
    fn a_lower_epoch_is_refused_and_a_higher_one_starts_anew() {
        let mut state = VolumeFence::new(false);
        assert_eq!(state.admit(&fence(1, 1, 5, 5), true), Verdict::Apply);
        assert_eq!(state.admit(&fence(1, 2, 1, 1), false), Verdict::Apply, "a read commits, too");
        assert_eq!(state.admit(&fence(1, 1, 6, 5), true), Verdict::Stale);
        assert_eq!(state.admit(&fence(1, 1, 6, 5), false), Verdict::Stale);
        assert_eq!(state.admit(&fence(1, 2, 5, 1), true), Verdict::Apply, "5 of another epoch");
        assert_eq!(state.admit(&fence(2, 0, 1, 1), true), Verdict::Apply);
        assert_eq!(state.admit(&fence(1, 9, 7, 1), true), Verdict::Stale);
    }

    /// The example of the design: the watermark alone would not do.
    #[test]
    fn a_late_copy_above_the_watermark_is_not_applied_again() {
        let mut state = VolumeFence::new(false);
        assert_eq!(state.admit(&fence(1, 1, 11, 10), true), Verdict::Apply);
        assert_eq!(state.admit(&fence(1, 1, 12, 10), true), Verdict::Apply);
        assert_eq!(state.admit(&fence(1, 1, 11, 10), true), Verdict::Again);
        assert_eq!(state.admit(&fence(1, 1, 13, 13), true), Verdict::Apply);
        assert_eq!(state.admit(&fence(1, 1, 12, 10), true), Verdict::Answered);
    }

    #[test]
    fn majors_grow_unless_the_owner_takes_over_from_itself() {
        let mut grant = Grant::default();
        assert_eq!(grant.open(Epoch { major: 0, minor: 1 }), Some(1));
        assert_eq!(grant.open(Epoch { major: 1, minor: 2 }), Some(1));
        assert_eq!(grant.open(Epoch { major: 1, minor: 1 }), None, "a frozen server wakes up");
        assert_eq!(grant.open(Epoch { major: 0, minor: 2 }), Some(2));
        assert_eq!(grant.open(Epoch { major: 1, minor: 3 }), None);
        assert_eq!(grant.open(Epoch { major: 2, minor: 2 }), Some(3), "closed and opened again");
    }
}
