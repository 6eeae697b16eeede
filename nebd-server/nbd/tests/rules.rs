//! What the specification says, rule by rule.

mod common;

use std::time::{Duration, Instant};

use common::*;
use nebd_nbd::negotiate::{CloseReason, Limits, Refusal};
use nebd_nbd::state::{DecodeError, EncodeError};
use nebd_nbd::wire::{OPTION_REPLY_MAGIC, command, info, option, reply};
use nebd_nbd::{
    ConnectionState, Event, ExportFlags, Negotiated, Negotiation, Policy, ReplyError, Requests,
    Sizes, Step, Terms, TlsPolicy,
};

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const UNKNOWN_FLAG: u16 = 32;
const SIZE: u64 = 1 << 20;

/// What becomes of a request: passed on, or answered with this error (0: success).
fn outcome(terms: Terms, flags: u16, command: u16, offset: u64, length: u32) -> Option<u32> {
    let mut requests = Requests::new(terms);
    let mut input = request(flags, command, 5, offset, length);
    let header_bytes = input.len();
    if command == command::WRITE {
        input.resize(header_bytes + length as usize, 0xaa);
    }
    let (taken, event) = requests.advance(&input);
    match event.unwrap() {
        Event::Request(request) => {
            assert_ne!(command, command::WRITE);
            assert_eq!(request.header(), input[..header_bytes]);
            None
        }
        Event::Write(request) => {
            assert_eq!((taken, request.length), (header_bytes, length));
            None
        }
        Event::Answer(answer) => {
            // With the payload, so that the next request is found.
            assert_eq!(taken, input.len());
            assert_eq!((answer.cookie, answer.is_read), (5, command == command::READ));
            Some(answer.result.map_or_else(|rejection| rejection.error() as u32, |()| 0))
        }
        event => panic!("{event:?}"),
    }
}

#[test]
fn requests_are_checked_as_the_specification_says() {
    use command::*;
    let all = terms();
    let read_only = Terms { flags: all.flags | ExportFlags::READ_ONLY, ..all };
    let nothing = Terms { flags: ExportFlags::HAS_FLAGS, allocation: false, ..all };
    let simple = Terms {
        flags: all.flags.without(ExportFlags::SEND_DF),
        structured: false,
        allocation: false,
        ..all
    };
    let (perm, inval, nospc, overflow) = (Some(1), Some(22), Some(28), Some(75));
    let end = SIZE - 512;
    #[rustfmt::skip]
    let cases = [
        // Passed on.
        (all, 0, READ, 0, 512, None), (all, DF, READ, 512, 65536, None),
        (all, FUA, READ, 0, 512, None), (all, 0, WRITE, end, 512, None),
        (all, FUA, WRITE, 0, 65536, None), (all, 0, FLUSH, 0, 0, None),
        (all, FUA, FLUSH, 0, 0, None), (all, 0, TRIM, 0, 1 << 20, None),
        (all, FUA, TRIM, 0, 512, None), (all, 0, CACHE, 0, 1 << 20, None),
        (all, FUA, CACHE, 0, 512, None),
        (all, FUA | NO_HOLE | FAST_ZERO, WRITE_ZEROES, 0, 1 << 20, None),
        (all, 0, BLOCK_STATUS, 0, 1 << 20, None), (all, REQ_ONE | FUA, BLOCK_STATUS, 0, 512, None),
        (read_only, 0, READ, 0, 512, None), (read_only, 0, FLUSH, 0, 0, None),
        (nothing, 0, READ, 0, 512, None), (nothing, 0, WRITE, 0, 512, None),
        (simple, 0, READ, 0, 65536, None),
        // There is nothing to do.
        (all, 0, READ, 0, 0, Some(0)), (all, 0, WRITE, 0, 0, Some(0)),
        (all, 0, TRIM, 0, 0, Some(0)), (all, 0, WRITE_ZEROES, SIZE, 0, Some(0)),
        // Not known, not offered.
        (all, 0, RESIZE, 0, 512, inval), (all, 0, 9, 0, 0, inval), (all, 0, 0xffff, 0, 0, inval),
        (nothing, 0, FLUSH, 0, 0, inval), (nothing, 0, TRIM, 0, 512, inval),
        (nothing, 0, CACHE, 0, 512, inval), (nothing, 0, WRITE_ZEROES, 0, 512, inval),
        (nothing, 0, BLOCK_STATUS, 0, 512, inval), (simple, 0, BLOCK_STATUS, 0, 512, inval),
        // Flags that are not known, do not go with the command, were not offered.
        (all, UNKNOWN_FLAG, READ, 0, 512, inval), (all, UNKNOWN_FLAG, WRITE, 0, 512, inval),
        (all, NO_HOLE, READ, 0, 512, inval), (all, REQ_ONE, READ, 0, 512, inval),
        (all, FAST_ZERO, READ, 0, 512, inval), (all, DF, WRITE, 0, 512, inval),
        (all, NO_HOLE, WRITE, 0, 512, inval), (all, NO_HOLE, TRIM, 0, 512, inval),
        (all, DF, CACHE, 0, 512, inval), (all, DF, WRITE_ZEROES, 0, 512, inval),
        (all, DF, BLOCK_STATUS, 0, 512, inval), (all, NO_HOLE, FLUSH, 0, 0, inval),
        (nothing, FUA, WRITE, 0, 512, inval), (simple, DF, READ, 0, 512, inval),
        // Read-only, whatever else is wrong.
        (read_only, 0, WRITE, 0, 512, perm), (read_only, 0, TRIM, 0, 512, perm),
        (read_only, 0, WRITE_ZEROES, 0, 512, perm), (read_only, 0, WRITE, SIZE, 512, perm),
        // Beyond the end.
        (all, 0, READ, end, 1024, inval), (all, 0, WRITE, end, 1024, nospc),
        (all, 0, WRITE_ZEROES, end, 1024, nospc), (all, 0, TRIM, end, 1024, inval),
        (all, 0, CACHE, end, 1024, inval), (all, 0, BLOCK_STATUS, end, 1024, inval),
        (all, 0, READ, u64::MAX - 511, 512, inval), (all, 0, WRITE, u64::MAX - 511, 512, nospc),
        (all, 0, TRIM, 512, u32::MAX - 511, inval),
        // Not aligned.
        (all, 0, READ, 1, 512, inval), (all, 0, READ, 0, 511, inval),
        (all, 0, WRITE, 256, 512, inval), (all, 0, WRITE, 0, 100, inval),
        (all, 0, WRITE_ZEROES, 256, 512, inval), (all, 0, TRIM, 0, 100, inval),
        (all, 0, BLOCK_STATUS, 100, 512, inval),
        // Reserved fields of a flush, a status of nothing.
        (all, 0, FLUSH, 512, 0, inval), (all, 0, FLUSH, 0, 512, inval),
        (all, 0, BLOCK_STATUS, 0, 0, inval),
        // More than the payload limit.
        (all, 0, WRITE, 0, 65536 + 512, inval), (simple, 0, READ, 0, 65536 + 512, inval),
        (all, 0, READ, 0, 65536 + 512, overflow), (all, DF, READ, 0, 65536 + 512, overflow),
    ];
    for (terms, flags, command, offset, length, expected) in cases {
        let case = format!("flags {flags}, command {command}, {offset} + {length}: {terms:?}");
        assert_eq!(outcome(terms, flags, command, offset, length), expected, "{case}");
    }
}

#[test]
fn what_cannot_be_answered_closes() {
    for magic in [0x2560_9514u32, 0x1256_0953, 0x21e4_1c71, 0] {
        let mut requests = Requests::new(terms());
        let mut bytes = request(0, command::READ, 1, 0, 512);
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        assert!(requests.advance(&bytes).1.is_err());
        assert_eq!(requests.advance(&bytes), (0, Ok(Event::Disconnect)));
    }
    // 32 MiB is skipped, more is an attack.
    let mut requests = Requests::new(terms());
    let write = request(0, command::WRITE, 1, 0, 32 << 20);
    assert_eq!(requests.advance(&write), (28, Ok(Event::Input)));
    assert!(requests.append_unread(&[], &mut Vec::new()).is_err());
    let mut requests = Requests::new(terms());
    assert!(requests.advance(&request(0, command::WRITE, 1, 0, (32 << 20) + 1)).1.is_err());
    // Whatever stands in the fields, the client leaves.
    let mut requests = Requests::new(terms());
    let leaving = request(7, command::DISC, 1, 2, 3);
    assert_eq!(requests.advance(&leaving), (28, Ok(Event::Disconnect)));
}

#[test]
fn a_resize_moves_the_end() {
    let mut requests = Requests::new(terms());
    requests.resize(SIZE + 512);
    let read = request(0, command::READ, 1, SIZE, 512);
    assert!(matches!(requests.advance(&read), (28, Ok(Event::Request(_)))));
    requests.resize(SIZE);
    assert!(matches!(requests.advance(&read), (28, Ok(Event::Answer(_)))));
}

#[test]
fn errors_of_storage_have_a_number_of_the_protocol() {
    let (_, event) = Requests::new(terms()).advance(&request(DF, command::READ, 1, 0, 512));
    let Ok(Event::Request(read)) = event else { panic!("{event:?}") };
    let zeroes = request(FAST_ZERO, command::WRITE_ZEROES, 1, 0, 512);
    let Ok(Event::Request(fast)) = Requests::new(terms()).advance(&zeroes).1 else { panic!() };
    for (errno, expected) in [
        (1, ReplyError::Perm),
        (5, ReplyError::Io),
        (12, ReplyError::NoMem),
        (13, ReplyError::Perm),
        (22, ReplyError::Inval),
        (27, ReplyError::NoSpc),
        (28, ReplyError::NoSpc),
        (30, ReplyError::Perm),
        (75, ReplyError::Overflow),
        (95, ReplyError::Inval),
        (108, ReplyError::Shutdown),
        (122, ReplyError::NoSpc),
        (61, ReplyError::Io),
        (110, ReplyError::Io),
        (-5, ReplyError::Io),
        (0, ReplyError::Io),
    ] {
        assert_eq!(ReplyError::from_errno(errno, &read), expected, "{errno}");
    }
    assert_eq!(ReplyError::from_errno(95, &fast), ReplyError::NotSup);
    assert_eq!(ReplyError::from_errno(75, &fast), ReplyError::Io);
}

/// A negotiation that has had these options, what it said to the last of them, and its last step.
fn negotiate(policy: Policy, parts: &[Vec<u8>]) -> (Negotiation, Vec<(u32, u32)>, Step) {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(policy, Instant::now(), &mut out);
    let mut step = Step::Input;
    for part in parts {
        out.clear();
        step = feed(&mut negotiation, part, &mut out).1;
    }
    (negotiation, option_replies(&out), step)
}

/// Option and type of each reply.
fn option_replies(mut out: &[u8]) -> Vec<(u32, u32)> {
    let mut replies = Vec::new();
    while out.starts_with(&OPTION_REPLY_MAGIC.to_be_bytes()) {
        let word = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
        replies.push((word(8), word(12)));
        out = &out[20 + word(16) as usize..];
    }
    replies
}

fn with_tls(tls: TlsPolicy) -> Policy {
    Policy { tls, ..Policy::default() }
}

#[test]
fn options_have_the_answer_that_the_specification_says() {
    let structured = option(option::STRUCTURED_REPLY, b"");
    let of_meta = meta(option::SET_META_CONTEXT, "disk", &["base:allocation"]);
    let mut cut = of_meta.clone();
    // The last query claims one byte more than there is.
    let at = cut.len() - "base:allocation".len() - 1;
    cut[at] += 1;
    let mut long_name = info(option::INFO, "disk", &[]);
    long_name[19] = 7;
    let long = option(option::INFO, &[0; (16 << 10) + 1]);
    let off = Policy::default();
    let unlisted = Policy { list: false, ..off };
    let cases = [
        (off, option(77, b"data"), reply::ERR_UNSUP),
        (off, option(4, b""), reply::ERR_UNSUP),
        (off, option(option::EXTENDED_HEADERS, b""), reply::ERR_UNSUP),
        (off, option(option::LIST, b"x"), reply::ERR_INVALID),
        (unlisted, option(option::LIST, b""), reply::ERR_POLICY),
        (off, option(option::STRUCTURED_REPLY, b"x"), reply::ERR_INVALID),
        (off, option(option::STARTTLS, b""), reply::ERR_POLICY),
        (with_tls(TlsPolicy::Allowed), option(option::STARTTLS, b"x"), reply::ERR_INVALID),
        (off, go("nothing"), reply::ERR_UNKNOWN),
        (off, go("busy"), reply::ERR_POLICY),
        (off, go("di\0sk"), reply::ERR_INVALID),
        (off, info(option::INFO, &"n".repeat(4097), &[]), reply::ERR_INVALID),
        (off, long_name, reply::ERR_INVALID),
        (off, option(option::GO, b""), reply::ERR_INVALID),
        (off, long, reply::ERR_TOO_BIG),
        (off, of_meta.clone(), reply::ERR_INVALID), // before structured replies
        (with_tls(TlsPolicy::Allowed), go("secret"), reply::ERR_TLS_REQD),
        (with_tls(TlsPolicy::Required), go("disk"), reply::ERR_TLS_REQD),
        (with_tls(TlsPolicy::Required), option(option::LIST, b""), reply::ERR_TLS_REQD),
        (with_tls(TlsPolicy::Required), option(77, b"data"), reply::ERR_TLS_REQD),
    ];
    for (policy, bytes, expected) in cases {
        let number = u32::from_be_bytes(bytes[8..12].try_into().unwrap());
        let (_, replies, step) = negotiate(policy, &[fixed(), bytes]);
        assert_eq!((replies, step), (vec![(number, expected)], Step::Input), "option {number}");
    }
    for (bytes, expected) in [
        (cut, vec![reply::ERR_INVALID]),
        (of_meta, vec![reply::META_CONTEXT, reply::ACK]),
        (meta(option::SET_META_CONTEXT, "disk", &[]), vec![reply::ACK]),
        (meta(option::SET_META_CONTEXT, "disk", &["base:", "x:"]), vec![reply::ACK]),
        (meta(option::SET_META_CONTEXT, "nothing", &[]), vec![reply::ERR_UNKNOWN]),
        (meta(option::LIST_META_CONTEXT, "disk", &[]), vec![reply::META_CONTEXT, reply::ACK]),
        (meta(option::LIST_META_CONTEXT, "disk", &["x:"]), vec![reply::ACK]),
    ] {
        let (_, replies, _) = negotiate(off, &[fixed(), structured.clone(), bytes]);
        let replies: Vec<u32> = replies.into_iter().map(|(_, kind)| kind).collect();
        assert_eq!(replies, expected);
    }
}

#[test]
fn contexts_hold_for_the_export_they_were_selected_for() {
    let structured = option(option::STRUCTURED_REPLY, b"");
    let select = |name| meta(option::SET_META_CONTEXT, name, &["base:allocation"]);
    for (selections, expected) in [
        (vec![select("disk")], true),
        (vec![select("")], false), // the same disk by another name
        (vec![select("disk"), select("nothing")], false),
        (vec![select("disk"), meta(option::SET_META_CONTEXT, "disk", &[])], false),
        (vec![select("disk"), option(option::SET_META_CONTEXT, b"nonsense")], false),
        (vec![select("disk"), meta(option::LIST_META_CONTEXT, "disk", &[])], true),
    ] {
        let parts = [vec![fixed(), structured.clone()], selections, vec![go("disk")]].concat();
        let (.., step) = negotiate(Policy::default(), &parts);
        let Step::Transmission(Negotiated { terms, .. }) = step else { panic!("{step:?}") };
        assert_eq!(terms.allocation, expected, "{parts:?}");
    }
}

#[test]
fn tls_forgets_what_was_said_before() {
    let before = [
        fixed(),
        option(option::STRUCTURED_REPLY, b""),
        meta(option::SET_META_CONTEXT, "disk", &["base:allocation"]),
    ];
    for policy in [with_tls(TlsPolicy::Allowed), with_tls(TlsPolicy::Required)] {
        let (mut negotiation, ..) = negotiate(policy, &before);
        let mut out = Vec::new();
        // What an attacker put behind the option is not taken for what comes under TLS.
        let injected = [option(option::STARTTLS, b""), go("disk")].concat();
        let (taken, step) = negotiation.advance(&injected, &mut out);
        assert_eq!((taken, step), (16, Step::StartTls));
        assert_eq!(option_replies(&out), [(option::STARTTLS, reply::ACK)]);
        assert_eq!(negotiation.advance(&injected[16..], &mut out), (0, Step::Waiting));
        negotiation.tls_started();
        out.clear();
        let again = feed(&mut negotiation, &option(option::STARTTLS, b""), &mut out).1;
        assert_eq!(again, Step::Input);
        assert_eq!(option_replies(&out), [(option::STARTTLS, reply::ERR_INVALID)]);
        // No reply asks for TLS any more.
        out.clear();
        let _ = feed(&mut negotiation, &go("secret"), &mut out);
        assert_eq!(option_replies(&out), [(option::GO, reply::ERR_UNKNOWN)]);
        let (_, step) = feed(&mut negotiation, &go("disk"), &mut out);
        let Step::Transmission(negotiated) = step else { panic!("{step:?}") };
        let Negotiated { terms, tls, .. } = negotiated;
        assert_eq!((terms.structured, terms.allocation, tls), (false, false, true));
    }
}

#[test]
fn some_negotiations_end_without_an_answer() {
    let name = |name: &[u8]| option(option::EXPORT_NAME, name);
    let off = Policy::default();
    let large = Policy { unasked_minimum_max: 256, ..off };
    let mut no_option = go("disk");
    no_option[0] = 0;
    let long = option(option::EXPORT_NAME, &[b'n'; 4097]);
    let few = Limits { options_max: 2, ..Limits::default() };
    let little = Limits { bytes_max: 100, ..Limits::default() };
    let unknown = option(77, &[0; 40]);
    for (policy, parts, expected) in [
        (off, vec![fixed(), option(option::ABORT, b"")], CloseReason::Aborted),
        (off, vec![client_flags(4)], CloseReason::ClientFlags(4)),
        (off, vec![fixed(), no_option], CloseReason::Magic(0x48_4156_454f_5054)),
        (off, vec![client_flags(0), go("disk")], CloseReason::NotFixed(option::GO)),
        (with_tls(TlsPolicy::Required), vec![fixed(), name(b"disk")], CloseReason::TlsRequired),
        (off, vec![fixed(), name(b"di\0sk")], CloseReason::Name),
        (off, vec![fixed(), name(b"\xff")], CloseReason::Name),
        (off, vec![fixed(), long], CloseReason::Name),
        (off, vec![fixed(), name(b"nothing")], CloseReason::Refused(Refusal::Unknown)),
        (large, vec![fixed(), name(b"disk")], CloseReason::SizesRequired),
        (
            Policy { limits: few, ..off },
            vec![fixed(), unknown.clone(), unknown.clone(), unknown.clone()],
            CloseReason::TooManyOptions,
        ),
        (
            Policy { limits: little, ..off },
            vec![fixed(), unknown.clone(), unknown],
            CloseReason::TooManyBytes,
        ),
    ] {
        let (mut negotiation, _, step) = negotiate(policy, &parts);
        assert_eq!(step, Step::Close(expected));
        // For good.
        let again = negotiation.advance(&go("disk"), &mut Vec::new());
        assert_eq!(again, (0, Step::Close(expected)));
    }
}

#[test]
fn time_runs_out() {
    let now = Instant::now();
    let mut negotiation = Negotiation::new(Policy::default(), now, &mut Vec::new());
    let deadline = now + Duration::from_secs(30);
    assert_eq!(negotiation.deadline(), deadline);
    assert_eq!(negotiation.check_time(deadline - Duration::from_nanos(1)), None);
    // Even while a question is open: its answer then changes nothing.
    let mut out = Vec::new();
    let (_, step) = negotiation.advance(&[fixed(), go("disk")].concat(), &mut out);
    let Step::Export(question) = step else { panic!("{step:?}") };
    assert!(question.enters_transmission());
    let late = Step::Close(CloseReason::TooLate);
    assert_eq!(negotiation.check_time(deadline), Some(Step::Close(CloseReason::TooLate)));
    assert_eq!(negotiation.answer_export(question, Ok(export("disk")), &mut out), late);
    assert!(out.is_empty());
}

#[test]
fn a_server_that_goes_refuses_all_but_the_parting() {
    let (mut negotiation, ..) = negotiate(Policy::default(), &[fixed()]);
    negotiation.shut_down();
    let mut out = Vec::new();
    let _ = feed(&mut negotiation, &go("disk"), &mut out);
    assert_eq!(option_replies(&out), [(option::GO, reply::ERR_SHUTDOWN)]);
    let (_, step) = feed(&mut negotiation, &option(option::ABORT, b""), &mut out);
    assert_eq!(step, Step::Close(CloseReason::Aborted));
    let (mut negotiation, ..) = negotiate(Policy::default(), &[fixed()]);
    negotiation.shut_down();
    let (_, step) = feed(&mut negotiation, &option(option::EXPORT_NAME, b"disk"), &mut out);
    assert_eq!(step, Step::Close(CloseReason::Refused(Refusal::Shutdown)));
}

#[test]
fn sizes_are_told_and_may_be_demanded() {
    let policy = Policy { unasked_minimum_max: 256, ..Policy::default() };
    let unasked = info(option::GO, "disk", &[]);
    let (_, replies, step) = negotiate(policy, &[fixed(), unasked.clone()]);
    assert_eq!(step, Step::Input);
    // What it should have asked for comes first, to spare it a round.
    let go = |kind| (option::GO, kind);
    assert_eq!(replies, [go(reply::INFO), go(reply::ERR_BLOCK_SIZE_REQD)]);
    let asked = info(option::GO, "disk", &[info::BLOCK_SIZE]);
    assert!(matches!(negotiate(policy, &[fixed(), asked]).2, Step::Transmission(_)));
    // By default it may find out the hard way.
    let (_, replies, step) = negotiate(Policy::default(), &[fixed(), unasked]);
    assert_eq!(replies, [go(reply::INFO), go(reply::INFO), go(reply::ACK)]);
    assert!(matches!(step, Step::Transmission(_)));
    assert!(Sizes::new(512, 4096, 1 << 20).is_ok());
    for (minimum, preferred, payload_max) in [
        (0, 512, 4096),
        (3, 512, 4096),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 256, 4096),
        (4096, 512, 4096),
        (1, 1000, 4096),
        (1, 8192, 4096),
        (1, 512, u32::MAX),
    ] {
        assert!(Sizes::new(minimum, preferred, payload_max).is_err(), "{minimum} {preferred}");
    }
}

#[test]
fn flags_that_are_offered_are_consistent() {
    let mut odd = export("disk");
    odd.flags = ExportFlags::SEND_FAST_ZERO | ExportFlags::SEND_DF | ExportFlags::ROTATIONAL;
    for (structured, df) in [(false, ExportFlags::NONE), (true, ExportFlags::SEND_DF)] {
        let mut out = Vec::new();
        let mut negotiation = Negotiation::new(Policy::default(), Instant::now(), &mut out);
        let mut options = fixed();
        if structured {
            options.extend(option(option::STRUCTURED_REPLY, b""));
        }
        let _ = feed(&mut negotiation, &options, &mut out);
        let (_, step) = negotiation.advance(&go("disk"), &mut out);
        let Step::Export(question) = step else { panic!("{step:?}") };
        let step = negotiation.answer_export(question, Ok(odd.clone()), &mut out);
        let Step::Transmission(Negotiated { terms, .. }) = step else { panic!("{step:?}") };
        // Fast zeroes without zeroes, and one piece of many that there are not, mean nothing.
        assert_eq!(terms.flags, ExportFlags::HAS_FLAGS | ExportFlags::ROTATIONAL | df);
    }
}

#[test]
fn a_state_that_no_server_would_have_agreed_to_is_refused() {
    let state = |terms| {
        let negotiated = Negotiated { export: "disk".into(), terms, tls: false };
        ConnectionState { negotiated, unread: Vec::new(), unsent: Vec::new() }
    };
    let decode = |terms| ConnectionState::decode(&state(terms).encode().unwrap());
    let all = terms();
    let without_df = all.flags.without(ExportFlags::SEND_DF);
    assert_eq!(decode(all), Ok(state(all)));
    // A context without structured replies, flags that do not go together or lack the first.
    let odd = Terms { structured: false, flags: without_df, ..all };
    assert_eq!(decode(odd), Err(DecodeError::Value(0x8005)));
    for flags in [without_df, all.flags.without(ExportFlags::HAS_FLAGS)] {
        assert_eq!(decode(Terms { flags, ..all }), Err(DecodeError::Value(0x8004)));
    }
    let mut under_tls = state(all);
    under_tls.negotiated.tls = true;
    assert_eq!(under_tls.encode(), Err(EncodeError::Tls));
    let mut nameless = state(all);
    nameless.negotiated.export = "di\0sk".into();
    assert_eq!(nameless.encode(), Err(EncodeError::Name));
    let mut later = state(all).encode().unwrap();
    later[4] = 2;
    assert_eq!(ConnectionState::decode(&later), Err(DecodeError::Version(2)));
}
