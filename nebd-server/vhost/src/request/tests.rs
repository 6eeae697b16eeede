use std::sync::Arc;

use super::*;
use crate::access::Window;
use crate::chain::{Builder, Descriptor};
use crate::memory::{GuestMemory, RegionSpec, sealed_memory};

const AT: u64 = 0x10000;

fn disk() -> Disk {
    Disk {
        size: 100 * 4096 + 2048,
        block_size: 4096,
        physical_block_size: 16384,
        optimal_io_size: 65536,
        read_only: false,
        queues: 4,
        segments_max: 126,
        segment_bytes_max: 1 << 20,
        discard_bytes_max: 16 * 4096,
        discard_ranges_max: 3,
        serial: *b"nebd-serial-00000001",
    }
}

fn memory() -> (Arc<GuestMemory>, Window) {
    let spec = RegionSpec { guest_address: AT, size: 1 << 20, user_address: 0, mmap_offset: 0 };
    let memory = GuestMemory::new(vec![sealed_memory(spec).unwrap()]).unwrap();
    let window = memory.user_window(0, 1 << 20).unwrap();
    (memory, window)
}

/// A request with this much to read and to write, whose readable bytes are `data`.
fn ask(
    kind: u32,
    sector: u64,
    data: &[u8],
    writable: u32,
    disk: &Disk,
    agreement: Agreement,
) -> (Result<Operation, Refused>, Window) {
    let (memory, window) = memory();
    window.write(0, &kind.to_le_bytes());
    window.write(8, &sector.to_le_bytes());
    window.write(0x1000, data);
    let mut builder = Builder::new(&memory, false);
    let mut push = |address, length, flags| {
        let descriptor = Descriptor { address, length, flags, next_or_id: 0 };
        builder.push(&descriptor).unwrap();
    };
    push(AT, 16, 0);
    if !data.is_empty() {
        push(AT + 0x1000, data.len() as u32, 0);
    }
    if writable > 0 {
        push(AT + 0x8000, writable, 2);
    }
    push(AT + 0x100, 1, 2);
    let (operation, _ticket) = parse(builder.finish(0).unwrap(), disk, &agreement);
    (operation, window)
}

fn plain(kind: u32, sector: u64, data: &[u8], writable: u32) -> Result<Operation, Refused> {
    ask(kind, sector, data, writable, &disk(), agreement()).0
}

fn agreement() -> Agreement {
    Agreement { features: disk().features(), writeback: true }
}

fn entry(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn reads_and_writes_are_in_range_and_in_blocks() {
    let Ok(Operation::Read { offset, length, segments }) = plain(0, 16, &[], 8192) else {
        panic!("no read");
    };
    assert_eq!((offset, length, segments.bytes()), (8192, 8192, 8192));
    let Ok(Operation::Write { offset, length, segments, fua }) = plain(1, 8, &[7; 4096], 0) else {
        panic!("no write");
    };
    assert_eq!((offset, length, segments.bytes(), fua), (4096, 4096, 4096, false));
    assert!(matches!(plain(0, 0, &[], 0), Ok(Operation::Done(0))));
    for (sector, bytes) in
        [(1, 4096), (8, 512), (99 * 8, 8192), (u64::MAX, 4096), (u64::MAX / 512, 4096)]
    {
        assert_eq!(plain(0, sector, &[], bytes).unwrap_err(), REFUSED, "{bytes} at {sector}");
    }
    assert!(matches!(plain(0, 99 * 8, &[], 4096), Ok(Operation::Read { .. })));
    // The last half block is out of reach.
    assert_eq!(plain(0, 100 * 8, &[], 4096).unwrap_err(), REFUSED);
}

#[test]
fn a_read_only_disk_refuses_mutations() {
    let disk = Disk { read_only: true, ..disk() };
    for kind in [T_OUT, T_DISCARD, T_WRITE_ZEROES] {
        let (operation, _) = ask(kind, 0, &entry(0, 8, 0), 0, &disk, agreement());
        assert_eq!(operation.unwrap_err(), REFUSED);
    }
    assert_ne!(disk.features() & F_RO, 0);
    assert_eq!(disk.features() & (F_DISCARD | F_WRITE_ZEROES), 0);
}

#[test]
fn writes_are_durable_at_once_for_those_who_do_not_flush() {
    let fua = |features: u64, writeback| {
        let agreement = Agreement { features, writeback };
        let (operation, _) = ask(1, 0, &[0; 4096], 0, &disk(), agreement);
        matches!(operation, Ok(Operation::Write { fua: true, .. }))
    };
    assert!(!fua(F_FLUSH | F_CONFIG_WCE, true));
    assert!(fua(F_FLUSH | F_CONFIG_WCE, false));
    assert!(!fua(F_FLUSH, false));
    assert!(fua(0, true));
    let agreement = Agreement { features: 0, writeback: true };
    let (operation, _) = ask(T_WRITE_ZEROES, 0, &entry(0, 8, 0), 0, &disk(), agreement);
    assert!(matches!(operation, Ok(Operation::WriteZeroes { fua: true, .. })));
}

#[test]
fn a_serial_is_answered_at_once() {
    let (operation, window) = ask(T_GET_ID, 0, &[], 20, &disk(), agreement());
    assert!(matches!(operation, Ok(Operation::Done(20))));
    let mut serial = [0; 20];
    window.read(0x8000, &mut serial);
    assert_eq!(serial, disk().serial);
    assert_eq!(plain(T_GET_ID, 0, &[], 19).unwrap_err(), REFUSED);
}

#[test]
fn ranges_are_checked_one_by_one() {
    let Ok(Operation::Discard(ranges)) = plain(T_DISCARD, 0, &entry(8, 16, 0), 0) else {
        panic!("no discard");
    };
    assert_eq!(ranges.as_slice(), [Range { offset: 4096, length: 8192, unmap: true }]);
    let three = [entry(0, 8, 0), entry(8, 0, 0), entry(16, 8, 1)].concat();
    let Ok(Operation::WriteZeroes { ranges, fua }) = plain(T_WRITE_ZEROES, 0, &three, 0) else {
        panic!("no write-zeroes");
    };
    let expected = [
        Range { offset: 0, length: 4096, unmap: false },
        Range { offset: 8192, length: 4096, unmap: true },
    ];
    assert_eq!((ranges.as_slice(), fua), (&expected[..], false));
    // A bit that discards do not have, one that nobody has.
    assert_eq!(plain(T_DISCARD, 0, &entry(0, 8, 1), 0).unwrap_err(), UNSUPPORTED);
    assert_eq!(plain(T_WRITE_ZEROES, 0, &entry(0, 8, 2), 0).unwrap_err(), UNSUPPORTED);
    let four = [entry(0, 8, 0), entry(0, 8, 0), entry(0, 8, 0), entry(0, 8, 0)].concat();
    for wrong in
        [&four[..], &four[..15], &[], &entry(0, 17 * 8, 0), &entry(1, 8, 0), &entry(100 * 8, 8, 0)]
    {
        assert_eq!(plain(T_DISCARD, 0, wrong, 0).unwrap_err(), REFUSED);
    }
    let none = Disk { discard_bytes_max: 0, ..disk() };
    let (operation, _) = ask(T_DISCARD, 0, &entry(0, 8, 0), 0, &none, agreement());
    assert_eq!(operation.unwrap_err(), UNSUPPORTED);
}

#[test]
fn unknown_operations_are_unsupported() {
    for kind in [2, 3, 5, 10, 12, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(plain(kind, 0, &[], 512).unwrap_err(), UNSUPPORTED, "{kind}");
    }
    assert!(matches!(plain(T_FLUSH, 77, &[], 0), Ok(Operation::Flush)));
}

#[test]
fn golden_configuration() {
    let config = disk().config(true);
    let fields: &[(usize, &[u8])] = &[
        (0, &(100u64 * 8 + 4).to_le_bytes()), // capacity
        (8, &(1u32 << 20).to_le_bytes()),     // size_max
        (12, &126u32.to_le_bytes()),          // seg_max
        (16, &[0, 0, 16, 63]),                // geometry: cylinders, heads, sectors
        (20, &4096u32.to_le_bytes()),         // blk_size
        (24, &[2, 0]),                        // physical_block_exp, alignment_offset
        (26, &4u16.to_le_bytes()),            // min_io_size
        (28, &16u32.to_le_bytes()),           // opt_io_size
        (32, &[1, 0]),                        // writeback, unused0
        (34, &4u16.to_le_bytes()),            // num_queues
        (36, &128u32.to_le_bytes()),          // max_discard_sectors
        (40, &3u32.to_le_bytes()),            // max_discard_seg
        (44, &8u32.to_le_bytes()),            // discard_sector_alignment
        (48, &128u32.to_le_bytes()),          // max_write_zeroes_sectors
        (52, &3u32.to_le_bytes()),            // max_write_zeroes_seg
        (56, &[1, 0, 0, 0]),                  // write_zeroes_may_unmap, unused1
    ];
    let mut end = 0;
    for (at, bytes) in fields {
        assert_eq!((end, &config[*at..at + bytes.len()]), (*at, *bytes));
        end = at + bytes.len();
    }
    assert_eq!(end, CONFIG_BYTES);
    assert_eq!(disk().config(false)[32], 0);
}

#[test]
fn features_are_those_of_the_disk() {
    let features = disk().features();
    assert_eq!(features & 1 << 26, 0, "the dirty log is not offered");
    for feature in
        [F_MQ, F_SIZE_MAX, F_DISCARD, F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1, F_RING_PACKED]
    {
        assert_ne!(features & feature, 0);
    }
    let small = Disk { queues: 1, segment_bytes_max: 0, discard_bytes_max: 0, ..disk() };
    assert_eq!(small.features() & (F_MQ | F_SIZE_MAX | F_DISCARD | F_WRITE_ZEROES), 0);
}
