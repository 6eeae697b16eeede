//! Who serves next: planned takeovers, and what follows a death.
//!
//! The **server** announces a **candidate** before it gives it anything, so the keeper knows every
//! process that can claim the generation. `seen` is the generation word at that time. A candidate
//! claims (the word moves), then says MAINPID; it is the server from the one that the keeper sees
//! first, and the old one is **retired**. No process that the keeper starts may meet another that
//! owns or can claim: a **vacancy** is filled only when the retired are gone, by event. The word is
//! read anew by whoever claims next, and moves no more once all of them are dead.
//!
//! | event | candidate | word | what the keeper does |
//! | --- | --- | --- | --- |
//! | announced, but there is no time for it | | | it is killed: the server notices |
//! | MAINPID of the candidate | | moved | it serves; the old server is retired |
//! | | | `seen` | nothing: it has not won |
//! | server dies | none | | vacancy |
//! | | alive | moved | it has won: it serves, MAINPID or not |
//! | | alive | `seen` | it is killed and retired, vacancy. That it claims before the signal arrives changes nothing: it dies before a successor is started |
//! | | dead, not yet noticed | moved | it serves, as far as is known; its end is the next event |
//! | | dead, not yet noticed | `seen` | vacancy |
//! | candidate dies | dead | `seen` | it is forgotten; the server goes on |
//! | | dead | moved | the server has lost: it is retired, with `hang_timeout` to exit by itself; vacancy |
//! | server dies after that | | | it is one of the retired: the vacancy is filled |
//! | new server dies, the old one is alive | | | the retired are killed, vacancy |
//! | new server dies, the old one is dead, not yet noticed | | | the same; the end is noticed by its own event |
//! | retired one dies | | | if it was the last, and there is a vacancy, that is filled |
//! | new server answers no pings in `start_timeout` | | | it is killed |
//!
//! Before each death what the dead one had sent is worked off, so "MAINPID, then death" is two events
//! in this order, whichever is noticed first. Of the retired only barriers are answered. A hung
//! server is killed by its watchdog whether there is a candidate or not, and then is a server that
//! died.
//!
//! The death that the next server is told of is the one that led to the vacancy.
//!
//! A candidate is the server's child before it is ours. Its pidfd tells its end all the same; of its
//! cause we know what `/proc` and the pidfd tell. When its parent ends it becomes our child, dead or
//! alive, and a dead one is then taken note of like any orphan.

use std::path::PathBuf;
use std::time::Instant;

use nebd_abi::Generation;
use nebd_abi::host::DeathCause;
use rustix::process::Signal;

use super::process::{self, End, Process};
use super::supervisor::{STANDBY_PAUSE, Server, Standby, Supervisor};
use super::watch::Watch;

/// A process that may take over from the serving one.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) process: Process,
    /// The generation when it was announced; once it is another, the candidate has claimed.
    pub(super) seen: Generation,
}

/// A process that serves no more, or must not begin to.
#[derive(Debug)]
pub(super) struct Retired {
    pub(super) process: Process,
    /// When it is killed if it has not exited by itself.
    pub(super) kill_at: Option<Instant>,
}

impl Retired {
    pub(super) fn new(process: Process) -> Retired {
        Retired { process, kill_at: None }
    }
}

/// Nobody serves.
#[derive(Debug)]
pub(super) struct Vacancy {
    /// How the last one ended.
    cause: DeathCause,
    /// It did serve; otherwise the next attempt is delayed.
    served: bool,
}

impl Supervisor {
    /// The server announces a candidate, or (0) takes that back.
    pub(super) fn on_candidate(&mut self, pid: i32) {
        // It is dead if the server kept to the protocol; its end is worked off by its own event.
        let is_over = |c: &Candidate| c.process.is_dead() && c.seen == self.page.generation();
        let is_free = self.candidate.as_ref().is_none_or(is_over);
        self.candidate.iter().for_each(|c| c.process.signal(Signal::KILL));
        if pid == 0 || self.processes().any(|process| process.pid == pid) {
            return;
        }
        let Some(process) = self.acceptable_candidate(pid, is_free) else {
            return process::kill_unknown(pid);
        };
        let seen = self.page.generation();
        tracing::info!(pid, %seen, "a candidate");
        let former = self.candidate.replace(Candidate { process, seen });
        self.retired.extend(former.map(|former| Retired::new(former.process)));
        self.write_children();
    }

    /// One that cannot be watched, or that would have a rival, must not live: its server could not
    /// be told, and would go on.
    fn acceptable_candidate(&self, pid: i32, is_free: bool) -> Option<Process> {
        let is_ready = self.serving.as_ref().is_some_and(|s| s.ready);
        if !is_ready || !is_free || self.stopping.is_some() {
            tracing::error!(pid, "no time for a candidate; killed");
            return None;
        }
        let Some(process) = Process::open(pid, None) else {
            tracing::error!(pid, "the candidate is dead, or cannot be opened; killed");
            return None;
        };
        match self.events.add_process(&process) {
            Ok(()) => Some(process),
            Err(error) => {
                tracing::error!(pid, %error, "the candidate cannot be watched; killed");
                None
            }
        }
    }

    /// A process that does not serve says that it, or another, is the server.
    pub(super) fn on_claim(&mut self, sender: i32, pid: i32) {
        let generation = self.page.generation();
        let has_won =
            |c: &mut Candidate| c.process.pid == sender && sender == pid && c.seen != generation;
        let Some(winner) = self.candidate.take_if(has_won) else {
            tracing::warn!(
                sender,
                pid,
                "not the server's, or not a candidate that claimed; ignored"
            );
            return;
        };
        self.promote(winner.process);
    }

    /// The server has relinquished to this process.
    pub(super) fn on_main_pid(&mut self, pid: i32) {
        if self.serving.as_ref().is_none_or(|s| s.process.pid == pid) {
            return;
        }
        let process = match self.candidate.take_if(|c| c.process.pid == pid) {
            Some(candidate) => candidate.process,
            None => {
                let Some(process) = Process::open(pid, None) else {
                    tracing::error!(pid, "the server hands over to a process that does not exist");
                    return;
                };
                if let Err(error) = self.events.add_process(&process) {
                    tracing::error!(pid, %error, "the new server cannot be watched");
                    return;
                }
                process
            }
        };
        self.condemn_candidate();
        self.promote(process);
    }

    fn retire_server(&mut self, kill_at: Option<Instant>) {
        let server = self.serving.take();
        self.retired.extend(server.map(|s| Retired { process: s.process, kill_at }));
    }

    /// It serves from now on.
    fn promote(&mut self, process: Process) {
        let from = self.serving.as_ref().map(|s| s.process.pid);
        tracing::info!(from, to = process.pid, "handed over");
        self.retire_server(None);
        self.watch = Watch::new(self.config.hang_timeout);
        self.serving = Some(self.resumed(process, true));
        if let Some(at) = &mut self.standby_at {
            *at = (*at).max(Instant::now() + STANDBY_PAUSE);
        }
        self.write_server_pid();
        self.write_children();
    }

    /// The candidate must not become anything any more.
    fn condemn_candidate(&mut self) {
        if let Some(candidate) = self.candidate.take() {
            candidate.process.signal(Signal::KILL);
            self.retired.push(Retired::new(candidate.process));
        }
    }

    /// Servers and standbys to come run this program.
    pub(super) fn on_binary(&mut self, path: PathBuf) {
        if !path.is_absolute() || !path.is_file() {
            tracing::error!(path = %path.display(), "no program; servers keep theirs");
            return;
        }
        tracing::info!(path = %path.display(), "the program of servers to come");
        if let Some(standby) = self.standby.as_mut().filter(|s| !s.process.runs(&path)) {
            standby.outdated = true;
            standby.process.signal(Signal::KILL);
        }
        self.binary = Some(path);
    }

    pub(super) fn on_server_end(&mut self, server: Server, end: End, now: Instant) {
        self.events.remove(&server.process.pidfd);
        if let Some(stream) = &server.stream {
            self.events.remove(stream);
        }
        self.predecessor = Some(server.process.pidfd);
        self.watch = Watch::new(self.config.hang_timeout);
        self.standby_at = None;
        if self.stopping.is_some() {
            return;
        }
        let generation = self.page.generation();
        if let Some(winner) = self.candidate.take_if(|c| c.seen != generation) {
            tracing::info!("the server died after the candidate had claimed");
            self.promote(winner.process);
            let is_missing = self.config.standby && self.standby.is_none();
            self.standby_at = is_missing.then_some(now + STANDBY_PAUSE);
            return;
        }
        self.condemn_candidate();
        self.retired.iter().for_each(|r| r.process.signal(Signal::KILL));
        let served = server.ready || server.was_standby;
        self.vacancy = Some(Vacancy { cause: end.cause, served });
    }

    pub(super) fn on_candidate_end(&mut self, candidate: Candidate, end: End, now: Instant) {
        self.events.remove(&candidate.process.pidfd);
        if self.page.generation() == candidate.seen || self.stopping.is_some() {
            return;
        }
        tracing::error!("the candidate died after it had claimed: the server has lost");
        self.predecessor = Some(candidate.process.pidfd);
        self.watch = Watch::new(self.config.hang_timeout);
        self.standby_at = None;
        let kill_at = Some(now + self.config.hang_timeout);
        self.retire_server(kill_at);
        self.retired.iter_mut().for_each(|r| r.kill_at = kill_at);
        self.vacancy = Some(Vacancy { cause: end.cause, served: true });
    }

    /// What time brings.
    pub(super) fn check_succession(&mut self, now: Instant) {
        for retired in &mut self.retired {
            if retired.kill_at.take_if(|at| *at <= now).is_some() {
                tracing::warn!(pid = retired.process.pid, "it does not exit; killed");
                retired.process.signal(Signal::KILL);
            }
        }
        let due = |server: &mut Server| server.probes_by.take_if(|at| *at <= now).is_some();
        if self.serving.as_mut().is_some_and(due) && self.page.silent_probes(0).is_none() {
            self.kill_hung();
        }
    }

    /// An image of the keeper that found no server. What the earlier one left must be gone first.
    pub(super) fn begin_vacant(&mut self, now: Instant) {
        if self.candidate.is_none() && self.retired.is_empty() {
            self.start_at = Some(now);
            return;
        }
        self.condemn_candidate();
        self.retired.iter().for_each(|r| r.process.signal(Signal::KILL));
        self.vacancy = Some(Vacancy { cause: DeathCause::Unknown, served: true });
    }

    /// Starts a successor, if one is needed and nobody is in its way.
    pub(super) fn fill_vacancy(&mut self, now: Instant) {
        if self.stopping.is_some() || !self.retired.is_empty() {
            return;
        }
        let Some(vacancy) = self.vacancy.take() else { return };
        // A server that never claimed the generation has no death of its own to tell.
        if self.page.death_of(self.page.generation()) == DeathCause::Unknown {
            self.page.record_death(vacancy.cause);
        }
        if let Some(standby) = self.standby.take_if(|s| !s.outdated) {
            self.activate(standby, now);
        } else if vacancy.served {
            self.start_server(now);
        } else {
            let delay = self.backoff.failed();
            let failures = self.backoff.failures();
            tracing::error!(failures, ?delay, "the server died before it served");
            self.start_at = Some(now + delay);
        }
    }

    fn activate(&mut self, standby: Standby, now: Instant) {
        let Standby { process, mut stream, .. } = standby;
        self.standby_backoff.succeeded();
        stream.activate();
        self.serving = Some(Server {
            process,
            ready: false,
            deadline: now + self.config.hang_timeout,
            probes_by: None,
            stream: Some(stream),
            was_standby: true,
        });
        // Before it is told: a keeper after us must not take it for a mere standby.
        self.write_children();
        self.flush_streams();
    }
}
