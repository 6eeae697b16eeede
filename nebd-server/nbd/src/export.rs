//! Exports, and what is agreed on about one.

use crate::wire::PAYLOAD_BYTES_TOLERATED;

/// Transmission flags of an export; a bit set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ExportFlags(u16);

impl ExportFlags {
    /// No flag.
    pub const NONE: ExportFlags = ExportFlags(0);
    /// Always set on the wire; set by this library.
    pub const HAS_FLAGS: ExportFlags = ExportFlags(1 << 0);
    /// Nothing can be written.
    pub const READ_ONLY: ExportFlags = ExportFlags(1 << 1);
    /// `FLUSH` is known.
    pub const SEND_FLUSH: ExportFlags = ExportFlags(1 << 2);
    /// The flag `FUA` is known.
    pub const SEND_FUA: ExportFlags = ExportFlags(1 << 3);
    /// A disk that turns.
    pub const ROTATIONAL: ExportFlags = ExportFlags(1 << 4);
    /// `TRIM` is known.
    pub const SEND_TRIM: ExportFlags = ExportFlags(1 << 5);
    /// `WRITE_ZEROES` and its flag `NO_HOLE` are known.
    pub const SEND_WRITE_ZEROES: ExportFlags = ExportFlags(1 << 6);
    /// The flag `DF` is known; set by this library if structured replies are agreed on.
    pub const SEND_DF: ExportFlags = ExportFlags(1 << 7);
    /// A flush on one connection covers what was acknowledged on another.
    pub const CAN_MULTI_CONN: ExportFlags = ExportFlags(1 << 8);
    /// `CACHE` is known.
    pub const SEND_CACHE: ExportFlags = ExportFlags(1 << 10);
    /// The flag `FAST_ZERO` is known.
    pub const SEND_FAST_ZERO: ExportFlags = ExportFlags(1 << 11);

    const KNOWN: u16 = 0b1101_1111_1111;

    /// As they travel.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// The flags with these bits; `None` if any is unknown.
    pub fn from_bits(bits: u16) -> Option<ExportFlags> {
        (bits & !ExportFlags::KNOWN == 0).then_some(ExportFlags(bits))
    }

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: ExportFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// These flags without those of `other`.
    pub fn without(self, other: ExportFlags) -> ExportFlags {
        ExportFlags(self.0 & !other.0)
    }

    /// What a client is told: consistent, whatever the caller wished for.
    pub(crate) fn offered(self, structured: bool) -> ExportFlags {
        let mut flags = self.without(ExportFlags::SEND_DF) | ExportFlags::HAS_FLAGS;
        if structured {
            flags = flags | ExportFlags::SEND_DF;
        }
        if !flags.contains(ExportFlags::SEND_WRITE_ZEROES) {
            flags = flags.without(ExportFlags::SEND_FAST_ZERO);
        }
        flags
    }
}

impl std::ops::BitOr for ExportFlags {
    type Output = ExportFlags;

    fn bitor(self, other: ExportFlags) -> ExportFlags {
        ExportFlags(self.0 | other.0)
    }
}

/// Size constraints of an export, within what the protocol allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    minimum: u32,
    preferred: u32,
    payload_max: u32,
}

/// Size constraints that the protocol does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "blocks of {minimum}, better {preferred}, payloads up to {payload_max} bytes: no client would take that"
)]
pub struct SizesError {
    /// See [`Sizes::minimum`].
    pub minimum: u32,
    /// See [`Sizes::preferred`].
    pub preferred: u32,
    /// See [`Sizes::payload_max`].
    pub payload_max: u32,
}

impl Sizes {
    /// Largest payload that an export can allow.
    pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;

    /// What a client expects that is told nothing.
    pub const DEFAULT: Sizes =
        Sizes { minimum: 1, preferred: 4096, payload_max: PAYLOAD_BYTES_TOLERATED };

    /// The minimum is a power of two up to 64 KiB, the preferred size one from 512 that is not
    /// below it, and a payload holds at least one block of that.
    pub fn new(minimum: u32, preferred: u32, payload_max: u32) -> Result<Sizes, SizesError> {
        let is_valid = minimum.is_power_of_two()
            && minimum <= 1 << 16
            && preferred.is_power_of_two()
            && preferred >= minimum.max(512)
            && (preferred..=Sizes::PAYLOAD_BYTES_MAX).contains(&payload_max);
        if is_valid {
            Ok(Sizes { minimum, preferred, payload_max })
        } else {
            Err(SizesError { minimum, preferred, payload_max })
        }
    }

    /// Offsets and lengths are multiples of it.
    pub fn minimum(self) -> u32 {
        self.minimum
    }

    /// Multiples of it are fast.
    pub fn preferred(self) -> u32 {
        self.preferred
    }

    /// Longest write, and longest read in one piece.
    pub fn payload_max(self) -> u32 {
        self.payload_max
    }
}

/// What a server says about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its canonical name, as in a list.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Bytes; a multiple of the minimum block size, or the rest is out of reach.
    pub size: u64,
    /// Size constraints.
    pub sizes: Sizes,
    /// What it can do. `HAS_FLAGS` and `SEND_DF` are added where they belong.
    pub flags: ExportFlags,
}

/// What holds for the transmission on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Bytes of the export.
    pub size: u64,
    /// Size constraints.
    pub sizes: Sizes,
    /// What the client was told that the export can do.
    pub flags: ExportFlags,
    /// Structured replies.
    pub structured: bool,
    /// `base:allocation` is selected.
    pub allocation: bool,
}

/// What a negotiation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export by the name that the server gave it.
    pub export: String,
    /// What holds from here on.
    pub terms: Terms,
    /// Whether the connection is under TLS.
    pub tls: bool,
}
