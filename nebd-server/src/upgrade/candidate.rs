//! The new server's side of a planned takeover.
//!
//! Everything that can be done without owning anything is done before the claim: the library of
//! every client judged, every region mapped, every volume opened as an observer and read. After the
//! claim there are locks to take, rings to look at, and queues to give to shards that wait for them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nebd_abi::VolumeName;
use nebd_abi::host::HostPage;
use nebd_abi::layout::{LayoutVersion, SessionId, features};
use nebd_backend::{PrepareContext, PreparedVolume};
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
use crate::server::AttachRequest;
use crate::session::Session;
use crate::shard::monotonic_ns;

/// The owner drives; this is how long it may think.
const ORDER_TIME_MAX: Duration = Duration::from_secs(120);
/// From the claim to the owner's locks being given up; guests stand still meanwhile.
const RELEASE_TIME_MAX: Duration = Duration::from_millis(250);
/// What is not served after this is served later, on threads of its own.
const RESUME_TIME_MAX: Duration = Duration::from_millis(500);
/// From then to its end.
const LINGER_TIME_MAX: Duration = Duration::from_secs(15);
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// Volumes are opened in parallel: storage takes its time.
const PREPARE_THREADS_MAX: usize = 16;

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

/// A volume opened as an observer, or why not.
type Opening = Result<Box<dyn PreparedVolume>, String>;

struct Candidate<'a> {
    config: &'a Config,
    socket: &'a OwnedFd,
    hello: Hello,
    owner: OwnedFd,
    assembly: Assembly,
    /// Sessions that are mapped.
    sessions: HashMap<SessionId, AttachRequest>,
    /// Volumes that were opened as an observer.
    volumes: BTreeSet<VolumeName>,
    /// Connections of clients.
    connections: Vec<(SessionId, OwnedFd)>,
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
        let assembly = collect(config, socket, &hello)?;
        crate::failpoint!("candidate-offer");
        let (sessions, volumes) = (HashMap::new(), BTreeSet::new());
        let connections = Vec::new();
        let candidate =
            Candidate { config, socket, hello, owner, assembly, sessions, volumes, connections };
        candidate.follow()
    }

    /// Prepares as often as it is told to, until it is to claim.
    fn follow(mut self) -> Result<(), CandidateError> {
        let mut changed = None;
        self.prepare(changed.take())?;
        loop {
            match receive(self.socket)? {
                Message::Offer(offer) => {
                    let changed = changed.get_or_insert_with(BTreeSet::new);
                    changed.extend(offer.entries.iter().map(|(name, _)| name.clone()));
                    changed.extend(offer.removed.iter().cloned());
                    take(&self.assembly, offer);
                }
                Message::Connections(connections) => self.connections = connections,
                Message::Prepare => self.prepare(Some(changed.take().unwrap_or_default()))?,
                Message::Frozen(frozen) => {
                    self.invalidate(&changed.take().unwrap_or_default());
                    return self.claim(frozen);
                }
                Message::Dismissed(reason) => {
                    tracing::info!(reason, "this candidate is not needed");
                    return Ok(());
                }
                _ => return Err(CandidateError::Order),
            }
        }
    }

    /// Forgets what was prepared of sessions whose descriptors changed.
    fn invalidate(&mut self, changed: &BTreeSet<String>) {
        let ids: HashSet<SessionId> =
            changed.iter().filter_map(|name| Session::of_store_name(name)).collect();
        self.sessions.retain(|id, _| !ids.contains(id));
    }

    /// Maps the sessions and opens the volumes that are not yet, and answers.
    fn prepare(&mut self, changed: Option<BTreeSet<String>>) -> Result<(), CandidateError> {
        let mut prepared = Prepared::default();
        if let Some(changed) = changed {
            self.invalidate(&changed);
            let server = &self.assembly.server;
            if let Err(error) = server.registry.reload(&self.assembly.holdings.state_dir) {
                prepared.failures.push((String::new(), error.to_string()));
            }
        }
        let server = &self.assembly.server;
        for id in server.stored_sessions() {
            if self.sessions.contains_key(&id) {
                continue;
            }
            match server.stored_request(id) {
                Ok(request) => _ = self.sessions.insert(id, request),
                Err(error) => {
                    tracing::warn!(session = %id, %error, "a stored session cannot be mapped");
                    prepared.failures.push((id.to_string(), error.to_string()));
                }
            }
        }
        let wanted: BTreeSet<VolumeName> = self
            .sessions
            .values()
            .map(|request| request.region.params().volume.clone())
            .filter(|name| !self.volumes.contains(name))
            .collect();
        crate::failpoint!("candidate-prepare");
        for (name, result) in self.open_all(&wanted) {
            match result {
                Ok(volume) => {
                    self.volumes.insert(name.clone());
                    self.assembly.server.prepared().insert(name, volume);
                }
                Err(error) => prepared.failures.push((name.to_string(), error)),
            }
        }
        prepared.volumes = self.volumes.len() as u32;
        prepared.sessions = self.sessions.len() as u32;
        send(self.socket, &Message::Prepared(prepared))?;
        crate::failpoint!("candidate-ready");
        Ok(())
    }

    /// Opens volumes as an observer, several at a time.
    fn open_all(&self, wanted: &BTreeSet<VolumeName>) -> Vec<(VolumeName, Opening)> {
        let server = &self.assembly.server;
        let names: Vec<&VolumeName> = wanted.iter().collect();
        let next = AtomicUsize::new(0);
        let opened = Mutex::new(Vec::with_capacity(names.len()));
        let open = |name: &VolumeName| {
            let record = server.registry.record(name).ok_or("it is not in the registry")?;
            let backend = server.backend(name).ok_or("this binary has no such backend")?;
            let context = PrepareContext { store: server.store.clone() };
            backend.prepare(&record.spec(name), &context).map_err(|error| error.to_string())
        };
        let work = || {
            while let Some(name) = names.get(next.fetch_add(1, Relaxed)) {
                let result = open(name);
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                opened.push(((*name).clone(), result));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..names.len().min(PREPARE_THREADS_MAX) {
                scope.spawn(work);
            }
            work();
        });
        opened.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// The point of no return, and what follows at once.
    fn claim(mut self, frozen: Frozen) -> Result<(), CandidateError> {
        let begin = monotonic_ns();
        crate::failpoint!("candidate-before-claim");
        let Some(generation) = self.assembly.host().claim(self.hello.generation) else {
            tracing::info!("another server has taken over; this one is not needed");
            return Ok(());
        };
        crate::failpoint!("candidate-after-claim");
        self.assembly.announce();
        // An owner that has died meanwhile is no loss.
        let _ = Message::Fenced(generation).send(self.socket, Instant::now() + RELEASE_TIME_MAX);
        crate::failpoint!("candidate-fenced");
        let state_dir = self.assembly.holdings.state_dir.clone();
        let server = self.assembly.server.clone();
        let planned = Some(crate::metrics::TakeoverKind::Planned);
        crate::metrics::start(&*server.store, generation, planned);
        server.upgrades.report().adopt(&frozen.report, &state_dir, &self.hello.binary);
        let stored = server.stored_sessions();
        // One that speaks for nothing is closed: its client comes back and says what it wants.
        self.connections.retain(|(session, _)| stored.contains(session));
        self.assembly.control.adopt(std::mem::take(&mut self.connections));
        self.await_release()?;
        server.upgrades.report().step("FENCE", begin, format!("generation {generation}"));
        let resume = monotonic_ns();
        let served = self.resume(&frozen.left);
        let blackouts = blackouts(&frozen.last_ns, &served);
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

    /// Serves every session that was prepared; the others, and those whose locks come later, start
    /// on threads of their own. Returns when each was served.
    fn resume(&mut self, left: &[SessionId]) -> Vec<(SessionId, VolumeName, u64)> {
        let server = &self.assembly.server;
        let left: HashSet<SessionId> = left.iter().copied().collect();
        let volume_of = |request: &AttachRequest| request.region.params().volume.clone();
        // A lock is a volume's: all of its sessions wait if one has requests at its storage.
        let locked: HashSet<VolumeName> =
            left.iter().filter_map(|id| self.sessions.get(id).map(volume_of)).collect();
        let (mut now, mut later) = (VecDeque::new(), Vec::new());
        for id in server.stored_sessions() {
            let request = match self.sessions.remove(&id) {
                Some(request) if !locked.contains(&volume_of(&request)) => {
                    now.push_back(request);
                    continue;
                }
                Some(request) => Ok(request),
                None => server.stored_request(id),
            };
            match request {
                Ok(request) => later.push(request),
                Err(error) => tracing::warn!(session = %id, %error, "cannot resume a session"),
            }
        }
        now.iter().chain(&later).for_each(|request| server.reserve_for(request));
        let (served, again) = self.attach_all(now);
        for id in again {
            match server.stored_request(id) {
                Ok(request) => later.push(request),
                Err(error) => tracing::error!(session = %id, %error, "a session is lost"),
            }
        }
        server.resume_all(later);
        served
    }

    /// Attaches these on a few threads, and returns those that are served after a while, and those
    /// that are to be tried again. One that waits for its storage holds up nothing but its thread.
    fn attach_all(
        &self,
        requests: VecDeque<AttachRequest>,
    ) -> (Vec<(SessionId, VolumeName, u64)>, Vec<SessionId>) {
        let count = requests.len();
        let queue = Arc::new(Mutex::new(requests));
        let (sender, results) = crossbeam::channel::unbounded();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..threads.min(count) {
            let (server, queue) = (self.assembly.server.clone(), queue.clone());
            let sender = sender.clone();
            self.assembly.server.jobs.spawn(move || {
                let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                while let Some(request) = next() {
                    let id = request.region.params().session;
                    let volume = request.region.params().volume.clone();
                    let result = match server.attach(request) {
                        Ok(_) => Ok((id, volume, monotonic_ns())),
                        Err(error) => {
                            tracing::warn!(session = %id, %error, "session waits");
                            Err(id)
                        }
                    };
                    if let Err(late) = sender.send(result)
                        && let Err(id) = late.into_inner()
                    {
                        // Nobody waits any more.
                        server.resume_stored(id);
                    }
                }
            });
        }
        let deadline = Instant::now() + RESUME_TIME_MAX;
        let (mut served, mut again) = (Vec::with_capacity(count), Vec::new());
        while served.len() + again.len() < count {
            match results.recv_deadline(deadline) {
                Ok(Ok(one)) => served.push(one),
                Ok(Err(id)) => again.push(id),
                Err(_) => break,
            }
        }
        let rest = std::mem::take(&mut *queue.lock().unwrap_or_else(PoisonError::into_inner));
        self.assembly.server.resume_all(rest.into());
        (served, again)
    }
}

/// Takes what is offered until it is told to prepare; sets up a server that serves nothing yet.
fn collect(config: &Config, socket: &OwnedFd, hello: &Hello) -> Result<Assembly, CandidateError> {
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
    let ingredients = Ingredients {
        host: Arc::new(host),
        generation: nebd_abi::Generation(hello.generation.0 + 1),
        seen: hello.generation,
        client,
        admin,
        probe,
        life,
        lock,
        store: offered,
    };
    Ok(assemble(config, ingredients).map_err(Box::new)?)
}

fn take(assembly: &Assembly, offer: Offer) {
    let store = &assembly.server.store;
    for (name, fd) in offer.entries {
        store.adopt(name, fd);
    }
    offer.removed.iter().for_each(|name| store.disown(name));
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

fn blackouts(
    last_ns: &[(SessionId, u64)],
    served: &[(SessionId, VolumeName, u64)],
) -> Vec<Blackout> {
    let last: HashMap<SessionId, u64> = last_ns.iter().copied().collect();
    let blackout = |(id, volume, served_ns): &(SessionId, VolumeName, u64)| Blackout {
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
