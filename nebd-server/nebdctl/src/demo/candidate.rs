//! The new server of a takeover under way, held by a pidfd: to be killed just when it has work to do.
//!
//! A takeover of a few volumes is over in milliseconds. So the candidate runs in slices: stopped,
//! looked at through the old server's report, let go again, until it is where it is to die.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nebd_rpc::admin::Upgrade;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::connection::Connection;
use crate::demo::process::is_interrupted;
use crate::failure::Failure;
use crate::upgrade;

/// How long it runs at a time.
const SLICE: Duration = Duration::from_micros(200);
/// A takeover that shows no candidate for this long has none.
const LIMIT: Duration = Duration::from_secs(10);
/// Here it has begun its work, and nothing is lost if it dies.
const ON_THE_WAY: [&str; 3] = ["PREPARE", "READY", "FREEZE"];

/// Kills the candidate of this takeover on the way, and tells in which step; none if the takeover was
/// over, or past the point of no return, before it could be met.
pub fn kill_on_the_way(
    connection: &Connection,
    first: Upgrade,
    server: u32,
) -> Result<Option<String>, Failure> {
    let deadline = Instant::now() + LIMIT;
    let mut report = first;
    let candidate = loop {
        match report.to.as_ref().map_or(0, |to| to.pid) {
            _ if upgrade::running(&report).is_none() => return Ok(None),
            0 => {}
            pid => match Candidate::open(pid, server)? {
                Some(candidate) => break candidate,
                None => return Ok(None),
            },
        }
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        if Instant::now() >= deadline {
            return Err(anyhow::anyhow!("the server told no candidate's pid").into());
        }
        report = upgrade::ask(connection)?;
    };
    while Instant::now() < deadline {
        candidate.signal(Signal::STOP);
        // If it is the owner already, nobody answers while it is stopped.
        let Ok(report) = upgrade::ask(connection) else { return Ok(None) };
        match upgrade::running(&report) {
            Some(step) if ON_THE_WAY.contains(&step) => {
                candidate.signal(Signal::KILL);
                return Ok(Some(step.to_owned()));
            }
            Some("HELLO" | "OFFER") => {}
            _ => return Ok(None),
        }
        candidate.signal(Signal::CONT);
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        std::thread::sleep(SLICE);
    }
    Ok(None)
}

/// A process that is let go again when this is dropped.
struct Candidate(OwnedFd);

impl Candidate {
    /// None if it has ended.
    fn open(pid: u32, parent: u32) -> anyhow::Result<Option<Candidate>> {
        let Some(raw) = Pid::from_raw(pid as i32) else { return Ok(None) };
        let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else { return Ok(None) };
        // The descriptor holds whatever has the pid now; the parent tells whether it is the one.
        let found = match parent_of(pid) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.context("cannot look at the candidate")?,
        };
        ensure!(found == Some(parent), "the candidate {pid} is no child of the server {parent}");
        Ok(Some(Candidate(pidfd)))
    }

    /// One that has ended needs no signal.
    fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.0, signal);
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
    }
}

fn parent_of(pid: u32) -> io::Result<Option<u32>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // After the name, which may hold anything: the state, then the parent.
    let rest = stat.rsplit_once(')').map(|(_, rest)| rest);
    Ok(rest.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_child_of_the_server_is_held() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(Candidate::open(child.id(), 1).is_err());
        let candidate = Candidate::open(child.id(), std::process::id()).unwrap().unwrap();
        candidate.signal(Signal::KILL);
        assert!(!child.wait().unwrap().success());
        assert!(Candidate::open(child.id(), std::process::id()).unwrap().is_none());
    }
}
