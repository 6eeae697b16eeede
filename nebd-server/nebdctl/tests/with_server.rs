//! Against a real keeper and server. They are built with the workspace; where only this crate is
//! built, these tests say so and pass.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const NEBDCTL: &str = env!("CARGO_BIN_EXE_nebdctl");

/// The server beside this crate's own program.
fn server() -> Option<PathBuf> {
    let server = Path::new(NEBDCTL).parent()?.join("nebd-server");
    if !server.is_file() {
        println!("skipped: {} is not built", server.display());
        return None;
    }
    Some(server)
}

/// A keeper in a directory of its own.
struct Stage {
    directory: tempfile::TempDir,
    keeper: Child,
}

impl Stage {
    fn start() -> Option<Stage> {
        let server = server()?;
        let directory = tempfile::Builder::new().prefix("nebdctl-").tempdir_in("/tmp").unwrap();
        let at = directory.path();
        fs::write(at.join("nebd.toml"), "log = \"warn\"\n[keeper]\nstandby = true\n").unwrap();
        fs::create_dir(at.join("state")).unwrap();
        let keeper = Command::new(server)
            .args(["keeper", "--config", "nebd.toml", "--socket", "s", "--state-dir", "state"])
            .current_dir(at)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let stage = Stage { directory, keeper };
        stage.until("the server answers", || {
            stage.run("status").status.success() && stage.server_pid().is_some()
        });
        Some(stage)
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(NEBDCTL);
        command.arg("--socket").arg(self.directory.path().join("s"));
        command.args(arguments.split_whitespace());
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn server_pid(&self) -> Option<u32> {
        let file = self.directory.path().join("state/server.pid");
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_so() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.keeper.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.keeper.wait();
    }
}

fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().last().unwrap_or_else(|| panic!("no output; {errors}"));
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {text}{errors}"))
}

#[test]
fn volumes_live_through_nebdctl() {
    let Some(stage) = Stage::start() else { return };
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
    let Some(stage) = Stage::start() else { return };
    assert!(stage.run("volume create mem:a --size 16MiB").status.success());
    let load =
        "bench --volume mem:a --op randwrite --queues 2 --iodepth 8 --seconds 4 --verify --json";
    let bench = stage.command(load).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let session = || json(&stage.run("status --json"))["sessions"][0].clone();
    stage.until("the bench is served", || session()["requests"].as_u64() > Some(100));
    let old = stage.server_pid().unwrap();
    let pid = nix::unistd::Pid::from_raw(old as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    stage.until("the client saw a takeover", || session()["takeovers"].as_u64() > Some(0));
    assert!(session()["blackout_worst_us"].as_u64() > Some(0));
    assert_ne!(stage.server_pid(), Some(old));

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
    let Some(stage) = Stage::start() else { return };
    assert!(stage.run("volume create null:a --size 16MiB").status.success());
    let output = stage.run("bench --volume null:a --op write --seconds 1 --verify --json");
    assert_eq!(output.status.code(), Some(4));
    assert!(json(&output)["mismatches"].as_u64() > Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("null:a"));
}

#[test]
fn the_demo_passes_and_cleans_up() {
    if server().is_none() {
        return;
    }
    let directory = tempfile::Builder::new().prefix("nebdctl-").tempdir_in("/tmp").unwrap();
    let output = Command::new(NEBDCTL)
        .args(["demo", "--kills", "3", "--seconds", "3", "--json"])
        .env("TMPDIR", directory.path())
        .env_remove("NEBD_SERVER")
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
