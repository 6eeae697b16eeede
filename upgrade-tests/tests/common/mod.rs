//! What the tests against a real server share.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nebd_upgrade_tests::campaign::{CampaignConfig, Summary};
use nebd_upgrade_tests::supervisor::{Programs, SERVER_ENV};

/// The programs under test: a `nebd-server` with the feature `test-hooks`, and our own.
pub fn programs() -> Programs {
    static SERVER: OnceLock<PathBuf> = OnceLock::new();
    let server = SERVER.get_or_init(|| match std::env::var_os(SERVER_ENV) {
        Some(path) => path.into(),
        None => build("nebd-server", &["--bin", "nebd-server", "--features", "test-hooks"]),
    });
    Programs { server: server.clone(), fence_store: env!("CARGO_BIN_EXE_fence-store").into() }
}

/// Builds a program of the workspace, and keeps a copy that no later build with other features
/// puts aside.
pub fn build(package: &str, arguments: &[&str]) -> PathBuf {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = scratch.parent().expect("the scratch directory is in the target directory");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--message-format=json", "--package", package])
        .args(arguments)
        .arg("--target-dir")
        .arg(target)
        .output()
        .expect("cargo can be started");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let built = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
        .next_back()
        .expect("cargo says where it put the program");
    let name = built.file_name().expect("a program has a name").to_string_lossy().into_owned();
    let kept = scratch.join(format!("{name}-kept"));
    let fresh = scratch.join(format!("{name}-{}", std::process::id()));
    std::fs::copy(&built, &fresh).expect("the program can be copied");
    std::fs::rename(&fresh, &kept).expect("the copy can be put in place");
    kept
}

/// A campaign's configuration for these tests.
#[allow(dead_code)]
pub fn config(backend: &str, sessions: usize, kills: usize) -> CampaignConfig {
    CampaignConfig { sessions, kills, ..CampaignConfig::new(programs(), backend) }
}

/// Nothing was wrong, every kill counted, and something was done at all.
#[allow(dead_code)]
pub fn assert_clean(summary: &Summary, kills: usize) {
    assert!(summary.is_clean(), "{summary}");
    assert!(summary.kills_counted >= kills, "{summary}");
    assert!(summary.kills == 0 || summary.writes_in_flight_min >= 8, "{summary}");
    assert!(summary.report.requests > 500 && summary.report.blocks_checked > 500, "{summary}");
    println!("{summary}");
}
