//! Volumes that are attached by vhost-user: the server dies and is replaced under a driver without a
//! guest, which must not notice, or connect again where a reply is in doubt.

mod common;

use std::time::Duration;

use common::{assert_clean, assert_unharmed, config, goes_on};
use nebd_upgrade_tests::campaign::{
    self, CANDIDATE_POINTS, Campaign, CampaignConfig, Kill, OWNER_POINTS, Summary, Way,
};
use nebd_upgrade_tests::vhost_device::{Control, Options};
use nix::sys::signal::Signal;

const POINTS: [&str; 4] =
    ["vhost-after-act", "vhost-after-save", "vhost-before-reply", "vhost-after-reply"];

fn split() -> Options {
    Options::new("")
}

fn packed() -> Options {
    // No power of two, as a packed ring may be.
    Options { packed: true, queues: 2, ring_size: 100, ..split() }
}

/// No indirect descriptors, no event indices: rings that are full.
fn plain(options: Options) -> Options {
    Options { indirect: false, event_idx: false, ring_size: 64, ..options }
}

fn vhost(backend: &str, sessions: usize, kills: usize, options: Options) -> CampaignConfig {
    let way = Way::VhostUser { options, churns: false };
    CampaignConfig { way, ..config(backend, sessions, kills) }
}

/// With control messages all the time.
fn churned(backend: &str, sessions: usize, kills: usize, options: Options) -> CampaignConfig {
    let way = Way::VhostUser { options, churns: true };
    CampaignConfig { way, ..config(backend, sessions, kills) }
}

/// All is well, and no connection was closed: nobody noticed anything but a pause.
fn assert_unnoticed(summary: &Summary, kills: usize) {
    assert_clean(summary, kills);
    assert_connected(summary);
}

fn assert_connected(summary: &Summary) {
    for figures in &summary.drivers {
        assert_eq!((figures.reconnects, figures.losses), (0, 0), "{summary}");
    }
}

#[test]
fn sigkill_is_not_noticed() {
    for (backend, options) in [
        ("file", split()),
        ("mem", packed()),
        ("fence-test", plain(Options { queues: 2, ..split() })),
        ("file", plain(packed())),
    ] {
        assert_unnoticed(&campaign::run(vhost(backend, 2, 8, options)).unwrap(), 8);
    }
}

#[test]
fn sigkill_with_a_warm_standby_is_not_noticed() {
    for (backend, options) in [("file", packed()), ("mem", split()), ("fence-test", packed())] {
        let config = CampaignConfig { standby: true, ..vhost(backend, 2, 5, options) };
        assert_unnoticed(&campaign::run(config).unwrap(), 5);
    }
}

#[test]
fn crashes_aborts_and_freezes_are_not_noticed() {
    let mut kinds = vec![Kill::SIGSEGV, Kill::SIGABRT, Kill::SIGSTOP, Kill::StopAndContinue];
    kinds.extend(["after-pop", "after-publish"].map(|point| Kill::at(point, "kill")));
    kinds.push(Kill::at("before-publish", "abort"));
    let kills = kinds.len();
    for options in [split(), packed()] {
        let config = CampaignConfig { kinds: kinds.clone(), ..vhost("file", 2, kills, options) };
        assert_unnoticed(&campaign::run(config).unwrap(), kills);
    }
}

/// Nobody knocks: part clients do so when their requests stall, and hypervisors know no such thing.
#[test]
fn hangs_are_found_out_without_a_part_client() {
    let kinds = vec![Kill::at("after-submit", "hang"), Kill::at("reissue", "hang")];
    let config = CampaignConfig { kinds, ..vhost("file", 1, 2, split()) };
    assert_unnoticed(&campaign::run(config).unwrap(), 2);
}

#[test]
fn planned_takeovers_are_not_noticed() {
    for (backend, options) in [("file", split()), ("mem", packed()), ("fence-test", plain(split()))]
    {
        let kinds = vec![Kill::Takeover];
        let config = CampaignConfig { kinds, ..vhost(backend, 2, 5, options) };
        assert_unnoticed(&campaign::run(config).unwrap(), 5);
    }
}

/// Every step of either side × a kill.
#[test]
fn a_death_at_every_step_of_a_takeover_is_not_noticed() {
    let points = OWNER_POINTS.iter().chain(&CANDIDATE_POINTS);
    let kinds: Vec<Kill> = points.map(|point| Kill::at(point, "kill")).collect();
    let count = kinds.len();
    let config = CampaignConfig { kinds, ..vhost("file", 2, count, packed()) };
    assert_unnoticed(&campaign::run(config).unwrap(), count);
}

/// The server dies in the middle of messages, under load: at each point of each of them.
#[test]
fn deaths_in_the_middle_of_messages() {
    for (backend, options) in [
        ("file", split()),
        ("mem", Options { acknowledged: false, ..packed() }),
        ("fence-test", packed()),
        ("file", plain(packed())),
    ] {
        let kinds = POINTS.map(|point| Kill::at(point, "kill")).to_vec();
        let config = CampaignConfig { kinds, ..churned(backend, 2, 16, options) };
        let summary = campaign::run(config).unwrap();
        assert_clean(&summary, 16);
        assert!(summary.drivers.iter().all(|figures| figures.controls > 10), "{summary}");
    }
}

#[test]
fn deaths_of_other_kinds_in_the_middle_of_messages() {
    let actions = ["segv", "abort", "stop", "kill"];
    let kinds = POINTS.iter().zip(actions).map(|(point, action)| Kill::at(point, action)).collect();
    let config = CampaignConfig { kinds, standby: true, ..churned("mem", 2, 4, packed()) };
    assert_clean(&campaign::run(config).unwrap(), 4);
}

#[test]
fn kills_and_takeovers_while_messages_go_on() {
    for (backend, options) in [("mem", packed()), ("fence-test", split())] {
        let kinds = vec![Kill::SIGKILL, Kill::Takeover];
        let config = CampaignConfig { kinds, ..churned(backend, 2, 10, options) };
        assert_clean(&campaign::run(config).unwrap(), 10);
    }
}

/// A hypervisor hangs up and connects again while nobody serves: the successor finds both, the old
/// session in the store and the new connection, and must not serve the rings of one guest twice.
#[test]
fn a_hypervisor_that_connects_again_while_its_server_is_dead() {
    let campaign = Campaign::start(vhost("fence-test", 1, 0, split())).unwrap();
    for _ in 0..6 {
        goes_on(&campaign);
        let victim = campaign.host().server_pid().unwrap();
        campaign.host().signal(victim, Signal::SIGSTOP).unwrap();
        let driver = campaign.drivers()[0].clone();
        let reconnects = driver.figures().reconnects;
        let again = std::thread::spawn(move || driver.perform(Control::Reconnect));
        let driver = &campaign.drivers()[0];
        let connects = |_: &_| driver.figures().reconnects > reconnects;
        campaign.host().wait_for("another connection", connects).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        campaign.host().signal(victim, Signal::SIGKILL).unwrap();
        campaign.host().wait_for_successor(victim).unwrap();
        assert!(again.join().unwrap(), "{:?}\n{}", driver.failure(), campaign.host().log());
    }
    goes_on(&campaign);
    assert_clean(&campaign.finish(), 0);
}

/// Each control by itself, under load, on both layouts: the ring stops with nothing in flight, and
/// goes on.
#[test]
fn controls_under_load() {
    for options in [split(), packed(), Options { acknowledged: false, ..split() }] {
        let campaign = Campaign::start(vhost("mem", 1, 0, options)).unwrap();
        for control in [
            Control::RestartRing(0),
            Control::PauseRing(0),
            Control::ReplaceKick(0),
            Control::ReplaceCall(0),
            Control::AddRegion,
            Control::SetMemory,
            Control::RemoveRegion,
            Control::Look,
            Control::Reconnect,
        ] {
            for _ in 0..3 {
                let driver = &campaign.drivers()[0];
                assert!(driver.perform(control), "{control:?}: {:?}", driver.failure());
                goes_on(&campaign);
            }
        }
        let summary = campaign.finish();
        assert_clean(&summary, 0);
        assert_eq!(summary.drivers[0].losses, 0, "{summary}");
    }
}

/// Told on the second socket, before and after a takeover.
#[test]
fn a_resize_is_told() {
    let mut campaign = Campaign::start(vhost("file", 1, 0, packed())).unwrap();
    let mut size = campaign.drivers()[0].figures().size_bytes;
    for kind in [None, Some(Kill::SIGKILL), Some(Kill::Takeover)] {
        if let Some(kind) = kind {
            campaign.kill(&kind).unwrap();
        }
        size += 8 << 20;
        campaign.host().admin().unwrap().resize("file:soak0", size).unwrap();
        let driver = &campaign.drivers()[0];
        let is_told = |_: &_| driver.figures().size_bytes == size;
        let told = campaign.host().wait_for("the new size in the configuration space", is_told);
        told.unwrap();
        goes_on(&campaign);
    }
    assert!(campaign.drivers()[0].figures().config_changes >= 3);
    let summary = campaign.finish();
    assert_unharmed(&summary, 2);
    assert_connected(&summary);
}
