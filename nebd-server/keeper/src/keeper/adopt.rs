//! A new keeper finds the server of a dead one.
//!
//! ```text
//!   children: serving 17, other 18     18 is killed: a standby, a candidate, or retired
//!   17 alive, same start time ──► wait for REGISTER … FDSTORE … READY from 17 ──► keep it
//!                                   │ it dies: keep the sockets it had sent
//!                                   └ time is over: kill it, start anew
//! ```
//!
//! A candidate that had claimed when both its keeper and the server before it died is killed with the
//! others: who owns the generation is on the host page, and only a server can show us that. What
//! was in the store is then what clients present anew.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;

use super::config::{KeeperConfig, KeeperError};
use super::files::{self, Role};
use super::mailbox::{Change, Mailbox, answer};
use super::process::{Process, kill_unknown};
use crate::names;
use crate::notify::{timespec, wait};

/// How long a killed process may take to be gone; a large one dumps core for seconds.
const DEATH_TIME_MAX: Duration = Duration::from_secs(60);

/// What a registration must have.
const REQUIRED: [&str; 5] = [names::LIFE, names::CLIENT, names::ADMIN, names::HOST, names::PROBE];

/// What servers of a dead keeper left.
#[derive(Default)]
pub(crate) struct Estate {
    /// The server, if it registered.
    pub(crate) server: Option<Process>,
    /// Descriptors of the keeper's own, by name.
    pub(crate) registered: BTreeMap<String, OwnedFd>,
    /// The store.
    pub(crate) store: BTreeMap<String, OwnedFd>,
}

/// Kills what is not to be kept, and waits for the one that is.
pub(crate) fn collect(config: &KeeperConfig, mailbox: &mut Mailbox) -> Result<Estate, KeeperError> {
    let mut kept = None;
    for record in files::read_children(&config.state_dir) {
        let Some(process) = Process::open(record.pid, Some(record.start)) else { continue };
        if record.role == Role::Serving && kept.is_none() {
            kept = Some(process);
        } else {
            bury(&process)?;
        }
    }
    let Some(server) = kept else { return Ok(Estate::default()) };
    tracing::info!(pid = server.pid, "a server of an earlier keeper is alive");
    let mut estate = Estate::default();
    if register(&server, config, mailbox, &mut estate)? {
        estate.server = Some(server);
        return Ok(estate);
    }
    tracing::warn!(pid = server.pid, "it did not register");
    bury(&server)?;
    Ok(estate)
}

fn bury(process: &Process) -> Result<(), KeeperError> {
    process.signal(Signal::KILL);
    let failed = KeeperError::system("wait for the end of a server");
    if wait(&process.pidfd, PollFlags::IN, Some(DEATH_TIME_MAX)).map_err(failed)? {
        return Ok(());
    }
    Err(KeeperError::System {
        action: "get rid of an earlier keeper's server",
        source: std::io::ErrorKind::TimedOut.into(),
    })
}

/// True once the server said READY.
fn register(
    server: &Process,
    config: &KeeperConfig,
    mailbox: &mut Mailbox,
    estate: &mut Estate,
) -> Result<bool, KeeperError> {
    let deadline = Instant::now() + config.adopt_timeout;
    // Of other threads than the one that registers: what went before is held only when all of the
    // store is. Dropped without an answer, they fail.
    let mut barriers = Vec::new();
    loop {
        while let Some(note) =
            mailbox.receive().map_err(KeeperError::system("receive notifications"))?
        {
            if note.pid != server.pid {
                continue;
            }
            match note.change {
                Some(Change::Register(name, fd)) => drop(estate.registered.insert(name, fd)),
                Some(Change::Store(name, fd)) => drop(estate.store.insert(name, fd)),
                Some(Change::Remove(name)) => drop(estate.store.remove(&name)),
                None => {}
            }
            // Too early to watch it; its server, which cannot be told, notices.
            note.candidate.filter(|pid| *pid != 0).into_iter().for_each(kill_unknown);
            barriers.extend(note.barrier);
            // A server that had just started when its keeper died says READY without registering.
            let complete = REQUIRED.iter().all(|name| estate.registered.contains_key(*name));
            if note.ready && complete {
                barriers.into_iter().for_each(answer);
                return Ok(true);
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = [
            PollFd::from_borrowed_fd(mailbox.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(server.pidfd.as_fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(KeeperError::system("wait for a server")(errno)),
        }
        if !fds[1].revents().is_empty() && fds[0].revents().is_empty() {
            return Ok(false);
        }
    }
}
