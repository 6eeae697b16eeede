//! The new server's side of a planned takeover.
//!
//! Everything that can be done without owning anything is done before the claim: the library of
//! every client judged, every region mapped, every volume opened as an observer and read. After the
//! claim there are locks to take, rings to look at, and queues to give to shards that wait for them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::host::HostPage;
use nebd_abi::layout::{LayoutVersion, SessionId, features};
use nebd_keeper::names;
use nebd_rpc::admin::{Blackout, UpgradeState};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, Signal};

use super::Probation;
use crate::config::Config;
use crate::handover::message::{
    Frozen, Hello, Message, Offer, Prepared, Purpose, VERSION, Welcome,
};
use crate::handover::wire::WireError;
use crate::holdings::LOCK;
use crate::run::{Assembly, Ingredients, RunError, assemble, confirm_death, prelude};
use crate::shard::monotonic_ns;
use crate::successor::{Preparation, Progress, Resumption, Served};

/// The owner drives; this is how long it may think.
const ORDER_TIME_MAX: Duration = Duration::from_secs(120);
/// From the claim to the owner's locks being given up; guests stand still meanwhile.
const RELEASE_TIME_MAX: Duration = Duration::from_millis(250);
/// From then to its end.
const LINGER_TIME_MAX: Duration = Duration::from_secs(15);
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// Why a candidate does not become the server.
#[derive(Debug, thiserror::Error)]
pub enum CandidateError {
    /// The owner cannot be understood.
    #[error("handover")]
    Wire(#[from] WireError),
    /// The owner asks for something out of turn.
    #[error("the owner sent a message out of turn")]
    Order,
    /// The owner did not offer what a server must have.
    #[error("the owner did not offer {0}")]
    Missing(&'static str),
    /// It cannot be set up.
    #[error(transparent)]
    Run(#[from] Box<RunError>),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> CandidateError {
    move |error| CandidateError::System { action, source: error.into() }
}

/// Takes over from the server at the other end of standard input; returns early if it is not to be.
pub fn run(config: &Config) -> Result<(), CandidateError> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    let socket = socket.map_err(system("duplicate standard input"))?;
    let null = std::fs::File::open("/dev/null").map_err(system("open /dev/null"))?;
    rustix::stdio::dup2_stdin(null).map_err(system("replace standard input"))?;
    let result = Candidate::take_over(config, &socket);
    if let Err(error) = &result {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        let _ = Message::Refused(text).send(&socket, Instant::now() + ANSWER_TIME_MAX);
    }
    result
}

struct Candidate<'a> {
    config: &'a Config,
    socket: &'a OwnedFd,
    hello: Hello,
    owner: OwnedFd,
    assembly: Assembly,
    preparation: Arc<Preparation>,
    /// Connections of clients.
    connections: Vec<(SessionId, OwnedFd)>,
    /// The owner has said that its control plane stands still. An old one does not say so, or says
    /// it last of all.
    is_gate_closed: bool,
    /// The registry was read since then.
    has_registry: bool,
}

impl<'a> Candidate<'a> {
    fn take_over(config: &'a Config, socket: &'a OwnedFd) -> Result<(), CandidateError> {
        prelude(config).map_err(Box::new)?;
        crate::failpoint!("candidate-start");
        let Message::Hello(hello) = receive(socket)? else { return Err(CandidateError::Order) };
        let unsupported = unsupported(&hello);
        let welcome = Welcome {
            version: VERSION.min(hello.versions.1),
            build: env!("CARGO_PKG_VERSION").into(),
            unsupported,
        };
        crate::hooks::strange_welcome(socket);
        send(socket, &Message::Welcome(welcome))?;
        crate::failpoint!("candidate-hello");
        if hello.purpose == Purpose::Check {
            let _ = receive(socket);
            return Ok(());
        }
        let pid = rustix::process::Pid::from_raw(hello.pid.cast_signed());
        let owner = pid.ok_or(CandidateError::Missing("its process id"))?;
        let owner = rustix::process::pidfd_open(owner, PidfdFlags::empty())
            .map_err(system("watch the owner"))?;
        let assembly = collect(config, socket)?;
        crate::failpoint!("candidate-offer");
        let preparation = Preparation::new(assembly.server.clone());
        let candidate = Candidate {
            config,
            socket,
            hello,
            owner,
            assembly,
            preparation,
            connections: Vec::new(),
            is_gate_closed: false,
            has_registry: false,
        };
        candidate.follow()
    }

    /// Prepares as often as it is told to, until it is to claim.
    fn follow(mut self) -> Result<(), CandidateError> {
        self.prepare()?;
        loop {
            match receive(self.socket)? {
                Message::Offer(offer) => self.take(offer),
                Message::Connections(connections) => {
                    self.connections = connections;
                    self.is_gate_closed = true;
                }
                Message::Prepare => {
                    self.prepare()?;
                    self.has_registry = self.is_gate_closed;
                }
                Message::Frozen(frozen) => return self.claim(frozen),
                Message::Dismissed(reason) => {
                    tracing::info!(reason, "this candidate is not needed");
                    return Ok(());
                }
                _ => return Err(CandidateError::Order),
            }
        }
    }

    /// What changed at the owner since it offered everything.
    fn take(&self, offer: Offer) {
        let store = &self.assembly.server.store;
        for (name, fd) in offer.entries {
            store.adopt(name.clone(), fd);
            self.preparation.note_change(&name);
        }
        for name in &offer.removed {
            store.disown(name);
            self.preparation.note_change(name);
        }
    }

    /// Prepares what is not yet, and answers.
    fn prepare(&self) -> Result<(), CandidateError> {
        crate::failpoint!("candidate-prepare");
        let Progress { volumes, sessions, failures } = self.preparation.update();
        for (name, error) in &failures {
            tracing::warn!(name, error, "cannot be prepared");
        }
        let (volumes, sessions) = (volumes as u32, sessions as u32);
        send(self.socket, &Message::Prepared(Prepared { volumes, sessions, failures }))?;
        crate::failpoint!("candidate-ready");
        Ok(())
    }

    /// The point of no return, and what follows at once.
    fn claim(mut self, frozen: Frozen) -> Result<(), CandidateError> {
        let begin = monotonic_ns();
        if !self.has_registry {
            // What was resized, made or limited since PREPARE looked would be unknown for good; a
            // failure is a reason to stay with the owner.
            self.assembly.server.registry.reload().map_err(|error| Box::new(error.into()))?;
        }
        crate::failpoint!("candidate-before-claim");
        let Some(generation) = self.assembly.host().claim(self.hello.generation) else {
            tracing::info!("another server has taken over; this one is not needed");
            return Ok(());
        };
        crate::failpoint!("candidate-after-claim");
        let host = self.assembly.host();
        self.assembly.server.tenure.begin(generation, host.death_of(self.hello.generation));
        self.assembly.announce();
        // An owner that has died meanwhile is no loss.
        let _ = Message::Fenced(generation).send(self.socket, Instant::now() + RELEASE_TIME_MAX);
        crate::failpoint!("candidate-fenced");
        let state_dir = self.assembly.holdings.state_dir.clone();
        let server = self.assembly.server.clone();
        let planned = Some(crate::metrics::TakeoverKind::Planned);
        crate::metrics::start(&*server.store, generation, planned);
        server.upgrades.report().adopt(&frozen.report, &state_dir, &self.hello.binary);
        self.await_release()?;
        server.upgrades.report().step("FENCE", begin, format!("generation {generation}"));
        let resume = monotonic_ns();
        let prepared = self.preparation.take();
        let served = Resumption::reserve(&server, prepared, &frozen.left).run();
        let blackouts = blackouts(&frozen.last_ns, &served);
        // One that speaks for nothing is closed: its client comes back and says what it wants.
        self.connections.retain(|(session, _)| server.has_place(*session));
        self.assembly.control.adopt(std::mem::take(&mut self.connections));
        crate::failpoint!("candidate-resumed");
        let _ = Message::Resumed.send(self.socket, Instant::now() + ANSWER_TIME_MAX);
        self.assembly.settle();
        let _ = Message::Settled.send(self.socket, Instant::now() + ANSWER_TIME_MAX);
        for Blackout { volume, blackout_us, .. } in &blackouts {
            if let Ok(volume) = volume.parse() {
                crate::metrics::note_blackout(&volume, Duration::from_micros(*blackout_us));
            }
        }
        {
            let mut report = server.upgrades.report();
            let worst = blackouts.iter().map(|blackout| blackout.blackout_us).max().unwrap_or(0);
            let detail = format!("{} sessions, worst blackout {worst} us", blackouts.len());
            report.set_blackouts(blackouts);
            report.step("RESUME", resume, detail);
            // A server that failed its probation has written down why.
            match report.reason() {
                reason if reason.is_empty() => report.finish(UpgradeState::Probation, ""),
                reason => report.finish(UpgradeState::RolledBack, reason),
            }
        }
        watch_owner(self.owner);
        let probation = Duration::from_millis(frozen.probation_ms);
        let run = Probation::new(probation);
        self.assembly.serve(self.config, Some(run)).map_err(|error| Box::new(error).into())
    }

    /// Until the owner has given up its locks; one that does not is frozen, and killed.
    fn await_release(&self) -> Result<(), CandidateError> {
        let released = Message::receive(self.socket, Instant::now() + RELEASE_TIME_MAX);
        if matches!(released, Ok(Message::Released)) {
            return Ok(());
        }
        tracing::warn!(event = "takeover", "the owner does not let go; it is killed");
        if crate::hooks::predecessor_is_spared() {
            return Ok(());
        }
        confirm_death(&self.owner).map_err(system("confirm the owner's death"))
    }
}

/// Takes what is offered until it is told to prepare; sets up a server that serves nothing yet.
fn collect(config: &Config, socket: &OwnedFd) -> Result<Assembly, CandidateError> {
    let mut offered = BTreeMap::new();
    loop {
        match receive(socket)? {
            Message::Offer(offer) => {
                offered.extend(offer.entries);
                offer.removed.iter().for_each(|name| _ = offered.remove(name));
            }
            Message::Prepare => break,
            _ => return Err(CandidateError::Order),
        }
    }
    let mut need = |name: &'static str| offered.remove(name).ok_or(CandidateError::Missing(name));
    let host = need(names::HOST)?;
    let (client, admin) = (need(names::CLIENT)?, need(names::ADMIN)?);
    let (probe, life, lock) = (need(names::PROBE).ok(), need(names::LIFE).ok(), need(LOCK).ok());
    let host = HostPage::open(host).map_err(RunError::Host).map_err(Box::new)?;
    let ingredients =
        Ingredients { host: Arc::new(host), client, admin, probe, life, lock, store: offered };
    Ok(assemble(config, ingredients).map_err(Box::new)?)
}

fn unsupported(hello: &Hello) -> Vec<(SessionId, String)> {
    let judge = |client: &crate::handover::message::Client| {
        if LayoutVersion::from_bits(client.layout).is_none() {
            return Some(format!("it does not know region layout {}", client.layout));
        }
        let unknown = client.features_required & !features::REQUIRED_KNOWN;
        (unknown != 0).then(|| format!("it lacks the features {unknown:#x} of the region"))
    };
    let clients = hello.clients.iter();
    clients.filter_map(|client| Some((client.session, judge(client)?))).collect()
}

fn blackouts(last_ns: &[(SessionId, u64)], served: &[Served]) -> Vec<Blackout> {
    let last: HashMap<SessionId, u64> = last_ns.iter().copied().collect();
    let blackout = |(id, volume, served_ns): &Served| Blackout {
        volume: volume.to_string(),
        session: id.to_string(),
        blackout_us: last.get(id).map_or(0, |last| served_ns.saturating_sub(*last) / 1000),
    };
    served.iter().map(blackout).collect()
}

/// The old server has a while to go; then it is killed.
fn watch_owner(owner: OwnedFd) {
    let watch = move || {
        let timeout = Timespec { tv_sec: LINGER_TIME_MAX.as_secs() as i64, tv_nsec: 0 };
        let gone = rustix::event::poll(&mut [PollFd::new(&owner, PollFlags::IN)], Some(&timeout));
        if gone == Ok(0) && !crate::hooks::predecessor_is_spared() {
            tracing::warn!(event = "takeover", "the old server does not go; it is killed");
            let _ = rustix::process::pidfd_send_signal(&owner, Signal::KILL);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("nebd-linger".into()).spawn(watch) {
        tracing::warn!(%error, "nobody watches the end of the old server");
    }
}

fn receive(socket: &OwnedFd) -> Result<Message, CandidateError> {
    Ok(Message::receive(socket, Instant::now() + ORDER_TIME_MAX)?)
}

fn send(socket: &OwnedFd, message: &Message) -> Result<(), CandidateError> {
    Ok(message.send(socket, Instant::now() + ANSWER_TIME_MAX)?)
}
