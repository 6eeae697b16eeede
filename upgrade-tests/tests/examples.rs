//! The Rust example, as a user would run it, while its server is killed. (`cargo xtask c-example` does
//! the same with the C example, from the installed header and library.)

mod common;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{build, programs};
use nebd_upgrade_tests::supervisor::{Host, HostConfig};
use nix::sys::signal::Signal;

#[test]
fn the_rust_example_passes_under_kills() {
    let example = build("nebd-client", &["--example", "verified_io"]);
    let host = Host::start(&HostConfig::new(programs().server)).unwrap();
    host.admin().unwrap().create("file:example", 16 << 20, 4096).unwrap();
    let mut child = Command::new(example)
        .args(["file:example", "4"])
        .env("NEBD_SOCKET", host.socket())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut kills = 0;
    while child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(250));
        let victim = host.server_pid().unwrap();
        host.signal(victim, Signal::SIGKILL).unwrap();
        host.wait_for_successor(victim).unwrap();
        kills += 1;
    }
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "after {kills} kills it said:\n{said}");
    assert!(kills >= 5, "only {kills} kills met it");
}
