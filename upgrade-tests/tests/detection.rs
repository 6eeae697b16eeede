//! The tests of the tests: with one rule of the server or of its storage switched off, the harness
//! must fail; with the rule on, everything else the same, it passes.

mod common;

use std::time::Duration;

use common::{assert_clean, config};
use nebd_upgrade_tests::campaign::{self, CampaignConfig};
use nebd_upgrade_tests::report::ProblemKind;

#[test]
fn a_successor_that_does_not_reissue_is_found() {
    let on = CampaignConfig { stall_limit: Duration::from_secs(3), ..config("file", 1, 3) };
    let off = CampaignConfig {
        environment: vec![("NEBD_TEST_REISSUE_OFF".into(), "1".into())],
        ..on.clone()
    };
    let on = CampaignConfig { stall_limit: Duration::from_secs(20), ..on };
    assert_clean(&campaign::run(on).unwrap(), 3);
    let summary = campaign::run(off).unwrap();
    let stalls =
        summary.report.problems.iter().filter(|problem| problem.kind == ProblemKind::Stall);
    assert!(stalls.count() > 0, "the lost requests were not noticed: {summary}");
}

#[test]
fn storage_without_its_fence_is_found() {
    let on = config("fence-test", 1, 40);
    let off = CampaignConfig { store_arguments: vec!["--no-fence".into()], ..on.clone() };
    assert_clean(&campaign::run(on).unwrap(), 40);
    let summary = campaign::run(off).unwrap();
    assert!(summary.report.mismatches > 0, "nothing was found: {summary}");
}

#[test]
fn a_flush_that_does_nothing_is_found() {
    let on = config("fence-test", 1, 0);
    let off = CampaignConfig {
        environment: vec![("NEBD_TEST_FLUSH_OFF".into(), "1".into())],
        ..on.clone()
    };
    let summary = campaign::run_power_cuts(on, 6).unwrap();
    assert_clean(&summary, 6);
    let store = summary.store.expect("the store was asked");
    assert!(store.flushes > 20 && store.fua > 20, "{store:?}");
    let summary = campaign::run_power_cuts(off, 6).unwrap();
    assert!(summary.report.mismatches > 0, "nothing was found: {summary}");
}
