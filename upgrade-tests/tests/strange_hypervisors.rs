//! Hypervisors and guests that write nonsense cost the server nothing but their own disk.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{assert_clean, config, goes_on};
use nebd_upgrade_tests::campaign::{Campaign, CampaignConfig, Kill, Way};
use nebd_upgrade_tests::stamp::Dice;
use nebd_upgrade_tests::vhost_device::message::{frame, id, send_bytes};
use nebd_upgrade_tests::vhost_device::{Disk, Options, RequestKind};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;

/// A neighbour under verified load, and the socket of a disk for strangers.
fn neighbour() -> (Campaign, PathBuf) {
    let way = Way::VhostUser { options: Options::new(""), churns: false };
    let campaign = Campaign::start(CampaignConfig { way, ..config("file", 1, 0) }).unwrap();
    let admin = campaign.host().admin().unwrap();
    admin.create("file:guest", 8 << 20, 4096).unwrap();
    let socket = admin.attach("file:guest", 2).unwrap();
    (campaign, socket)
}

/// The neighbour has noticed nothing, nobody has died, and an honest driver gets the disk.
fn assert_harmless(campaign: Campaign, server: Option<i32>, socket: &Path) {
    goes_on(&campaign);
    assert_eq!(campaign.host().server_pid(), server, "{}", campaign.host().log());
    assert_honest_is_served(socket);
    let summary = campaign.finish();
    assert_clean(&summary, 0);
    assert_eq!(summary.drivers[0].reconnects, 0, "{summary}");
}

fn assert_honest_is_served(socket: &Path) {
    let mut disk = Disk::open(&Options { queues: 2, ..Options::new(socket) }).unwrap();
    for slot in 0..4 {
        disk.guest.submit(slot, RequestKind::Read, 0, &[4096]);
    }
    disk.guest.kick();
    let mut left = 4;
    while left > 0 {
        disk.check().unwrap();
        let reaped = disk.guest.reap(|answer| assert_eq!(answer.errno, 0)).unwrap();
        left -= reaped;
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Until the server hangs up; it may not, if it waits for more.
fn hear(stream: &mut UnixStream) {
    stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    let _ = stream.read(&mut [0; 4096]);
}

#[test]
fn random_bytes_halves_and_lies_about_lengths() {
    let (campaign, socket) = neighbour();
    let server = campaign.host().server_pid();
    let mut dice = Dice::new(1);
    for round in 0..60 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let whole = frame(dice.below(45) as u32, round % 2 == 0, &[7; 40]);
        let mut bytes: Vec<u8> = (0..200).map(|_| dice.below(256) as u8).collect();
        match round % 4 {
            0 => {}
            1 => bytes = whole[..dice.below(whole.len() as u64) as usize].to_vec(),
            2 => {
                bytes = whole;
                bytes[8..12].copy_from_slice(&(dice.below(1 << 32) as u32).to_le_bytes());
            }
            _ => bytes = [whole.clone(), whole].concat(),
        }
        let _ = stream.write_all(&bytes);
        hear(&mut stream);
    }
    assert_harmless(campaign, server, &socket);
}

/// Descriptors of every kind with messages that have none, or too many of them.
#[test]
fn descriptors_where_none_belong() {
    let (campaign, socket) = neighbour();
    let server = campaign.host().server_pid();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let eventfd = eventfd(0, EventfdFlags::empty()).unwrap();
    let memory = rustix::fs::memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let fds = [&reader, &writer, &eventfd, &memory, &null].map(AsFd::as_fd);
    for request in 1..45 {
        for count in [1, 2, 8, 9, 60] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            let many: Vec<BorrowedFd<'_>> = fds.iter().copied().cycle().take(count).collect();
            let _ = send_bytes(&stream, &frame(request, true, &[0; 40]), &many);
            if count == 8 {
                hear(&mut stream);
            }
        }
    }
    assert_harmless(campaign, server, &socket);
}

/// What is well-formed and cannot be: rings, memory, doorbells and records that there are not.
#[test]
fn messages_that_ask_for_the_impossible() {
    let (campaign, socket) = neighbour();
    let server = campaign.host().server_pid();
    let eventfd = eventfd(0, EventfdFlags::empty()).unwrap();
    let memory = rustix::fs::memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
    let numbers = |numbers: &[u64]| -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    };
    let far = u64::MAX - 4096;
    let cases: Vec<(u32, Vec<u8>, Vec<&OwnedFd>)> = vec![
        (id::SET_FEATURES, numbers(&[u64::MAX]), vec![]),
        (id::SET_PROTOCOL_FEATURES, numbers(&[u64::MAX]), vec![]),
        (id::SET_MEM_TABLE, numbers(&[1, 0, 1 << 20, 0, 0]), vec![&memory]),
        (id::SET_MEM_TABLE, numbers(&[1, far, 1 << 20, far, far]), vec![&memory]),
        (id::SET_MEM_TABLE, numbers(&[8]), vec![]),
        (id::ADD_MEM_REG, numbers(&[0, 0, 1 << 40, 0, 0]), vec![&memory]),
        (id::REM_MEM_REG, numbers(&[0, 1, 2, 3, 4]), vec![]),
        (id::SET_VRING_NUM, numbers(&[0]), vec![]),
        (id::SET_VRING_NUM, numbers(&[(1 << 31) << 32]), vec![]),
        (id::SET_VRING_NUM, numbers(&[200 | 128 << 32]), vec![]),
        (id::SET_VRING_ADDR, numbers(&[0, far, far, far, 0]), vec![]),
        (id::SET_VRING_BASE, numbers(&[0xffff_ffff << 32]), vec![]),
        (id::GET_VRING_BASE, numbers(&[77]), vec![]),
        (id::SET_VRING_KICK, numbers(&[0]), vec![&memory]),
        (id::SET_VRING_KICK, numbers(&[1 << 8]), vec![]),
        (id::SET_VRING_CALL, numbers(&[0]), vec![&memory]),
        (id::SET_VRING_ENABLE, numbers(&[7 << 32]), vec![]),
        (id::GET_INFLIGHT_FD, numbers(&[0, 0, 0xffff_ffff]), vec![]),
        (id::SET_INFLIGHT_FD, numbers(&[far, far, 2 | 128 << 16]), vec![&memory]),
        (id::SET_INFLIGHT_FD, numbers(&[64, 0, 2 | 128 << 16]), vec![&eventfd]),
        (id::SET_BACKEND_REQ_FD, vec![], vec![&eventfd]),
        (id::GET_CONFIG, numbers(&[u64::MAX, 0]), vec![]),
    ];
    for first in &cases {
        // Half of them as the first message, half after a good start.
        for is_started in [false, true] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            if is_started {
                let number = [2 | 128u64 << 32].map(u64::to_le_bytes).concat();
                let _ = send_bytes(&stream, &frame(id::SET_OWNER, false, &[]), &[]);
                let _ = send_bytes(&stream, &frame(id::SET_VRING_NUM, false, &number), &[]);
            }
            let (request, payload, fds) = first;
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
            let _ = send_bytes(&stream, &frame(*request, true, payload), &fds);
            hear(&mut stream);
        }
    }
    assert_harmless(campaign, server, &socket);
}

/// Bad descriptors, loops, addresses out of memory, indices that run ahead: on both layouts.
#[test]
fn guests_that_write_nonsense_into_their_rings() {
    let (campaign, socket) = neighbour();
    let server = campaign.host().server_pid();
    let mut dice = Dice::new(7);
    for round in 0..40 {
        let options = Options {
            queues: 2,
            packed: round % 2 == 1,
            indirect: round % 3 != 0,
            event_idx: round % 5 != 0,
            ..Options::new(&socket)
        };
        let mut disk = Disk::open(&options).unwrap();
        for slot in 0..16 {
            disk.guest.submit(slot, RequestKind::Write, slot as u64 * 4096, &[4096]);
        }
        disk.guest.kick();
        for _ in 0..6 {
            disk.guest.scramble(&mut dice);
            std::thread::sleep(Duration::from_micros(dice.below(1500)));
        }
    }
    let log = campaign.host().log();
    assert!(log.contains("its driver broke the rules"), "nothing was read of it:\n{log}");
    assert_harmless(campaign, server, &socket);
}

/// The same, and the server dies meanwhile: its successor finds rings and records full of nonsense.
#[test]
fn guests_that_write_nonsense_while_servers_die() {
    let (mut campaign, socket) = neighbour();
    let mut dice = Dice::new(9);
    for round in 0..6 {
        let options = Options { queues: 2, packed: round % 2 == 1, ..Options::new(&socket) };
        let mut disk = Disk::open(&options).unwrap();
        for slot in 0..16 {
            disk.guest.submit(slot, RequestKind::Write, slot as u64 * 4096, &[4096]);
        }
        disk.guest.kick();
        disk.guest.scramble(&mut dice);
        campaign.kill(if round % 3 == 2 { &Kill::Takeover } else { &Kill::SIGKILL }).unwrap();
        disk.guest.scramble(&mut dice);
        goes_on(&campaign);
    }
    let server = campaign.host().server_pid();
    assert_harmless(campaign, server, &socket);
}
