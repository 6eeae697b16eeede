use proptest::prelude::*;
use rustix::fs::MemfdFlags;

use super::*;
use crate::queue::{F_RING_PACKED, F_VERSION_1};

fn disk() -> Disk {
    Disk {
        size: 1 << 30,
        block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 65536,
        read_only: false,
        queues: 2,
        segments_max: 126,
        segment_bytes_max: 0,
        discard_bytes_max: 1 << 20,
        discard_ranges_max: 16,
        serial: *b"nebd-serial-00000001",
    }
}

fn fd() -> OwnedFd {
    rustix::fs::memfd_create("device", MemfdFlags::CLOEXEC).unwrap()
}

fn number(action: Action) -> u64 {
    match action {
        Action::Reply(Reply::Number(number)) => number,
        other => panic!("{other:?}"),
    }
}

fn region(at: u64) -> RegionSpec {
    RegionSpec { guest_address: at, size: 4096, user_address: at, mmap_offset: 0 }
}

/// What QEMU says when it starts a disk of one queue.
fn start(device: &mut Device) {
    let features = number(device.handle(&Message::GetFeatures, Vec::new()).unwrap());
    let protocol = number(device.handle(&Message::GetProtocolFeatures, Vec::new()).unwrap());
    assert_eq!(number(device.handle(&Message::GetQueueNum, Vec::new()).unwrap()), 2);
    let ring = |number| RingState { index: 1, number };
    let addresses =
        RingAddresses { index: 1, descriptors: 1, used: 2, available: 3, ..Default::default() };
    for (message, fds) in [
        (Message::SetProtocolFeatures(protocol), 0),
        (Message::SetOwner, 0),
        (Message::SetBackendReqFd, 1),
        (Message::SetFeatures(features), 0),
        (Message::SetMemTable(vec![region(0), region(8192)]), 2),
        (
            Message::SetInflightFd(InflightDescription {
                queues: 2,
                queue_size: 128,
                ..Default::default()
            }),
            1,
        ),
        (Message::SetVringNum(ring(128)), 0),
        (Message::SetVringBase(ring(7)), 0),
        (Message::SetVringAddr(addresses), 0),
        (Message::SetVringKick(RingFd { index: 1, has_fd: true }), 1),
        (Message::SetVringCall(RingFd { index: 1, has_fd: true }), 1),
        (Message::SetStatus(15), 0),
    ] {
        let fds = (0..fds).map(|_| fd()).collect();
        device.handle(&message, fds).unwrap();
        assert_eq!(device.ring_setup(1), None, "it is not enabled after {message:?}");
    }
    device.handle(&Message::SetVringEnable(ring(1)), Vec::new()).unwrap();
}

#[test]
fn a_ring_runs_once_all_is_said_and_stops_when_asked() {
    let mut device = Device::new(disk());
    start(&mut device);
    let setup = device.ring_setup(1).unwrap();
    assert_eq!((setup.size, setup.base), (128, 7));
    assert_eq!((setup.descriptors, setup.available, setup.used), (1, 3, 2));
    assert_ne!(setup.features & F_RING_PACKED & F_VERSION_1, setup.features);
    assert_eq!(device.ring_setup(0), None);
    let stop = Message::GetVringBase(RingState { index: 1, number: 0 });
    for _ in 0..2 {
        // Twice: a successor may act on it again, and then the ring runs no more.
        assert!(matches!(device.handle(&stop, Vec::new()), Ok(Action::Stop(1))));
    }
    let expected = Reply::Ring(RingState { index: 1, number: 99 });
    assert_eq!(device.stopped(1, Some(99)), expected);
    assert_eq!(device.stopped(1, None), expected);
    assert_eq!(device.ring_setup(1), None);
}

#[test]
fn a_successor_begins_with_the_state() {
    let mut device = Device::new(disk());
    start(&mut device);
    let restored = Device::restore(disk(), &device.state().encode()).unwrap();
    assert_eq!(restored.state(), device.state());
    assert_eq!(restored.ring_setup(1), device.ring_setup(1));
    assert_eq!(Device::restore(disk(), b"").unwrap().state(), Device::new(disk()).state());
    let other = Disk { queues: 1, ..disk() };
    assert!(Device::restore(other, &device.state().encode()).is_none());
}

/// The bytes of a state, for ever.
#[test]
fn golden_state() {
    let mut device = Device::new(Disk { queues: 1, ..disk() });
    device.state.features = 0x1_4000_0000;
    device.state.protocol_features = 0x1208;
    device.state.status = 15;
    device.state.has_channel = true;
    device.state.inflight = Some(InflightDescription {
        mmap_size: 4096,
        mmap_offset: 64,
        queues: 1,
        queue_size: 128,
        is_padded: true,
    });
    device.state.regions = vec![region(0x10000)];
    device.state.rings[0] = Ring {
        size: 128,
        base: 7,
        addresses: [1, 2, 3],
        enabled: true,
        started: true,
        doorbells: [true, false, true],
    };
    let words: Vec<u64> =
        device.state.encode().as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let expected = [
        0x0000_0f07_0000_0001, // version, flags with the status
        0x0000_0001_4000_0000, // features
        0x0000_0000_0000_1208, // protocol features
        4096,                  // inflight: size
        64,                    // inflight: offset
        0x0000_0001_0080_0001, // inflight: queues, queue size, padded
        0x0000_0001_0000_0001, // regions, rings
        0x10000,               // region: guest address
        4096,                  // region: size
        0x10000,               // region: user address
        0,                     // region: offset
        0x0000_0007_0017_0080, // ring: size, flags, base
        1,                     // ring: descriptors
        2,                     // ring: available
        3,                     // ring: used
    ];
    assert_eq!(words, expected);
}

#[test]
fn what_was_not_offered_is_refused() {
    let mut device = Device::new(disk());
    let log_all = 1 << 26;
    let refused = device.handle(&Message::SetFeatures(log_all | F_VERSION_1), Vec::new());
    assert_eq!(refused.unwrap_err(), Refusal::Features(log_all));
    let refused = device.handle(&Message::SetProtocolFeatures(1 << 8), Vec::new());
    assert_eq!(refused.unwrap_err(), Refusal::Features(1 << 8));
    for message in
        [Message::SetLogBase, Message::SetLogFd, Message::Postcopy(28), Message::Unknown(33)]
    {
        let refused = device.handle(&message, Vec::new()).unwrap_err();
        assert!(refused.is_fatal() && refused == Refusal::Message(message.id()));
    }
    let ring = |index, number| RingState { index, number };
    let refused = device.handle(&Message::SetVringNum(ring(2, 8)), Vec::new()).unwrap_err();
    assert_eq!(refused, Refusal::Ring(2));
    for number in [0, 32769, 1 << 20] {
        let refused =
            device.handle(&Message::SetVringNum(ring(0, number)), Vec::new()).unwrap_err();
        assert_eq!(refused, Refusal::RingNumber(number));
    }
    for (queues, queue_size) in [(0, 8), (3, 8), (u16::MAX, 8), (1, 0), (1, u16::MAX)] {
        let inflight = InflightDescription { queues, queue_size, ..Default::default() };
        let refused = device.handle(&Message::GetInflightFd(inflight), Vec::new()).unwrap_err();
        assert!(matches!(refused, Refusal::RingNumber(_)));
    }
    assert_eq!(device.state(), Device::new(disk()).state());
}

#[test]
fn acknowledgements_are_given_when_agreed_on_and_asked_for() {
    let mut device = Device::new(disk());
    let message = Message::SetVringEnable(RingState { index: 0, number: 1 });
    assert_eq!(device.acknowledgement(&message, true, true), None);
    device.handle(&Message::SetProtocolFeatures(protocol::REPLY_ACK), Vec::new()).unwrap();
    assert_eq!(device.acknowledgement(&message, true, true), Some(Reply::Number(0)));
    assert_eq!(device.acknowledgement(&message, true, false), Some(Reply::Number(1)));
    assert_eq!(device.acknowledgement(&message, false, true), None);
    assert_eq!(device.acknowledgement(&Message::GetFeatures, true, true), None);
}

#[test]
fn regions_come_and_go_any_number_of_times() {
    let mut device = Device::new(disk());
    for _ in 0..2 {
        device.handle(&Message::AddMemReg(region(4096)), vec![fd()]).unwrap();
        assert_eq!(device.state().regions, [region(4096)]);
    }
    for _ in 0..2 {
        device.handle(&Message::RemMemReg(region(4096)), Vec::new()).unwrap();
        assert_eq!(device.state().regions, []);
    }
    for slot in 0..MEMORY_SLOTS {
        device.handle(&Message::AddMemReg(region(slot << 20)), vec![fd()]).unwrap();
    }
    let refused = device.handle(&Message::AddMemReg(region(1 << 40)), vec![fd()]).unwrap_err();
    assert_eq!(refused, Refusal::Slots);
}

#[test]
fn the_configuration_space_is_read_in_pieces_and_written_in_one_place() {
    let mut device = Device::new(disk());
    let read = |device: &mut Device, offset, length| {
        let piece = ConfigPiece { offset, flags: 0, bytes: vec![0xaa; length] };
        match device.handle(&Message::GetConfig(piece), Vec::new()).unwrap() {
            Action::Reply(Reply::Config(piece)) => piece.map(|piece| piece.bytes),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(read(&mut device, 0, 8).unwrap(), (1u64 << 21).to_le_bytes());
    assert_eq!(read(&mut device, 58, 4).unwrap(), [0; 4]);
    assert_eq!(read(&mut device, 252, 4).unwrap(), [0; 4]);
    assert_eq!(read(&mut device, 253, 4), None);
    assert_eq!(read(&mut device, u32::MAX, 4), None);
    assert!(device.resize(2 << 30) == device.state().has_channel);
    assert_eq!(read(&mut device, 0, 8).unwrap(), (1u64 << 22).to_le_bytes());
    let write = |offset, bytes: &[u8]| {
        Message::SetConfig(ConfigPiece { offset, flags: 0, bytes: bytes.to_vec() })
    };
    assert!(device.agreement().writeback);
    device.handle(&write(32, &[0]), Vec::new()).unwrap();
    assert!(!device.agreement().writeback);
    assert_eq!(read(&mut device, 32, 1).unwrap(), [0]);
    let refused = device.handle(&write(0, &[0; 8]), Vec::new()).unwrap_err();
    assert_eq!(refused, Refusal::Config(0));
    assert!(!refused.is_fatal());
}

#[test]
fn a_reset_forgets_the_rings_and_nothing_that_was_agreed_on() {
    let mut device = Device::new(disk());
    start(&mut device);
    let before = device.state().clone();
    assert!(matches!(device.handle(&Message::ResetDevice, Vec::new()), Ok(Action::Reset)));
    let after = device.state();
    assert_eq!((after.status, after.inflight, device.ring_setup(1)), (0, None, None));
    assert_eq!(
        (after.protocol_features, &after.regions),
        (before.protocol_features, &before.regions)
    );
}

proptest! {
    #[test]
    fn random_bytes_are_no_state(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Some(state) = State::decode(&bytes) {
            prop_assert!(state.rings.len() <= 256);
        }
        let mut versioned = bytes;
        versioned.splice(0..4.min(versioned.len()), 1u32.to_le_bytes());
        if let Some(state) = State::decode(&versioned) {
            prop_assert_eq!(State::decode(&state.encode()), Some(state));
        }
    }
}
