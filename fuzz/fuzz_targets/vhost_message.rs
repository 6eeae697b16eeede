//! Bytes from a hypervisor: refused, or messages that survive their own encoding, and a device that they
//! leave in a state which survives its own.

#![no_main]

use std::os::fd::OwnedFd;

use libfuzzer_sys::fuzz_target;
use nebd_vhost::device::{Device, State};
use nebd_vhost::message::{HEADER_BYTES, Header, Message};
use nebd_vhost::request::Disk;

fuzz_target!(|bytes: &[u8]| {
    let disk = Disk {
        size: 1 << 30,
        block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 0,
        read_only: false,
        queues: 3,
        segments_max: 126,
        segment_bytes_max: 0,
        discard_bytes_max: 1 << 20,
        discard_ranges_max: 16,
        serial: [0; 20],
    };
    let mut device = Device::new(disk.clone());
    let mut rest = bytes;
    while let Some((header, payload)) = rest.split_first_chunk::<HEADER_BYTES>() {
        // As it comes, and with version and length made right, so that payloads are reached.
        let _ = Header::decode(header);
        let (request, size) = (u32::from(header[0]) % 48, usize::from(header[8]) % 64);
        let payload_bytes = if header[9] == 0 { 8 } else { size.min(payload.len()) };
        let payload_bytes = payload_bytes.min(payload.len());
        let (payload, next) = payload.split_at(payload_bytes);
        rest = next;
        let fds = usize::from(header[10]) % 3;
        let Ok(message) = Message::decode(request, payload, fds) else { continue };
        let again = message.encode(false);
        let (_, encoded) = again.split_at(HEADER_BYTES);
        assert_eq!(Message::decode(request, encoded, fds).as_ref(), Ok(&message));
        let fds = message.fds().unwrap_or(0);
        let fds = (0..fds).map(|_| null()).collect();
        let _ = device.handle(&message, fds);
        for ring in 0..4 {
            let _ = device.ring_setup(ring);
        }
    }
    let state = device.state();
    assert_eq!(State::decode(&state.encode()).as_ref(), Some(state));
    assert!(Device::restore(disk, &state.encode()).is_some());
    let _ = State::decode(bytes);
});

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("it is always there").into()
}
