//! Volumes, bench and demo against a real keeper and server.

mod server;

use std::fs;
use std::process::{Command, Stdio};

use server::{NEBDCTL, Stage, json, server};

#[test]
fn volumes_live_through_nebdctl() {
    let stage = Stage::start();
    assert_eq!(json(&stage.run("volume create mem:a --size 8MiB --json"))["size_bytes"], 8 << 20);
    assert_eq!(stage.run("volume create mem:a --size 8MiB").status.code(), Some(1));
    assert_eq!(stage.run("volume unpark mem:a").status.code(), Some(1));
    assert_eq!(stage.run("volume resize mem:a --size 4MiB").status.code(), Some(1));
    assert_eq!(stage.run("volume delete mem:b").status.code(), Some(1));
    assert_eq!(stage.run("bench --volume mem:b --seconds 1").status.code(), Some(1));
    assert_eq!(stage.run("volume delete mem:a").status.code(), Some(0));
    assert_eq!(json(&stage.run("volume list --json"))["volumes"].as_array().unwrap().len(), 0);
}

#[test]
fn bench_finds_no_error_while_the_server_is_killed_and_status_tells_of_it() {
    let stage = Stage::start();
    assert!(stage.run("volume create mem:a --size 16MiB").status.success());
    let load =
        "bench --volume mem:a --op randwrite --queues 2 --iodepth 8 --seconds 4 --verify --json";
    let bench = stage.command(load).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let session = || json(&stage.run("status --json"))["sessions"][0].clone();
    stage.until("the bench is served", || session()["requests"].as_u64() > Some(100));
    stage.kill_server();
    stage.until("the client saw a takeover", || session()["takeovers"].as_u64() > Some(0));
    assert!(session()["blackout_worst_us"].as_u64() > Some(0));

    let output = bench.wait_with_output().unwrap();
    let report = json(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!((report["errors"].as_u64(), report["mismatches"].as_u64()), (Some(0), Some(0)));
    for field in ["iops", "mib_per_s", "blackout_ms_max"] {
        assert!(report[field].as_f64() > Some(0.0), "{field}: {report}");
    }
    for field in ["p50", "p99", "p99_9", "max"] {
        assert!(report["latency_us"][field].as_f64() > Some(0.0), "{field}: {report}");
    }
    assert!(report["cpu_s"]["client"].is_f64() && report["cpu_s"]["server"].is_f64(), "{report}");
}

#[test]
fn a_verified_bench_of_a_volume_that_forgets_is_exit_code_4() {
    let stage = Stage::start();
    assert!(stage.run("volume create null:a --size 16MiB").status.success());
    let output = stage.run("bench --volume null:a --op write --seconds 1 --verify --json");
    assert_eq!(output.status.code(), Some(4));
    assert!(json(&output)["mismatches"].as_u64() > Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("null:a"));
}

#[test]
fn the_demo_passes_and_cleans_up() {
    let directory = tempfile::Builder::new().prefix("nebdctl-").tempdir_in("/tmp").unwrap();
    let output = Command::new(NEBDCTL)
        .args(["demo", "--kills", "3", "--seconds", "3", "--json"])
        .env("TMPDIR", directory.path())
        .env("NEBD_SERVER", server())
        .output()
        .unwrap();
    let report = json(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!((report["errors"].as_u64(), report["mismatches"].as_u64()), (Some(0), Some(0)));
    assert!(report["requests"].as_u64() > Some(0) && report["iops"].as_f64() > Some(0.0));
    let events = report["events"].as_array().unwrap();
    let counted = |event: &&serde_json::Value| event["writes_in_flight"].as_u64() >= Some(8);
    assert!(events.iter().filter(counted).count() >= 3, "{report}");
    assert!(events.iter().all(|event| event["kind"] == "sigkill"));
    assert!(events.iter().all(|event| event["blackout_ms"].as_f64() > Some(0.0)));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "something was left behind");
}

#[test]
fn the_demo_of_upgrades_shows_each_kind_once_and_cleans_up() {
    let directory = tempfile::Builder::new().prefix("nebdctl-").tempdir_in("/tmp").unwrap();
    let output = Command::new(NEBDCTL)
        .args(["demo", "--upgrade", "--seconds", "3", "--json"])
        .env("TMPDIR", directory.path())
        .env("NEBD_SERVER", server())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{told}");
    let report = json(&output);
    assert_eq!((report["errors"].as_u64(), report["mismatches"].as_u64()), (Some(0), Some(0)));
    let events = report["events"].as_array().unwrap();
    let kinds: Vec<_> = events.iter().map(|event| event["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["planned", "refused", "rolled-back", "sigkill"], "{report}");
    for event in events {
        let is_moved = event["pid"] != event["successor_pid"];
        let moves = event["kind"] == "planned" || event["kind"] == "sigkill";
        assert_eq!(is_moved, moves, "{event}");
        assert!(event["blackout_ms"].as_f64() > Some(0.0), "{event}");
        assert!(event["writes_in_flight"].as_u64() >= Some(8), "{event}");
    }
    assert!(events[1]["detail"].as_str().unwrap().contains("is it a nebd-server"), "{report}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "something was left behind");
}
