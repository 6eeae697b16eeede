//! `nebdctl top` against a real keeper and server.

mod server;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;
use server::{Stage, json};

fn load(stage: &Stage, seconds: u32) -> Child {
    assert!(stage.run("volume create mem:a --size 16MiB").status.success());
    let load =
        format!("bench --volume mem:a --op randwrite --iodepth 8 --seconds {seconds} --json");
    let bench = stage.command(&load).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let requests = || json(&stage.run("status --json"))["sessions"][0]["requests"].as_u64();
    stage.until("the bench is served", || requests() > Some(100));
    bench
}

fn end(mut bench: Child) {
    let _ = bench.kill();
    bench.wait().unwrap();
}

#[test]
fn one_look_tells_what_goes_on() {
    let stage = Stage::start();
    assert!(stage.run("volume create null:idle --size 16MiB").status.success());
    let bench = load(&stage, 60);
    let output = stage.run("top --once --json --interval 0.5");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), 1);
    let report = json(&output);
    let [busy, idle] = &report["volumes"].as_array().unwrap()[..] else { panic!("{report}") };
    assert_eq!((&busy["name"], &idle["name"]), (&"mem:a".into(), &"null:idle".into()));
    for field in ["iops", "write_bytes_per_s", "latency_p50_us", "latency_p99_us"] {
        assert!(busy[field].as_f64() > Some(0.0), "{field}: {report}");
    }
    assert_eq!((busy["read_bytes_per_s"].as_f64(), busy["errors"].as_u64()), (Some(0.0), Some(0)));
    assert!(busy["latency_p99_us"].as_f64() >= busy["latency_p50_us"].as_f64());
    assert_eq!((busy["sessions"].as_u64(), idle["sessions"].as_u64()), (Some(1), Some(0)));
    assert_eq!(report["total"]["iops"], busy["iops"]);
    assert!(idle["latency_p50_us"].is_null() && report["last_takeover"].is_null());

    let text = stage.run("top --once --interval 0.2").stdout;
    let text = String::from_utf8(text).unwrap();
    for part in ["generation 1", "no takeovers", "mem:a", "null:idle", "total"] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    end(bench);
}

#[test]
fn it_goes_on_over_a_kill_and_counts_no_backwards() {
    let stage = Stage::start();
    let bench = load(&stage, 60);
    let mut top = stage
        .command("top --json --interval 0.1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let mut requests = 0;
    let mut check = |report: &Value| {
        let line = &report["volumes"][0];
        let now = line["requests"].as_u64().unwrap();
        assert!(now >= requests, "{requests} {report}");
        requests = now;
        // What a mem volume of a test never reaches; a counter that fell would be beyond it.
        assert!((0.0..1e8).contains(&line["iops"].as_f64().unwrap()), "{report}");
    };
    for _ in 0..3 {
        check(&next());
    }
    stage.kill_server();
    loop {
        let report = next();
        check(&report);
        if report["generation"] == 2 && report["volumes"][0]["iops"].as_f64() > Some(0.0) {
            assert_eq!(report["last_takeover"]["kind"], "killed");
            assert_eq!(report["takeovers"], 1);
            if report["last_takeover"]["blackout_us"].as_u64() > Some(0) {
                break;
            }
        }
    }
    kill(Pid::from_raw(top.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(top.wait().unwrap().code(), Some(0));
    end(bench);
}

#[test]
fn the_terminal_is_given_back() {
    let stage = Stage::start();
    assert!(stage.run("volume create null:shown --size 16MiB").status.success());
    for quit in [None, Some(Signal::SIGINT), Some(Signal::SIGTERM)] {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let size = Winsize { ws_row: 12, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size).unwrap();
        let modes = tcgetattr(&slave).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON));

        let mut top = stage
            .command("top --interval 0.1")
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let screen = File::from(master);
        let read = |shown: &mut String| {
            let mut bytes = [0; 4096];
            let count = (&screen).read(&mut bytes).unwrap();
            shown.push_str(&String::from_utf8_lossy(&bytes[..count]));
        };
        let mut shown = String::new();
        while shown.matches("null:shown").count() < 3 {
            read(&mut shown);
        }
        assert!(shown.starts_with("\x1b[?1049h\x1b[?25l"), "{shown:?}");
        assert!(!tcgetattr(&slave).unwrap().local_modes.contains(LocalModes::ECHO));
        match quit {
            Some(signal) => kill(Pid::from_raw(top.id() as i32), signal).unwrap(),
            None => (&screen).write_all(b"q").unwrap(),
        }
        // Read on, so that nothing it writes has to wait.
        while !shown.ends_with("\x1b[?25h\x1b[?1049l") {
            read(&mut shown);
        }
        assert_eq!(top.wait().unwrap().code(), Some(0));
        assert_eq!(tcgetattr(&slave).unwrap().local_modes, modes);
    }
}
