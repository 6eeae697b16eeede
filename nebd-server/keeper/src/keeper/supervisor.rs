//! The keeper's state, and what changes it.
//!
//! ```text
//!   cold ──READY──► serving ──dies──► drain datagrams ─► record the cause ─► successor
//!    ▲  │             │  ▲                                                    │
//!    │  dies          │  └────READY── activated ◄── ACTIVATE ── standby ◄─────┤ if there is one
//!    │  ▼             │                   │ dies                              │
//!    └ backoff        └─► new standby     └─────────────────► cold ◄──────────┘ else, at once
//! ```
//!
//! How a successor is found, and planned takeovers: [`super::succession`].

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nebd_abi::host::HostPage;
use rustix::process::Signal;

use super::backoff::Backoff;
use super::config::{KeeperConfig, KeeperError};
use super::events::{Events, Token};
use super::files::{self, Record, Role};
use super::mailbox::{Change, Mailbox, Notification, answer};
use super::process::Process;
use super::sockets::Sockets;
use super::store::Store;
use super::stream::Stream;
use super::succession::{Candidate, Retired, Vacancy};
use super::watch::{Look, Verdict, Watch};
use crate::notify::Notifier;
use crate::sys;

/// After so many datagrams other events have their turn; the rest is told again.
const DATAGRAMS_PER_EVENT: usize = 256;
/// More than a socket's queue holds: a dead sender's are among so many, and a living one that sends
/// without end cannot hold up its successor.
const DATAGRAMS_QUEUED_MAX: usize = 1 << 16;

/// A standby maps all sessions and opens all volumes: not while its server resumes them, on the same
/// cores.
pub(super) const STANDBY_PAUSE: Duration = Duration::from_millis(250);

/// The process that serves, or is to.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) process: Process,
    pub(super) ready: bool,
    /// When it is given up if it is not ready.
    pub(super) deadline: Instant,
    /// When it is given up if nothing of it answers pings: it took over by plan.
    pub(super) probes_by: Option<Instant>,
    /// It was the standby: what remains to be sent, up to ACTIVATE.
    pub(super) stream: Option<Stream>,
    pub(super) was_standby: bool,
}

/// The process that stands by.
#[derive(Debug)]
pub(super) struct Standby {
    pub(super) process: Process,
    pub(super) stream: Stream,
    /// Killed, for it runs a program that is not wanted any more.
    pub(super) outdated: bool,
}

impl Standby {
    pub(super) fn new(process: Process, stream: Stream) -> Standby {
        Standby { process, stream, outdated: false }
    }
}

/// The end has been asked for.
#[derive(Debug)]
pub(super) struct Stopping {
    /// When patience ends; `None` once it has.
    pub(super) deadline: Option<Instant>,
}

/// Everything a keeper holds.
pub(super) struct Supervisor {
    pub(super) config: KeeperConfig,
    pub(super) lock: OwnedFd,
    pub(super) events: Events,
    pub(super) mailbox: Mailbox,
    pub(super) sockets: Sockets,
    pub(super) page: HostPage,
    pub(super) probe: OwnedFd,
    pub(super) life_read: OwnedFd,
    /// Held, never written to: their end is how servers learn of ours.
    pub(super) life: Vec<OwnedFd>,
    pub(super) store: Store,
    pub(super) serving: Option<Server>,
    pub(super) standby: Option<Standby>,
    /// It may take over from the serving one.
    pub(super) candidate: Option<Candidate>,
    /// Whose end is awaited before anybody is started: they served, or might have claimed.
    pub(super) retired: Vec<Retired>,
    /// Nobody serves, and nobody is to before the retired are gone.
    pub(super) vacancy: Option<Vacancy>,
    /// The program of servers to come, if not the configured one.
    pub(super) binary: Option<PathBuf>,
    pub(super) predecessor: Option<OwnedFd>,
    pub(super) backoff: Backoff,
    pub(super) standby_backoff: Backoff,
    pub(super) start_at: Option<Instant>,
    pub(super) standby_at: Option<Instant>,
    pub(super) watch: Watch,
    pub(super) stopping: Option<Stopping>,
    /// The keeper is to replace itself; when a standby that is in the way is given up.
    pub(super) replace_by: Option<Instant>,
    /// The service manager above, if any.
    pub(super) superior: Option<Notifier>,
}

impl Supervisor {
    /// Until everything is stopped.
    pub(super) fn run(&mut self) -> Result<(), KeeperError> {
        loop {
            let now = Instant::now();
            self.tick(now);
            if self.stopping.is_some() && self.processes().next().is_none() {
                return Ok(());
            }
            if self.replace_by.is_some() && self.is_quiet() {
                self.replace_by = None;
                self.replace_self();
            }
            let timeout = self.deadline().map(|d| d.saturating_duration_since(Instant::now()));
            for token in self.events.wait(timeout)? {
                self.apply(token, Instant::now());
            }
        }
    }

    fn apply(&mut self, token: Token, now: Instant) {
        match token {
            Token::Signals => self.on_signals(now),
            Token::Mailbox => self.drain_mailbox(now, DATAGRAMS_PER_EVENT),
            Token::Knock => self.on_doubt(now),
            Token::Stream => self.flush_streams(),
            Token::Process(pid) => self.on_exit(pid, now),
        }
    }

    pub(super) fn processes(&self) -> impl Iterator<Item = &Process> {
        let serving = self.serving.iter().map(|s| &s.process);
        serving
            .chain(self.standby.iter().map(|s| &s.process))
            .chain(self.candidate.iter().map(|c| &c.process))
            .chain(self.retired.iter().map(|r| &r.process))
    }

    /// The earliest time at which [`tick`](Self::tick) has something to do.
    fn deadline(&self) -> Option<Instant> {
        let awaited = self.serving.as_ref().filter(|s| !s.process.by_watchdog);
        [
            self.start_at,
            self.standby_at,
            awaited.filter(|s| !s.ready).map(|s| s.deadline),
            awaited.and_then(|s| s.probes_by),
            self.retired.iter().filter_map(|r| r.kill_at).min(),
            self.watch.deadline(),
            self.stopping.as_ref().and_then(|s| s.deadline),
            self.replace_by,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn tick(&mut self, now: Instant) {
        let due = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        if due(&mut self.start_at) {
            self.start_server(now);
        }
        if due(&mut self.standby_at) {
            self.start_standby(now);
        }
        let late = |s: &&mut Server| !s.ready && !s.process.by_watchdog && s.deadline <= now;
        if let Some(server) = self.serving.as_mut().filter(late) {
            tracing::error!(pid = server.process.pid, "the server does not get ready; killed");
            server.process.by_watchdog = true;
            server.process.signal(Signal::KILL);
        }
        self.check_watch(now);
        self.check_succession(now);
        if self.stopping.as_mut().is_some_and(|s| due(&mut s.deadline)) {
            tracing::warn!("the servers do not stop; killed");
            self.processes().for_each(|p| p.signal(Signal::KILL));
        }
        if due(&mut self.replace_by) && !self.is_quiet() {
            for standby in self.standby.iter().filter(|s| !s.stream.is_empty()) {
                tracing::warn!(
                    "the standby does not read; killed, so that the keeper can be replaced"
                );
                standby.process.signal(Signal::KILL);
            }
            self.replace_by = Some(now + self.config.hang_timeout);
        }
    }

    /// Nothing is on its way to a standby, and no successor is sought, so that nothing of it is lost
    /// over exec.
    fn is_quiet(&self) -> bool {
        self.vacancy.is_none()
            && self.standby.as_ref().is_none_or(|s| s.stream.is_empty())
            && self.serving.as_ref().is_none_or(|s| s.stream.is_none())
    }

    fn check_watch(&mut self, now: Instant) {
        let page = &self.page;
        match self.watch.expire(now, |ping| page.silent_probes(ping)) {
            Verdict::Fine => {}
            Verdict::PingAgain => self.on_doubt(now),
            Verdict::Hung => self.kill_hung(),
        }
        self.look_after_work(now);
    }

    /// A server at work is asked for signs of life; one without is left to sleep.
    fn look_after_work(&mut self, now: Instant) {
        if !self.is_watched() {
            return;
        }
        match self.watch.look(|| self.page.look_at_work()) {
            Look::Later => {}
            Look::Ping { at_rest } => self.ping(now, at_rest),
            Look::Away => self.page.look_away(),
        }
    }

    fn is_watched(&self) -> bool {
        self.serving.as_ref().is_some_and(|s| s.ready && !s.process.by_watchdog)
    }

    pub(super) fn kill_hung(&mut self) {
        if let Some(server) = &mut self.serving {
            tracing::error!(pid = server.process.pid, "the server hangs; killed");
            server.process.by_watchdog = true;
            server.process.signal(Signal::KILL);
        }
    }

    /// A knock at the socket, or a stop: does the server live?
    fn on_doubt(&mut self, now: Instant) {
        if self.is_watched() && self.watch.knock() {
            self.ping(now, false);
        }
    }

    fn ping(&mut self, now: Instant, at_rest: bool) {
        let ping = self.page.ping();
        // A full counter has not been read for long; the silence will show.
        let _full = rustix::io::write(&self.probe, &1_u64.to_ne_bytes());
        self.watch.pinged(ping, now, at_rest);
    }

    fn on_signals(&mut self, now: Instant) {
        for signal in self.events.signals() {
            match signal {
                libc::SIGCHLD => {
                    self.on_stop_reports(now);
                    self.reap_orphans();
                }
                libc::SIGHUP if self.stopping.is_none() => {
                    self.replace_by = Some(now + self.config.hang_timeout);
                }
                libc::SIGHUP => {}
                _ => self.on_stop_request(now),
            }
        }
    }

    /// Takes note of the end of processes that dead servers left behind.
    pub(super) fn reap_orphans(&self) {
        while let Some(pid) = sys::ended_child() {
            if self.processes().any(|p| p.pid == pid) {
                // Its own event is on the way; after it, we are here again.
                return;
            }
            sys::reap(pid);
        }
    }

    pub(super) fn on_stop_reports(&mut self, now: Instant) {
        let report = self.serving.as_ref().and_then(|s| s.process.stop_report());
        if let Some(stopped) = report {
            self.watch.set_stopped(stopped);
            if stopped {
                tracing::warn!("the server was stopped by a signal");
                self.on_doubt(now);
            }
        }
        if let Some(standby) = &self.standby
            && standby.process.stop_report() == Some(true)
        {
            tracing::warn!(pid = standby.process.pid, "the standby was stopped; killed");
            standby.process.signal(Signal::KILL);
        }
    }

    fn on_stop_request(&mut self, now: Instant) {
        self.start_at = None;
        self.standby_at = None;
        self.replace_by = None;
        let first = self.stopping.is_none();
        let deadline = if first { now + self.config.stop_timeout } else { now };
        self.stopping = Some(Stopping { deadline: Some(deadline) });
        if first {
            tracing::info!("stopping");
            if let Some(superior) = &self.superior {
                superior.stopping();
            }
            self.processes().for_each(|p| p.signal(Signal::TERM));
            // A stopped process would not even see it.
            self.processes().for_each(|p| p.signal(Signal::CONT));
        }
    }

    /// Works through what has been sent so far, in order.
    fn drain_mailbox(&mut self, now: Instant, count_max: usize) {
        for _ in 0..count_max {
            match self.mailbox.receive() {
                Ok(Some(notification)) => self.on_notification(notification, now),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "notifications cannot be received");
                    return;
                }
            }
        }
    }

    fn on_notification(&mut self, note: Notification, now: Instant) {
        if !self.processes().any(|process| process.pid == note.pid) {
            tracing::warn!(pid = note.pid, "a notification of a stranger is ignored");
            return;
        }
        if let Some(status) = note.status {
            tracing::info!(pid = note.pid, status, "status");
        }
        if self.serving.as_ref().is_some_and(|s| s.process.pid == note.pid) {
            if let Some(change) = note.change {
                self.on_change(change);
            }
            if note.ready {
                self.on_ready(now);
            }
            if let Some(pid) = note.candidate {
                self.on_candidate(pid);
            }
            if let Some(path) = note.binary {
                self.on_binary(path);
            }
            if let Some(pid) = note.main_pid {
                self.on_main_pid(pid);
            }
            if note.stopping {
                tracing::info!(pid = note.pid, "the server stops");
            }
        } else if let Some(pid) = note.main_pid {
            self.on_claim(note.pid, pid);
        }
        note.barrier.into_iter().for_each(answer);
    }

    fn on_change(&mut self, change: Change) {
        match change {
            Change::Store(name, fd) => match self.store.insert(&name, fd) {
                Some(fd) => {
                    if let Some(standby) = &mut self.standby {
                        standby.stream.store(&name, &fd);
                    }
                }
                None => tracing::error!(name, count = self.store.len(), "the store is full"),
            },
            Change::Remove(name) => {
                if self.store.remove(&name)
                    && let Some(standby) = &mut self.standby
                {
                    standby.stream.remove(&name);
                }
            }
            // A server that registers twice; the rest of what it sends we hold.
            Change::Register(name, fd) if name == crate::names::LIFE => self.life.push(fd),
            Change::Register(..) => {}
        }
        self.flush_streams();
    }

    fn on_ready(&mut self, now: Instant) {
        let Some(server) = self.serving.as_mut().filter(|s| !s.ready) else { return };
        if server.stream.is_some() {
            tracing::warn!("a standby said that it serves before it was told to; ignored");
            return;
        }
        server.ready = true;
        tracing::info!(pid = server.process.pid, "serving");
        self.backoff.succeeded();
        if !server.was_standby {
            self.write_server_pid();
        }
        if let Some(superior) = &self.superior {
            superior.ready();
        }
        if self.config.standby && self.standby.is_none() && self.stopping.is_none() {
            self.standby_at = Some(now + STANDBY_PAUSE);
        }
    }

    /// Sends what there is room for; afterwards an activated standby is a server like any other.
    pub(super) fn flush_streams(&mut self) {
        if let Some(standby) = &mut self.standby
            && let Err(error) = self.events.flush(&mut standby.stream)
        {
            tracing::error!(pid = standby.process.pid, %error, "the standby is lost; killed");
            standby.process.signal(Signal::KILL);
        }
        let Some(server) = &mut self.serving else { return };
        let Some(stream) = &mut server.stream else { return };
        if let Err(error) = self.events.flush(stream) {
            tracing::error!(pid = server.process.pid, %error, "the standby is lost; killed");
            server.process.signal(Signal::KILL);
        } else if stream.is_empty() {
            server.stream = None;
            self.write_server_pid();
        }
    }

    fn on_exit(&mut self, pid: i32, now: Instant) {
        let Some(end) = self.processes().find(|p| p.pid == pid).and_then(Process::end) else {
            return;
        };
        // Whatever it sent before it died counts, and is known before anybody follows it.
        self.drain_mailbox(now, DATAGRAMS_QUEUED_MAX);
        tracing::warn!(pid, cause = ?end.cause, status = end.status, signal = end.signal, "ended");
        if let Some(server) = self.serving.take_if(|s| s.process.pid == pid) {
            self.on_server_end(server, end, now);
        } else if let Some(standby) = self.standby.take_if(|s| s.process.pid == pid) {
            self.events.remove(&standby.process.pidfd);
            self.events.remove(&standby.stream);
            if self.stopping.is_none() {
                let delay = match standby.outdated {
                    true => STANDBY_PAUSE,
                    false => self.standby_backoff.failed(),
                };
                self.standby_at = Some(now + delay);
            }
        } else if let Some(candidate) = self.candidate.take_if(|c| c.process.pid == pid) {
            self.on_candidate_end(candidate, end, now);
        } else if let Some(index) = self.retired.iter().position(|r| r.process.pid == pid) {
            self.events.remove(&self.retired.swap_remove(index).process.pidfd);
        }
        self.fill_vacancy(now);
        if self.stopping.is_none() {
            self.write_children();
        }
        self.reap_orphans();
    }

    pub(super) fn write_server_pid(&self) {
        if let Some(server) = &self.serving {
            let contents = format!("{}\n", server.process.pid);
            self.written(files::write(&self.config.state_dir, files::SERVER_PID, &contents));
        }
    }

    pub(super) fn write_children(&self) {
        self.write_children_with(None);
    }

    /// Also with one that is about to start.
    pub(super) fn write_children_with(&self, starting: Option<(&Process, Role)>) {
        let serving = self.serving.as_ref().map(|s| s.process.pid);
        let candidate = self.candidate.as_ref().map(|c| c.process.pid);
        let record = |p: &Process| {
            let role = match Some(p.pid) {
                pid if pid == serving => Role::Serving,
                pid if pid == candidate => Role::Candidate,
                _ => Role::Other,
            };
            Record { role, pid: p.pid, start: p.start }
        };
        let starting = starting.map(|(p, role)| Record { role, ..record(p) });
        let records: Vec<Record> = self.processes().map(record).chain(starting).collect();
        self.written(files::write_children(&self.config.state_dir, &records));
    }

    /// A full disk must not stop a restart; the files are for people and for the next keeper.
    fn written(&self, result: Result<(), KeeperError>) {
        if let Err(error) = result {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(%error, source, "the state directory is not up to date");
        }
    }

    /// Removes what was made for clients and scripts to find.
    pub(super) fn clean_up(&self) {
        files::remove(&self.config.socket);
        files::remove(&self.config.admin_socket);
        files::remove(&self.config.notify_socket());
        for name in [files::SERVER_PID, files::KEEPER_PID, files::CHILDREN] {
            files::remove(&self.config.state_dir.join(name));
        }
    }
}
