//! Golden bytes of what a hypervisor's connection leaves to the next server: the journal, and in it what
//! was agreed on.

#[path = "../../../proto/abi/tests/golden/text.rs"]
mod text;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nebd_vhost::device::{Ring, State};
use nebd_vhost::journal::Journal;
use nebd_vhost::memory::RegionSpec;
use nebd_vhost::message::InflightDescription;
use rustix::fs::{MemfdFlags, SealFlags};

const JOURNAL_BYTES: usize = 65536;

fn golden(name: &str, text: &str) -> Vec<u8> {
    text::golden(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1"), name, text)
}

fn state() -> State {
    State {
        features: 0x0001_0203_0405_0607,
        protocol_features: 0x0809_0a0b,
        status: 0x0f,
        writeback: true,
        has_channel: true,
        inflight: Some(InflightDescription {
            mmap_size: 0x3000,
            mmap_offset: 0x1000,
            queues: 1,
            queue_size: 0x0100,
            is_padded: true,
        }),
        regions: vec![RegionSpec {
            guest_address: 0x0010_0000,
            size: 0x2000_0000,
            user_address: 0x7f00_1234_0000,
            mmap_offset: 0x5000,
        }],
        rings: vec![
            Ring {
                size: 0x0100,
                base: 0x8003_8002,
                addresses: [0x11_0000, 0x12_0000, 0x13_0000],
                enabled: true,
                started: true,
                doorbells: [true, true, false],
            },
            Ring::default(),
        ],
    }
}

#[rustfmt::skip]
const STATE: &[(usize, &str)] = &[
    (4, "version"), (4, "flags, status"), (8, "features"), (8, "protocol_features"),
    (8, "inflight mmap_size"), (8, "inflight mmap_offset"), (2, "inflight queues"),
    (2, "inflight queue_size"), (4, "inflight is_padded"), (4, "regions"), (4, "rings"),
    (8, "region guest_address"), (8, "region size"), (8, "region user_address"),
    (8, "region mmap_offset"),
    (2, "ring 0 size"), (2, "ring 0 flags"), (4, "ring 0 base"), (8, "ring 0 descriptors"),
    (8, "ring 0 available"), (8, "ring 0 used"), (32, "ring 1"),
];

#[test]
fn agreement() {
    let text = text::render("What was agreed on, version 1", &state().encode(), STATE);
    assert_eq!(State::decode(&golden("vhost_state", &text)), Some(state()));
}

#[rustfmt::skip]
const JOURNAL: &[(usize, &str)] = &[
    (8, "magic"), (4, "version"), (4, "reserved"), (8, "messages, phase"), (8, "message bytes"),
    (8, "states saved"), (8, "bytes in slot 0"), (8, "bytes in slot 1"), (4040, "reserved"),
    (16, "slot 0"), (28656, "slot 0, free"), (16, "slot 1"), (28656, "slot 1, free"), (0, "reserved"),
];

#[test]
fn journal() {
    let journal = Journal::create().unwrap();
    journal.save(b"the first state").unwrap();
    journal.save(b"the state").unwrap();
    let file = File::from(journal.fd().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; JOURNAL_BYTES];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let title = "Journal of a vhost-user connection, version 1: two states saved, no message yet";
    let stored = golden("vhost_journal", &text::render(title, &bytes, JOURNAL));

    let journal = Journal::map(memfd(&stored)).unwrap();
    assert_eq!((journal.count(), journal.state().unwrap().as_slice()), (0, &b"the state"[..]));
}

/// As a predecessor leaves it.
fn memfd(bytes: &[u8]) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("golden", flags).unwrap());
    file.write_all(bytes).unwrap();
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file.into()
}
