//! Operations that travel on the ring. All are idempotent: a successor may issue them again.

/// What a request asks of its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Read `length` bytes at `offset` into the buffers.
    Read = 1,
    /// Write `length` bytes at `offset` from the buffers.
    Write = 2,
    /// Every write acknowledged before this was submitted is durable once it completes.
    Flush = 3,
    /// The range may be forgotten; it reads as zeros or as before.
    Discard = 4,
    /// The range reads as zeros afterwards.
    WriteZeroes = 5,
}

impl Op {
    /// Every operation, in the order of its number.
    pub const ALL: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];

    /// The operation with this number in a slot, if there is one.
    pub fn from_bits(bits: u8) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u8 == bits)
    }

    /// Whether the operation moves data through buffers.
    pub fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }

    /// Whether the operation changes what the volume holds.
    pub fn is_mutation(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// Modifiers of an [`Op`]; a bit set, appended to and never renumbered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OpFlags(u8);

impl OpFlags {
    /// No modifier.
    pub const NONE: OpFlags = OpFlags(0);
    /// Force unit access: a write or write-zeroes is durable once it completes.
    pub const FUA: OpFlags = OpFlags(1 << 0);
    /// Write-zeroes keeps the range allocated.
    pub const NO_UNMAP: OpFlags = OpFlags(1 << 1);

    const KNOWN: u8 = 0b11;

    /// The flags with these bits; `None` if any is unknown, for a silent drop of a flag (FUA!)
    /// would lose data.
    pub fn from_bits(bits: u8) -> Option<OpFlags> {
        (bits & !OpFlags::KNOWN == 0).then_some(OpFlags(bits))
    }

    /// As they stand in a slot.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: OpFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for OpFlags {
    type Output = OpFlags;

    fn bitor(self, other: OpFlags) -> OpFlags {
        OpFlags(self.0 | other.0)
    }
}
