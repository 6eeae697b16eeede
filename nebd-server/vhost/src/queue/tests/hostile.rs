//! Drivers that break the rules.

use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;

use super::driver::{Driver, Kind};
use crate::access::hooks::unharmed;
use crate::chain::Violation;
use crate::inflight::{InflightRecord, Layout, QueueRecord, RecordError};
use crate::queue::{QueueSetup, StartError, VirtQueue};
use crate::request::Status;

const GUEST: u64 = 0x4_0000_0000;

fn kind(layout: Layout, indirect: bool) -> Kind {
    Kind { layout, size: 8, event_idx: false, indirect, past: 0 }
}

fn start(driver: &Driver, setup: &QueueSetup) -> VirtQueue {
    let record = QueueRecord::private(driver.kind.layout, driver.kind.size);
    VirtQueue::start(setup, driver.memory.clone(), record).unwrap().0
}

/// A request of three descriptors, some of which are changed: (which, byte, value of 16 bits).
fn broken(layout: Layout, indirect: bool, changes: &[(usize, usize, u16)]) -> Violation {
    let mut driver = Driver::new(kind(layout, indirect));
    let mut queue = start(&driver, &driver.kind.setup());
    driver.submit(3).unwrap();
    let table = driver.window().load_u64(0, Relaxed).saturating_sub(GUEST) as usize;
    unharmed(|| {
        for (which, byte, value) in changes {
            // 100 and above: in the indirect table.
            let at = if *which >= 100 { table + 16 * (which - 100) } else { 16 * which };
            driver.window().store_u16(at + byte, *value, Relaxed);
        }
    });
    let violation = queue.pop().unwrap_err();
    assert_eq!(queue.pop().unwrap_err(), violation, "a queue stays broken");
    assert!(!queue.is_ready());
    violation
}

/// Where things stand in a descriptor: flags, and next or id.
fn flags(layout: Layout) -> (usize, u16) {
    match layout {
        Layout::Split => (12, 0),
        Layout::Packed => (14, 1 << 7),
    }
}

#[test]
fn each_rule_of_a_chain_is_checked() {
    for layout in [Layout::Split, Layout::Packed] {
        let (at, own) = flags(layout);
        assert_eq!(broken(layout, false, &[(1, 8, 0)]), Violation::Empty);
        let beyond = Violation::Address { address: GUEST | 0xffff << 48 | data(), length: 128 };
        assert_eq!(broken(layout, false, &[(1, 6, 0xffff)]), beyond);
        let order = broken(layout, false, &[(0, at, own | 3), (1, at, own | 1)]);
        assert_eq!(order, Violation::Order);
        assert_eq!(broken(layout, false, &[(0, 8, 15)]), Violation::Header(15));
        // Its last two descriptors are for the device to read.
        let deaf = broken(layout, false, &[(1, at, own | 1), (2, at, own)]);
        assert_eq!(deaf, Violation::Status);
        assert_eq!(broken(layout, false, &[(1, at, own | 4)]), Violation::Indirect);
        // Indirect descriptors: followed by others, in a table, a table that is none, an empty one.
        assert_eq!(broken(layout, true, &[(0, at, own | 5)]), Violation::Indirect);
        assert_eq!(broken(layout, true, &[(101, at, own | 4)]), Violation::Indirect);
        assert_eq!(broken(layout, true, &[(0, 8, 47)]), Violation::Table(47));
        assert_eq!(broken(layout, true, &[(0, 8, 0)]), Violation::Table(0));
        let nowhere = broken(layout, true, &[(0, 6, 0xffff)]);
        assert!(matches!(nowhere, Violation::Address { length: 48, .. }));
    }
}

/// Guest address of the data of the first request, less the guest's first.
fn data() -> u64 {
    0x20000
}

#[test]
fn split_chains_end_somewhere() {
    let layout = Layout::Split;
    assert_eq!(broken(layout, false, &[(1, 14, 8)]), Violation::Next(8));
    assert_eq!(broken(layout, true, &[(100, 14, 3)]), Violation::Next(3));
    // A loop of writable descriptors, direct and indirect.
    assert_eq!(broken(layout, false, &[(1, 14, 1)]), Violation::TooLong(1024));
    assert_eq!(broken(layout, true, &[(101, 14, 1)]), Violation::TooLong(1024));
}

#[test]
fn packed_chains_end_somewhere() {
    let mut driver = Driver::new(kind(Layout::Packed, false));
    let mut queue = start(&driver, &driver.kind.setup());
    driver.submit(3).unwrap();
    for place in 0..8 {
        unharmed(|| driver.window().store_u16(16 * place + 14, 1 << 7 | 1, Relaxed));
    }
    assert_eq!(queue.pop().unwrap_err(), Violation::TooLong(8));
}

#[test]
fn split_rings_are_checked() {
    let broken = |index: u16, head: u16| {
        let mut driver = Driver::new(kind(Layout::Split, false));
        let mut queue = start(&driver, &driver.kind.setup());
        driver.submit(3).unwrap();
        unharmed(|| {
            driver.window().store_u16(0x2000 + 4, head, Relaxed);
            driver.window().store_u16(0x2000 + 2, index, Relaxed);
        });
        queue.pop().unwrap_err()
    };
    assert_eq!(broken(9, 0), Violation::Ahead(9));
    assert_eq!(broken(0xffff, 0), Violation::Ahead(0xffff));
    assert_eq!(broken(1, 8), Violation::Head(8));
    let mut driver = Driver::new(kind(Layout::Split, false));
    let mut queue = start(&driver, &driver.kind.setup());
    driver.submit(3).unwrap();
    let _chain = queue.pop().unwrap().unwrap();
    unharmed(|| driver.window().store_u16(0x2000 + 2, 2, Relaxed));
    assert_eq!(queue.pop().unwrap_err(), Violation::HeadInFlight(0));
}

#[test]
fn a_header_may_be_cut_and_a_status_may_follow_its_data() {
    let mut driver = Driver::new(kind(Layout::Split, false));
    let mut queue = start(&driver, &driver.kind.setup());
    driver.submit(4).unwrap();
    // Header of 10 and 6 bytes, then one piece of 129 bytes that ends with the status.
    unharmed(|| {
        let window = driver.window();
        let header = window.load_u64(0, Relaxed);
        for (place, address, length, flags) in
            [(0, header, 10, 1), (1, header + 10, 6, 1), (2, GUEST + data(), 129, 2)]
        {
            window.store_u64(16 * place, address, Relaxed);
            window.store_u32(16 * place + 8, length, Relaxed);
            window.store_u16(16 * place + 12, flags, Relaxed);
        }
        window.store_u64(16 * 3, 0, Relaxed);
    });
    // The free list of the driver is in order, so the chain is 0, 1, 2, 3.
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.kind, chain.sector), (0, 1));
    assert_eq!((chain.readable.bytes(), chain.writable.bytes()), (0, 128));
    queue.publish(chain.ticket, Status::IoError, 0);
    assert_eq!(driver.window().load_u8(data() as usize + 128, Relaxed), 1);
}

#[test]
fn rings_elsewhere_are_refused() {
    for layout in [Layout::Split, Layout::Packed] {
        let driver = Driver::new(kind(layout, false));
        let good = driver.kind.setup();
        let refused = |setup: QueueSetup| {
            let record = QueueRecord::private(layout, 8);
            VirtQueue::start(&setup, driver.memory.clone(), record).err().expect("a refusal")
        };
        for setup in [
            QueueSetup { descriptors: 0, ..good },
            QueueSetup { descriptors: good.descriptors + 8, ..good },
            QueueSetup { available: good.available + 1, ..good },
            QueueSetup { used: u64::MAX - 2, ..good },
        ] {
            assert!(matches!(refused(setup), StartError::Ring { .. }), "{setup:?}");
        }
        assert!(matches!(refused(QueueSetup { size: 0, ..good }), StartError::Size(0)));
        let base = refused(QueueSetup { base: 0x1_7fff, ..good });
        assert!(matches!(base, StartError::Base(0x1_7fff)));
        let large = refused(QueueSetup { size: 16, ..good });
        assert!(matches!(large, StartError::Record(RecordError::Entries(8))), "{large}");
    }
    let driver = Driver::new(kind(Layout::Split, false));
    let odd = QueueSetup { size: 6, ..driver.kind.setup() };
    let record = QueueRecord::private(Layout::Split, 8);
    let refused = VirtQueue::start(&odd, driver.memory.clone(), record).err();
    assert!(matches!(refused, Some(StartError::Size(6))));
}

/// Bytes that are likelier than chance to mean something.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..8u64,
        any::<u64>(),
        any::<u16>().prop_map(|low| GUEST + u64::from(low)),
        any::<u8>().prop_map(|byte| u64::from(byte) << 48),
        (0..16u64, 0..8u64).prop_map(|(flags, next)| flags << 32 | next << 48 | 64),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A driver and a hypervisor scribble over rings, requests and record while the device runs and is
    /// started again: an error now and then, and nothing else.
    #[test]
    fn a_device_survives_its_driver(
        packed in any::<bool>(),
        indirect in any::<bool>(),
        rounds in prop::collection::vec(
            (any::<u8>(), prop::collection::vec((0..0x900usize, word()), 0..12)),
            1..30,
        ),
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Split };
        let mut driver = Driver::new(kind(layout, indirect));
        let record = InflightRecord::create(layout, 1, 8).unwrap();
        let shared = std::sync::Arc::new(
            nebd_abi::region::SharedMemory::map(
                record.fd().try_clone_to_owned().unwrap(), u64::MAX,
            ).unwrap(),
        );
        let bytes = crate::access::Window::of(&shared, 0, 4096).unwrap();
        let mut queue: Option<VirtQueue> = None;
        for (what, words) in rounds {
            for (at, value) in words {
                unharmed(|| match at {
                    // The descriptors, the available ring, the used ring, a few requests, the record.
                    0..0x100 => driver.window().store_u64(at & !7, value, Relaxed),
                    0x100..0x200 => driver.window().store_u16(0x2000 + (at & 0x1e), value as u16, Relaxed),
                    0x200..0x300 => driver.window().store_u16(0x3000 + (at & 0x4e), value as u16, Relaxed),
                    0x300..0x700 => driver.window().store_u64(0x8000 + (at & 0x3f8), value, Relaxed),
                    _ => bytes.store_u64(at & 0x1f8, value, Relaxed),
                });
            }
            if what % 8 == 0 || queue.is_none() {
                let record = record.queue(layout, 0).unwrap();
                let setup = driver.kind.setup();
                queue = VirtQueue::start(&setup, driver.memory.clone(), record).ok().map(
                    |(mut queue, chains)| {
                        for chain in chains {
                            queue.publish(chain.ticket, Status::Ok, 0);
                        }
                        queue
                    },
                );
            }
            if what % 3 == 0 {
                driver.submit(2 + u16::from(what) % 3);
            }
            let Some(queue) = &mut queue else { continue };
            for _ in 0..8 {
                let Ok(Some(chain)) = queue.pop() else { break };
                prop_assert!(chain.ticket.head() < 8);
                prop_assert!(chain.readable.as_slice().len() + chain.writable.as_slice().len() <= 2048);
                queue.publish(chain.ticket, Status::Ok, 1);
            }
            if what % 2 == 0 {
                queue.flush();
            }
            let _ = (queue.call_needed(), queue.sleep(), queue.is_ready(), queue.base());
            queue.wake();
        }
    }
}
