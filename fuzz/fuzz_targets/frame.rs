//! Bytes from a storage connection: refused, or a frame that is written as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;

use frame::{HEADER_BYTES, Header};

// The file, not the crate: the crate brings a whole gRPC stack, to be built with sanitizers.
#[allow(dead_code)]
#[path = "../../proto/rpc/src/frame.rs"]
mod frame;

fuzz_target!(|bytes: &[u8]| {
    // As it comes: nearly always a damaged checksum.
    let _ = frame::read(&mut &bytes[..]);
    // With the header's checksum made right, so that the fields are reached.
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let mut fixed = *header;
    fixed[..4].copy_from_slice(b"NFRM");
    fixed[4..6].copy_from_slice(&frame::VERSION.to_le_bytes());
    let crc = crc32c::crc32c(&fixed[..80]);
    fixed[80..84].copy_from_slice(&crc.to_le_bytes());
    let Ok((decoded, payload_bytes, _)) = Header::decode(&fixed) else { return };
    let again = decoded.encode(payload);
    let (repeated, length, _) = Header::decode(&again).expect("of our own making");
    assert_eq!((decoded, length as usize), (repeated, payload.len()));
    // A payload is read whole or not at all; a wrong length never makes one up.
    if payload_bytes as usize <= 1 << 16 {
        let whole = [&fixed[..], payload].concat();
        if let Ok(Some((_, data))) = frame::read(&mut &whole[..]) {
            assert_eq!(data, payload[..payload_bytes as usize]);
        }
    }
});
