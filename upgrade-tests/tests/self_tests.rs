//! The tests of the tests: an honest device passes, and every planted fault is found.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_upgrade_tests::memory::{Fault, MemoryDevice};
use nebd_upgrade_tests::report::{ProblemKind, VolumeReport};
use nebd_upgrade_tests::stream::{Goal, Stream, StreamOptions};
use nebd_upgrade_tests::timeline::Timeline;
use proptest::prelude::*;

const BLOCKS: u64 = 192;

fn stream(fault: Fault, block_bytes: u32, seed: u64, steps: u64) -> Stream<MemoryDevice> {
    let device = MemoryDevice::new(BLOCKS * u64::from(block_bytes), block_bytes, fault, seed);
    let options = StreamOptions {
        seed,
        steps_max: Some(steps),
        stall_limit: Duration::from_millis(300),
        tracks_durability: Fault::FOUND_AFTER_POWER_CUT.contains(&fault) || seed & 1 == 0,
        ..StreamOptions::default()
    };
    Stream::new(device, 4, options, Arc::new(Timeline::default()))
}

fn until_rest(stream: &mut Stream<MemoryDevice>, goal: Goal) {
    while !stream.is_at_rest(goal) {
        stream.pump(goal);
    }
}

fn run(fault: Fault, block_bytes: u32, seed: u64, steps: u64) -> VolumeReport {
    let mut stream = stream(fault, block_bytes, seed, steps);
    until_rest(&mut stream, Goal::Run);
    until_rest(&mut stream, Goal::Drain);
    until_rest(&mut stream, Goal::Sweep);
    let report = stream.report();
    if report.is_clean() {
        assert!(report.blocks_checked >= BLOCKS, "the sweep covers the volume: {report:?}");
    }
    report
}

fn run_with_power_cuts(fault: Fault, seed: u64) -> VolumeReport {
    let mut stream = stream(fault, 4096, seed, u64::MAX);
    for _ in 0..12 {
        for _ in 0..400 {
            stream.pump(Goal::Run);
        }
        until_rest(&mut stream, Goal::Drain);
        stream.device_mut().cut_power();
        stream.cut_power();
        until_rest(&mut stream, Goal::Sweep);
    }
    stream.report()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_honest_device_passes(seed: u64, small_blocks: bool) {
        let report = run(Fault::None, if small_blocks { 512 } else { 4096 }, seed, 1500);
        prop_assert!(report.is_clean(), "{report:#?}");
    }

    #[test]
    fn an_honest_device_passes_power_cuts(seed: u64) {
        let report = run_with_power_cuts(Fault::None, seed & !1);
        prop_assert!(report.is_clean(), "{report:#?}");
    }

    #[test]
    fn errors_are_reported_and_leave_old_or_new(seed: u64) {
        let report = run(Fault::Error, 4096, seed, 1500);
        prop_assert!(report.errors > 0 && report.mismatches == 0, "{report:#?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn every_planted_fault_is_found(seed: u64, small_blocks: bool) {
        for fault in Fault::FOUND_UNDER_LOAD {
            let block_bytes = match fault {
                Fault::Tear => 4096, // A block of one sector cannot be torn.
                _ if small_blocks => 512,
                _ => 4096,
            };
            let report = run(fault, block_bytes, seed, 4000);
            prop_assert!(!report.is_clean(), "{fault:?} was not found");
        }
    }

    #[test]
    fn a_flush_or_fua_that_does_nothing_is_found_by_power_cuts(seed: u64) {
        for fault in Fault::FOUND_AFTER_POWER_CUT {
            let report = run_with_power_cuts(fault, seed);
            prop_assert!(report.mismatches > 0, "{fault:?} was not found");
        }
    }
}

#[test]
fn a_report_names_the_block_what_was_expected_and_the_events_around() {
    let mut stream = stream(Fault::Replay, 4096, 5, u64::MAX);
    let timeline = stream.timeline();
    timeline.note("kill #1 (sigkill)");
    while stream.report().mismatches == 0 {
        stream.pump(Goal::Run);
    }
    timeline.note("kill #2 (sigkill)");
    let report = stream.report();
    let text = report.problems[0].to_string();
    assert_eq!(report.problems[0].kind, ProblemKind::Mismatch);
    for part in ["block ", "found: sector ", "expected: write ", "between kill #1", "and kill #2"] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

#[test]
fn a_forgotten_request_is_a_stall_that_names_it() {
    let report = run(Fault::DropRequest, 4096, 9, 4000);
    assert_eq!(report.failures, 1);
    assert!(report.problems[0].found.contains("is not answered"), "{}", report.problems[0]);
}

/// One core must check far more than any server of ours delivers.
#[test]
fn the_checker_is_cheap() {
    let begun = Instant::now();
    let report = run(Fault::None, 4096, 3, 50_000);
    let rate = report.requests as f64 / begun.elapsed().as_secs_f64();
    println!("{rate:.0} requests/s, device included");
    assert!(report.is_clean(), "{report:#?}");
}
