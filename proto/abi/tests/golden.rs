//! Golden bytes of everything shared: what was released once stays readable for good.
//!
//! The files of `golden/v1` show each byte with its field's name; `docs/formats.md` draws them.

#![cfg(not(loom))]

#[path = "golden/text.rs"]
mod text;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use nebd_abi::control::{AttachFlags, Event, Message, VolumeInfo};
use nebd_abi::host::{DeathCause, HostPage, Work};
use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, SessionId};
use nebd_abi::region::{Region, SharedMemory};
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, ServerQueue, Submission};
use nebd_abi::{Epoch, Errno, Generation, Op, OpFlags};

const EPOCH: Epoch = Epoch { major: 0x0a, minor: 0x0b };

fn golden(name: &str, text: &str) -> Vec<u8> {
    text::golden(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1"), name, text)
}

fn session() -> SessionId {
    SessionId(std::array::from_fn(|i| 0xa0 + i as u8))
}

fn params() -> RegionParams {
    RegionParams {
        version: LayoutVersion::V1,
        session: session(),
        geometry: Geometry { queue_count: 3, queue_depth: 2, iovecs_per_slot: 2, arena_size: 8192 },
        volume: "file:disk1".parse().unwrap(),
        client_pid: 0x0102_0304,
        client_version: "0.1.0".into(),
    }
}

fn words(memory: &SharedMemory, offset: u64, count: usize) -> Vec<&AtomicU64> {
    (0..count as u64)
        // SAFETY: an atomic; every bit pattern is valid.
        .map(|i| unsafe { memory.atomics::<AtomicU64>(offset + 8 * i) }.unwrap())
        .collect()
}

fn load(memory: &SharedMemory, offset: u64, length: usize) -> Vec<u8> {
    let words = words(memory, offset, length / 8);
    words.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect()
}

fn store(memory: &SharedMemory, offset: u64, bytes: &[u8]) {
    for (word, chunk) in words(memory, offset, bytes.len() / 8).iter().zip(bytes.chunks(8)) {
        word.store(u64::from_le_bytes(chunk.try_into().unwrap()), Relaxed);
    }
}

#[rustfmt::skip]
const REGION_HEADER: &[(usize, &str)] = &[
    (8, "magic"), (4, "layout_version"), (4, "header_size"), (8, "region_size"), (16, "session"),
    (8, "features_required"), (8, "features_optional"),
    (4, "queue_count"), (4, "queue_depth"), (4, "iovecs_per_slot"), (4, "reserved0"),
    (8, "queues_offset"), (8, "queue_stride"), (8, "arena_offset"), (8, "arena_size"),
    (4, "client_pid"), (4, "reserved1"), (32, "client_version"), (112, "reserved2"),
    (192, "volume"), (64, "reserved3"),
    (8, "takeovers"), (8, "blackout_last_us"), (8, "blackout_worst_us"),
    (4, "blackout_generation"), (4, "reserved8"), (32, "reserved4"),
    (8, "epoch"), (8, "heartbeat"), (4, "death"), (4, "server_state"), (8, "volume_size"),
    (4, "server_pid"), (4, "reserved5"), (24, "reserved6"), (0, "reserved7"),
];

#[test]
fn region_header() {
    let region = Region::create(params()).unwrap();
    let header = region.header();
    header.takeovers.store(2, Relaxed);
    header.blackout_last_us.store(0x1111, Relaxed);
    header.blackout_worst_us.store(0x2222, Relaxed);
    header.blackout_generation.store(0x44, Relaxed);
    header.epoch.store(EPOCH.to_bits(), Relaxed);
    header.heartbeat.store(0x33, Relaxed);
    header.death.store(11, Relaxed);
    header.server_state.store(1, Relaxed);
    header.volume_size.store(64 << 20, Relaxed);
    header.server_pid.store(0x0506_0708, Relaxed);
    let bytes = load(region.memory(), 0, 4096);
    let text = text::render("Region header, layout 1", &bytes, REGION_HEADER);
    let stored = golden("region_header", &text);

    let other = SharedMemory::create("golden", region.memory().size()).unwrap();
    store(&other, 0, &stored);
    let opened = Region::open(other.fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(opened.params(), &params());
}

fn queue_fields() -> Vec<(usize, String)> {
    let mut fields: Vec<(usize, String)> = Vec::new();
    let mut field = |length: usize, name: String| fields.push((length, name));
    for line in ["sq_tail", "sq_need_wakeup", "cq_tail", "cq_head"] {
        field(4, format!("{line}.word"));
        field(4, format!("{line}.flag"));
        field(56, format!("{line} reserved"));
    }
    for i in 0..4 {
        field(8, format!("sq[{i}].seq"));
        field(8, format!("sq[{i}].slot"));
    }
    for i in 0..4 {
        for name in ["seq", "slot_result", "epoch", "reserved"] {
            field(8, format!("cq[{i}].{name}"));
        }
    }
    for i in 0..2 {
        for name in ["seq", "op", "offset", "length", "iovec.memory_length", "iovec.offset"] {
            field(8, format!("slots[{i}].{name}"));
        }
        field(16, format!("slots[{i}].reserved"));
    }
    for slot in 0..2 {
        for i in 0..2 {
            field(8, format!("iovecs[{slot}][{i}].memory_length"));
            field(8, format!("iovecs[{slot}][{i}].offset"));
        }
    }
    field(0, "padding to the page".into());
    fields
}

#[test]
fn queue() {
    let region = Arc::new(Region::create(params()).unwrap());
    let (geometry, memory) = (*region.geometry(), region.queue(1).unwrap());
    let (mut submit, reap) = (ClientSubmit::new(memory.clone()), ClientReap::new(memory.clone()));
    let (mut server, _) = ServerQueue::adopt(memory, EPOCH);
    let one = [Buffer { memory: 0, length: 4096, offset: 0x1000 }];
    let two = [
        Buffer { memory: 0, length: 512, offset: 0 },
        Buffer { memory: 3, length: 1024, offset: 0x5000 },
    ];
    let flags = OpFlags::FUA;
    let write = Submission { op: Op::Write, flags, offset: 0x2000, length: 4096, buffers: &one };
    let flags = OpFlags::NONE;
    let read = Submission { op: Op::Read, flags, offset: 0x3000, length: 1536, buffers: &two };
    submit.submit(1, &write);
    submit.submit(0, &read);
    while server.pop().unwrap().is_some() {}
    server.publish(1, 1, Err(Errno::NOSPC));
    assert!(server.sleep() && !reap.sleep());

    let (at, length) =
        (geometry.queues_offset() + geometry.queue_stride(), geometry.queue_stride() as usize);
    let fields = queue_fields();
    let fields: Vec<(usize, &str)> = fields.iter().map(|(n, name)| (*n, name.as_str())).collect();
    let title = "Queue of depth 2, 2 iovecs a slot, layout 1: a write with FUA in slot 1, answered \
                 with ENOSPC and not yet reaped; a read in slot 0, in flight; both sides asleep";
    let text = text::render(title, &load(region.memory(), at, length), &fields);
    let stored = golden("queue", &text);

    // A server of today takes a region of then over, and its client reaps the rest.
    let other = Arc::new(Region::create(params()).unwrap());
    store(other.memory(), at, &stored);
    let memory = other.queue(1).unwrap();
    let (_, in_flight) = ServerQueue::adopt(memory.clone(), EPOCH);
    assert_eq!(in_flight.len(), 1);
    assert_eq!((in_flight[0].slot, in_flight[0].seq, in_flight[0].op), (0, 2, Ok(Op::Read)));
    assert_eq!(in_flight[0].buffers.as_slice(), two);
    let completion = ClientReap::new(memory).reap().unwrap();
    assert_eq!((completion.slot, completion.result), (1, Err(Errno::NOSPC)));
}

const HEAD: [(usize, &str); 5] =
    [(4, "magic"), (2, "version"), (2, "kind"), (8, "request"), (8, "reserved")];
#[rustfmt::skip]
const HELLO: [(usize, &str); 6] = [
    (4, "layout_min"), (4, "layout_max"), (8, "features"), (4, "pid"), (4, "reserved"), (32, "version"),
];
#[rustfmt::skip]
const WELCOME: [(usize, &str); 6] = [
    (4, "layout"), (4, "generation"), (8, "features"), (4, "pid"), (4, "reserved"), (32, "version"),
];
#[rustfmt::skip]
const ATTACH: [(usize, &str); 5] = [
    (16, "session"), (4, "flags"), (4, "queue_count"), (8, "incarnation"), (192, "volume"),
];
#[rustfmt::skip]
const ATTACHED: [(usize, &str); 6] = [
    (8, "size"), (4, "block_size"), (4, "flags: read_only, can_discard, can_write_zeroes"),
    (8, "epoch"), (8, "transfer_bytes_max"), (8, "incarnation"),
];
const FAILED: [(usize, &str); 3] = [(4, "errno"), (4, "retry"), (0, "text")];
const MEMORY: [(usize, &str); 2] = [(4, "memory"), (4, "reserved")];
const RESIZE: [(usize, &str); 2] = [(16, "operation"), (8, "size")];
const EVENT: [(usize, &str); 3] = [(4, "event"), (4, "reserved"), (8, "value")];

type Fields = &'static [(usize, &'static str)];

fn messages() -> Vec<(&'static str, Message, Fields)> {
    let version = || "0.1.0".to_owned();
    let info = VolumeInfo {
        size: 64 << 20,
        block_size: 4096,
        read_only: false,
        can_discard: true,
        can_write_zeroes: true,
        epoch: EPOCH,
        transfer_bytes_max: 64 << 20,
        incarnation: 0x1234,
    };
    let flags = AttachFlags::EXCLUSIVE | AttachFlags::REATTACH;
    let volume = "file:disk1".parse().unwrap();
    let hello = Message::Hello {
        layout_min: 1,
        layout_max: 2,
        features: 0x10,
        pid: 0x0102_0304,
        version: version(),
    };
    let welcome = Message::Welcome {
        layout: 1,
        generation: Generation(0x0b),
        features: 0,
        pid: 0x0506_0708,
        version: version(),
    };
    let attach =
        Message::Attach { session: session(), flags, queue_count: 3, incarnation: 0x1234, volume };
    let failed = Message::Failed { errno: Errno(16), retry: true, text: "busy".into() };
    let resize = Message::Resize { operation: [0xcc; 16], size: 128 << 20 };
    vec![
        ("hello", hello, &HELLO),
        ("welcome", welcome, &WELCOME),
        ("attach", attach, &ATTACH),
        ("attached", Message::Attached(info), &ATTACHED),
        ("failed", failed, &FAILED),
        ("register_memory", Message::RegisterMemory { memory: 3 }, &MEMORY),
        ("unregister_memory", Message::UnregisterMemory { memory: 3 }, &MEMORY),
        ("done", Message::Done, &[]),
        ("resize", resize, &RESIZE),
        ("info", Message::Info, &[]),
        ("detach", Message::Detach, &[]),
        ("ping", Message::Ping, &[]),
        ("event_resized", Message::Event(Event::Resized(128 << 20)), &EVENT),
        ("event_parked", Message::Event(Event::Parked), &EVENT),
        ("event_unparked", Message::Event(Event::Unparked), &EVENT),
        ("event_detached", Message::Event(Event::Detached(Errno::INVAL)), &EVENT),
    ]
}

#[test]
fn control_messages() {
    for (name, message, body) in messages() {
        let fields: Vec<(usize, &str)> = HEAD.iter().chain(body).copied().collect();
        let title = format!("Control message {name}, version 1");
        let text = text::render(&title, &message.encode(0x77), &fields);
        let stored = golden(&format!("control_{name}"), &text);
        assert_eq!(Message::decode(&stored), Ok((0x77, message.clone())));
        // What a later version appends is not looked at; text that runs to the end is the exception.
        if !matches!(message, Message::Failed { .. }) {
            let longer = [&stored[..], &[0xff; 9]].concat();
            assert_eq!(Message::decode(&longer), Ok((0x77, message)));
        }
        for length in 0..stored.len().min(HEADER_AND_LEAST) {
            assert!(Message::decode(&stored[..length]).is_err());
        }
    }
}

/// Every message is at least its header.
const HEADER_AND_LEAST: usize = nebd_abi::control::HEADER_BYTES;

#[rustfmt::skip]
const HOST_PAGE: &[(usize, &str)] = &[
    (8, "magic"), (4, "version"), (4, "reserved0"), (4, "generation"), (4, "owner_pid"),
    (4, "death_generation"), (4, "death_cause"), (4, "work"), (28, "reserved1"),
    (8, "ping"), (8, "pong_count"), (8, "pongs[0]"), (8, "pongs[1]"), (1008, "pongs[2..128]"),
    (0, "reserved2"),
];

#[test]
fn host_page() {
    let page = HostPage::create().unwrap();
    let first = page.claim(Generation(0)).unwrap();
    page.record_death(DeathCause::Watchdog);
    page.claim(first).unwrap();
    page.announce_probes(2);
    page.ping();
    page.pong(0);
    page.take_up_work();
    let raw = SharedMemory::map(page.fd().try_clone_to_owned().unwrap(), 4096).unwrap();
    // The owner is this process, whose id is another each time.
    let pid = std::process::id().to_le_bytes();
    let mut bytes = load(&raw, 0, 4096);
    assert_eq!(bytes[20..24], pid);
    bytes[20..24].copy_from_slice(&0x0506_0708u32.to_le_bytes());
    let title = "Host page, version 1: generation 2 owns, 1 was killed by the watchdog, one of two \
                 probes has answered, and there is work";
    let stored = golden("host_page", &text::render(title, &bytes, HOST_PAGE));

    let other = SharedMemory::create("golden", 4096).unwrap();
    store(&other, 0, &stored);
    let page = HostPage::open(other.fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!((page.generation(), page.owner_pid()), (Generation(2), 0x0506_0708));
    assert_eq!(page.death_of(first), DeathCause::Watchdog);
    assert_eq!(page.silent_probes(1), Some(1));
    assert_eq!(page.look_at_work(), Work::Some);
}
