//! Servers of different versions take over from each other, forwards and back, under load.
//!
//! The base is the commit in `tests/base-commit`: the first with planned takeovers. It differs from
//! what follows in real fields: it knows no `Connections` message of the handover (clients connect
//! again), no `blackout_generation` in a region, and keeps no counters in ledgers.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{assert_clean, config, programs};
use nebd_upgrade_tests::campaign::{Campaign, CampaignConfig, Kill};

fn git(arguments: &[&str]) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Builds the base's server, once a target directory; `None` without the history to build it from.
fn base() -> Option<PathBuf> {
    let commit = include_str!("base-commit").trim();
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("base-{}", &commit[..12]));
    let program = scratch.join("target/debug/nebd-server");
    if program.exists() {
        return Some(program);
    }
    git(&["cat-file", "-e", &format!("{commit}^{{commit}}")])?;
    std::fs::create_dir_all(scratch.join("source")).unwrap();
    let archive = scratch.join("source.tar");
    git(&["archive", "--output", archive.to_str().unwrap(), commit])?;
    let unpacked = Command::new("tar")
        .args(["-xf", archive.to_str().unwrap(), "-C"])
        .arg(scratch.join("source"))
        .status();
    assert!(unpacked.unwrap().success());
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .current_dir(scratch.join("source"))
        .args(["build", "--locked", "-p", "nebd-server", "--features", "test-hooks"])
        .arg("--target-dir")
        .arg(scratch.join("target"))
        .status();
    assert!(built.unwrap().success(), "the base does not build");
    Some(program)
}

/// base → head → base → head, with deaths in between, the clients attached all the time.
#[test]
fn versions_take_over_from_each_other_forwards_and_back() {
    let Some(base) = base() else {
        eprintln!(
            "skipped: this checkout has no history to build the base from (git fetch --unshallow)"
        );
        return;
    };
    for backend in ["file", "mem", "fence-test"] {
        let head = programs();
        let mut older = config(backend, 3, 1);
        older.programs.server = base.clone();
        let config = CampaignConfig { ..older };
        let mut campaign = Campaign::start(config).unwrap();
        for _ in 0..3 {
            campaign.kill(&Kill::TakeoverBy(head.server.clone())).unwrap();
            campaign.kill(&Kill::SIGKILL).unwrap();
            campaign.kill(&Kill::TakeoverBy(base.clone())).unwrap();
            campaign.kill(&Kill::SIGKILL).unwrap();
        }
        campaign.kill(&Kill::TakeoverBy(head.server)).unwrap();
        assert_clean(&campaign.finish(), 13);
    }
}
