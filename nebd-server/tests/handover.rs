//! The bytes of the handover must never change: a server of the next release has to understand them.

use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nebd_abi::Generation;
use nebd_abi::layout::SessionId;
use nebd_server::handover::message::{
    Client, Frozen, Hello, Message, Offer, Prepared, Purpose, Welcome,
};
use nebd_server::handover::wire::{self, Fields, REQUIRED, WireError};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

fn null() -> std::os::fd::OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

fn every_message() -> Vec<(&'static str, Message)> {
    let session = SessionId(std::array::from_fn(|i| 0xa0 + i as u8));
    let client = Client {
        session,
        volume: "file:disk1".into(),
        pid: 77,
        version: "0.1.0".into(),
        layout: 1,
        features_required: 0,
    };
    let hello = Hello {
        versions: (1, 1),
        purpose: Purpose::Takeover,
        generation: Generation(7),
        pid: 4711,
        build: "0.1.0".into(),
        binary: "/usr/bin/nebd-server".into(),
        has_store: true,
        canary: "file:disk1".into(),
        clients: vec![client],
    };
    let welcome = Welcome {
        version: 1,
        build: "0.2.0".into(),
        unsupported: vec![(session, "it does not know region layout 9".into())],
    };
    let offer = Offer {
        entries: vec![("s.a.region".into(), null()), ("m.disk".into(), null())],
        removed: vec!["s.b.region".into()],
    };
    let prepared = Prepared {
        volumes: 3,
        sessions: 4,
        failures: vec![("file:disk2".into(), "it cannot be read".into())],
    };
    let frozen = Frozen {
        report: vec![1, 2, 3],
        last_ns: vec![(session, 0x1122_3344_5566)],
        left: vec![session],
        probation_ms: 60_000,
    };
    vec![
        ("Hello", Message::Hello(hello)),
        ("Welcome", Message::Welcome(welcome)),
        ("Refused", Message::Refused("no".into())),
        ("Offer", Message::Offer(offer)),
        ("Prepare", Message::Prepare),
        ("Prepared", Message::Prepared(prepared)),
        ("Connections", Message::Connections(vec![(session, null())])),
        ("Frozen", Message::Frozen(frozen)),
        ("Fenced", Message::Fenced(Generation(8))),
        ("Released", Message::Released),
        ("Resumed", Message::Resumed),
        ("Settled", Message::Settled),
        ("Dismissed", Message::Dismissed("enough".into())),
    ]
}

#[test]
fn every_message_has_its_golden_bytes() {
    let mut text = String::new();
    for (name, message) in every_message() {
        let (kind, fields) = message.encode();
        writeln!(text, "{name}, kind {kind:04x}").unwrap();
        let mut rest = fields.bytes();
        while let Some((header, tail)) = rest.split_at_checked(8) {
            let length = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
            let (value, tail) = tail.split_at(length);
            rest = tail;
            let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
            writeln!(text, "  {} {}", hex(header), hex(value)).unwrap();
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/handover-v1.txt");
    if std::env::var_os("NEBD_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, golden, "bytes of the handover have changed");
}

#[test]
fn every_message_is_understood() {
    let flags = SocketFlags::CLOEXEC;
    let (here, there) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    for (name, message) in every_message() {
        let deadline = Instant::now() + Duration::from_secs(10);
        message.send(&here, deadline).unwrap();
        let received = Message::receive(&there, deadline).unwrap();
        assert_eq!(received.encode().1.bytes(), message.encode().1.bytes(), "{name}");
    }
}

/// Any prefix, any flipped byte: an error or another message, never a panic.
#[test]
fn damaged_messages_are_refused_or_read() {
    for (_, message) in every_message() {
        let (kind, fields) = message.encode();
        let bytes = fields.bytes();
        for end in 0..bytes.len() {
            let _ = Message::decode(kind, &bytes[..end], Vec::new());
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.to_vec();
                damaged[at] ^= 1 << bit;
                let _ = Message::decode(kind, &damaged, Vec::new());
            }
        }
    }
}

#[test]
fn descriptors_under_wrong_names_are_refused() {
    let fields = Fields::new().with(REQUIRED | 13, b"s.a.region").with(REQUIRED | 15, [0; 4]);
    let decoded = Message::decode(REQUIRED | 4, fields.bytes(), vec![null()]);
    assert!(matches!(decoded, Err(WireError::Damaged(_))), "{decoded:?}");
}

#[test]
fn a_version_too_far_apart_is_refused_for_that() {
    let (kind, fields) = every_message().remove(0).1.encode();
    // A later version may have fields that we must know; its number is looked at first.
    let later = Fields::new()
        .with(REQUIRED | 1, 40_u32.to_le_bytes())
        .with(REQUIRED | 2, 41_u32.to_le_bytes())
        .with(REQUIRED | 0x7000, b"unknown");
    let refused = Message::decode(kind, later.bytes(), Vec::new());
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("40 to 41") && text.contains("smaller steps"), "{text}");
    assert!(Message::decode(kind, fields.bytes(), Vec::new()).is_ok());
}

#[test]
fn an_optional_message_of_a_later_version_is_skipped() {
    let flags = SocketFlags::CLOEXEC;
    let (here, there) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    wire::send(&here, 0x7abc, b"whatever it says", &[null().as_fd()], deadline).unwrap();
    Message::Prepare.send(&here, deadline).unwrap();
    assert!(matches!(Message::receive(&there, deadline), Ok(Message::Prepare)));
    wire::send(&here, REQUIRED | 0x7abc, b"", &[], deadline).unwrap();
    let refused = Message::receive(&there, deadline);
    assert!(matches!(refused, Err(WireError::Unknown { what: "message", .. })), "{refused:?}");
}

/// Messages to be skipped, and packets of a message without an end: the next is always there
/// already, and yet the deadline holds. An owner that is frozen must not wait for such a candidate.
#[test]
fn a_peer_that_talks_without_end_is_late() {
    const PREPARE: u16 = REQUIRED | 5;
    let flags = SocketFlags::CLOEXEC;
    let pair = || {
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    let soon = Instant::now() + Duration::from_secs(10);
    let (here, there) = pair();
    for _ in 0..20 {
        wire::send(&here, 0x7abc, b"", &[], soon).unwrap();
    }
    Message::Prepare.send(&here, soon).unwrap();
    let received = Message::receive(&there, Instant::now());
    assert!(matches!(received, Err(WireError::Late(_))), "{received:?}");

    let (here, there) = pair();
    for _ in 0..20 {
        let mut packet = [0; 16]; // an empty body, whose checksum is zero, and not the last
        packet[..4].copy_from_slice(&wire::MAGIC.to_le_bytes());
        packet[4..6].copy_from_slice(&PREPARE.to_le_bytes());
        nebd_abi::socket::send(&here, &packet, &[]).unwrap();
    }
    Message::Prepare.send(&here, soon).unwrap();
    let received = Message::receive(&there, Instant::now());
    assert!(matches!(received, Err(WireError::Late(_))), "{received:?}");
}

/// The candidate claims the generation after the owner's, and watches the owner's process.
#[test]
fn a_hello_with_numbers_that_no_server_has_is_refused() {
    let Message::Hello(hello) = every_message().remove(0).1 else { panic!("the first is Hello") };
    let last = Hello { generation: Generation(u32::MAX), ..hello.clone() };
    let nobody = Hello { pid: u32::MAX, ..hello };
    for hello in [last, nobody] {
        let (kind, fields) = Message::Hello(hello).encode();
        let decoded = Message::decode(kind, fields.bytes(), Vec::new());
        assert!(matches!(decoded, Err(WireError::Damaged(_))), "{decoded:?}");
    }
}
