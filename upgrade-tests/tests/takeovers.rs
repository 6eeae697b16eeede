//! Planned takeovers under load: clean ones, and ones to which something happens at every step.

mod common;

use common::{assert_clean, assert_unharmed, config};
use nebd_upgrade_tests::campaign::{
    self, ACTIONS, CANDIDATE_POINTS, Campaign, CampaignConfig, KEEPER_ACTIONS, Kill, OWNER_POINTS,
};

#[test]
fn planned_takeovers_with_every_backend() {
    for backend in ["file", "mem", "fence-test"] {
        let config = CampaignConfig { kinds: vec![Kill::Takeover], ..config(backend, 3, 10) };
        assert_clean(&campaign::run(config).unwrap(), 10);
    }
}

#[test]
fn planned_takeovers_with_a_thread_pool_and_a_standby() {
    let config = CampaignConfig {
        kinds: vec![Kill::Takeover, Kill::SIGKILL],
        file_engine: "threads",
        standby: true,
        ..config("file", 4, 12)
    };
    assert_clean(&campaign::run(config).unwrap(), 12);
}

#[test]
fn planned_takeovers_and_deaths_in_turn_with_64_volumes() {
    let config = CampaignConfig {
        kinds: vec![Kill::Takeover, Kill::SIGKILL],
        depth: 8,
        volume_bytes: 2 << 20,
        ..config("file", 64, 8)
    };
    assert_clean(&campaign::run(config).unwrap(), 8);
}

/// Every step of either side × a kill; the long run (`upgrade-tests matrix`) has every other fault as
/// well.
#[test]
fn a_death_at_every_step_of_a_takeover() {
    let points = OWNER_POINTS.iter().chain(&CANDIDATE_POINTS);
    let kinds: Vec<Kill> = points.map(|point| Kill::at(point, "kill")).collect();
    let count = kinds.len();
    let config = CampaignConfig { kinds, ..config("file", 2, count) };
    assert_clean(&campaign::run(config).unwrap(), count);
}

/// The steps around the point of no return × every other fault.
#[test]
fn every_fault_around_the_point_of_no_return() {
    let mut kinds = Vec::new();
    for point in ["owner-frozen", "owner-fenced", "candidate-before-claim", "candidate-after-claim"]
    {
        for action in ACTIONS.into_iter().filter(|action| *action != "kill") {
            kinds.push(Kill::at(point, action));
        }
    }
    let count = kinds.len();
    let config = CampaignConfig { kinds, ..config("file", 2, count) };
    assert_clean(&campaign::run(config).unwrap(), count);
}

/// The keeper is killed in the middle of every step, and started again at once.
#[test]
fn a_death_of_the_keeper_at_every_step_of_a_takeover() {
    let points = OWNER_POINTS.iter().chain(&CANDIDATE_POINTS);
    let kinds: Vec<Kill> = points.map(|point| Kill::at(point, "keeper-kill")).collect();
    let count = kinds.len();
    let config = CampaignConfig { kinds, ..config("file", 2, count) };
    assert_clean(&campaign::run(config).unwrap(), count);
}

/// No keeper for a while, and one that is stopped, on either side of the point of no return.
#[test]
fn a_keeper_that_is_away_around_the_point_of_no_return() {
    let mut kinds = Vec::new();
    for point in ["candidate-before-claim", "candidate-after-claim"] {
        let actions = KEEPER_ACTIONS.iter().filter(|action| **action != "keeper-kill");
        kinds.extend(actions.map(|action| Kill::at(point, action)));
    }
    let count = kinds.len();
    let config = CampaignConfig { kinds, ..config("file", 2, count) };
    assert_clean(&campaign::run(config).unwrap(), count);
}

/// Requests of the old server that end after the new one has settled: it goes by itself all the same,
/// and is not waited for until its time is over.
#[test]
fn an_old_server_goes_once_its_last_request_has_ended() {
    let mut config = config("file", 2, 4);
    config.file_engine = "threads";
    config.environment.push(("NEBD_TEST_SYNC_MS".into(), "60".into()));
    let mut campaign = Campaign::start(config).unwrap();
    for _ in 0..4 {
        campaign.kill(&Kill::Takeover).unwrap();
        let log = campaign.host().log();
        assert!(log.contains("with requests at their storage"), "{log}");
        assert!(!log.contains("the old server does not go"), "{log}");
    }
    assert_unharmed(&campaign.finish(), 4);
}

/// Frozen once it has let go, overtaken, and continued: nothing of the old server gets through,
/// though nobody kills it. The storage fences, and answers that come late reach no memory. (An old
/// server that is frozen before it lets go is killed: a copy that it is in the middle of can be
/// stopped in no other way. See `every_fault_around_the_point_of_no_return`.)
#[test]
fn the_fence_alone_holds_while_an_old_server_is_thawed() {
    let mut config = config("fence-test", 2, 4);
    config.kinds = vec![Kill::at("owner-released", "stop")];
    config.environment.push(("NEBD_TEST_SPARE_PREDECESSOR".into(), "1".into()));
    assert_clean(&campaign::run(config).unwrap(), 4);
}
