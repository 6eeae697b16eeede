//! Copies into memory that will not be looked at soon.
//!
//! An ordinary store to memory that is in no cache reads the line first, only to overwrite it, and
//! then pushes something useful out of the cache. Streaming stores do neither: for a mebibyte 10
//! GB/s in place of 6 (decision 0011), for 4 KiB no difference worth the barrier.

/// From here on streaming stores pay.
const STREAM_BYTES_MIN: usize = 64 << 10;

/// Copies `length` bytes.
///
/// # Safety
/// Both ranges are mapped for that long and do not overlap. Others may change the source
/// meanwhile: either value of such a byte arrives.
pub(super) unsafe fn to_memory(target: *mut u8, source: *const u8, length: usize) {
    #[cfg(target_arch = "x86_64")]
    if length >= STREAM_BYTES_MIN {
        // SAFETY: as the caller's promise.
        unsafe { stream(target, source, length) };
        return;
    }
    // SAFETY: as the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(source, target, length) };
}

/// SSE2, which every x86-64 has. Wider registers gain nothing: memory is the limit.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(target: *mut u8, source: *const u8, length: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const STEP: usize = 64;
    // Streaming stores want an aligned target; whole lines, too, are what they are good at.
    let head = target.align_offset(STEP).min(length);
    let steps = (length - head) / STEP;
    let tail = head + steps * STEP;
    // SAFETY: head, steps and tail are parts of the caller's ranges; each streaming store goes to
    // a multiple of 16 bytes. The barrier makes them visible before any later store, like that of
    // the completion that tells about them.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        for at in (head..tail).step_by(STEP) {
            let (from, to) = (source.add(at).cast::<__m128i>(), target.add(at).cast::<__m128i>());
            let line = [
                _mm_loadu_si128(from),
                _mm_loadu_si128(from.add(1)),
                _mm_loadu_si128(from.add(2)),
                _mm_loadu_si128(from.add(3)),
            ];
            for (index, part) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(index), part);
            }
        }
        std::ptr::copy_nonoverlapping(source.add(tail), target.add(tail), length - tail);
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_and_no_other_changes() {
        let source: Vec<u8> = (0..STREAM_BYTES_MIN + 300).map(|at| (at % 251) as u8).collect();
        for length in [0, 1, 4096, STREAM_BYTES_MIN - 1, STREAM_BYTES_MIN, STREAM_BYTES_MIN + 129] {
            for (source_shift, shift) in [(0, 0), (1, 0), (0, 1), (3, 63), (64, 17)] {
                let mut target = vec![0xee_u8; STREAM_BYTES_MIN + 300];
                // SAFETY: both vectors are longer than shift and length together.
                unsafe {
                    let to = target.as_mut_ptr().add(shift);
                    to_memory(to, source.as_ptr().add(source_shift), length);
                }
                let copied = &target[shift..shift + length];
                assert!(copied == &source[source_shift..source_shift + length], "{length} {shift}");
                assert!(target[..shift].iter().all(|byte| *byte == 0xee));
                assert!(target[shift + length..].iter().all(|byte| *byte == 0xee));
            }
        }
    }
}
