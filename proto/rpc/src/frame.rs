//! The data-plane frame: one fixed header, an optional payload, a checksum over each.
//!
//! ```text
//!  0        4        6        8                16               24               32
//!  ├ NFRM ──┼ version┼ kind ──┼ request ───────┼ volume ────────┼ epoch ─────────┤
//!  ├ seq ────────────┼ oldest ────────────────┼ offset ────────┼ length ────────┤  64
//!  ├ flags ─┼ result ┼ payload bytes ┼ payload crc ┼ header crc ┼ zero ──────────┤  88
//! ```
//!
//! Every operation, reads too, carries the fence `(volume, epoch, seq, oldest)`: storage refuses
//! a lower epoch, commits a higher one before it serves anything under it, and never applies a
//! `seq` twice.

use std::io::{self, Read, Write};

use nebd_abi::{Epoch, Fence};

/// `NFRM`, little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"NFRM");
/// Version of the frame.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 88;
/// Largest payload.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Open a volume; payload: its name. Answer: `fence.volume`, `fence.epoch.major`, `length` (size).
    Open = 1,
    /// Read `length` bytes; the answer's payload.
    Read = 2,
    /// Write the payload.
    Write = 3,
    /// Make what was acknowledged durable.
    Flush = 4,
    /// Forget a range.
    Discard = 5,
    /// Zero a range.
    WriteZeroes = 6,
    /// An answer, to the frame with the same `request`.
    Answer = 7,
    /// Create a volume of `length` bytes; payload: its name.
    Create = 8,
    /// Delete a volume; payload: its name.
    Delete = 9,
    /// Resize a volume to `length` bytes; payload: its name.
    Resize = 10,
    /// Ask for size and id without becoming the owner; payload: its name.
    Observe = 11,
}

impl Kind {
    fn from_bits(bits: u16) -> Option<Kind> {
        use Kind::*;
        [Open, Read, Write, Flush, Discard, WriteZeroes, Answer, Create, Delete, Resize, Observe]
            .into_iter()
            .find(|kind| *kind as u16 == bits)
    }
}

/// A frame's header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it carries.
    pub kind: Kind,
    /// Chosen by the asking side; the answer repeats it.
    pub request: u64,
    /// The fence.
    pub fence: Fence,
    /// Bytes from the start of the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// [`nebd_abi::OpFlags`] of a request.
    pub flags: u32,
    /// Of an answer: 0, or an errno (positive).
    pub result: u32,
}

/// Why bytes are no frame. The connection they came from is beyond repair.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not `NFRM`, or the header's checksum is off.
    #[error("the frame header is damaged")]
    Header,
    /// A version this build does not speak.
    #[error("frame version {0} is not spoken here")]
    Version(u16),
    /// A kind this build does not know.
    #[error("frame kind {0} is not known here")]
    Kind(u16),
    /// A payload beyond [`PAYLOAD_BYTES_MAX`].
    #[error("a payload of {0} bytes is too long")]
    Long(u32),
    /// The payload's checksum is off.
    #[error("the frame payload is damaged")]
    Payload,
}

impl Header {
    /// A header of this kind, all else zero.
    pub fn new(kind: Kind, request: u64) -> Header {
        let (fence, flags, result) = (Fence::default(), 0, 0);
        Header { kind, request, fence, offset: 0, length: 0, flags, result }
    }

    /// The header's bytes, for a frame with this payload.
    pub fn encode(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC.to_le_bytes());
        put(&VERSION.to_le_bytes());
        put(&(self.kind as u16).to_le_bytes());
        for word in [
            self.request,
            self.fence.volume,
            self.fence.epoch.to_bits(),
            self.fence.seq,
            self.fence.oldest,
            self.offset,
            self.length,
        ] {
            put(&word.to_le_bytes());
        }
        put(&self.flags.to_le_bytes());
        put(&self.result.to_le_bytes());
        put(&(payload.len() as u32).to_le_bytes());
        put(&crc32c::crc32c(payload).to_le_bytes());
        let crc = crc32c::crc32c(&out[..80]);
        out[80..84].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The header in these bytes, the payload's length and its checksum.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(Header, u32, u32), FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(0) != MAGIC || u32_at(80) != crc32c::crc32c(&bytes[..80]) {
            return Err(FrameError::Header);
        }
        if u16_at(4) != VERSION {
            return Err(FrameError::Version(u16_at(4)));
        }
        let kind = Kind::from_bits(u16_at(6)).ok_or(FrameError::Kind(u16_at(6)))?;
        let fence = Fence {
            volume: u64_at(16),
            epoch: Epoch::from_bits(u64_at(24)),
            seq: u64_at(32),
            oldest: u64_at(40),
        };
        let header = Header {
            kind,
            request: u64_at(8),
            fence,
            offset: u64_at(48),
            length: u64_at(56),
            flags: u32_at(64),
            result: u32_at(68),
        };
        let payload_bytes = u32_at(72);
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(FrameError::Long(payload_bytes));
        }
        Ok((header, payload_bytes, u32_at(76)))
    }
}

/// Writes a frame.
pub fn write(out: &mut impl Write, header: &Header, payload: &[u8]) -> Result<(), FrameError> {
    out.write_all(&header.encode(payload))?;
    out.write_all(payload)?;
    Ok(())
}

/// Reads a frame and checks it; `None` at a clean end.
pub fn read(input: &mut impl Read) -> Result<Option<(Header, Vec<u8>)>, FrameError> {
    let mut bytes = [0; HEADER_BYTES];
    let first = loop {
        match input.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    input.read_exact(&mut bytes[first..])?;
    let (header, payload_bytes, crc) = Header::decode(&bytes)?;
    let mut payload = vec![0; payload_bytes as usize];
    input.read_exact(&mut payload)?;
    if crc32c::crc32c(&payload) != crc {
        return Err(FrameError::Payload);
    }
    Ok(Some((header, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            fence: Fence { volume: 1, epoch: Epoch { major: 2, minor: 3 }, seq: 4, oldest: 5 },
            offset: 6,
            length: 7,
            flags: 8,
            result: 9,
            ..Header::new(Kind::Write, 10)
        }
    }

    #[test]
    fn a_frame_goes_through_and_damage_is_noticed() {
        let mut bytes = Vec::new();
        write(&mut bytes, &sample(), b"payload").unwrap();
        let (header, payload) = read(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!((header, &payload[..]), (sample(), &b"payload"[..]));
        for at in 0..bytes.len() {
            if (84..HEADER_BYTES).contains(&at) {
                continue; // reserved
            }
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(read(&mut &damaged[..]).is_err(), "byte {at}");
        }
        assert!(read(&mut &b""[..]).unwrap().is_none());
    }
}
