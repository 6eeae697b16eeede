//! Golden bytes of what a server leaves to its successors: the ledger and the statistics.

#[path = "../../proto/abi/tests/golden/text.rs"]
mod text;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nebd_abi::{Generation, Op, VolumeName};
use nebd_server::metrics::{Counters, Stats, TakeoverKind, Totals};
use nebd_server::session::ledger::{Attachment, Ledger};
use rustix::fs::{MemfdFlags, SealFlags};

const ATTACHMENT: Attachment = Attachment {
    major: 0x0a,
    attach_flags: 1,
    client_uid: 0x0102,
    client_gid: 0x0304,
    client_pid: 0x0506_0708,
    incarnation: 0x1112_1314_1516_1718,
};

fn golden(name: &str, text: &str) -> Vec<u8> {
    text::golden(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1"), name, text)
}

fn bytes(fd: BorrowedFd<'_>, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    File::open(path).unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// A memfd of this size that starts with these bytes, as a predecessor would leave it.
fn memfd(bytes: &[u8], size: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("golden", flags).unwrap());
    file.write_all(bytes).unwrap();
    file.set_len(size).unwrap();
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

fn fill(counters: &Counters) {
    for (number, op) in counters.ops.iter().enumerate() {
        let number = number as u64;
        op.requests.store(0x100 + number, Relaxed);
        op.errors.store(0x200 + number, Relaxed);
        op.bytes.store(0x300 + number, Relaxed);
    }
    counters.stalls.store(0x41, Relaxed);
    counters.throttles.store(0x42, Relaxed);
    counters.throttled_ns.store(0x43, Relaxed);
    counters.latency.record(7_500);
    counters.latency.record(1_024_000);
}

fn check(totals: &Totals) {
    assert_eq!((totals.of(Op::Read).requests, totals.of(Op::WriteZeroes).bytes), (0x101, 0x305));
    assert_eq!((totals.stalls, totals.throttles, totals.throttled_ns), (0x41, 0x42, 0x43));
    assert_eq!((totals.latency.count(), totals.latency.sum_ns), (2, 1_031_500));
    assert_eq!(totals.latency.buckets[7], 1);
}

#[rustfmt::skip]
const COUNTERS: &[(usize, &str)] = &[
    (24, "other: requests, errors, bytes"), (24, "read"), (24, "write"), (24, "flush"),
    (24, "discard"), (24, "write_zeroes"),
    (8, "stalls"), (8, "throttles"), (8, "throttled_ns"), (8, "reserved"),
    (8, "latency.sum_ns"), (64, "latency.buckets[0..8]"), (448, "latency.buckets[8..64]"),
    (1152, "latency.buckets[64..208]"),
];

#[test]
fn ledger() {
    let ledger = Ledger::create(2, &ATTACHMENT).unwrap();
    fill(ledger.counters());
    ledger.dispatch(1, 0x77, Generation(5));
    ledger.count_death(1, Generation(5));
    ledger.dispatch(1, 0x77, Generation(6));
    let mut fields = vec![
        (8, "magic"),
        (4, "version"),
        (4, "slots_total"),
        (4, "major"),
        (4, "attach_flags"),
        (4, "client_uid"),
        (4, "client_gid"),
        (4, "client_pid"),
        (4, "reserved0"),
        (8, "incarnation"),
        (16, "reserved1"),
    ];
    fields.extend(COUNTERS);
    fields.extend([(2184, "reserved2"), (16, "slot 0"), (8, "slot 1: seq"), (4, "generation")]);
    fields.extend([(4, "deaths"), (0, "to the end of the page")]);
    let title = "Ledger of two slots, version 1: slot 1 was given to a backend by generation 6";
    let text = text::render(title, &bytes(ledger.fd(), 8192), &fields);
    let stored = golden("ledger", &text);
    let again = Ledger::open(memfd(&stored, 8192)).unwrap();
    assert_eq!(
        (again.attachment(), again.slots_total(), again.deaths(1, 0x77)),
        (ATTACHMENT, 2, 1)
    );
    let mut totals = Totals::default();
    totals.add(again.counters());
    check(&totals);
}

#[test]
fn statistics() {
    let stats = Stats::create().unwrap();
    stats.note_takeover(TakeoverKind::Crash, Generation(2), 0x1111);
    stats.note_takeover(TakeoverKind::Planned, Generation(3), 0x2222);
    stats.note_blackout(TakeoverKind::Crash, Duration::from_micros(9));
    stats.note_blackout(TakeoverKind::Planned, Duration::from_micros(4096));
    stats.note_phase("PREPARE", Duration::from_micros(5));
    stats.note_phase("PREPARE", Duration::from_micros(7));
    let volume: VolumeName = "file:disk1".parse().unwrap();
    let session = Ledger::create(1, &ATTACHMENT).unwrap();
    fill(session.counters());
    assert!(stats.retire(&volume, session.counters()));
    let mut fields = vec![
        (8, "magic"),
        (4, "version"),
        (4, "volumes_max"),
        (4, "volumes_used"),
        (4, "last_kind"),
        (8, "last_unix_ms"),
        (8, "last_blackout_ns"),
        (4, "last_generation"),
        (4, "reserved0"),
        (16, "reserved1"),
        (48, "takeovers: unknown, exit, killed, crash, watchdog, planned"),
        (16, "takeovers[6..8]"),
        (32, "phases[0].name"),
        (8, "count"),
        (8, "sum_ns"),
        (8, "last_ns"),
        (8, "reserved"),
        (960, "phases[1..16]"),
        (896, "reserved2"),
        (8, "unplanned: sum_ns"),
        (64, "buckets[0..8]"),
        (1600, "buckets[8..208]"),
        (8, "planned: sum_ns"),
        (640, "buckets[0..80]"),
        (1024, "buckets[80..208]"),
        (2800, "reserved3"),
        (192, "volumes[0].name"),
    ];
    fields.extend(COUNTERS);
    fields.push((8, "reserved"));
    let title = "Statistics, version 1: a crash, a planned takeover, a volume; 4095 are not shown";
    let text = text::render(title, &bytes(stats.fd(), 8192 + 2048), &fields);
    let stored = golden("statistics", &text);
    let again = Stats::open(memfd(&stored, 8192 + 4096 * 2048)).unwrap();
    let last = again.last_takeover().unwrap();
    assert_eq!((last.kind, last.generation.0), (TakeoverKind::Planned, 3));
    assert_eq!((last.unix_ms, last.blackout), (0x2222, Duration::from_micros(4096)));
    assert_eq!(again.phases()[0].sum_ns, 12_000);
    assert_eq!((again.blackouts(true).count(), again.blackouts(false).count()), (1, 1));
    let retired = again.retired();
    assert_eq!((retired.len(), &retired[0].0), (1, &volume));
    check(&retired[0].1);
}
