//! A guest writes whatever it likes, wherever it likes, between the steps of a virtqueue's device, and a
//! hypervisor into its inflight record: errors, and never a byte outside the guest's memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nebd_abi::region::SharedMemory;
use nebd_fuzz::{Input, write};
use nebd_vhost::chain::Chain;
use nebd_vhost::inflight::{InflightRecord, Layout};
use nebd_vhost::memory::{Backing, GuestMemory, MappedRegion, RegionSpec};
use nebd_vhost::queue::{F_RING_EVENT_IDX, F_RING_INDIRECT, F_RING_PACKED, QueueSetup, VirtQueue};
use nebd_vhost::request::{Agreement, Disk, Operation, Status, parse};

const SIZE: u16 = 8;
const USER: u64 = 1 << 30;
const BYTES: u64 = 8192;
const AVAILABLE: u64 = 256;
const USED: u64 = 512;
/// Where a well-formed request is written, whose parts a scribble may then change.
const REQUEST: u64 = 1024;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let choice = input.byte();
    let features = [F_RING_PACKED, F_RING_EVENT_IDX, F_RING_INDIRECT];
    let features = features.iter().enumerate();
    let features = features.filter(|(bit, _)| choice >> bit & 1 != 0).map(|(_, flag)| flag).sum();
    let shared = SharedMemory::create("guest", BYTES).expect("a memfd");
    // Two regions that meet in the middle of where requests are, and a hole behind them.
    let regions = [(0, 4096), (4096, 4096)].map(|(guest_address, size)| {
        let user_address = USER + guest_address;
        let spec = RegionSpec { guest_address, size, user_address, mmap_offset: guest_address };
        MappedRegion::map(spec, shared.fd(), Backing::Sealed).expect("sealed")
    });
    let memory = GuestMemory::new(regions.to_vec()).expect("two regions");
    let setup = QueueSetup {
        size: SIZE,
        descriptors: USER,
        available: USER + AVAILABLE,
        used: USER + USED,
        base: if choice & 1 != 0 { 0x8000 } else { 0 },
        features,
    };
    let record = InflightRecord::create(setup.layout(), 1, SIZE).expect("a memfd");
    let record_bytes =
        SharedMemory::map(record.fd().try_clone_to_owned().expect("a descriptor"), BYTES)
            .expect("sealed");
    let start = || {
        let record = record.queue(setup.layout(), 0).expect("it has one");
        VirtQueue::start(&setup, memory.clone(), record)
    };
    let mut queue = None;
    let mut next = 0;
    while !input.0.is_empty() {
        match input.byte() % 8 {
            0 => scribble(&mut input, &shared, BYTES),
            1 => scribble(&mut input, &record_bytes, setup.layout().queue_bytes(SIZE)),
            2 | 3 => submit(&mut input, &shared, setup.layout(), &mut next),
            4 => {
                let Ok((mut started, chains)) = start() else { continue };
                assert!(chains.len() <= SIZE.into());
                for chain in chains {
                    answer(&mut started, chain);
                }
                queue = Some(started);
            }
            5 => {
                let Some(queue) = &mut queue else { continue };
                let _ = (queue.call_needed(), queue.sleep(), queue.is_ready(), queue.base());
                queue.wake();
            }
            6 => {
                let Some(queue) = &mut queue else { continue };
                queue.flush();
                assert!(queue.in_flight() <= SIZE);
            }
            _ => {
                let Some(queue) = &mut queue else { continue };
                while let Ok(Some(chain)) = queue.pop() {
                    answer(queue, chain);
                    assert!(queue.in_flight() <= SIZE);
                }
            }
        }
    }
});

fn scribble(input: &mut Input<'_>, memory: &SharedMemory, within: u64) {
    let offset = u64::from(u16::from_le_bytes([input.byte(), input.byte()])) % within;
    let count = usize::from(input.byte());
    write(memory, offset, input.bytes(count));
}

/// Makes a chain of three descriptors, or a table of them, available at the next place.
fn submit(input: &mut Input<'_>, memory: &SharedMemory, layout: Layout, next: &mut u16) {
    let kind = input.byte() % 16;
    let at = REQUEST + u64::from(*next % SIZE) * 448;
    write(memory, at, &[kind, 0, 0, 0, 0, 0, 0, 0, input.byte() % 8]);
    let parts = [(at, 16u32, 0u16), (at + 64, 512, if kind == 0 { 2 } else { 0 }), (at + 32, 1, 2)];
    let (indirect, base) = (input.byte() & 1 != 0, at + 128);
    for (index, (address, length, flags)) in parts.into_iter().enumerate() {
        let last = index == 2;
        let place = if indirect { index as u16 } else { (*next + index as u16) % SIZE };
        let start = if indirect { base } else { 0 } + u64::from(place) * 16;
        let mut flags = flags | u16::from(!last);
        let mut other = (place + 1) % SIZE;
        if layout == Layout::Packed {
            flags |= available(*next + if indirect { 0 } else { index as u16 });
            std::mem::swap(&mut flags, &mut other);
        }
        write(memory, start, &descriptor(address, length, flags, other));
    }
    let places = if indirect { 1 } else { 3 };
    if indirect {
        let (flags, other) = match layout {
            Layout::Split => (4, 0),
            Layout::Packed => (0, 4 | available(*next)),
        };
        let start = u64::from(*next % SIZE) * 16;
        write(memory, start, &descriptor(base, 48, flags, other));
    }
    if layout == Layout::Split {
        // One entry in the available ring, which counts entries and not places.
        let index = input.byte();
        write(
            memory,
            AVAILABLE + 4 + 2 * u64::from(index % SIZE as u8),
            &(*next % SIZE).to_le_bytes(),
        );
        write(memory, AVAILABLE + 2, &(u16::from(index) + 1).to_le_bytes());
    }
    *next = (*next + places) % (2 * SIZE);
}

fn available(place: u16) -> u16 {
    if place / SIZE % 2 == 0 { 1 << 7 } else { 1 << 15 }
}

fn descriptor(address: u64, length: u32, third: u16, fourth: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&third.to_le_bytes());
    bytes[14..].copy_from_slice(&fourth.to_le_bytes());
    bytes
}

/// Does with a request what a backend would do, so that its segments are touched.
fn answer(queue: &mut VirtQueue, chain: Chain) {
    let disk = Disk {
        size: 1 << 20,
        block_size: 512,
        physical_block_size: 512,
        optimal_io_size: 0,
        read_only: false,
        queues: 1,
        segments_max: 6,
        segment_bytes_max: 0,
        discard_bytes_max: 1 << 16,
        discard_ranges_max: 4,
        serial: [7; 20],
    };
    let agreement = Agreement { features: u64::MAX, writeback: true };
    let (operation, ticket) = parse(chain, &disk, &agreement);
    assert!(ticket.head() < SIZE);
    let (status, written) = match operation {
        Ok(Operation::Read { offset, length, segments }) => {
            assert!(offset + u64::from(length) <= disk.size);
            assert_eq!(segments.bytes(), length.into());
            for segment in segments.as_slice() {
                // SAFETY: the queue's memory, which holds the segment, is mapped as long as the target
                // runs, and nobody else looks at it.
                unsafe { segment.pointer().write_bytes(0x5a, segment.len()) };
            }
            (Status::Ok, length)
        }
        Ok(Operation::Write { offset, length, segments, .. }) => {
            assert!(offset + u64::from(length) <= disk.size);
            assert_eq!(segments.bytes(), length.into());
            (Status::Ok, 0)
        }
        Ok(Operation::Discard(ranges) | Operation::WriteZeroes { ranges, .. }) => {
            assert!(ranges.as_slice().iter().all(|range| range.offset + range.length <= disk.size));
            (Status::Ok, 0)
        }
        Ok(Operation::Flush) => (Status::Ok, 0),
        Ok(Operation::Done(written)) => (Status::Ok, written),
        Err(refused) => (refused.0, 0),
    };
    queue.publish(ticket, status, written);
}
