//! The other server of a planned takeover says whatever it likes: it is refused, or its message is
//! one that both sides mean the same by, with numbers that a server can use.

#![no_main]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use nebd_fuzz::Input;
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType};

use message::{Hello, Message};
use wire::{Fields, REQUIRED, WireError};

// The files, not the crate: the crate brings a whole server, to be built with sanitizers.
#[allow(dead_code)]
#[path = "../../nebd-server/src/handover/message.rs"]
mod message;
#[allow(dead_code)]
#[path = "../../nebd-server/src/handover/wire.rs"]
mod wire;

/// The highest tag of a message's own fields, and those of fields within fields.
const TAG_MAX: u16 = 23;
const INNER_TAGS: std::ops::RangeInclusive<u16> = 32..=39;
/// Optional in this version; every other tag is required.
const OPTIONAL: [u16; 13] = [5, 6, 7, 9, 12, 16, 17, 19, 20, 21, 22, 34, 35];
const WHY: u16 = 38;
const NAME: u16 = REQUIRED | 13;
const MANIFEST: u16 = REQUIRED | 15;
const KIND_MAX: u16 = 13;
const OFFER: u16 = REQUIRED | 4;
/// Messages and fields that have required fields within.
const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const FENCED: u16 = 8;
const CLIENT: u16 = 10;
const UNSUPPORTED: u16 = 11;
const FAILURE: u16 = 18;
const LAST: u16 = 20;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    match input.byte() % 4 {
        // As it comes: a kind, descriptors, and a body that is seldom one.
        0 => {
            let (kind, count) = (kind(&mut input), usize::from(input.byte() % 4));
            check(kind, input.0, count);
        }
        // Fields that are whole, so that values are reached.
        1 | 2 => {
            let kind = kind(&mut input);
            let (body, names) = body(&mut input, kind);
            // Mostly as many descriptors as the names ask for.
            let count = if input.byte() == 0 { names + 1 } else { names };
            check(kind, &body, count);
        }
        _ => packets(&mut input),
    }
});

/// A kind that there is, mostly.
fn kind(input: &mut Input<'_>) -> u16 {
    match input.byte() {
        255 => u16::from_le_bytes([input.byte(), input.byte()]),
        byte => {
            let number = u16::from(byte) % KIND_MAX + 1;
            if matches!(number, 12 | 13) { number } else { REQUIRED | number }
        }
    }
}

/// A tag that there is, mostly.
fn tag(input: &mut Input<'_>) -> u16 {
    let byte = u16::from(input.byte());
    let number = match byte {
        255 => return u16::from_le_bytes([input.byte(), input.byte()]),
        byte if byte >= 128 => INNER_TAGS.start() + byte % 8,
        byte => byte % TAG_MAX + 1,
    };
    if OPTIONAL.contains(&number) || number == WHY { number } else { REQUIRED | number }
}

/// Fields from the input, an offer's checksum made right; and how many descriptors they name.
fn body(input: &mut Input<'_>, kind: u16) -> (Vec<u8>, usize) {
    let (mut fields, mut names, mut checksum) = (Fields::new(), 0, 0);
    while !input.0.is_empty() {
        let tag = if kind == OFFER && input.byte() > 64 { NAME } else { tag(input) };
        let value = value(input, tag, 1);
        if tag == NAME {
            checksum = crc32c::crc32c_append(crc32c::crc32c_append(checksum, &value), b"\n");
        }
        names += usize::from(matches!(tag & !REQUIRED, 13 | 23));
        fields.push(tag, value);
    }
    if kind == OFFER {
        fields.push(MANIFEST, checksum.to_le_bytes());
    }
    let body = match kind & !REQUIRED {
        message @ (HELLO | WELCOME | FENCED) => complete(fields, message),
        _ => fields.bytes().to_vec(),
    };
    (body, names.min(64))
}

/// With what a message, or a field with fields within, must have, after what the input says: of two
/// fields with a tag the first counts.
fn complete(mut fields: Fields, what: u16) -> Vec<u8> {
    let required: &[(u16, &[u8])] = match what {
        HELLO => &[(3, &[1]), (4, &[7]), (8, &[1])],
        WELCOME => &[(2, &[1])],
        FENCED => &[(4, &[8])],
        CLIENT => &[(32, &[1; 16]), (33, b"null:a"), (36, &[1]), (37, &[0])],
        UNSUPPORTED => &[(32, &[1; 16])],
        FAILURE => &[(33, b"null:a")],
        LAST => &[(32, &[1; 16]), (39, &[9])],
        _ => &[],
    };
    for (number, value) in required {
        fields.push(REQUIRED | number, value);
    }
    let said = fields.bytes().to_vec();
    if what != HELLO {
        return said;
    }
    // Of these the last counts.
    let versions = Fields::new().with(REQUIRED | 1, [1]).with(REQUIRED | 2, [1]);
    [versions.bytes(), &said].concat()
}

/// A number, a session's id, a text, or fields within the field.
fn value(input: &mut Input<'_>, within: u16, depth: u8) -> Vec<u8> {
    let choice = input.byte();
    let within = within & !REQUIRED;
    if choice >= 64 && depth > 0 && matches!(within, CLIENT | UNSUPPORTED | FAILURE | LAST) {
        let mut inner = Fields::new();
        for _ in 0..choice % 8 {
            let tag = tag(input);
            inner.push(tag, value(input, tag, depth - 1));
        }
        return complete(inner, within);
    }
    let length = [1, 4, 8, 16, usize::from(choice)][usize::from(choice % 5)];
    let mut value = input.bytes(length).to_vec();
    if choice < 32 {
        value.resize(length, 0);
    }
    value
}

fn null() -> &'static File {
    static NULL: OnceLock<File> = OnceLock::new();
    NULL.get_or_init(|| File::open("/dev/null").expect("every system has it"))
}

fn descriptors(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| null().as_fd().try_clone_to_owned().expect("a descriptor")).collect()
}

/// Decodes it; if it is taken, what we would say in its place is taken for the same.
fn check(kind: u16, body: &[u8], count: usize) {
    let Ok(message) = Message::decode(kind, body, descriptors(count)) else { return };
    let (again, fields) = message.encode();
    assert_eq!(again, kind);
    let kept = carried(&message);
    if matches!(message, Message::Offer(_) | Message::Connections(_)) {
        assert_eq!(kept, count, "a descriptor has no name");
    }
    if let Message::Hello(hello) = &message {
        usable(hello);
    }
    let repeated = Message::decode(again, fields.bytes(), descriptors(kept));
    let repeated = repeated.expect("a message of our own making");
    assert_eq!(repeated.encode().1.bytes(), fields.bytes());
}

fn carried(message: &Message) -> usize {
    match message {
        Message::Offer(offer) => offer.entries.len(),
        Message::Connections(connections) => connections.len(),
        _ => 0,
    }
}

/// What a candidate does with the numbers of a Hello that it took.
fn usable(hello: &Hello) {
    let spoken = message::VERSION.min(hello.versions.1);
    assert!((message::VERSION_MIN..=message::VERSION).contains(&spoken));
    assert!(spoken >= hello.versions.0);
    assert!(hello.generation.0.checked_add(1).is_some(), "no generation is left to be claimed");
    assert!(hello.pid.cast_signed() >= 0, "no process has that id");
}

/// Packets over a socket, their checksums made right as a rule: received whole, or refused.
fn packets(input: &mut Input<'_>) {
    let flags = SocketFlags::CLOEXEC;
    let (here, there) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .expect("a pair of sockets");
    let (mut body, mut first, mut is_whole, mut named) = (Vec::new(), None, false, 0);
    let mut is_ours = true;
    for _ in 0..8 {
        if input.0.is_empty() || is_whole {
            break;
        }
        let (kind, choice) = (kind(input), input.byte());
        let length = usize::from(input.byte());
        let chunk = input.bytes(length);
        is_whole = choice & 1 != 0;
        let mut packet = wire::MAGIC.to_le_bytes().to_vec();
        packet.extend_from_slice(&kind.to_le_bytes());
        packet.extend_from_slice(&u16::from(choice & 1).to_le_bytes());
        packet.extend_from_slice(&crc32c::crc32c(chunk).to_le_bytes());
        packet.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        packet.extend_from_slice(chunk);
        if choice & 0xf0 == 0xf0 {
            let at = usize::from(input.byte()) % packet.len();
            let damage = input.byte();
            is_ours &= damage == 0;
            packet[at] ^= damage;
            packet.truncate(packet.len() - usize::from(input.byte()) % packet.len());
            is_ours &= packet.len() == 16 + chunk.len();
        }
        let fds: Vec<BorrowedFd<'_>> = (0..choice >> 1 & 3).map(|_| null().as_fd()).collect();
        send(&here, &packet, &fds);
        is_ours &= *first.get_or_insert(kind) == kind;
        body.extend_from_slice(chunk);
        named += fds.len();
    }
    drop(here);
    // All that comes is there already: one that waited would be told that its peer has gone.
    let deadline = Instant::now() + std::time::Duration::from_secs(60);
    match wire::receive(&there, deadline) {
        Ok(received) if is_ours && is_whole => {
            assert_eq!((Some(received.kind), &received.body), (first, &body));
            assert_eq!(received.fds.len(), named);
            let _ = Message::decode(received.kind, &received.body, received.fds);
        }
        Ok(received) => assert!(!is_ours, "{received:?} is no whole message"),
        Err(WireError::Late(_)) => panic!("a peer that has gone is no slow one"),
        Err(error) => assert!(!is_ours || !is_whole, "{error}"),
    }
}

fn send(socket: &OwnedFd, packet: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(fds));
    }
    let slices = [std::io::IoSlice::new(packet)];
    // A full buffer would be a defect of this target.
    rustix::net::sendmsg(socket, &slices, &mut ancillary, SendFlags::DONTWAIT).expect("room");
}
