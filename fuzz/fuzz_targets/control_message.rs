//! A packet from a stranger: refused, or a message that survives its own encoding.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nebd_abi::control::{MESSAGE_BYTES_MAX, Message};

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // With the header made right, so that bodies are reached: a kind, then the body.
    if let Some((kind, body)) = bytes.split_first() {
        let mut packet = Message::Ping.encode(7);
        packet[6] = kind % 16;
        packet.extend_from_slice(body);
        check(&packet);
    }
});

fn check(bytes: &[u8]) {
    let Ok((request, message)) = Message::decode(bytes) else { return };
    let again = message.encode(request);
    assert!(again.len() <= MESSAGE_BYTES_MAX);
    // A text longer than a message is cut, all else comes back as it was.
    if bytes.len() <= 1024 {
        assert_eq!(Message::decode(&again), Ok((request, message)));
    }
}
