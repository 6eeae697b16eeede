//! However the stream is cut, the same happens; whatever comes, nothing breaks; replies say what
//! they should to a client that reads them as the specification says.

mod common;

use std::time::Instant;

use common::*;
use nebd_nbd::reply::Piece;
use nebd_nbd::wire::{OPTION_MAGIC, command, option};
use nebd_nbd::{
    Command, CommandFlags, ConnectionState, Event, ExportFlags, Extent, Negotiated, Negotiation,
    Policy, Replies, Request, Requests, Sizes, Span, Step, Terms, TlsPolicy,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// All that came of a handshake: its last step, what was said, how many bytes it took.
type Handshake = (String, Vec<u8>, usize);

/// Feeds at most so many bytes at a time; the sizes repeat.
fn handshake(policy: Policy, input: &[u8], sizes: &[usize]) -> Handshake {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(policy, Instant::now(), &mut out);
    let (mut at, mut end) = (0, 0);
    let mut sizes = sizes.iter().cycle();
    loop {
        let (taken, step) = negotiation.advance(&input[at..end], &mut out);
        at += taken;
        match answered(&mut negotiation, step, &mut out) {
            Step::Input if end == input.len() => return ("Input".into(), out, at),
            Step::Input => {
                assert_eq!(at, end, "all input is taken before more is asked for");
                end = (end + sizes.next().unwrap()).min(input.len());
            }
            Step::Sent => {}
            Step::StartTls => negotiation.tls_started(),
            step => return (format!("{step:?}"), out, at),
        }
    }
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("disk"), Just(""), Just("secret"), Just("nothing")];
    let number = prop_oneof![0..12u32, any::<u32>()];
    let queries = vec(prop_oneof![Just("base:"), Just("base:allocation"), Just("x:y")], 0..3);
    let of_meta = prop_oneof![Just(option::SET_META_CONTEXT), Just(option::LIST_META_CONTEXT)];
    prop_oneof![
        (number, vec(any::<u8>(), 0..40)).prop_map(|(number, data)| common::option(number, &data)),
        (name.clone(), vec(0..5u16, 0..4)).prop_map(|(name, items)| common::info(
            option::INFO,
            name,
            &items
        )),
        (of_meta, name.clone(), queries)
            .prop_map(|(number, name, queries)| meta(number, name, &queries)),
        prop_oneof![Just(option::STRUCTURED_REPLY), Just(option::LIST), Just(option::STARTTLS)]
            .prop_map(|number| common::option(number, b"")),
        name.prop_map(go),
        // Claims more than it has, with what follows as its data.
        (1..12u32, any::<u32>()).prop_map(|(number, length)| {
            let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
            bytes.extend(number.to_be_bytes());
            bytes.extend((length % 100_000).to_be_bytes());
            bytes
        }),
    ]
}

fn any_policy() -> impl Strategy<Value = Policy> {
    prop_oneof![Just(TlsPolicy::Off), Just(TlsPolicy::Allowed), Just(TlsPolicy::Required)]
        .prop_map(|tls| Policy { tls, ..Policy::default() })
}

fn any_terms() -> impl Strategy<Value = Terms> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(structured, allocation, read_only)| {
        let mut flags = terms().flags;
        if !structured {
            flags = flags.without(ExportFlags::SEND_DF);
        }
        if read_only {
            flags = flags | ExportFlags::READ_ONLY;
        }
        Terms { structured, allocation: structured && allocation, flags, ..terms() }
    })
}

/// A request, mostly sane, with the payload of a write.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![4 => Just(0), 2 => 0..32u16, 1 => any::<u16>()];
    let number = prop_oneof![6 => 0..9u16, 3 => Just(command::WRITE), 1 => any::<u16>()];
    let number = number.prop_filter("ends the stream", |number| *number != command::DISC);
    let offset = prop_oneof![4 => (0..2050u64).prop_map(|block| block * 512), 1 => any::<u64>()];
    let length = prop_oneof![4 => (0..4u32).prop_map(|blocks| blocks * 512), 1 => 0..70_000u32];
    (flags, number, any::<u64>(), offset, length).prop_map(
        |(flags, number, cookie, offset, length)| {
            let mut bytes = request(flags, number, cookie, offset, length);
            if number == command::WRITE {
                bytes.extend((0..length).map(|i| (cookie as u32).wrapping_add(i) as u8));
            }
            bytes
        },
    )
}

fn any_stream() -> impl Strategy<Value = Vec<u8>> {
    let last = prop_oneof![
        Just(request(0, command::DISC, 0, 0, 0)),
        vec(any::<u8>(), 0..64),
        Just(Vec::new()),
    ];
    (vec(any_request(), 0..12), last)
        .prop_map(|(requests, last)| [requests.concat(), last].concat())
}

/// What comes of a stream: events and, for writes, their whole payload.
#[derive(Debug, Default, PartialEq)]
struct Seen(Vec<(String, Vec<u8>)>);

impl Seen {
    /// Reads until the input ends or the connection does; what has come of a payload that is not
    /// complete is left in `partial`.
    fn read(&mut self, requests: &mut Requests, mut input: &[u8], partial: &mut Vec<u8>) -> bool {
        loop {
            if requests.payload_left() > 0 {
                if input.is_empty() {
                    return true;
                }
                let taken = requests.payload_arrived(input.len());
                partial.extend_from_slice(&input[..taken]);
                input = &input[taken..];
                if requests.payload_left() > 0 {
                    continue;
                }
                if let Some((_, payload)) = self.0.last_mut() {
                    *payload = std::mem::take(partial);
                }
            }
            let (taken, event) = requests.advance(input);
            input = &input[taken..];
            match event {
                Ok(Event::Input) => {
                    assert!(input.is_empty());
                    return true;
                }
                Ok(Event::Payload(left)) => panic!("{left} are left"),
                Ok(Event::Disconnect) | Err(_) => {
                    self.0.push((format!("{event:?}"), Vec::new()));
                    return false;
                }
                Ok(event) => self.0.push((format!("{event:?}"), Vec::new())),
            }
        }
    }
}

fn whole(terms: Terms, stream: &[u8]) -> Seen {
    let mut seen = Seen::default();
    seen.read(&mut Requests::new(terms), stream, &mut Vec::new());
    seen
}

/// The chunks of structured replies, read as a client does: kind, whether it is the last, payload.
fn chunks(mut bytes: &[u8]) -> Vec<(u16, bool, Vec<u8>)> {
    let mut chunks = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..4], 0x668e33ef_u32.to_be_bytes());
        let flags = u16::from_be_bytes(bytes[4..6].try_into().unwrap());
        let kind = u16::from_be_bytes(bytes[6..8].try_into().unwrap());
        assert_eq!(bytes[8..16], COOKIE.to_be_bytes());
        let length = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        assert!(flags <= 1);
        chunks.push((kind, flags == 1, bytes[20..20 + length].to_vec()));
        bytes = &bytes[20 + length..];
    }
    chunks
}

const COOKIE: u64 = 0x0123_4567_89ab_cdef;

fn of_range(command: Command, flags: CommandFlags, offset: u64, length: u32) -> Request {
    Request { cookie: COOKIE, command, flags, offset, length }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn a_handshake_goes_the_same_way_however_it_is_cut(
        policy in any_policy(),
        options in vec(any_option(), 0..8),
        client_flags in prop_oneof![4 => Just(3u16), 1 => 0..5u16],
        sizes in vec(1..40usize, 1..8),
    ) {
        let input = [common::client_flags(client_flags), options.concat()].concat();
        let expected = handshake(policy, &input, &[usize::MAX >> 1]);
        prop_assert_eq!(&handshake(policy, &input, &sizes), &expected);
        prop_assert_eq!(&handshake(policy, &input, &[1]), &expected);
    }

    #[test]
    fn requests_are_the_same_however_the_stream_is_cut(
        terms in any_terms(),
        stream in any_stream(),
        sizes in vec(1..100usize, 1..8),
    ) {
        let expected = whole(terms, &stream);
        let mut seen = Seen::default();
        let (mut requests, mut partial) = (Requests::new(terms), Vec::new());
        let (mut at, mut sizes) = (0, sizes.iter().cycle());
        while at < stream.len() {
            let end = (at + sizes.next().unwrap()).min(stream.len());
            if !seen.read(&mut requests, &stream[at..end], &mut partial) {
                break;
            }
            at = end;
        }
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn a_successor_goes_on_wherever_the_stream_was_cut(
        terms in any_terms(),
        stream in any_stream(),
        cut in any::<prop::sample::Index>(),
    ) {
        let expected = whole(terms, &stream);
        let (before, after) = stream.split_at(cut.index(stream.len() + 1));
        let mut seen = Seen::default();
        let (mut requests, mut partial) = (Requests::new(terms), Vec::new());
        if seen.read(&mut requests, before, &mut partial) {
            if requests.payload_left() > 0 {
                // The successor reads this write anew.
                seen.0.pop();
            }
            let negotiated = Negotiated { export: "disk".into(), terms: *requests.terms(), tls: false };
            let (mut unread, unsent) = (Vec::new(), b"reply".to_vec());
            if requests.append_unread(&partial, &mut unread).is_ok() {
                let state = ConnectionState { negotiated, unread, unsent };
                let state = ConnectionState::decode(&state.encode().unwrap()).unwrap();
                prop_assert_eq!(&state.unsent, b"reply");
                let mut requests = Requests::new(state.negotiated.terms);
                let (rest, mut partial) = ([&state.unread, after].concat(), Vec::new());
                seen.read(&mut requests, &rest, &mut partial);
                prop_assert_eq!(seen, expected);
            } else {
                // Within the payload of a refused write: it waits for the end of that.
                seen.read(&mut requests, after, &mut partial);
                prop_assert_eq!(seen, expected);
            }
        } else {
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn noise_breaks_nothing(
        terms in any_terms(),
        policy in any_policy(),
        noise in vec(any::<u8>(), 0..400),
        sizes in vec(1..40usize, 1..4),
    ) {
        let expected = handshake(policy, &noise, &[400]);
        prop_assert_eq!(&handshake(policy, &noise, &sizes), &expected);
        let _ = whole(terms, &noise);
        let _ = ConnectionState::decode(&noise);
    }

    #[test]
    fn a_state_is_read_as_it_was_written_or_refused(
        terms in any_terms(),
        export in "[a-zä:]{0,20}",
        size in any::<u64>(),
        exponents in (0..17u32, 9..18u32),
        unread in vec(any::<u8>(), 0..40),
        unsent in vec(any::<u8>(), 0..40),
        damage in (any::<prop::sample::Index>(), 1..=255u8),
    ) {
        let minimum = 1 << exponents.0;
        let sizes = Sizes::new(minimum, minimum.max(1 << exponents.1), 1 << 20).unwrap();
        let terms = Terms { size, sizes, ..terms };
        let state = ConnectionState { negotiated: Negotiated { export, terms, tls: false }, unread, unsent };
        let mut bytes = state.encode().unwrap();
        prop_assert_eq!(&ConnectionState::decode(&bytes), &Ok(state.clone()));
        for end in 0..bytes.len() {
            prop_assert!(ConnectionState::decode(&bytes[..end]).is_err());
        }
        // A field from the future that need not be understood, and one that must.
        let with = |tag: u16| [&bytes[..], &tag.to_le_bytes(), &[0, 0, 1, 0, 0, 0, 7]].concat();
        prop_assert_eq!(&ConnectionState::decode(&with(0x0077)), &Ok(state));
        prop_assert!(ConnectionState::decode(&with(0x8077)).is_err());
        let at = damage.0.index(bytes.len());
        bytes[at] ^= damage.1;
        if let Ok(other) = ConnectionState::decode(&bytes) {
            // Values may differ; they are such as a server could have written.
            prop_assert_eq!(ConnectionState::decode(&other.encode().unwrap()), Ok(other));
        }
    }

    #[test]
    fn the_pieces_of_a_read_cover_it_once(
        structured in any::<bool>(),
        whole in any::<bool>(),
        length in 1..20_000u32,
        spans in vec((0..6000u32, any::<bool>()), 0..10),
    ) {
        let flags = if whole { CommandFlags::DF } else { CommandFlags::NONE };
        let request = of_range(Command::Read, flags, 1 << 40, length);
        let spans: Vec<_> =
            spans.into_iter().map(|(length, is_hole)| Span { length, is_hole }).collect();
        // Ones, with the holes' zeroes.
        let mut data = vec![1u8; length as usize];
        let mut at = 0;
        for span in &spans {
            let end = (at + span.length as usize).min(data.len());
            data[at..end].fill(u8::from(!span.is_hole));
            at = end;
        }
        let replies = Replies::new(&Terms { structured, ..terms() });
        let mut sent = Vec::new();
        for Piece { head, data: range } in replies.pieces(&request, &spans) {
            sent.extend_from_slice(&head);
            sent.extend_from_slice(&data[range]);
        }
        if !structured {
            prop_assert_eq!(&sent[..16], &replies.data(&request)[..]);
            prop_assert_eq!(&sent[16..], &data[..]);
            return Ok(());
        }
        let chunks = chunks(&sent);
        prop_assert!(!whole || chunks.len() == 1);
        let mut got: Vec<Option<u8>> = vec![None; data.len()];
        for (index, (kind, is_last, payload)) in chunks.iter().enumerate() {
            prop_assert_eq!(*is_last, index + 1 == chunks.len());
            let offset = u64::from_be_bytes(payload[..8].try_into().unwrap()) - request.offset;
            let bytes = match kind {
                1 => payload[8..].to_vec(),
                2 => vec![0; u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize],
                kind => panic!("kind {kind}"),
            };
            prop_assert!(!bytes.is_empty());
            // A neighbour of the same kind would have been one with it.
            prop_assert!(index == 0 || chunks[index - 1].0 != *kind);
            for (i, byte) in bytes.into_iter().enumerate() {
                prop_assert_eq!(got[offset as usize + i].replace(byte), None);
            }
        }
        let got: Option<Vec<u8>> = got.into_iter().collect();
        prop_assert_eq!(got, Some(data));
    }

    #[test]
    fn extents_begin_at_the_range_and_end_within_it(
        one in any::<bool>(),
        length in 1..20_000u32,
        extents in vec((prop_oneof![0..6000u64, any::<u64>()], any::<bool>(), any::<bool>()), 0..10),
    ) {
        let flags = if one { CommandFlags::REQ_ONE } else { CommandFlags::NONE };
        let request = of_range(Command::BlockStatus, flags, 0, length);
        let extents: Vec<_> = extents
            .into_iter()
            .map(|(length, is_hole, is_zero)| Extent { length, is_hole, is_zero })
            .collect();
        let mut out = Vec::new();
        Replies::new(&terms()).block_status(&request, extents.clone(), &mut out);
        let chunks = chunks(&out);
        prop_assert_eq!(chunks.len(), 1);
        let (kind, is_last, payload) = &chunks[0];
        prop_assert_eq!((*kind, *is_last, &payload[..4]), (5, true, &1u32.to_be_bytes()[..]));
        let told: Vec<(u32, u32)> = payload[4..]
            .as_chunks::<8>().0
            .iter()
            .map(|e| (u32::from_be_bytes(e[..4].try_into().unwrap()), u32::from_be_bytes(e[4..].try_into().unwrap())))
            .collect();
        prop_assert!((payload.len() - 4).is_multiple_of(8) && !told.is_empty());
        prop_assert!(!one || told.len() == 1);
        prop_assert!(told.iter().all(|(length, _)| *length > 0));
        prop_assert!(told.iter().map(|(length, _)| u64::from(*length)).sum::<u64>() <= u64::from(length));
        prop_assert!(told.windows(2).all(|pair| pair[0].1 != pair[1].1));
        // Each byte that is told of has the state that was given for it.
        let states = extents.iter().flat_map(|extent| {
            let state = u32::from(extent.is_hole) | u32::from(extent.is_zero) << 1;
            std::iter::repeat_n(state, extent.length.min(u64::from(length)) as usize)
        });
        let told = told.into_iter().flat_map(|(length, state)| std::iter::repeat_n(state, length as usize));
        if extents.iter().any(|extent| extent.length > 0) {
            let (told, states): (Vec<u32>, Vec<u32>) = (told.collect(), states.take(length as usize).collect());
            prop_assert!(told == states[..told.len()]);
            prop_assert!(one || told.len() == states.len());
        } else {
            prop_assert!(told.eq(std::iter::repeat_n(0, length as usize)));
        }
    }
}
