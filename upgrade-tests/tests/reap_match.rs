//! The test of the reap match, in a process of its own, for its switch is the process's.

mod common;

use std::time::Duration;

use common::{assert_clean, config};
use nebd_abi::ring::hooks::switch_reap_match_off;
use nebd_upgrade_tests::campaign::{self, CampaignConfig};

#[test]
fn a_client_that_accepts_any_completion_is_found() {
    let config = CampaignConfig {
        environment: vec![("NEBD_TEST_DUPLICATE_COMPLETIONS".into(), "1".into())],
        stall_limit: Duration::from_secs(10),
        ..config("file", 1, 10)
    };
    assert_clean(&campaign::run(config.clone()).unwrap(), 10);
    switch_reap_match_off(true);
    let summary = campaign::run(config).unwrap();
    switch_reap_match_off(false);
    assert!(!summary.is_clean(), "nothing was found: {summary}");
}
