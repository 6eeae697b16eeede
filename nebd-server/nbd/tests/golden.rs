//! Golden bytes of every message, labelled by field.
//!
//! What a server sends is NBD's and must not change by accident; the state of a connection is ours
//! and stays readable for good.

#[path = "../../../proto/abi/tests/golden/text.rs"]
mod text;

mod common;

use std::path::Path;
use std::time::Instant;

use common::*;
use nebd_nbd::request::{Answer, Rejection};
use nebd_nbd::wire::{command, option};
use nebd_nbd::{
    Command, CommandFlags, ConnectionState, Event, Extent, Negotiated, Negotiation, Policy,
    Replies, ReplyError, Request, Requests, Span, Step, TlsPolicy,
};

type Fields = &'static [(usize, &'static str)];

fn golden(name: &str, title: &str, bytes: &[u8], fields: Fields) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    text::golden(&folder, name, &text::render(title, bytes, fields))
}

#[rustfmt::skip]
const GREETING: Fields = &[(8, "init_magic"), (8, "option_magic"), (0, "handshake_flags")];
#[rustfmt::skip]
const ACK: Fields = &[(8, "magic"), (4, "option"), (4, "reply"), (0, "length")];
#[rustfmt::skip]
const ERROR: Fields = &[(8, "magic"), (4, "option"), (4, "reply"), (4, "length"), (0, "message")];
#[rustfmt::skip]
const LIST: Fields = &[
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"),
    (4, "name_length"), (4, "name"), (6, "description"),
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"), (4, "name_length"), (5, "name"),
    (8, "magic"), (4, "option"), (4, "reply"), (0, "length"),
];
#[rustfmt::skip]
const INFO: Fields = &[
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"),
    (2, "item"), (4, "minimum"), (4, "preferred"), (4, "payload_max"),
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"),
    (2, "item"), (8, "size"), (2, "transmission_flags"),
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"), (2, "item"), (4, "name"),
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"), (2, "item"), (6, "description"),
    (8, "magic"), (4, "option"), (4, "reply"), (0, "length"),
];
#[rustfmt::skip]
const META: Fields = &[
    (8, "magic"), (4, "option"), (4, "reply"), (4, "length"), (4, "context_id"), (15, "context"),
    (8, "magic"), (4, "option"), (4, "reply"), (0, "length"),
];
#[rustfmt::skip]
const EXPORT: Fields = &[(8, "size"), (2, "transmission_flags"), (0, "zeroes")];

/// What the server says to each option, after these options.
fn said(policy: Policy, before: &[Vec<u8>], last: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(policy, Instant::now(), &mut out);
    let _ = feed(&mut negotiation, &before.concat(), &mut out);
    out.clear();
    let _ = feed(&mut negotiation, last, &mut out);
    out
}

#[test]
fn handshake() {
    let mut out = Vec::new();
    let _ = Negotiation::new(Policy::default(), Instant::now(), &mut out);
    golden("greeting", "What a client is greeted with", &out, GREETING);

    let policy = Policy { tls: TlsPolicy::Allowed, ..Policy::default() };
    let structured = option(option::STRUCTURED_REPLY, b"");
    let queries: &[&str] = &["base:allocation", "base:nothing", "x-other:thing"];
    let with = [fixed(), structured.clone()];
    for (name, title, before, last, fields) in [
        ("list", "LIST of two exports", &with[..1], option(option::LIST, b""), LIST),
        ("go", "GO with all that can be asked", &with[..], go("disk"), INFO),
        ("abort", "ABORT", &with[..1], option(option::ABORT, b"bye"), ACK),
        ("structured_reply", "STRUCTURED_REPLY", &with[..1], structured, ACK),
        ("starttls", "STARTTLS", &with[..1], option(option::STARTTLS, b""), ACK),
        ("unknown_export", "GO of no export", &with[..1], go("nothing"), ERROR),
        ("tls_required", "GO of an export for TLS alone", &with[..1], go("secret"), ERROR),
        (
            "extended_headers",
            "EXTENDED_HEADERS is not known",
            &with[..1],
            option(option::EXTENDED_HEADERS, b""),
            ERROR,
        ),
        (
            "set_meta_context",
            "SET_META_CONTEXT",
            &with[..],
            meta(option::SET_META_CONTEXT, "disk", queries),
            META,
        ),
        (
            "list_meta_context",
            "LIST_META_CONTEXT",
            &with[..],
            meta(option::LIST_META_CONTEXT, "disk", &["base:"]),
            META,
        ),
        (
            "export_name",
            "EXPORT_NAME of a client of long ago",
            &[client_flags(0)][..],
            option(option::EXPORT_NAME, b"disk"),
            EXPORT,
        ),
    ] {
        golden(name, title, &said(policy, before, &last), fields);
    }
}

#[rustfmt::skip]
const REQUEST: Fields = &[
    (4, "magic"), (2, "flags"), (2, "command"), (8, "cookie"), (8, "offset"), (0, "length"),
];

#[test]
fn requests() {
    for (name, command, flags, offset, length) in [
        ("request_read", Command::Read, CommandFlags::DF, 0x2000, 0x1000),
        ("request_write", Command::Write, CommandFlags::FUA, 0x2000, 0x1000),
        ("request_flush", Command::Flush, CommandFlags::NONE, 0, 0),
        ("request_trim", Command::Trim, CommandFlags::NONE, 0x2000, 0x8000),
        ("request_cache", Command::Cache, CommandFlags::NONE, 0x2000, 0x8000),
        (
            "request_write_zeroes",
            Command::WriteZeroes,
            CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            0x2000,
            0x8000,
        ),
        ("request_block_status", Command::BlockStatus, CommandFlags::REQ_ONE, 0x2000, 0x8000),
    ] {
        let request = Request { cookie: 0x1122_3344_5566_7788, command, flags, offset, length };
        let stored = golden(name, "A request", &request.header(), REQUEST);
        let expected = match command {
            Command::Write => Event::Write(request),
            _ => Event::Request(request),
        };
        assert_eq!(Requests::new(terms()).advance(&stored), (28, Ok(expected)));
    }
    let leaving = bare_request(command::DISC);
    let stored = golden("request_disc", "The client leaves", &leaving, REQUEST);
    assert_eq!(Requests::new(terms()).advance(&stored), (28, Ok(Event::Disconnect)));
    let resize = bare_request(command::RESIZE);
    let stored = golden("request_resize", "An experimental request", &resize, REQUEST);
    let answer = Answer { cookie: 9, is_read: false, result: Err(Rejection::Command) };
    assert_eq!(Requests::new(terms()).advance(&stored), (28, Ok(Event::Answer(answer))));
    assert_eq!(Rejection::Command.error(), ReplyError::Inval);
}

fn bare_request(command: u16) -> Vec<u8> {
    request(0, command, 9, 0, 0)
}

#[rustfmt::skip]
const SIMPLE: Fields = &[(4, "magic"), (4, "error"), (0, "cookie")];
#[rustfmt::skip]
const CHUNK: Fields = &[
    (4, "magic"), (2, "flags"), (2, "type"), (8, "cookie"), (4, "length"), (0, ""),
];
#[rustfmt::skip]
const DATA: Fields = &[
    (4, "magic"), (2, "flags"), (2, "type"), (8, "cookie"), (4, "length"), (0, "offset"),
];
#[rustfmt::skip]
const HOLE: Fields = &[
    (4, "magic"), (2, "flags"), (2, "type"), (8, "cookie"), (4, "length"), (8, "offset"),
    (0, "hole_length"),
];
#[rustfmt::skip]
const FAILED: Fields = &[
    (4, "magic"), (2, "flags"), (2, "type"), (8, "cookie"), (4, "length"), (4, "error"),
    (2, "message_length"), (0, "message"),
];
#[rustfmt::skip]
const FAILED_AT: Fields = &[
    (4, "magic"), (2, "flags"), (2, "type"), (8, "cookie"), (4, "length"), (4, "error"),
    (2, "message_length"), (0, "offset"),
];
#[rustfmt::skip]
const STATUS: Fields = &[
    (4, "magic"), (2, "flags"), (2, "type"), (8, "cookie"), (4, "length"), (4, "context_id"),
    (4, "length"), (4, "state"), (4, "length"), (4, "state"), (4, "length"), (0, "state"),
];

#[test]
fn replies() {
    let request = |command| Request {
        cookie: 0x1122_3344_5566_7788,
        command,
        flags: CommandFlags::NONE,
        offset: 0x2000,
        length: 0x3000,
    };
    let (read, write) = (request(Command::Read), request(Command::Write));
    let simple = Replies::new(&nebd_nbd::Terms { structured: false, ..terms() });
    let replies = Replies::new(&terms());
    golden("simple_done", "Success", &replies.done(&write), SIMPLE);
    golden("simple_read", "Success of a read; its data follows", &simple.data(&read), SIMPLE);
    golden("simple_error", "ENOSPC", &simple.error(&write, ReplyError::NoSpc), SIMPLE);
    golden("chunk_data", "A read in one piece; its data follows", &replies.data(&read), DATA);
    let spans = [Span { length: 0x1000, is_hole: false }, Span { length: 0x2000, is_hole: true }];
    let pieces: Vec<_> = replies.pieces(&read, &spans).collect();
    assert_eq!((pieces[0].data.clone(), pieces[1].data.clone()), (0..0x1000, 0..0));
    golden("chunk_data_first", "Data that a hole follows", &pieces[0].head, DATA);
    golden("chunk_hole", "A hole, the last piece", &pieces[1].head, HOLE);
    golden("chunk_error", "EIO", &replies.error(&read, ReplyError::Io), FAILED);
    let at = replies.error_at(&read, ReplyError::Io, 0x2200);
    golden("chunk_error_offset", "EIO at an offset", &at, FAILED_AT);
    let mut out = Vec::new();
    replies.error_with(&read, ReplyError::Inval, "because", &mut out);
    golden("chunk_error_message", "EINVAL, and why", &out, FAILED);
    out.clear();
    replies.answer(&Answer { cookie: read.cookie, is_read: true, result: Ok(()) }, &mut out);
    golden("chunk_none", "A read of nothing", &out, CHUNK);
    out.clear();
    let extent = |length, is_hole, is_zero| Extent { length, is_hole, is_zero };
    let extents =
        [extent(0x1000, true, true), extent(0x1000, false, false), extent(0x9000, false, true)];
    replies.block_status(&request(Command::BlockStatus), extents, &mut out);
    golden("chunk_block_status", "A hole, data, zeroes", &out, STATUS);
}

#[rustfmt::skip]
const STATE: Fields = &[
    (4, "magic"), (2, "version"), (2, "reserved"),
    (2, "tag"), (2, "reserved"), (4, "length"), (4, "export"),
    (2, "tag"), (2, "reserved"), (4, "length"), (8, "size"),
    (2, "tag"), (2, "reserved"), (4, "length"), (4, "minimum"), (4, "preferred"), (4, "payload_max"),
    (2, "tag"), (2, "reserved"), (4, "length"), (2, "transmission_flags"),
    (2, "tag"), (2, "reserved"), (4, "length"), (4, "agreed"),
    (2, "tag"), (2, "reserved"), (4, "length"), (31, "unread"),
    (2, "tag"), (2, "reserved"), (4, "length"), (0, "unsent"),
];

#[test]
fn state() {
    // A write of which three bytes have come, and a reply of which the last two have not gone.
    let mut requests = Requests::new(terms());
    let header = request(0, command::WRITE, 7, 0, 512);
    assert!(matches!(requests.advance(&header), (28, Ok(Event::Write(_)))));
    assert_eq!(requests.payload_arrived(3), 3);
    let mut unread = Vec::new();
    requests.append_unread(b"abc", &mut unread).unwrap();
    let negotiated = Negotiated { export: "disk".into(), terms: terms(), tls: false };
    let state = ConnectionState { negotiated, unread, unsent: vec![0xee, 0xff] };
    let title = "State of a connection, version 1";
    let stored = golden("state", title, &state.encode().unwrap(), STATE);
    assert_eq!(ConnectionState::decode(&stored), Ok(state));
}

#[test]
fn the_last_step_enters_the_transmission() {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(Policy::default(), Instant::now(), &mut out);
    let options = [
        fixed(),
        option(option::STRUCTURED_REPLY, b""),
        meta(option::SET_META_CONTEXT, "disk", &["base:allocation"]),
        go("disk"),
        b"rest".to_vec(),
    ]
    .concat();
    let (taken, step) = feed(&mut negotiation, &options, &mut out);
    assert_eq!(&options[taken..], b"rest");
    let negotiated = Negotiated { export: "disk".into(), terms: terms(), tls: false };
    assert_eq!(step, Step::Transmission(negotiated));
}
