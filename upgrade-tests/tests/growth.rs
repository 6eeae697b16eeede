//! Keeper, servers, standby and client hold after many takeovers what they held after a few. The
//! long run: `upgrade-tests soak --kind planned --kills 5000 --standby --sessions 4 --growth 100`.

mod common;

use common::{assert_clean, config};
use nebd_upgrade_tests::campaign::{self, CampaignConfig, Kill};

// The only test here: the client is this process.
#[test]
fn nothing_grows_over_40_planned_takeovers_and_40_deaths() {
    let config = CampaignConfig {
        kinds: vec![Kill::Takeover, Kill::SIGKILL],
        depth: 16,
        standby: true,
        pause_ms_max: 5,
        growth_window: 10,
        ..config("file", 3, 80)
    };
    let summary = campaign::run(config).unwrap();
    assert_clean(&summary, 80);
    assert!(!summary.has_grown(), "{summary}");
    for role in ["client", "keeper", "server after planned", "server after sigkill", "standby"] {
        let looked = |figure: &str| {
            let compared = summary.growth.iter();
            let found = compared.filter(|c| c.role == role && c.figure == figure);
            found.filter(|c| c.first.least > 0 && c.last.least > 0).count()
        };
        assert_eq!((looked("descriptors"), looked("threads")), (1, 1), "{role}: {summary}");
    }
}
