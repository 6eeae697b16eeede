use proptest::prelude::*;

use super::*;

/// Bytes in hexadecimal, spaces and all.
fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

const REGION: RegionSpec = RegionSpec {
    guest_address: 0x1_0000_0000,
    size: 0x2000_0000,
    user_address: 0x7f00_1234_0000,
    mmap_offset: 0x1000,
};
const REGION_BYTES: &str = "0000000001000000 0000002000000000 00003412007f0000 0010000000000000";

fn golden() -> Vec<(Message, usize, &'static str)> {
    let ring = RingState { index: 1, number: 0x100 };
    let inflight = InflightDescription {
        mmap_size: 0x3000,
        mmap_offset: 0x40,
        queues: 2,
        queue_size: 128,
        is_padded: true,
    };
    let piece = ConfigPiece { offset: 32, flags: 0, bytes: vec![1] };
    let addresses = RingAddresses {
        index: 1,
        flags: 0,
        descriptors: 0x1111,
        used: 0x2222,
        available: 0x3333,
        log: 0x4444,
    };
    let fd = |has_fd| RingFd { index: 3, has_fd };
    vec![
        (Message::GetFeatures, 0, "01000000 01000000 00000000"),
        (Message::SetFeatures(0x1_4000_0200), 0, "02000000 01000000 08000000 0002004001000000"),
        (Message::SetOwner, 0, "03000000 01000000 00000000"),
        (Message::ResetOwner, 0, "04000000 01000000 00000000"),
        (
            Message::SetMemTable(vec![REGION]),
            1,
            "05000000 01000000 28000000 01000000 00000000
             0000000001000000 0000002000000000 00003412007f0000 0010000000000000",
        ),
        (Message::SetVringNum(ring), 0, "08000000 01000000 08000000 01000000 00010000"),
        (
            Message::SetVringAddr(addresses),
            0,
            "09000000 01000000 28000000 01000000 00000000
             1111000000000000 2222000000000000 3333000000000000 4444000000000000",
        ),
        (Message::SetVringBase(ring), 0, "0a000000 01000000 08000000 01000000 00010000"),
        (Message::GetVringBase(ring), 0, "0b000000 01000000 08000000 01000000 00010000"),
        (Message::SetVringKick(fd(true)), 1, "0c000000 01000000 08000000 0300000000000000"),
        (Message::SetVringCall(fd(false)), 0, "0d000000 01000000 08000000 0301000000000000"),
        (Message::SetVringErr(fd(true)), 1, "0e000000 01000000 08000000 0300000000000000"),
        (Message::GetProtocolFeatures, 0, "0f000000 01000000 00000000"),
        (Message::SetProtocolFeatures(0x1208), 0, "10000000 01000000 08000000 0812000000000000"),
        (Message::GetQueueNum, 0, "11000000 01000000 00000000"),
        (Message::SetVringEnable(ring), 0, "12000000 01000000 08000000 01000000 00010000"),
        (Message::SetBackendReqFd, 1, "15000000 01000000 00000000"),
        (
            Message::GetConfig(piece.clone()),
            0,
            "18000000 01000000 0d000000 20000000 01000000 00000000 01",
        ),
        (Message::SetConfig(piece), 0, "19000000 01000000 0d000000 20000000 01000000 00000000 01"),
        (
            Message::GetInflightFd(inflight),
            0,
            "1f000000 01000000 18000000 0030000000000000 4000000000000000 0200 8000 00000000",
        ),
        (
            Message::SetInflightFd(InflightDescription { is_padded: false, ..inflight }),
            1,
            "20000000 01000000 14000000 0030000000000000 4000000000000000 0200 8000",
        ),
        (Message::ResetDevice, 0, "22000000 01000000 00000000"),
        (Message::GetMaxMemSlots, 0, "24000000 01000000 00000000"),
        (
            Message::AddMemReg(REGION),
            1,
            "25000000 01000000 28000000 0000000000000000
             0000000001000000 0000002000000000 00003412007f0000 0010000000000000",
        ),
        (
            Message::RemMemReg(REGION),
            0,
            "26000000 01000000 28000000 0000000000000000
             0000000001000000 0000002000000000 00003412007f0000 0010000000000000",
        ),
        (Message::SetStatus(15), 0, "27000000 01000000 08000000 0f00000000000000"),
        (Message::GetStatus, 0, "28000000 01000000 00000000"),
    ]
}

fn decode(bytes: &[u8], fds: usize) -> Result<(Header, Message), MessageError> {
    let (header, payload) = bytes.split_first_chunk().unwrap();
    let header = Header::decode(header)?;
    let payload = &payload[..header.payload_bytes];
    Ok((header, Message::decode(header.request, payload, fds)?))
}

#[test]
fn golden_messages() {
    assert!(golden().iter().any(|(_, _, text)| text.contains(&REGION_BYTES[..16])));
    for (message, fds, text) in golden() {
        assert_eq!(message.encode(false), bytes(text), "{message:?}");
        let (header, again) = decode(&bytes(text), fds).unwrap();
        assert_eq!((again, header.need_reply), (message.clone(), false));
        let mut asking = bytes(text);
        asking[4] |= 8;
        assert_eq!(message.encode(true), asking);
        assert!(decode(&asking, fds).unwrap().0.need_reply);
    }
}

#[test]
fn golden_replies() {
    let inflight =
        InflightDescription { mmap_size: 4096, queues: 1, queue_size: 64, ..Default::default() };
    let piece = ConfigPiece { offset: 0, flags: 0, bytes: vec![7, 8] };
    for (reply, request, text) in [
        (Reply::Number(5), 1, "01000000 05000000 08000000 0500000000000000"),
        (
            Reply::Ring(RingState { index: 2, number: 9 }),
            11,
            "0b000000 05000000 08000000 02000000 09000000",
        ),
        (
            Reply::Config(Some(piece)),
            24,
            "18000000 05000000 0e000000 00000000 02000000 00000000 0708",
        ),
        (Reply::Config(None), 24, "18000000 05000000 00000000"),
        (
            Reply::Inflight(inflight),
            31,
            "1f000000 05000000 14000000 0010000000000000 0000000000000000 0100 4000",
        ),
    ] {
        assert_eq!(reply.encode(request), bytes(text), "{reply:?}");
    }
    assert_eq!(config_changed(), bytes("02000000 01000000 00000000"));
}

#[test]
fn lengths_and_descriptors_are_checked() {
    for (message, fds, text) in golden() {
        let request = message.id();
        let whole = bytes(text);
        let payload = &whole[HEADER_BYTES..];
        let more = Message::decode(request, payload, fds + 1);
        if fds > 0 {
            assert_eq!(more, Err(MessageError::Fds { request, count: fds + 1 }), "{message:?}");
        }
        if fds > 0 {
            let fewer = Message::decode(request, payload, fds - 1);
            assert_eq!(fewer, Err(MessageError::Fds { request, count: fds - 1 }));
        }
        if !matches!(message, Message::SetBackendReqFd) {
            let longer = [payload, &[0; 3]].concat();
            let expected = MessageError::Length { request, bytes: longer.len() };
            assert_eq!(Message::decode(request, &longer, fds), Err(expected), "{message:?}");
        }
        if !payload.is_empty() {
            let shorter = &payload[..payload.len() - 1];
            let expected = MessageError::Length { request, bytes: shorter.len() };
            assert_eq!(Message::decode(request, shorter, fds), Err(expected), "{message:?}");
        }
    }
    let nine = [&9u32.to_le_bytes()[..], &[0; 4 + 9 * 32]].concat();
    assert!(matches!(Message::decode(5, &nine, 9), Err(MessageError::Length { .. })));
}

#[test]
fn strange_headers_are_refused() {
    let header = |flags: u32, size: u32| {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = 1;
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..].copy_from_slice(&size.to_le_bytes());
        Header::decode(&bytes)
    };
    assert!(header(1, 0).is_ok());
    assert_eq!(header(2, 0), Err(MessageError::Flags(2)));
    assert_eq!(header(5, 0), Err(MessageError::Flags(5)));
    assert_eq!(header(1, 4097), Err(MessageError::TooLong(4097)));
    assert_eq!(header(1, u32::MAX), Err(MessageError::TooLong(u32::MAX)));
}

proptest! {
    /// Random payloads of every kind: refused, or a message that survives its own encoding.
    #[test]
    fn random_bytes_never_panic(
        request in 0..48u32,
        payload in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..300),
        cut in prop_oneof![Just(8usize), Just(20), Just(24), Just(40), Just(264), 0..300usize],
        fds in 0..9usize,
    ) {
        let payload = &payload[..cut.min(payload.len())];
        if let Ok(message) = Message::decode(request, payload, fds) {
            prop_assert_eq!(message.id(), request);
            let again = message.encode(false);
            let (_, repeated) = decode(&again, fds).unwrap();
            prop_assert_eq!(repeated, message);
        }
    }
}
