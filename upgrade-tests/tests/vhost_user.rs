//! Volumes that are attached by vhost-user: the server dies and is replaced under a driver without a
//! guest, which must not notice, or connect again where a reply is in doubt.

mod common;

use std::time::Duration;

use common::{assert_clean, config, goes_on};
use nebd_upgrade_tests::campaign::{Campaign, CampaignConfig, Way};
use nebd_upgrade_tests::vhost_device::{Control, Options};
use nix::sys::signal::Signal;

fn options() -> Options {
    Options::new("")
}

fn vhost(backend: &str, sessions: usize, kills: usize, options: Options) -> CampaignConfig {
    let way = Way::VhostUser { options, churns: false };
    CampaignConfig { way, ..config(backend, sessions, kills) }
}

/// A hypervisor hangs up and connects again while nobody serves: the successor finds both, the old
/// session in the store and the new connection, and must not serve the rings of one guest twice.
#[test]
fn a_hypervisor_that_connects_again_while_its_server_is_dead() {
    let campaign = Campaign::start(vhost("fence-test", 1, 0, options())).unwrap();
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
