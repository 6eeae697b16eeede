//! A new keeper finds the server of a dead one.
//!
//! ```text
//!   children: serving 17, other 18     18 is killed: a standby, or retired
//!   17 alive, same start time ──► wait for REGISTER … FDSTORE … READY from 17 ──► keep it
//!                                   │ it dies: keep the sockets it had sent
//!                                   └ time is over: kill it, start anew
//! ```
//!
//! The keeper may have died while a candidate was about to take over. Either of the two may be the
//! server now, and the old one registers even if it is not. The host page, which comes with a
//! registration, says who owns the generation: that one is kept, once it registers, and the other is
//! killed. A candidate that claims just before it is killed leaves a server that has lost, and exits:
//! that is followed like any death.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nebd_abi::host::HostPage;
use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;

use super::config::{KeeperConfig, KeeperError};
use super::files::{self, Role};
use super::mailbox::{Change, Mailbox, Notification, answer};
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

impl Estate {
    /// What a dead one had sent, where nobody else had.
    fn inherit(&mut self, dead: Contender) {
        if self.registered.is_empty() && self.store.is_empty() {
            self.registered = dead.registered;
            self.store = dead.store;
        }
    }
}

/// A process that may be the server, and what it has sent.
struct Contender {
    process: Process,
    registered: BTreeMap<String, OwnedFd>,
    store: BTreeMap<String, OwnedFd>,
    /// Of other threads than the one that registers: what went before is held only when all of the
    /// store is. Dropped without an answer, they fail.
    barriers: Vec<OwnedFd>,
}

impl Contender {
    fn new(process: Process) -> Contender {
        Contender {
            process,
            registered: BTreeMap::new(),
            store: BTreeMap::new(),
            barriers: Vec::new(),
        }
    }

    /// True once all is there and it has said READY.
    fn take(&mut self, note: Notification) -> bool {
        match note.change {
            Some(Change::Register(name, fd)) => drop(self.registered.insert(name, fd)),
            Some(Change::Store(name, fd)) => drop(self.store.insert(name, fd)),
            Some(Change::Remove(name)) => drop(self.store.remove(&name)),
            None => {}
        }
        // Too early to watch it; its server, which cannot be told, notices.
        note.candidate.filter(|pid| *pid != 0).into_iter().for_each(kill_unknown);
        self.barriers.extend(note.barrier);
        // A server that had just started when its keeper died says READY without registering.
        note.ready && REQUIRED.iter().all(|name| self.registered.contains_key(*name))
    }

    /// Whether the generation is its own.
    fn is_owner(&self) -> Result<bool, KeeperError> {
        let Some(fd) = self.registered.get(names::HOST) else { return Ok(false) };
        let fd = fd.try_clone().map_err(KeeperError::system("duplicate the host page"))?;
        Ok(i32::try_from(HostPage::open(fd)?.owner_pid()) == Ok(self.process.pid))
    }
}

/// Kills what is not to be kept, and waits for the one that is.
pub(crate) fn collect(config: &KeeperConfig, mailbox: &mut Mailbox) -> Result<Estate, KeeperError> {
    let mut contenders = Vec::new();
    for record in files::read_children(&config.state_dir) {
        let Some(process) = Process::open(record.pid, Some(record.start)) else { continue };
        match record.role {
            Role::Other => bury(&process)?,
            Role::Serving | Role::Candidate => contenders.push(Contender::new(process)),
        }
    }
    let mut estate = Estate::default();
    let deadline = Instant::now() + config.adopt_timeout;
    for contender in &contenders {
        tracing::info!(pid = contender.process.pid, "a server of an earlier keeper is alive");
    }
    while !contenders.is_empty() {
        let Some(index) = next_to_decide(&mut contenders, mailbox, deadline)? else {
            tracing::warn!("nobody registered");
            break;
        };
        let contender = contenders.swap_remove(index);
        if !contender.process.is_dead() && contender.is_owner()? {
            contenders.iter().try_for_each(|other| bury(&other.process))?;
            contender.barriers.into_iter().for_each(answer);
            let Contender { process, registered, store, .. } = contender;
            return Ok(Estate { server: Some(process), registered, store });
        }
        bury(&contender.process)?;
        estate.inherit(contender);
    }
    for contender in contenders {
        bury(&contender.process)?;
        estate.inherit(contender);
    }
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

/// The contender that has registered, or is dead; `None` when the time is over.
fn next_to_decide(
    contenders: &mut [Contender],
    mailbox: &mut Mailbox,
    deadline: Instant,
) -> Result<Option<usize>, KeeperError> {
    loop {
        while let Some(note) =
            mailbox.receive().map_err(KeeperError::system("receive notifications"))?
        {
            let pid = note.pid;
            if let Some(index) = contenders.iter().position(|c| c.process.pid == pid)
                && contenders[index].take(note)
            {
                return Ok(Some(index));
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let mut fds = vec![PollFd::from_borrowed_fd(mailbox.as_fd(), PollFlags::IN)];
        fds.extend(
            contenders
                .iter()
                .map(|c| PollFd::from_borrowed_fd(c.process.pidfd.as_fd(), PollFlags::IN)),
        );
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(KeeperError::system("wait for a server")(errno)),
        }
        let has_come = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if !has_come(&fds[0])
            && let Some(index) = fds[1..].iter().position(has_come)
        {
            return Ok(Some(index));
        }
    }
}
