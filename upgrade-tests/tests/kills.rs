//! The server dies under load, in every way and at every point: no error, no wrong byte, IO goes on.

mod common;

use common::{assert_clean, config};
use nebd_upgrade_tests::campaign::{self, CampaignConfig, Kill};

#[test]
fn sigkill_with_one_volume_on_a_file() {
    assert_clean(&campaign::run(config("file", 1, 25)).unwrap(), 25);
}

#[test]
fn sigkill_with_a_thread_pool_instead_of_io_uring() {
    let config = CampaignConfig { file_engine: "threads", ..config("file", 2, 15) };
    assert_clean(&campaign::run(config).unwrap(), 15);
}

#[test]
fn sigkill_with_blocks_of_512_bytes() {
    let config =
        CampaignConfig { block_bytes: 512, volume_bytes: 2 << 20, ..config("file", 1, 15) };
    assert_clean(&campaign::run(config).unwrap(), 15);
}

#[test]
fn sigkill_with_volumes_in_memory() {
    assert_clean(&campaign::run(config("mem", 4, 20)).unwrap(), 20);
}

#[test]
fn sigkill_with_storage_that_delivers_late_twice_and_again() {
    let summary = campaign::run(config("fence-test", 2, 30)).unwrap();
    assert_clean(&summary, 30);
    let store = summary.store.expect("the store was asked");
    assert!(store.redelivered > 100 && store.stale > 100, "the fence was not needed: {store:?}");
}

/// A standby opens volumes of every kind as an observer, again and again, while their owner lives.
#[test]
fn sigkill_with_a_warm_standby_and_other_backends() {
    for backend in ["mem", "fence-test"] {
        let config = CampaignConfig { standby: true, ..config(backend, 4, 12) };
        assert_clean(&campaign::run(config).unwrap(), 12);
    }
}

#[test]
fn sigkill_with_a_warm_standby_and_64_volumes() {
    let config =
        CampaignConfig { standby: true, depth: 8, volume_bytes: 2 << 20, ..config("file", 64, 12) };
    assert_clean(&campaign::run(config).unwrap(), 12);
}

#[test]
fn sigkill_with_256_volumes() {
    let config = CampaignConfig { depth: 8, volume_bytes: 1 << 20, ..config("file", 256, 4) };
    assert_clean(&campaign::run(config).unwrap(), 4);
}

#[test]
fn crashes_with_core_dumps_aborts_and_freezes() {
    let kinds = vec![Kill::SIGSEGV, Kill::SIGABRT, Kill::SIGSTOP, Kill::StopAndContinue];
    let config = CampaignConfig { kinds, ..config("file", 4, 12) };
    assert_clean(&campaign::run(config).unwrap(), 12);
}

/// Every point × a kill; and the points of the data path × every other way.
#[test]
fn deaths_at_every_point_of_the_protocol() {
    let mut kinds = Vec::new();
    for point in [
        "before-claim",
        "after-claim",
        "after-ready",
        "resume",
        "reissue",
        "after-pop",
        "before-submit",
        "after-submit",
        "before-publish",
        "after-publish",
    ] {
        kinds.push(Kill::at(point, "kill"));
    }
    for point in ["reissue", "after-submit", "after-publish"] {
        for action in ["segv", "abort", "stop", "hang"] {
            kinds.push(Kill::at(point, action));
        }
    }
    let kills = kinds.len();
    let config = CampaignConfig { kinds, depth: 16, ..config("file", 4, kills) };
    assert_clean(&campaign::run(config).unwrap(), kills);
}
