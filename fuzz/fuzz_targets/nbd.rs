//! Bytes from an NBD client, in the handshake and after it: however they are cut, the same comes
//! of them, little memory is spent on them, and a successor understands what is left of them.

#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use nebd_fuzz::Input;
use nebd_nbd::negotiate::Refusal;
use nebd_nbd::wire::{FLAG_FIXED_NEWSTYLE, OPTION_MAGIC, REQUEST_MAGIC};
use nebd_nbd::{
    Command, ConnectionState, Event, Export, ExportFlags, Extent, Negotiated, Negotiation, Policy,
    Replies, ReplyError, Request, Requests, Sizes, Span, Step, TlsPolicy,
};

const SIZE: u64 = 1 << 20;
/// Structured replies, `base:allocation` of `d`, and `d` itself.
const AGREED: &[(u8, &[u8])] =
    &[(8, b""), (10, b"\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation"), (7, b"\0\0\0\x01d\0\0")];

fn export(name: &str) -> Result<Export, Refusal> {
    let every = ExportFlags::from_bits(0b1101_0110_1100).expect("a constant");
    match name {
        "d" | "" => Ok(Export {
            name: "d".into(),
            description: "fuzzed".into(),
            size: SIZE,
            sizes: Sizes::new(512, 512, 2048).expect("a constant"),
            flags: if name.is_empty() { every | ExportFlags::READ_ONLY } else { every },
        }),
        "tls" => Err(Refusal::TlsRequired),
        _ => Err(Refusal::Unknown),
    }
}

/// What came of a handshake: all that was said, the end of it, and what was not taken.
fn negotiate(policy: Policy, input: &[u8], cut: usize) -> (Vec<u8>, Option<Negotiated>, usize) {
    let mut said = Vec::new();
    let mut negotiation = Negotiation::new(policy, Instant::now(), &mut said);
    let (mut at, mut end) = (0, cut.min(input.len()));
    loop {
        let before = said.len();
        let (taken, mut step) = negotiation.advance(&input[at..end], &mut said);
        at += taken;
        step = match step {
            Step::List(question) => {
                negotiation.answer_list(question, [("d", "fuzzed"), ("tls", "")], &mut said)
            }
            Step::Export(question) => {
                let answer = export(question.name());
                negotiation.answer_export(question, answer, &mut said)
            }
            step => step,
        };
        // One option at a time, so that a client that does not read costs little.
        assert!(said.len() - before < 512);
        match step {
            Step::Input if end == input.len() => return (said, None, at),
            Step::Input => end = (end + cut).min(input.len()),
            Step::Sent => {}
            Step::StartTls => negotiation.tls_started(),
            Step::Transmission(negotiated) => return (said, Some(negotiated), at),
            Step::Close(_) => return (said, None, at),
            Step::List(_) | Step::Export(_) | Step::Waiting => panic!("{step:?}"),
        }
    }
}

/// A backend that knows no storage, and checks what gets through to it.
fn reply(replies: &Replies, request: &Request, out: &mut Vec<u8>) {
    let whole = [Span { length: 512, is_hole: true }, Span { length: 700, is_hole: false }];
    if request.command != Command::Flush {
        let end = request.offset.checked_add(u64::from(request.length)).expect("checked");
        assert!(end <= SIZE && request.length > 0);
        assert!(request.offset % 512 == 0 && request.length % 512 == 0);
    }
    match request.command {
        Command::Read => {
            assert!(request.length <= 2048);
            for piece in replies.pieces(request, &whole) {
                out.extend_from_slice(&piece.head);
                out.resize(out.len() + piece.data.len(), 0xdd);
            }
        }
        Command::BlockStatus => {
            let extents =
                (0..9).map(|i| Extent { length: 700, is_hole: i % 2 == 0, is_zero: false });
            replies.block_status(request, extents, out);
        }
        _ if request.is_fua() => out.extend_from_slice(&replies.error(request, ReplyError::Io)),
        _ => out.extend_from_slice(&replies.done(request)),
    }
}

/// What came of a stream of requests; after each piece a successor goes on if `hand_over`.
fn transmit(negotiated: &Negotiated, input: &[u8], cut: usize, hand_over: bool) -> Vec<u8> {
    let mut requests = Requests::new(negotiated.terms);
    let replies = Replies::new(&negotiated.terms);
    let (mut said, mut at, mut end) = (Vec::new(), 0, cut.min(input.len()));
    // Requests are answered once their payload is there.
    let mut write: Option<(Request, Vec<u8>)> = None;
    loop {
        if let Some((request, payload)) = &mut write {
            let taken = requests.payload_arrived(end - at);
            payload.extend_from_slice(&input[at..at + taken]);
            at += taken;
            if requests.payload_left() == 0 {
                assert_eq!(payload.len(), request.length as usize);
                said.extend_from_slice(payload);
                reply(&replies, request, &mut said);
                write = None;
                continue;
            }
        } else {
            let (taken, event) = requests.advance(&input[at..end]);
            at += taken;
            match event {
                Ok(Event::Input) => assert_eq!(at, end),
                Ok(Event::Payload(left)) => panic!("{left} bytes"),
                Ok(Event::Disconnect) | Err(_) => return said,
                Ok(Event::Answer(answer)) => replies.answer(&answer, &mut said),
                Ok(Event::Request(request)) => reply(&replies, &request, &mut said),
                Ok(Event::Write(request)) => write = Some((request, Vec::new())),
            }
            if at < end || write.is_some() {
                continue;
            }
        }
        let mut unread = Vec::new();
        let payload = write.as_ref().map_or(&[][..], |(_, payload)| payload);
        if hand_over && requests.append_unread(payload, &mut unread).is_ok() {
            let negotiated = Negotiated { tls: false, ..negotiated.clone() };
            let state = ConnectionState { negotiated, unread, unsent: Vec::new() };
            let bytes = state.encode().expect("not under TLS");
            let state = ConnectionState::decode(&bytes).expect("of our own making");
            requests = Requests::new(state.negotiated.terms);
            write = None;
            let (taken, event) = requests.advance(&state.unread);
            match event {
                Ok(Event::Write(request)) => {
                    let payload = state.unread[taken..].to_vec();
                    assert_eq!(requests.payload_arrived(payload.len()), payload.len());
                    write = Some((request, payload));
                }
                event => assert_eq!((taken, event), (state.unread.len(), Ok(Event::Input))),
            }
        }
        if end == input.len() {
            return said;
        }
        end = (end + cut).min(input.len());
    }
}

/// All that a modern client agrees on before it chooses.
fn agreed() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (option, data) in AGREED {
        bytes.extend(OPTION_MAGIC.to_be_bytes());
        bytes.extend(u32::from(*option).to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(*data);
    }
    bytes
}

/// Options and requests with their magic words in place, so that what is behind them is reached.
fn framed(mut input: Input, is_agreed: bool) -> Vec<u8> {
    let mut bytes = u32::from(FLAG_FIXED_NEWSTYLE).to_be_bytes().to_vec();
    if is_agreed {
        bytes.extend(agreed());
    }
    while !input.0.is_empty() {
        let kind = input.byte();
        if kind & 0x8f == 0x0f {
            bytes.extend(agreed());
        } else if kind & 0x80 == 0 {
            let length = usize::from(input.byte());
            let data = input.bytes(length);
            bytes.extend(OPTION_MAGIC.to_be_bytes());
            bytes.extend(u32::from(kind & 0x0f).to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
        } else {
            let (flags, place, blocks) = (input.byte(), input.byte(), input.byte());
            bytes.extend(REQUEST_MAGIC.to_be_bytes());
            bytes.extend(u16::from(flags & 0x3f).to_be_bytes());
            bytes.extend(u16::from(kind & 0x0f).to_be_bytes());
            bytes.extend([kind; 8]);
            bytes.extend((u64::from(place) * 8192).to_be_bytes());
            let length = u32::from(blocks) * 32;
            bytes.extend(length.to_be_bytes());
            if kind & 0x0f == 1 {
                bytes.resize(bytes.len() + length as usize, place);
            }
        }
    }
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    let _ = ConnectionState::decode(bytes);
    let mut input = Input(bytes);
    let (mode, cut) = (input.byte(), usize::from(input.byte() & 0x3f) + 1);
    let tls = [TlsPolicy::Off, TlsPolicy::Allowed, TlsPolicy::Required, TlsPolicy::Off];
    let policy = Policy { tls: tls[usize::from(mode & 3)], ..Policy::default() };
    let stream = if mode & 4 == 0 { framed(input, mode & 8 == 0) } else { input.0.to_vec() };
    let (said, negotiated, taken) = negotiate(policy, &stream, usize::MAX);
    assert_eq!((said, negotiated.clone(), taken), negotiate(policy, &stream, cut));
    if let Some(negotiated) = negotiated {
        let rest = &stream[taken..];
        let said = transmit(&negotiated, rest, usize::MAX, false);
        assert_eq!(said, transmit(&negotiated, rest, cut, false));
        assert_eq!(said, transmit(&negotiated, rest, cut, true));
    }
});
