//! Checksums of an image, chunk by chunk, and where its zeros are.

use std::ops::Range;
use std::sync::LazyLock;

use crate::image::pump::CHUNK_BYTES;

static ZEROS: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];
/// Of a whole chunk of zeros; an image may have millions of them.
static ZEROS_SUM: LazyLock<u32> = LazyLock::new(|| crc32c::crc32c(&ZEROS));

/// What a chunk's worth of further bytes makes of each bit of a checksum.
static PAST_CHUNK: LazyLock<[u32; 32]> =
    LazyLock::new(|| std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, CHUNK_BYTES)));

/// What `crc32c_combine` does to the first checksum, thousands of times as fast: it is linear.
fn past_chunk(sum: u32) -> u32 {
    let bits = (0..32).filter(|bit| sum >> bit & 1 == 1);
    bits.fold(0, |shifted, bit| shifted ^ PAST_CHUNK[bit])
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Comparing memory is as fast as the machine can, whatever the build.
    bytes.chunks(CHUNK_BYTES).all(|part| *part == ZEROS[..part.len()])
}

/// Bytes that are all zero, or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where.
    pub range: Range<usize>,
    /// Whether they are zero.
    pub is_zero: bool,
}

/// Cuts `bytes` into runs as long as possible, in steps of `grain`.
pub fn runs(bytes: &[u8], grain: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    for part in bytes.chunks(grain) {
        let (start, end) = (at, at + part.len());
        let is_zero = is_zero(part);
        match runs.last_mut().filter(|run| run.is_zero == is_zero) {
            Some(run) => run.range.end = end,
            None => runs.push(Run { range: start..end, is_zero }),
        }
        at = end;
    }
    runs
}

/// A CRC-32C of each chunk, and of the whole.
#[derive(Debug, Default)]
pub struct Sums {
    chunks: Vec<u32>,
    bytes: u64,
    image: u32,
}

impl Sums {
    /// Takes the next chunk. Only the first `image_length` of its bytes are of the image itself.
    pub fn push(&mut self, bytes: &[u8], image_length: usize) {
        let sum = crc32c::crc32c(bytes);
        let of_image = match image_length == bytes.len() {
            true => sum,
            false => crc32c::crc32c(&bytes[..image_length.min(bytes.len())]),
        };
        self.add(sum, bytes.len(), of_image, image_length);
    }

    fn add(&mut self, sum: u32, length: usize, of_image: u32, image_length: usize) {
        self.chunks.push(sum);
        self.bytes += length as u64;
        self.image = match image_length {
            CHUNK_BYTES => past_chunk(self.image) ^ of_image,
            length => crc32c::crc32c_combine(self.image, of_image, length),
        };
    }

    /// Takes zeros: whole chunks, and at the end of a volume a part of one.
    pub fn push_zeros(&mut self, length: u64, are_of_image: bool) {
        let mut left = length;
        while left > 0 {
            let part = left.min(CHUNK_BYTES as u64) as usize;
            let sum = match part {
                CHUNK_BYTES => *ZEROS_SUM,
                part => crc32c::crc32c(&ZEROS[..part]),
            };
            match are_of_image {
                true => self.add(sum, part, sum, part),
                false => self.add(sum, part, 0, 0),
            }
            left -= part as u64;
        }
    }

    /// Bytes taken so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the chunk at `offset` is the one that was taken there.
    pub fn matches(&self, offset: u64, bytes: &[u8]) -> bool {
        let index = (offset / CHUNK_BYTES as u64) as usize;
        self.chunks.get(index) == Some(&crc32c::crc32c(bytes))
    }

    /// Of the image, as digits.
    pub fn image(&self) -> String {
        format!("{:08x}", self.image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found() {
        let mut bytes = vec![0; 40];
        bytes[17] = 1;
        bytes[25] = 1;
        let run = |range, is_zero| Run { range, is_zero };
        let found = runs(&bytes, 8);
        assert_eq!(found, [run(0..16, true), run(16..32, false), run(32..40, true)]);
        assert_eq!(runs(&bytes[..20], 8), [run(0..16, true), run(16..20, false)]);
        assert_eq!(runs(&[], 8), []);
    }

    #[test]
    fn the_sum_of_the_image_is_that_of_its_bytes() {
        let image: Vec<u8> = (0..CHUNK_BYTES + 700).map(|at| (at * 7 / 3) as u8).collect();
        let mut sums = Sums::default();
        sums.push(&image[..CHUNK_BYTES], CHUNK_BYTES);
        let mut tail = image[CHUNK_BYTES..].to_vec();
        tail.resize(1024, 0);
        sums.push(&tail, 700);
        sums.push_zeros(CHUNK_BYTES as u64 + 512, false);
        assert_eq!(sums.image(), format!("{:08x}", crc32c::crc32c(&image)));
        let mut hole = Sums::default();
        hole.push(&[7; CHUNK_BYTES], CHUNK_BYTES);
        hole.push_zeros(CHUNK_BYTES as u64, true);
        let mut flat = vec![7; CHUNK_BYTES];
        flat.resize(2 * CHUNK_BYTES, 0);
        assert_eq!(hole.image(), format!("{:08x}", crc32c::crc32c(&flat)));
        assert_eq!(sums.bytes(), 2 * CHUNK_BYTES as u64 + 1536);
        assert!(sums.matches(CHUNK_BYTES as u64, &tail));
        tail[3] ^= 1;
        assert!(!sums.matches(CHUNK_BYTES as u64, &tail));
    }
}
