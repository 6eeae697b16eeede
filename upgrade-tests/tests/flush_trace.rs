//! A flush is an `fdatasync`: seen from outside, with strace, also right after a takeover.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::programs;
use nebd_upgrade_tests::client_device::{AttachOptions, ClientDevice};
use nebd_upgrade_tests::device::{Device, Io, Op};
use nebd_upgrade_tests::supervisor::{Host, HostConfig};
use nix::sys::signal::Signal;

/// Whether strace is there and may trace; says why not.
fn can_trace() -> bool {
    match Command::new("strace").args(["-o", "/dev/null", "true"]).output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("skipped: strace fails: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(error) => {
            eprintln!("skipped: strace cannot be started: {error}");
            false
        }
    }
}

/// A keeper under strace, as if it were the server's program.
fn traced_server(dir: &Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let (script, trace) = (dir.join("nebd-server"), dir.join("trace"));
    let text = format!(
        "#!/bin/sh\nexec strace -D -f -qq -e trace=fdatasync,fsync -e signal=none -o {} {} \"$@\"\n",
        trace.display(),
        programs().server.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script
}

fn syncs(dir: &Path) -> usize {
    let trace = std::fs::read_to_string(dir.join("trace")).unwrap_or_default();
    let is_sync = |line: &&str| line.contains("fdatasync(") || line.contains("fsync(");
    trace.lines().filter(is_sync).count()
}

fn carry_out(device: &mut ClientDevice, op: Op, fua: bool, block: u64) {
    let is_write = op == Op::Write;
    let (offset, length) = if is_write { (block * 4096, 4096) } else { (0, 0) };
    let buffers = if is_write { vec![vec![block as u8; 4096]] } else { Vec::new() };
    device.submit(1, Io { op, fua, offset, length, buffers }).unwrap();
    let (mut done, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(30));
    while done.is_empty() {
        assert!(Instant::now() < deadline, "{op:?} is not answered");
        device.poll(&mut done).unwrap();
        std::thread::sleep(Duration::from_micros(100));
    }
    assert_eq!(done[0].errno, 0);
}

/// Flushes and writes with FUA, each alone, some of them the first request after a takeover; returns
/// for how many of them no sync was seen.
fn unsynced(environment: &[(&str, &str)]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let mut config = HostConfig::new(traced_server(dir.path()));
    config.file_engine = "threads"; // Syncs through io_uring are no system calls.
    for (name, value) in environment {
        config = config.with_env(name, value);
    }
    let host = Host::start(&config).unwrap();
    host.admin().unwrap().create("file:traced", 4 << 20, 4096).unwrap();
    let how = AttachOptions::default();
    let mut device = ClientDevice::open(host.socket(), "file:traced", &how).unwrap();
    let mut unsynced = 0;
    for round in 0..12 {
        carry_out(&mut device, Op::Write, false, round);
        if round % 3 == 2 {
            let victim = host.server_pid().unwrap();
            host.signal(victim, Signal::SIGKILL).unwrap();
            host.wait_for_successor(victim).unwrap();
        }
        let before = syncs(dir.path());
        if round % 2 == 0 {
            carry_out(&mut device, Op::Flush, false, 0);
        } else {
            carry_out(&mut device, Op::Write, true, 100 + round);
        }
        unsynced += usize::from(syncs(dir.path()) == before);
    }
    unsynced
}

#[test]
fn every_flush_and_fua_reaches_the_file_and_the_test_notices_if_not() {
    if !can_trace() {
        return;
    }
    assert_eq!(unsynced(&[]), 0);
    let unsynced = unsynced(&[("NEBD_TEST_FLUSH_OFF", "1")]);
    assert!(unsynced > 6, "with flush switched off only {unsynced} of 12 were missed");
}
