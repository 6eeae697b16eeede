//! What the tests against a real server share.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nebd_rpc::admin::{Upgrade, UpgradeState};
use nebd_upgrade_tests::campaign::{Campaign, CampaignConfig, Summary};
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
pub fn config(backend: &str, sessions: usize, kills: usize) -> CampaignConfig {
    CampaignConfig { sessions, kills, ..CampaignConfig::new(programs(), backend) }
}

/// Nothing was wrong, enough kills met enough writes in flight, and something was done at all.
pub fn assert_clean(summary: &Summary, kills: usize) {
    assert_unharmed(summary, kills);
    assert!(summary.kills_counted >= kills, "{summary}");
    assert!(summary.kills == 0 || summary.writes_in_flight_min >= 8, "{summary}");
}

/// The same of a campaign whose test deals every blow itself: on a busy machine a blow may meet few
/// writes, and `Campaign::kill` does not deal another in its place.
pub fn assert_unharmed(summary: &Summary, kills: usize) {
    assert!(summary.is_clean(), "{summary}");
    assert!(summary.kills >= kills, "{summary}");
    assert!(summary.report.requests > 500 && summary.report.blocks_checked > 500, "{summary}");
    println!("{summary}");
}

/// A program that is another copy of the server, `name`, with this in its environment: whoever starts
/// it has it not, and whoever it starts has it, too.
pub fn server_with(directory: &Path, name: &str, environment: &[(&str, &str)]) -> Program {
    let copy = directory.join(name);
    std::fs::copy(programs().server, &copy).expect("the server can be copied");
    let script = directory.join(format!("{name}.sh"));
    let set: String =
        environment.iter().map(|(name, value)| format!("{name}='{value}' ")).collect();
    let text = format!("#!/bin/sh\n{set}exec {} \"$@\"\n", copy.display());
    std::fs::write(&script, text).expect("a script can be written");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("a script can be made executable");
    Program { started_as: script, runs: copy }
}

/// A program that starts another in its own place.
pub struct Program {
    /// What is started.
    pub started_as: PathBuf,
    /// What the process runs then.
    pub runs: PathBuf,
}

/// The executable of a process.
pub fn executable(pid: i32) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).expect("the process lives")
}

/// Starts a planned takeover by this program.
pub fn upgrade(campaign: &Campaign, binary: &Path, probation: Duration) {
    let operation = format!("{:?}", Instant::now());
    let admin = campaign.host().admin().unwrap();
    admin.start_upgrade_on_probation(operation.as_bytes(), Some(binary), probation).unwrap();
}

/// Waits until the report of the last takeover says that it is in one of these states.
pub fn until(campaign: &Campaign, states: &[UpgradeState]) -> Upgrade {
    let admin = campaign.host().admin().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let report = admin.upgrade().unwrap();
        if states.contains(&report.state()) {
            return report;
        }
        assert!(Instant::now() < deadline, "{report:?}\n{}", campaign.host().log());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until every volume has answered many more requests.
pub fn goes_on(campaign: &Campaign) {
    let gauges = campaign.load().expect("there is load").gauges();
    let count = || gauges.iter().map(|gauges| gauges.completions.load(SeqCst)).collect::<Vec<_>>();
    let before = count();
    let deadline = Instant::now() + Duration::from_secs(60);
    while count().iter().zip(&before).any(|(now, before)| now - before < 100) {
        assert_eq!(campaign.problems(), 0);
        assert!(Instant::now() < deadline, "IO stands still\n{}", campaign.host().log());
        std::thread::sleep(Duration::from_millis(2));
    }
}
