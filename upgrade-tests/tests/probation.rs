//! A new server that does not pass its probation: the old binary serves again, by itself.

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::{assert_unharmed, config, executable, goes_on, programs, server_with, until, upgrade};
use nebd_rpc::admin::UpgradeState::{Done, Failed, Probation, Refused, RolledBack};
use nebd_upgrade_tests::campaign::{Campaign, CampaignConfig, Kill};

/// Longer than a test: it ends otherwise, or not at all.
const LONG: Duration = Duration::from_secs(600);

/// As the kernel names it.
fn old_binary() -> PathBuf {
    programs().server.canonicalize().unwrap()
}

/// Two volumes under load.
fn start(standby: bool) -> Campaign {
    Campaign::start(CampaignConfig { standby, ..config("file", 2, 1) }).unwrap()
}

#[test]
fn a_failed_probation_goes_back_by_itself() {
    let mut campaign = start(false);
    let directory = tempfile::tempdir().unwrap();
    let complaint = [("NEBD_TEST_COMPLAINT", "volume file:soak1 is not as it was")];
    let new = server_with(directory.path(), "new-server", &complaint);
    let owner = campaign.host().server_pid().unwrap();
    upgrade(&campaign, &new.started_as, LONG);
    let report = until(&campaign, &[RolledBack, Done, Failed, Refused]);
    assert_eq!(report.state(), RolledBack, "{report:?}");
    assert!(report.reason.contains("volume file:soak1 is not as it was"), "{report:?}");
    // The new server did serve: this is the third.
    let (from, to) = (report.from.clone().unwrap(), report.to.clone().unwrap());
    assert_eq!(PathBuf::from(&from.binary), new.runs, "{report:?}");
    campaign.host().wait_for_order().unwrap();
    let server = campaign.host().server_pid().unwrap();
    assert_eq!((executable(server), to.pid as i32), (old_binary(), server), "{report:?}");
    assert_ne!(server, owner);
    goes_on(&campaign);
    campaign.kill(&Kill::SIGKILL).unwrap();
    assert_eq!(executable(campaign.host().server_pid().unwrap()), old_binary());
    assert_unharmed(&campaign.finish(), 1);
}

fn death_in_the_probation(kind: Kill, standby: bool) {
    let mut campaign = start(standby);
    let directory = tempfile::tempdir().unwrap();
    let new = server_with(directory.path(), "new-server", &[]);
    upgrade(&campaign, &new.started_as, LONG);
    until(&campaign, &[Probation]);
    campaign.host().wait_for_order().unwrap();
    assert_eq!(executable(campaign.host().server_pid().unwrap()), new.runs);
    campaign.kill(&kind).unwrap();
    let report = until(&campaign, &[RolledBack, Done, Failed, Refused]);
    assert_eq!(report.state(), RolledBack, "{report:?}");
    assert!(report.reason.contains("the new server died in its probation"), "{report:?}");
    assert_eq!(executable(campaign.host().server_pid().unwrap()), old_binary());
    goes_on(&campaign);
    // What was rolled back is over: the next upgrade is one like any other.
    campaign.kill(&Kill::Takeover).unwrap();
    assert_unharmed(&campaign.finish(), 2);
}

#[test]
fn a_kill_in_the_probation_goes_back_to_the_old_binary() {
    death_in_the_probation(Kill::SIGKILL, false);
}

#[test]
fn a_crash_in_the_probation_goes_back_to_the_old_binary() {
    death_in_the_probation(Kill::SIGSEGV, false);
}

#[test]
fn a_death_in_the_probation_goes_back_to_a_standby_of_the_old_binary() {
    death_in_the_probation(Kill::SIGKILL, true);
}

/// The other way: once it has passed, the new binary is the one that the keeper starts.
#[test]
fn a_probation_that_was_passed_is_for_good() {
    let mut campaign = start(false);
    let directory = tempfile::tempdir().unwrap();
    let new = server_with(directory.path(), "new-server", &[]);
    upgrade(&campaign, &new.started_as, Duration::from_millis(300));
    let report = until(&campaign, &[RolledBack, Done, Failed, Refused]);
    assert_eq!(report.state(), Done, "{report:?}");
    campaign.kill(&Kill::SIGKILL).unwrap();
    assert_eq!(executable(campaign.host().server_pid().unwrap()), new.runs);
    goes_on(&campaign);
    assert_unharmed(&campaign.finish(), 1);
}
