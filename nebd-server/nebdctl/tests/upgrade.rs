//! Planned takeovers as the operator sees them, with a server that plays each of them.

mod fake;

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use fake::{Fake, Scene};
use nebd_rpc::admin::{
    Blackout, ClientSupport, Server, Upgrade, UpgradeKind, UpgradeState, UpgradeStep,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Status;

fn nebdctl(socket: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nebdctl"))
        .env("NEBD_SOCKET", socket)
        .args(arguments.split_whitespace())
        .output()
        .unwrap()
}

/// Plays the scenes for a command line; checks its exit code; returns both streams.
fn play(scenes: &[Scene], arguments: &str, code: i32) -> (String, String) {
    let fake = Fake::start_playing(scenes.iter().cloned());
    told(&nebdctl(fake.socket(), arguments), code)
}

fn told(output: &Output, code: i32) -> (String, String) {
    let out = String::from_utf8(output.stdout.clone()).unwrap();
    let err = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{out}{err}");
    (out, err)
}

fn json(out: &str) -> serde_json::Value {
    assert_eq!(out.lines().count(), 1, "{out}");
    serde_json::from_str(out).unwrap()
}

fn server(version: &str, pid: u32) -> Server {
    let binary = format!("/opt/nebd-{version}/nebd-server");
    Server { version: version.into(), binary, pid, generation: pid / 10 }
}

/// A report after the first `steps` steps.
fn report(state: UpgradeState, steps: usize) -> Upgrade {
    let names = ["HELLO", "OFFER", "PREPARE", "READY", "FREEZE", "FENCE", "RESUME", "LINGER"];
    let step = |(index, name): (usize, &&str)| UpgradeStep {
        name: (*name).into(),
        at_us: 1204 * index as u64,
        duration_us: 381 * (index as u64 + 1),
        detail: format!("{index} volumes, {index} canary reads"),
    };
    Upgrade {
        state: state.into(),
        from: Some(server("0.1.0", 120)),
        to: Some(server("0.2.0", 340)),
        steps: names.iter().enumerate().map(step).take(steps).collect(),
        ..Upgrade::default()
    }
}

fn tells(state: UpgradeState, steps: usize) -> Scene {
    Scene::Tells(report(state, steps))
}

/// A report that all is over, and how long each of 100 volumes was dark: 100 µs to 10 ms.
fn done() -> Upgrade {
    let blackout = |number: u64| Blackout {
        volume: format!("file:d{number}"),
        session: format!("{number:032x}"),
        blackout_us: number * 100,
    };
    Upgrade { blackouts: (1..=100).map(blackout).collect(), ..report(UpgradeState::Done, 8) }
}

fn client(number: u32, supported: bool) -> ClientSupport {
    ClientSupport {
        session: format!("{number:032x}"),
        volume: format!("file:c{number}"),
        client_pid: 1000 + number,
        client_version: "0.1.0".into(),
        layout_version: 1,
        supported,
        reason: if supported { String::new() } else { "layout 1 has no slots".into() },
    }
}

#[test]
fn an_upgrade_tells_each_step_once_and_the_blackout() {
    let running = |steps| tells(UpgradeState::Running, steps);
    let scenes = [running(0), running(1), running(3), running(3), running(7), Scene::Tells(done())];
    let (out, _) = play(&scenes, "upgrade --probation none", 0);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 8 + 2, "{out}");
    assert_eq!(lines[2].split_whitespace().nth(2), Some("PREPARE"));
    assert!(lines[2].starts_with("     2.408 ms  PREPARE    2 volumes, 2 canary reads "), "{out}");
    assert!(lines[2].ends_with("  1.14 ms"), "{out}");
    assert_eq!(
        lines[8],
        "blackout    100 volume(s): p50 5.00 ms, p99 9.90 ms, worst 10.0 ms (file:d100)"
    );
    assert_eq!(lines[9], "done        0.1.0 (pid 120) → 0.2.0 (pid 340)");
}

#[test]
fn a_connection_that_breaks_in_the_middle_is_made_again() {
    let scenes = [
        Scene::Breaks,
        tells(UpgradeState::Running, 2),
        Scene::Breaks,
        Scene::Breaks,
        tells(UpgradeState::Running, 5),
        Scene::Away(Duration::from_millis(200)),
        Scene::Tells(done()),
    ];
    let fake = Fake::start_playing(scenes);
    let (out, _) = told(&nebdctl(fake.socket(), "upgrade --probation none"), 0);
    assert_eq!(out.lines().count(), 10, "{out}");
    // The answer to the first was lost; the operation is the same one.
    let started = fake.started();
    assert_eq!(started.len(), 2);
    assert_eq!(started[0].operation_id.len(), 16);
    assert_eq!(started[0], started[1]);
}

#[test]
fn a_successor_that_knows_nothing_of_it_is_exit_code_1() {
    let scenes = [tells(UpgradeState::Running, 3), Scene::Breaks, Scene::Knows(Upgrade::default())];
    let (_, err) = play(&scenes, "upgrade", 1);
    assert!(err.contains("knows nothing of this takeover"), "{err}");
    assert!(err.contains(&format!("pid {}", std::process::id())), "{err}");

    let (out, err) = play(&scenes, "upgrade --json", 1);
    let value = json(&out);
    assert_eq!(value["state"], "lost");
    assert_eq!(value["steps"].as_array().unwrap().len(), 3);
    assert!(err.contains("PREPARE"), "the steps are on standard error: {err}");

    let other = Upgrade { operation_id: vec![9; 16].into(), ..done() };
    let scenes = [tells(UpgradeState::Running, 3), Scene::Knows(other)];
    let (_, err) = play(&scenes, "upgrade", 1);
    assert!(err.contains("another one was started since"), "{err}");
}

#[test]
fn a_refusal_says_why_and_what_to_do() {
    let refused = Upgrade {
        reason: "the binary speaks handover 7, this server 1 to 2.\n".into(),
        clients: vec![client(1, true), client(2, false)],
        to: None,
        ..report(UpgradeState::Refused, 1)
    };
    let (out, err) = play(&[Scene::Tells(refused.clone())], "upgrade", 1);
    assert!(
        err.contains("upgrade refused: the binary speaks handover 7, this server 1 to 2. "),
        "{err}"
    );
    assert!(err.contains("Nothing was moved, 0.1.0 (pid 120) serves on"), "{err}");
    assert!(err.contains("--dry-run"), "{err}");
    assert!(out.contains("layout 1 has no slots"), "{out}");
    let (out, _) = play(&[Scene::Tells(refused)], "rollback --json", 1);
    let value = json(&out);
    assert_eq!((&value["kind"], &value["state"]), (&"rollback".into(), &"refused".into()));
    assert!(value["to"].is_null());

    // The same as an error of the call.
    let refusal = Status::failed_precondition("another upgrade is under way");
    let fake = Fake::start_refusing_takeovers(refusal);
    let (out, err) = told(&nebdctl(fake.socket(), "upgrade --json"), 1);
    assert!(
        err.contains("upgrade refused: another upgrade is under way. Nothing was moved"),
        "{err}"
    );
    assert_eq!(json(&out)["state"], "refused");
    assert_eq!(json(&out)["reason"], "another upgrade is under way");
    let fake = Fake::start_refusing_takeovers(Status::unimplemented(""));
    let (_, err) = told(&nebdctl(fake.socket(), "rollback"), 1);
    assert!(err.contains("older than this nebdctl"), "{err}");

    // Somebody else's takeover comes as the answer.
    let other = Upgrade {
        operation_id: vec![9; 16].into(),
        kind: UpgradeKind::Upgrade.into(),
        ..report(UpgradeState::Running, 2)
    };
    let (_, err) = play(&[Scene::Knows(other)], "upgrade", 1);
    assert!(err.contains("another takeover comes first: upgrade under way, in PREPARE"), "{err}");
}

#[test]
fn a_failure_on_the_way_names_the_step_and_who_serves() {
    let failed = Upgrade {
        reason: "the candidate was killed by SIGKILL".into(),
        ..report(UpgradeState::Failed, 3)
    };
    let scenes = [tells(UpgradeState::Running, 1), Scene::Tells(failed)];
    let (out, err) = play(&scenes, "upgrade", 1);
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(err.contains("failed at PREPARE: the candidate was killed by SIGKILL. "), "{err}");
    assert!(err.contains("0.1.0 (pid 120) serves on"), "{err}");
}

#[test]
fn a_probation_is_waited_for_unless_told_otherwise() {
    let probation = |left: u64| {
        let report = Upgrade { probation_left_ms: left, ..done() };
        Scene::Tells(Upgrade { state: UpgradeState::Probation.into(), ..report })
    };
    let scenes =
        [tells(UpgradeState::Running, 8), probation(60_000), probation(20), Scene::Tells(done())];
    let fake = Fake::start_playing(scenes.clone());
    let (out, _) = told(&nebdctl(fake.socket(), "upgrade --canary file:d7"), 0);
    assert_eq!(out.matches("0.2.0 (pid 340) serves, on probation for 1 min").count(), 1, "{out}");
    assert!(out.contains("done "), "{out}");
    let started = &fake.started()[0];
    assert_eq!((started.probation_ms, started.canary.as_str()), (60_000, "file:d7"));
    assert_eq!((started.kind(), started.binary.as_str()), (UpgradeKind::Upgrade, ""));

    let (out, _) = play(&scenes, "upgrade --probation 5min --no-wait", 0);
    assert!(out.contains("nebdctl rollback") && !out.contains("done "), "{out}");
    let (out, _) = play(&scenes, "upgrade --no-wait --json", 0);
    assert_eq!(json(&out)["state"], "probation");
    assert_eq!(json(&out)["probation_left_ms"], 60_000);
}

#[test]
fn on_a_terminal_a_live_line_counts_down() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("skipped: script (bsdutils) is not here to make a terminal");
        return;
    }
    let probation = |left: u64| {
        let report = Upgrade { state: UpgradeState::Probation.into(), ..done() };
        Scene::Tells(Upgrade { probation_left_ms: left, ..report })
    };
    let mut scenes = vec![tells(UpgradeState::Running, 2); 20];
    scenes.extend((1..=20).rev().map(|left| probation(left * 1000)));
    scenes.push(Scene::Tells(done()));
    let fake = Fake::start_playing(scenes);
    let output = Command::new("script")
        .env("NEBD_SOCKET", fake.socket())
        .env("TERM", "xterm")
        .args(["-qec", &format!("{} upgrade", env!("CARGO_BIN_EXE_nebdctl")), "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (out, _) = told(&output, 0);
    assert!(out.contains("PREPARE, "), "{out}");
    assert!(out.contains(" s left, blackout p50 5.00 ms"), "{out}");
    assert!(out.trim_end().ends_with("done        0.1.0 (pid 120) → 0.2.0 (pid 340)"), "{out}");
}

#[test]
fn a_failed_probation_is_exit_code_1() {
    let back = Upgrade {
        reason: "file:d7: p99 of reads rose from 1 ms to 80 ms".into(),
        ..report(UpgradeState::RolledBack, 8)
    };
    let (_, err) =
        play(&[tells(UpgradeState::Running, 2), Scene::Tells(back.clone())], "upgrade", 1);
    assert!(err.contains("upgrade rolled back: file:d7: p99 of reads"), "{err}");
    assert!(err.contains("/opt/nebd-0.1.0/nebd-server serves again"), "{err}");
    let (out, _) = play(&[Scene::Tells(back)], "upgrade --json", 1);
    assert_eq!(json(&out)["state"], "rolled_back");
}

#[test]
fn the_json_has_everything() {
    let scenes = [tells(UpgradeState::Running, 2), Scene::Tells(done())];
    let (out, err) = play(&scenes, "upgrade --json", 0);
    let value = json(&out);
    assert_eq!(value["operation_id"].as_str().unwrap().len(), 32);
    assert_eq!((&value["kind"], &value["state"]), (&"upgrade".into(), &"done".into()));
    assert!(value["reason"].is_null());
    assert_eq!(value["from"]["binary"], "/opt/nebd-0.1.0/nebd-server");
    assert_eq!((&value["to"]["pid"], &value["to"]["generation"]), (&340.into(), &34.into()));
    assert_eq!(value["steps"][2]["name"], "PREPARE");
    assert_eq!(value["steps"][2]["at_us"], 2408);
    assert_eq!(value["steps"][2]["duration_us"], 1143);
    assert_eq!(value["blackouts"].as_array().unwrap().len(), 100);
    let blackout = &value["blackout_us"];
    assert_eq!((&blackout["p50"], &blackout["p99"]), (&5000.into(), &9900.into()));
    assert_eq!((&blackout["worst"], &blackout["volumes"]), (&10_000.into(), &100.into()));
    assert_eq!(blackout["worst_volume"], "file:d100");
    assert_eq!(err.lines().count(), 8, "{err}");
}

#[test]
fn a_check_is_a_table_and_fails_if_a_client_is_not_supported() {
    let clients = |supported| {
        let clients = vec![client(1, true), client(2, supported), client(3, true)];
        [Scene::Tells(Upgrade { clients, ..report(UpgradeState::Done, 1) })]
    };
    let fake = Fake::start_playing(clients(true));
    let (out, _) = told(&nebdctl(fake.socket(), "upgrade --check"), 0);
    assert!(out.contains("supports all of 3 session(s)"), "{out}");
    let started = &fake.started()[0];
    assert_eq!((started.kind(), started.probation_ms), (UpgradeKind::Check, 0));

    let (out, err) = play(&clients(false), "upgrade --check", 1);
    let table: Vec<&str> = out.lines().skip_while(|line| !line.starts_with("SESSION")).collect();
    let header = "SESSION   VOLUME   CLIENT PID  CLIENT VERSION  LAYOUT  SUPPORTED  REASON";
    let row =
        "00000000  file:c2        1002  0.1.0                1  NO         layout 1 has no slots";
    assert_eq!(table[..2], [header, row], "{out}");
    assert!(table[2].contains("file:c1") && table[3].contains("yes"), "{out}");
    let counted = "0.2.0 (/opt/nebd-0.2.0/nebd-server) does not support 1 of 3 session(s)";
    assert!(err.contains(counted), "{err}");
    let (out, _) = play(&clients(false), "upgrade --check --json", 1);
    assert_eq!(json(&out)["clients"][1]["supported"], false);
    assert_eq!(json(&out)["clients"][1]["reason"], "layout 1 has no slots");
}

#[test]
fn a_dry_run_that_finds_nothing_is_exit_code_0() {
    let fake = Fake::start_playing([tells(UpgradeState::Done, 4)]);
    let (out, _) = told(&nebdctl(fake.socket(), "upgrade --dry-run"), 0);
    assert!(out.contains("could take over; 0.1.0 (pid 120) serves on"), "{out}");
    assert_eq!(fake.started()[0].kind(), UpgradeKind::DryRun);
    let fake = Fake::start_playing([Scene::Tells(done())]);
    told(&nebdctl(fake.socket(), "rollback"), 0);
    assert_eq!(fake.started()[0].kind(), UpgradeKind::Rollback);
}

#[test]
fn the_new_server_is_looked_at_before_it_is_asked_for() {
    let fake = Fake::start_playing([Scene::Tells(done())]);
    let directory = tempfile::tempdir().unwrap();
    let run = |binary: &Path, code| {
        told(&nebdctl(fake.socket(), &format!("upgrade --binary {}", binary.display())), code).1
    };
    let missing = run(&directory.path().join("none"), 1);
    assert!(missing.contains("none: No such file"), "{missing}");
    assert!(run(directory.path(), 1).contains("is no file"));
    let file = directory.path().join("new");
    std::fs::write(&file, "").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(run(&file, 1).contains("chmod +x"));
    assert!(fake.started().is_empty());
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_nebdctl"))
        .env("NEBD_SOCKET", fake.socket())
        .current_dir(directory.path())
        .args(["upgrade", "--binary", "new", "--probation", "1s"])
        .output()
        .unwrap();
    told(&output, 0);
    let file = std::fs::canonicalize(&file).unwrap();
    assert_eq!(fake.started()[0].binary, file.to_str().unwrap());
}

#[test]
fn an_interrupt_says_that_the_takeover_goes_on() {
    let fake = Fake::start_playing([tells(UpgradeState::Running, 3)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_nebdctl"))
        .env("NEBD_SOCKET", fake.socket())
        .args(["upgrade", "--json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    // Once a step is told, the signal is noted.
    assert!(lines.next().unwrap().contains("HELLO"));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("the takeover goes on")), "{rest:?}");
}

#[test]
fn the_command_line_is_checked_and_documented() {
    for command in [
        "upgrade --check --dry-run",
        "upgrade --probation 60",
        "upgrade --canary ../x",
        "rollback x",
    ] {
        told(&nebdctl(Path::new("/nonexistent"), command), 2);
    }
    told(&nebdctl(Path::new("/nonexistent"), "upgrade"), 3);
    let (help, _) = told(&nebdctl(Path::new("/nonexistent"), "upgrade --help"), 0);
    for word in ["rolled_back", "blackout_us", "worst_volume", "operation_id", "goes on"] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn the_status_tells_of_the_last_takeover_in_one_line() {
    let line = |scene: Scene| {
        let (out, _) = play(&[scene], "status", 0);
        out.lines().find(|line| line.starts_with("upgrade ")).map(str::to_owned)
    };
    assert_eq!(line(Scene::Knows(Upgrade::default())), None);
    assert_eq!(line(Scene::IsOld), None);
    let known =
        |report: Upgrade| Scene::Knows(Upgrade { kind: UpgradeKind::Upgrade.into(), ..report });
    let text = line(known(done())).unwrap();
    assert!(
        text.contains("upgrade done: 0.1.0 (pid 120) → 0.2.0 (pid 340), blackout p50"),
        "{text}"
    );
    let probation =
        Upgrade { state: UpgradeState::Probation.into(), probation_left_ms: 42_100, ..done() };
    let text = line(known(probation)).unwrap();
    assert!(text.contains("probation, 43 s left") && text.contains("nebdctl rollback"), "{text}");
    let failed = Upgrade { reason: "no fds".into(), ..report(UpgradeState::Failed, 2) };
    assert!(
        line(known(failed))
            .unwrap()
            .ends_with("upgrade failed: 0.1.0 (pid 120) → 0.2.0 (pid 340): no fds")
    );
    let (out, _) = play(&[known(done())], "status --json", 0);
    assert_eq!(json(&out)["upgrade"]["state"], "done");
    let (out, _) = play(&[], "status --json", 0);
    assert!(json(&out)["upgrade"].is_null());
}
