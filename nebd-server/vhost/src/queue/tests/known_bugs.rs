//! Bugs that others had in the same place.

use std::sync::atomic::Ordering::Relaxed;

use super::driver::{Driver, Kind};
use crate::access::hooks;
use crate::chain::Chain;
use crate::inflight::{InflightRecord, Layout};
use crate::queue::VirtQueue;
use crate::request::Status;

fn kind(layout: Layout, past: u16) -> Kind {
    Kind { layout, size: 8, event_idx: false, indirect: false, past }
}

fn start(driver: &Driver, record: &InflightRecord) -> (VirtQueue, Vec<Chain>) {
    let queue = record.queue(driver.kind.layout, 0).unwrap();
    VirtQueue::start(&driver.kind.setup(), driver.memory.clone(), queue).unwrap()
}

fn record(layout: Layout) -> InflightRecord {
    InflightRecord::create(layout, 1, 8).unwrap()
}

/// SPDK #3766: the ring has a past (it was migrated), the record is new and none of what was taken has
/// been answered; the chain of head 0 must survive a restart.
#[test]
fn a_new_record_of_a_ring_with_a_past_loses_nothing() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut driver = Driver::new(kind(layout, 1003));
        let record = record(layout);
        let (mut queue, chains) = start(&driver, &record);
        assert!(chains.is_empty());
        for _ in 0..3 {
            driver.submit(2).unwrap();
            queue.pop().unwrap().unwrap();
        }
        drop(queue);
        let (_, chains) = start(&driver, &record);
        let numbers: Vec<u64> = chains.iter().map(|chain| chain.sector).collect();
        assert_eq!(numbers, [1, 2, 3], "{layout:?}");
    }
}

/// SPDK #3504: a batch of answers was told to the guest, but the device died before it cleared all of
/// them from the record. The guest has its descriptors back, and what stands there now is nobody's.
#[test]
fn an_answered_batch_is_not_issued_again_from_descriptors_that_were_reused() {
    for layout in [Layout::Split, Layout::Packed] {
        for deaths in 0..60 {
            let mut driver = Driver::new(kind(layout, 0));
            let record = record(layout);
            hooks::die_after(u64::MAX);
            let (mut queue, _) = start(&driver, &record);
            let mut chains = Vec::new();
            for _ in 0..4 {
                driver.submit(2).unwrap();
                chains.push(queue.pop().unwrap().unwrap());
            }
            let stays = chains.remove(0);
            for chain in chains {
                queue.publish(chain.ticket, Status::Ok, 0);
            }
            hooks::die_after(deaths);
            queue.flush();
            hooks::die_after(u64::MAX);
            let answered = driver.reap();
            assert!(answered.is_empty() || answered == [2, 3, 4], "a batch is told of at once");
            let (_, chains) = start(&driver, &record);
            let numbers: Vec<u64> = chains.iter().map(|chain| chain.sector).collect();
            let left: &[u64] = if answered.is_empty() { &[1, 2, 3, 4] } else { &[1] };
            assert_eq!(numbers, left, "{layout:?}, dead after {deaths} stores");
            drop(stays);
        }
    }
}

/// SPDK #3070: live recovery did not work at all with packed rings. Here over several laps, chains of
/// different lengths answered out of order, and a restart after every one.
#[test]
fn packed_rings_recover_over_many_laps() {
    let mut driver = Driver::new(kind(Layout::Packed, 5));
    let record = record(Layout::Packed);
    let mut answered = Vec::new();
    for round in 0..40u16 {
        while driver.submit(2 + round % 3).is_some() {}
        let (mut queue, mut chains) = start(&driver, &record);
        while let Some(chain) = queue.pop().unwrap() {
            chains.push(chain);
        }
        assert_eq!(chains.len(), driver.outstanding(), "round {round}");
        // The newest is answered, the others stay for the next server.
        let newest = chains.pop().unwrap();
        let bytes = newest.writable.bytes() as u32;
        queue.publish(newest.ticket, Status::Ok, bytes);
        queue.flush();
        answered.extend(driver.reap());
    }
    assert_eq!(answered.len(), 40);
    answered.sort_unstable();
    answered.dedup();
    assert_eq!(answered.len(), 40);
}

/// A batch as long as the ring brings the used index back to where it was.
#[test]
fn a_batch_as_long_as_a_packed_ring_is_recognised() {
    for deaths in 0..60 {
        let kind =
            Kind { layout: Layout::Packed, size: 3, event_idx: true, indirect: true, past: 2 };
        let mut driver = Driver::new(kind);
        let record = InflightRecord::create(Layout::Packed, 1, 3).unwrap();
        hooks::die_after(u64::MAX);
        let (mut queue, _) = start(&driver, &record);
        let mut chains = Vec::new();
        while driver.submit(3).is_some() {
            chains.push(queue.pop().unwrap().unwrap());
        }
        assert_eq!(chains.len(), 3);
        for chain in chains {
            queue.publish(chain.ticket, Status::Ok, 128);
        }
        hooks::die_after(deaths);
        queue.flush();
        hooks::die_after(u64::MAX);
        let answered = driver.reap().len();
        let (mut queue, chains) = start(&driver, &record);
        assert_eq!(chains.len(), 3 - answered, "dead after {deaths} stores");
        for chain in chains {
            queue.publish(chain.ticket, Status::Ok, 128);
        }
        queue.flush();
        driver.reap();
        assert_eq!(driver.outstanding(), 0);
    }
}

/// SPDK #3860: a packed ring's buffer id is whatever the driver says, and no index.
#[test]
fn a_buffer_id_beyond_the_ring_is_returned_as_it_came() {
    let mut driver = Driver::new(kind(Layout::Packed, 0));
    let record = record(Layout::Packed);
    let (mut queue, _) = start(&driver, &record);
    driver.submit(2).unwrap();
    hooks::unharmed(|| {
        for place in 0..2 {
            driver.window().store_u16(16 * place + 12, 0xfffe, Relaxed);
        }
    });
    let chain = queue.pop().unwrap().unwrap();
    assert!(chain.ticket.head() < 8);
    queue.publish(chain.ticket, Status::Ok, 0);
    queue.flush();
    assert_eq!(hooks::unharmed(|| driver.window().load_u16(12, Relaxed)), 0xfffe);
}
