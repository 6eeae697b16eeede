//! A candidate that says something else than it should, and an owner that does: the takeover is refused,
//! the operator is told why, and the old server serves on.

mod common;

use std::time::Duration;

use common::{assert_unharmed, config, goes_on, server_with, until, upgrade};
use nebd_rpc::admin::UpgradeState;
use nebd_upgrade_tests::campaign::{Campaign, Kill};

/// The upgrade ends so, for a reason that says this; and afterwards all is as it was.
fn assert_refused(mut campaign: Campaign, environment: &[(&str, &str)], reason: &str) {
    let directory = tempfile::tempdir().unwrap();
    let program = server_with(directory.path(), "strange", environment);
    let owner = campaign.host().server_pid().unwrap();
    upgrade(&campaign, &program.started_as, Duration::ZERO);
    let over = [UpgradeState::Refused, UpgradeState::Failed, UpgradeState::Done];
    let report = until(&campaign, &over);
    assert_ne!(report.state(), UpgradeState::Done, "{report:?}");
    assert!(report.reason.contains(reason), "{:?}", report.reason);
    assert_eq!(campaign.host().server_pid(), Some(owner));
    campaign.host().wait_for_order().unwrap();
    goes_on(&campaign);
    // Nothing of it is left: a death is survived as ever.
    campaign.kill(&Kill::SIGKILL).unwrap();
    assert_unharmed(&campaign.finish(), 1);
}

fn candidate(kind: &str, reason: &str) {
    let campaign = Campaign::start(config("file", 2, 1)).unwrap();
    assert_refused(campaign, &[("NEBD_TEST_CANDIDATE", kind)], reason);
}

#[test]
fn a_candidate_of_a_version_too_far_away() {
    candidate("version", "the candidate wants version 77 of the handover, this server speaks 1 to");
}

#[test]
fn a_candidate_that_answers_garbage() {
    candidate("garbage", "HELLO: the other server sent a damaged packet");
}

#[test]
fn a_candidate_that_demands_what_the_owner_does_not_know() {
    candidate("tag", "HELLO: the other server sent field 65520 that this version does not know");
}

/// The candidate refuses; the fault is the owner's.
fn owner(kind: &str, reason: &str) {
    let mut config = config("file", 2, 1);
    config.environment.push(("NEBD_TEST_OWNER".into(), kind.into()));
    assert_refused(Campaign::start(config).unwrap(), &[], reason);
}

#[test]
fn an_owner_of_a_version_too_far_away() {
    owner("hello-version", "it speaks versions 77 to 78 of the handover");
}

#[test]
fn an_owner_that_greets_with_garbage() {
    owner("hello-garbage", "the other server sent a damaged packet");
}

#[test]
fn an_owner_that_greets_with_what_the_candidate_does_not_know() {
    owner("hello-tag", "the other server sent field 65520 that this version does not know");
}

/// The candidate goes while the owner still offers: its reason must not be lost.
#[test]
fn an_owner_that_offers_garbage() {
    owner("offer-garbage", "the other server sent a damaged packet: a field beyond its message");
}

#[test]
fn an_owner_that_offers_what_the_candidate_does_not_know() {
    owner("offer-tag", "the other server sent field 65520 that this version does not know");
}
