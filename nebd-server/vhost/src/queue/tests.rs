//! A driver and a row of devices that die, at every single store.

use std::collections::BTreeSet;

use proptest::prelude::*;

use self::driver::{Driver, Kind};
use crate::access::hooks;
use crate::chain::{Chain, Ticket};
use crate::inflight::{InflightRecord, Layout};
use crate::queue::VirtQueue;
use crate::request::Status;

mod driver;
mod hostile;
mod known_bugs;

/// One step of a walk; numbers choose among what is possible.
#[derive(Clone, Copy, Debug)]
enum Step {
    Submit(u16),
    Pop(u8),
    Publish(usize),
    Flush,
    Reap,
    DriverSleep,
    DeviceSleep,
    /// The device will die after so many more stores.
    Die(u64),
}

struct Device {
    queue: VirtQueue,
    held: Vec<(u64, u32, Ticket)>,
    /// Numbers that this device was given.
    seen: BTreeSet<u64>,
    asleep: bool,
}

struct World {
    driver: Driver,
    record: InflightRecord,
    device: Option<Device>,
    deaths: u32,
    answered: u64,
}

impl World {
    fn new(kind: Kind) -> World {
        hooks::die_after(u64::MAX);
        let record = InflightRecord::create(kind.layout, 2, kind.size).unwrap();
        let driver = Driver::new(kind);
        let mut world = World { driver, record, device: None, deaths: 0, answered: 0 };
        world.restart();
        world
    }

    /// Starts devices until one survives its start.
    fn restart(&mut self) {
        while self.device.is_none() {
            let setup = self.driver.kind.setup();
            let record = self.record.queue(self.driver.kind.layout, 1).unwrap();
            let (queue, chains) =
                VirtQueue::start(&setup, self.driver.memory.clone(), record).unwrap();
            let mut device =
                Device { queue, held: Vec::new(), seen: BTreeSet::new(), asleep: false };
            let mut last = 0;
            for chain in chains {
                assert!(chain.sector > last, "issued again out of order");
                last = chain.sector;
                take(&self.driver, &mut device, chain);
            }
            let called = device.queue.call_needed();
            self.device = Some(device);
            if self.bury_the_dead() {
                assert!(called, "a new device must call once");
                self.driver.asleep = false;
            }
        }
    }

    /// Whether the device still lives.
    fn bury_the_dead(&mut self) -> bool {
        if hooks::alive() {
            return true;
        }
        self.device = None;
        self.deaths += 1;
        hooks::die_after(u64::MAX);
        false
    }

    fn step(&mut self, step: Step) {
        self.act(step);
        if !self.bury_the_dead() {
            self.restart();
        }
    }

    fn act(&mut self, step: Step) {
        let device = self.device.as_mut().unwrap();
        match step {
            Step::Submit(count) => {
                let longest = if self.driver.kind.indirect { 4 } else { self.driver.kind.size };
                let count = 2 + count % 3;
                if count > longest {
                    return;
                }
                let Some(kick) = self.driver.submit(count) else { return };
                if device.asleep {
                    assert!(kick, "a kick is lost");
                    device.asleep = false;
                    device.queue.wake();
                }
            }
            Step::Pop(count) => {
                for _ in 0..count {
                    let Some(chain) = device.queue.pop().unwrap() else { break };
                    assert!(!device.asleep, "a device slept while there was something");
                    take(&self.driver, device, chain);
                }
            }
            Step::Publish(choice) => publish(device, choice),
            Step::Flush => self.flush(),
            Step::Reap => self.reap(),
            Step::DriverSleep => {
                self.driver.sleep();
            }
            Step::DeviceSleep => {
                device.asleep = device.queue.sleep();
                if !device.asleep {
                    device.queue.wake();
                }
            }
            Step::Die(stores) => hooks::die_after(stores),
        }
    }

    fn flush(&mut self) {
        let device = self.device.as_mut().unwrap();
        device.queue.flush();
        let called = device.queue.call_needed();
        if hooks::alive() && self.driver.asleep {
            let nothing = self.driver.sleep();
            assert!(called || nothing, "a call is lost");
            if called {
                self.driver.asleep = false;
            }
        }
    }

    fn reap(&mut self) {
        self.driver.wake();
        for number in self.driver.reap() {
            let device = self.device.as_ref().unwrap();
            let held = device.held.iter().any(|(held, ..)| *held == number);
            assert!(!held, "request {number} was answered and is in flight");
            self.answered += 1;
        }
    }

    /// Everything that was asked is answered in the end.
    fn finish(&mut self) {
        hooks::die_after(u64::MAX);
        for _ in 0..3 {
            for step in [Step::Pop(255), Step::Pop(255), Step::Publish(0)] {
                self.step(step);
            }
            while !self.device.as_ref().unwrap().held.is_empty() {
                self.step(Step::Publish(0));
            }
            self.step(Step::Flush);
            self.step(Step::Reap);
        }
        assert_eq!(self.driver.outstanding(), 0, "requests are lost");
        let device = self.device.as_ref().unwrap();
        assert_eq!(device.queue.in_flight(), 0);
    }
}

fn take(driver: &Driver, device: &mut Device, chain: Chain) {
    let number = chain.sector;
    assert!(driver.is_outstanding(number), "request {number:#x} was issued after its answer");
    assert!(device.seen.insert(number), "request {number} was issued twice by one device");
    device.held.push((number, chain.writable.bytes() as u32, chain.ticket));
}

fn publish(device: &mut Device, choice: usize) {
    if !device.held.is_empty() {
        let (_, bytes, ticket) = device.held.swap_remove(choice % device.held.len());
        device.queue.publish(ticket, Status::Ok, bytes);
    }
}

/// A number out of a sequence, for scenarios that are the same each time.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *state >> 33
}

fn scenario(seed: u64, length: usize) -> Vec<Step> {
    let mut state = seed;
    let mut number = move || next(&mut state) as usize;
    let step = |_| match number() % 16 {
        0..=3 => Step::Submit(number() as u16),
        4..=6 => Step::Pop((number() % 4) as u8),
        7..=9 => Step::Publish(number()),
        10..=11 => Step::Flush,
        12..=13 => Step::Reap,
        14 => Step::DriverSleep,
        _ => Step::DeviceSleep,
    };
    (0..length).map(step).collect()
}

fn kinds(sizes: &[u16]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    for layout in [Layout::Split, Layout::Packed] {
        for (event_idx, indirect) in [(false, false), (false, true), (true, false), (true, true)] {
            for size in sizes {
                // A split ring's size is a power of two, and the shortest chain has two descriptors.
                let is_possible =
                    (layout == Layout::Packed || size.is_power_of_two()) && (indirect || *size > 1);
                if is_possible {
                    let past = 65530 + size % 6;
                    kinds.push(Kind { layout, size: *size, event_idx, indirect, past });
                }
            }
        }
    }
    kinds
}

fn run(kind: Kind, steps: &[Step], deaths: &[u64]) -> World {
    let mut world = World::new(kind);
    let mut deaths = deaths.iter();
    if let Some(first) = deaths.next() {
        hooks::die_after(*first);
    }
    for step in steps {
        let before = world.deaths;
        world.step(*step);
        if world.deaths > before
            && let Some(next) = deaths.next()
        {
            hooks::die_after(*next);
        }
    }
    world.finish();
    world
}

/// Each store in turn is the last that a device makes.
#[test]
fn a_death_at_every_store_loses_and_doubles_nothing() {
    for kind in kinds(&[1, 2, 3, 4, 8]) {
        let mut answered = 0;
        for seed in 1..=6 {
            let steps = scenario(seed * 7919, 90);
            let before = hooks::stores();
            let world = run(kind, &steps, &[]);
            let stores = hooks::stores() - before;
            answered += world.answered;
            for death in 0..stores {
                run(kind, &steps, &[death]);
            }
        }
        // Several laps of every ring.
        assert!(answered > 5 * u64::from(kind.size), "{kind:?}: only {answered} answers");
    }
}

/// A second death follows, soon after the successor has started or while it starts.
#[test]
fn a_death_during_recovery_loses_and_doubles_nothing() {
    for kind in kinds(&[1, 3, 4]) {
        let steps = scenario(104729, 70);
        let before = hooks::stores();
        run(kind, &steps, &[]);
        let stores = hooks::stores() - before;
        let mut deaths = 0;
        for first in 0..stores {
            for second in 0..14 {
                deaths += death_in_start(kind, &steps, first, second);
            }
        }
        assert!(deaths > 0, "no device of {kind:?} died in its start");
    }
}

/// Like [`run`], but the successor's start has only so many stores.
fn death_in_start(kind: Kind, steps: &[Step], first: u64, second: u64) -> u32 {
    let mut world = World::new(kind);
    hooks::die_after(first);
    let mut in_start = 0;
    for step in steps {
        let is_first = world.deaths == 0;
        world.act(*step);
        if !world.bury_the_dead() {
            if is_first {
                hooks::die_after(second);
            }
            world.restart();
            in_start += u32::from(is_first && world.deaths > 1);
        }
    }
    world.finish();
    in_start
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    /// Long walks with many deaths, queues of all sizes.
    #[test]
    fn walks_over_many_deaths_lose_and_double_nothing(
        packed in any::<bool>(),
        event_idx in any::<bool>(),
        indirect in any::<bool>(),
        size in 1..=256u16,
        past in any::<u16>(),
        steps in prop::collection::vec(step(), 1..900),
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Split };
        let size = if packed { size } else { size.next_power_of_two() };
        let kind = Kind { layout, size, event_idx, indirect, past };
        run(kind, &steps, &[]);
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<u16>().prop_map(Step::Submit),
        6 => any::<u8>().prop_map(|count| Step::Pop(count % 16)),
        8 => any::<usize>().prop_map(Step::Publish),
        3 => Just(Step::Flush),
        3 => Just(Step::Reap),
        1 => Just(Step::DriverSleep),
        1 => Just(Step::DeviceSleep),
        1 => (0..60u64).prop_map(Step::Die),
    ]
}
