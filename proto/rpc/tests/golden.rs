//! Golden bytes of the data-plane frame.

#[path = "../../abi/tests/golden/text.rs"]
mod text;

use std::path::Path;

use nebd_abi::{Epoch, Fence, OpFlags};
use nebd_rpc::frame::{self, Header, Kind};

#[rustfmt::skip]
const FRAME: &[(usize, &str)] = &[
    (4, "magic"), (2, "version"), (2, "kind"), (8, "request"), (8, "volume"), (8, "epoch"),
    (8, "seq"), (8, "oldest"), (8, "offset"), (8, "length"), (4, "flags"), (4, "result"),
    (4, "payload_bytes"), (4, "payload_crc"), (4, "header_crc"), (4, "reserved"), (0, "payload"),
];

fn check(name: &str, title: &str, header: Header, payload: &[u8]) {
    let mut bytes = Vec::new();
    frame::write(&mut bytes, &header, payload).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let stored = text::golden(&folder, name, &text::render(title, &bytes, FRAME));
    let (decoded, data) = frame::read(&mut &stored[..]).unwrap().unwrap();
    assert_eq!((decoded, &data[..]), (header, payload));
}

#[test]
fn frames() {
    let fence =
        Fence { volume: 0x11, epoch: Epoch { major: 0x0a, minor: 0x0b }, seq: 0x22, oldest: 0x21 };
    let (flags, length) = (u32::from(OpFlags::FUA.bits()), 8);
    let write = Header { fence, flags, offset: 0x2000, length, ..Header::new(Kind::Write, 0x77) };
    check("frame_write", "Frame version 1: a write with FUA", write, b"contents");
    let answer = Header { fence, result: 28, ..Header::new(Kind::Answer, 0x77) };
    check("frame_answer", "Frame version 1: an answer, ENOSPC, without payload", answer, b"");
}
