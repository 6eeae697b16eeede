//! The process that takes a dead server's memory down: it keeps nothing else alive, ends by itself,
//! and is not needed.

mod common;

use std::fs;

use common::programs;
use nebd_upgrade_tests::supervisor::{Host, HostConfig};
use nix::sys::signal::Signal;

/// Living and dead (zombie) holders whose parent is this process.
fn holders_of(parent: i32) -> Vec<i32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((name, rest)) = stat.rsplit_once(')') else { return false };
        // After the name: state and parent.
        name.ends_with("(nebd-memory")
            && rest.split_ascii_whitespace().nth(1) == Some(&parent.to_string())
    })
    .collect()
}

#[test]
fn a_holder_keeps_no_descriptor_but_its_server_s() {
    let host = Host::start(&HostConfig::new(programs().server)).unwrap();
    let server = host.server_pid().unwrap();
    let [holder] = holders_of(server)[..] else { panic!("{:?}", holders_of(server)) };
    let fds: Vec<_> = fs::read_dir(format!("/proc/{holder}/fd")).unwrap().flatten().collect();
    assert_eq!(fds.len(), 1, "{fds:?}");
    let target = fs::read_link(fds[0].path()).unwrap();
    assert!(target.to_string_lossy().contains("pidfd"), "{target:?}");
}

#[test]
fn holders_end_after_their_servers_and_leave_no_zombies() {
    let config = HostConfig { standby: true, ..HostConfig::new(programs().server) };
    let host = Host::start(&config).unwrap();
    let mut server = host.server_pid().unwrap();
    for _ in 0..8 {
        let [holder] = holders_of(server)[..] else { panic!("{:?}", holders_of(server)) };
        host.signal(server, Signal::SIGKILL).unwrap();
        server = host.wait_for_successor(server).unwrap();
        host.wait_for("the end of the dead server's holder", |_| {
            !fs::exists(format!("/proc/{holder}")).unwrap()
        })
        .unwrap();
    }
    let orphans = holders_of(host.keeper_pid() as i32);
    assert!(orphans.is_empty(), "nobody took note of {orphans:?}");
    assert_eq!(holders_of(server).len(), 1);
}

#[test]
fn a_server_lives_and_dies_well_without_its_holder() {
    let host = Host::start(&HostConfig::new(programs().server)).unwrap();
    let server = host.server_pid().unwrap();
    for holder in holders_of(server) {
        host.signal(holder, Signal::SIGKILL).unwrap();
    }
    host.admin().unwrap().create("null:still-served", 1 << 20, 4096).unwrap();
    host.signal(server, Signal::SIGKILL).unwrap();
    let successor = host.wait_for_successor(server).unwrap();
    assert_eq!(holders_of(successor).len(), 1);
}
