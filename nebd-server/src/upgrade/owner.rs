//! The old server's side of a planned takeover.
//!
//! Until the candidate has claimed the generation, every error and every silence ends here: the
//! candidate is killed, its end awaited, and the generation word looked at. If it has not moved,
//! this server goes on as if nothing had been. If it has, this server owns nothing any more and goes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use nebd_abi::VolumeName;
use nebd_abi::layout::{ServerState, SessionId, features};
use nebd_abi::region::Region;
use nebd_backend::FdStore;
use nebd_rpc::admin::{self, ClientSupport, UpgradeKind, UpgradeState};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::Order;
use super::checks::{check_binary, check_means};
use super::seals::Seals;
use crate::handover::message::{
    self, Client, Frozen, Hello, Message, Prepared, Purpose, Welcome, send_offer,
};
use crate::handover::wire::WireError;
use crate::holdings::Holdings;
use crate::server::Server;
use crate::shard::{Command, Freeze, FreezeEvent, monotonic_ns};
use crate::volume::OpenVolume;

/// What is under way in the control plane may take this long to end.
const GATE_TIME_MAX: Duration = Duration::from_secs(5);
/// Rounds in which the candidate catches up before the gate is closed.
const DELTA_ROUNDS_MAX: usize = 5;
/// Longest wait for the service manager to hear of the new server.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(30);
/// Guests stand still while this runs.
const FENCE_TIME_MAX: Duration = Duration::from_secs(1);
/// What can be served at once is served within milliseconds; a new server that is silent for this
/// long is frozen, and the next one is quicker than its thaw.
const RESUME_TIME_MAX: Duration = Duration::from_secs(2);
const LINGER_TIME_MAX: Duration = Duration::from_secs(10);
/// Between looks at the new server while requests are still at their storage.
const DRAIN_PAUSE: Duration = Duration::from_millis(2);
/// Messages of a candidate that went away, and errors of its socket, in which its reason is looked for.
const LAST_LOOKS: usize = 4;
/// Entries of the store in one message.
const OFFER_ENTRIES_MAX: usize = 128;

/// Why a takeover did not come about.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Nothing had moved yet.
    #[error("{0}")]
    Refused(String),
    /// Something broke on the way.
    #[error("{step}: {reason}")]
    Failed { step: &'static str, reason: String },
    /// It was not meant to: a dry run, a check.
    #[error("")]
    Enough,
}

fn failed<E: std::fmt::Display>(step: &'static str) -> impl Fn(E) -> Failure {
    move |reason| Failure::Failed { step, reason: reason.to_string() }
}

/// Hands this server over; does not return if that succeeds.
pub(super) fn hand_over(server: &Arc<Server>, holdings: &Holdings, order: &Order) {
    let mut owner = Owner { server, holdings, order, candidate: None };
    let failure = match owner.attempt() {
        Ok(never) => match never {},
        Err(failure) => owner.with_last_words(failure),
    };
    owner.go_on();
    let mut report = server.upgrades.report();
    match failure {
        Failure::Refused(reason) => report.finish(UpgradeState::Refused, reason),
        Failure::Failed { .. } => report.finish(UpgradeState::Failed, failure.to_string()),
        Failure::Enough => report.finish(UpgradeState::Done, ""),
    }
}

enum Never {}

struct Owner<'a> {
    server: &'a Arc<Server>,
    holdings: &'a Holdings,
    order: &'a Order,
    candidate: Option<Candidate>,
}

struct Candidate {
    child: Child,
    socket: OwnedFd,
}

impl Owner<'_> {
    fn attempt(&mut self) -> Result<Never, Failure> {
        let (server, order) = (self.server, self.order);
        let binary = order.binary.clone().unwrap_or_else(|| self.holdings.binary.clone());
        let describe = |binary: &Path, version: &str, pid, generation| admin::Server {
            version: version.into(),
            binary: binary.to_string_lossy().into_owned(),
            pid,
            generation,
        };
        let version = env!("CARGO_PKG_VERSION");
        let (pid, generation) = (std::process::id(), server.tenure.generation().0);
        server.upgrades.report().set_from(describe(
            &self.holdings.binary,
            version,
            pid,
            generation,
        ));
        server.upgrades.report().set_to(describe(&binary, "", 0, 0));
        check_binary(&binary).map_err(Failure::Refused)?;
        check_means(server).map_err(Failure::Refused)?;

        let begin = monotonic_ns();
        self.start(&binary).map_err(Failure::Refused)?;
        let candidate_pid = self.candidate.as_ref().map_or(0, |candidate| candidate.child.id());
        server.upgrades.report().set_to(describe(&binary, "", candidate_pid, 0));
        self.announce(candidate_pid).map_err(failed("HELLO"))?;
        let clients = self.clients();
        let welcome = self.greet(&clients)?;
        server.upgrades.report().set_to(describe(
            &binary,
            &welcome.build,
            candidate_pid,
            generation + 1,
        ));
        let count = clients.len();
        let detail = format!("version {}, {count} clients attached", welcome.build);
        server.upgrades.report().step("HELLO", begin, detail);
        self.judge_clients(clients, &welcome)?;
        if order.kind == UpgradeKind::Check {
            return Err(Failure::Enough);
        }

        self.offer_all()?;
        let prepared = self.prepare("PREPARE")?;
        self.close_gate()?;
        if order.kind == UpgradeKind::DryRun {
            return Err(Failure::Enough);
        }
        crate::failpoint!("owner-ready");
        let (left, events) = self.freeze(&prepared)?;
        self.fence()?;
        self.release(left, &events)
    }

    fn start(&mut self, binary: &Path) -> Result<(), String> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .map_err(|error| format!("no sockets for the candidate: {error}"))?;
        let own = std::env::args_os().skip(1);
        let args = own.filter(|arg| arg != "--standby" && arg != "--candidate");
        let child = Process::new(binary)
            .args(args)
            .arg("--candidate")
            // All that it inherits; descriptors of ours are closed when it starts.
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("{} cannot be started: {error}", binary.display()))?;
        self.candidate = Some(Candidate { child, socket: ours });
        Ok(())
    }

    fn socket(&self) -> Result<BorrowedFd<'_>, Failure> {
        let candidate = self.candidate.as_ref().map(|candidate| candidate.socket.as_fd());
        candidate.ok_or_else(|| failed("HELLO")("there is no candidate"))
    }

    /// Tells the keeper who may become the server, before it can.
    fn announce(&self, pid: u32) -> std::io::Result<()> {
        let Some(notifier) = &self.holdings.notifier else { return Ok(()) };
        notifier.candidate(pid);
        // Not the store's barrier, which would ask the next keeper if this one dies: that one has
        // not heard of the candidate.
        notifier.barrier(self.holdings.step)
    }

    fn greet(&self, clients: &[Client]) -> Result<Welcome, Failure> {
        let deadline = Instant::now() + self.holdings.step;
        let hello = Hello {
            versions: (message::VERSION_MIN, message::VERSION),
            purpose: match self.order.kind {
                UpgradeKind::Check => Purpose::Check,
                UpgradeKind::DryRun => Purpose::DryRun,
                _ => Purpose::Takeover,
            },
            generation: self.server.tenure.generation(),
            pid: std::process::id(),
            build: env!("CARGO_PKG_VERSION").into(),
            binary: self.holdings.binary.to_string_lossy().into_owned(),
            has_store: self.server.has_store(),
            canary: self.order.canary.clone(),
            clients: clients.to_vec(),
        };
        let refused = |error: WireError| match error {
            // Whatever it is, it is no server of ours.
            WireError::Gone => Failure::Refused(
                "the binary went away without a word: is it a nebd-server that knows planned \
                 takeovers? Its log may say more"
                    .into(),
            ),
            error => Failure::Refused(format!("HELLO: {error}")),
        };
        let socket = self.socket()?;
        crate::failpoint!("owner-hello");
        if !crate::hooks::strange_owner("hello", socket) {
            Message::Hello(hello).send(socket, deadline).map_err(refused)?;
        }
        match Message::receive(socket, deadline).map_err(refused)? {
            Message::Welcome(welcome)
                if (message::VERSION_MIN..=message::VERSION).contains(&welcome.version) =>
            {
                Ok(welcome)
            }
            Message::Welcome(welcome) => Err(Failure::Refused(format!(
                "the candidate wants version {} of the handover, this server speaks {} to {}",
                welcome.version,
                message::VERSION_MIN,
                message::VERSION
            ))),
            Message::Refused(reason) => Err(Failure::Refused(reason)),
            other => Err(Failure::Refused(unexpected(&other))),
        }
    }

    fn clients(&self) -> Vec<Client> {
        let sessions = self.server.sessions();
        let describe = |session: &Arc<crate::session::Session>| {
            let params = session.region.params();
            Client {
                session: session.id,
                volume: session.volume.name.to_string(),
                pid: params.client_pid,
                version: params.client_version.clone(),
                layout: params.version as u32,
                // Of the word in shared memory only what this server knows counts: the rest was
                // not there when the session was attached.
                features_required: session.region.header().features_required.load(Relaxed)
                    & features::REQUIRED_KNOWN,
            }
        };
        sessions.iter().map(describe).collect()
    }

    fn judge_clients(&self, clients: Vec<Client>, welcome: &Welcome) -> Result<(), Failure> {
        let reasons: BTreeMap<[u8; 16], &String> =
            welcome.unsupported.iter().map(|(session, why)| (session.0, why)).collect();
        let support = clients.into_iter().map(|client| ClientSupport {
            session: client.session.to_string(),
            volume: client.volume,
            client_pid: client.pid,
            client_version: client.version,
            layout_version: client.layout,
            supported: !reasons.contains_key(&client.session.0),
            reason: reasons.get(&client.session.0).map_or_else(String::new, |why| (*why).clone()),
        });
        let support: Vec<ClientSupport> = support.collect();
        let refused: Vec<String> = support
            .iter()
            .filter(|client| !client.supported)
            .map(|client| format!("{} (process {})", client.volume, client.client_pid))
            .collect();
        self.server.upgrades.report().set_clients(support);
        if refused.is_empty() {
            return Ok(());
        }
        Err(Failure::Refused(format!(
            "the candidate cannot serve clients that are attached: {}",
            refused.join(", ")
        )))
    }

    /// Offers the listeners and everything in the store. From now on changes are noted.
    fn offer_all(&self) -> Result<(), Failure> {
        let begin = monotonic_ns();
        let deadline = Instant::now() + self.holdings.step;
        let own: Vec<(&str, BorrowedFd<'_>)> =
            self.holdings.fds.iter().map(|(name, fd)| (*name, fd.as_fd())).collect();
        send_offer(self.socket()?, &own, &[], deadline).map_err(failed("OFFER"))?;
        crate::failpoint!("owner-offer");
        let _ = self.server.store.changes();
        let names = self.server.store.names("");
        let count = names.len() + own.len();
        if !crate::hooks::strange_owner("offer", self.socket()?) {
            self.offer(&names, deadline).map_err(failed("OFFER"))?;
        }
        self.server.upgrades.report().step("OFFER", begin, format!("{count} descriptors"));
        Ok(())
    }

    /// Offers these entries; those that are gone are told as gone.
    fn offer(&self, names: &[String], deadline: Instant) -> Result<(), WireError> {
        let Some(candidate) = &self.candidate else { return Err(WireError::Gone) };
        for group in names.chunks(OFFER_ENTRIES_MAX) {
            let fetched: Vec<(&String, Option<OwnedFd>)> =
                group.iter().map(|name| (name, self.server.store.fetch(name))).collect();
            let entries: Vec<(&str, BorrowedFd<'_>)> = fetched
                .iter()
                .filter_map(|(name, fd)| Some((name.as_str(), fd.as_ref()?.as_fd())))
                .collect();
            let absent = fetched.iter().filter(|(_, fd)| fd.is_none());
            let gone: Vec<String> = absent.map(|(name, _)| (*name).clone()).collect();
            if gone.iter().any(|name| self.server.store.holds(name)) {
                // It is there and cannot be duplicated: no descriptors are left.
                return Err(WireError::System(rustix::io::Errno::MFILE.into()));
            }
            send_offer(&candidate.socket, &entries, &gone, deadline)?;
        }
        Ok(())
    }

    fn offer_changes(&self, deadline: Instant) -> Result<usize, WireError> {
        let changed: Vec<String> =
            self.server.store.changes().unwrap_or_default().into_iter().collect();
        self.offer(&changed, deadline)?;
        Ok(changed.len())
    }

    fn prepare(&self, step: &'static str) -> Result<Prepared, Failure> {
        let begin = monotonic_ns();
        let deadline = Instant::now() + self.holdings.step;
        let prepared = loop {
            match self.have_prepared(step) {
                Ok(prepared) => break prepared,
                // Of a session that began or ended meanwhile the candidate may know the half.
                Err(failure) if Instant::now() > deadline => return Err(failure),
                Err(failure) => {
                    if !self.offer_changes(deadline).is_ok_and(|count| count > 0) {
                        return Err(failure);
                    }
                }
            }
        };
        let detail = format!("{} volumes, {} sessions", prepared.volumes, prepared.sessions);
        self.server.upgrades.report().step(step, begin, detail);
        Ok(prepared)
    }

    fn have_prepared(&self, step: &'static str) -> Result<Prepared, Failure> {
        let deadline = Instant::now() + self.holdings.step;
        let socket = self.socket()?;
        Message::Prepare.send(socket, deadline).map_err(failed(step))?;
        crate::failpoint!("owner-prepare");
        let prepared = match Message::receive(socket, deadline).map_err(failed(step))? {
            Message::Prepared(prepared) => prepared,
            other => return Err(failed(step)(unexpected(&other))),
        };
        let failures = self.judge_failures(&prepared);
        if !failures.is_empty() {
            return Err(failed(step)(failures.join("; ")));
        }
        Ok(prepared)
    }

    /// Those of a candidate's failures that are reasons to stay.
    fn judge_failures(&self, prepared: &Prepared) -> Vec<String> {
        let sessions = self.server.sessions();
        let served: HashSet<String> = sessions.iter().map(|s| s.volume.name.to_string()).collect();
        let counts = |(what, why): &(String, String)| {
            if let Ok(id) = what.parse::<SessionId>() {
                let session = self.server.session(id)?;
                // One that ends may be gone from the store already, and not from here.
                if session.is_draining() || self.is_broken(&session) {
                    return None;
                }
                return Some(format!("{}, session {id}: {why}", session.volume.name));
            }
            // What this server cannot have open either is no reason; and the way back from a bad
            // server is open whatever else is wrong.
            let is_reason = what.is_empty()
                || served.contains(what) && self.order.kind != UpgradeKind::Rollback;
            is_reason.then(|| format!("{what}: {why}"))
        };
        prepared.failures.iter().filter_map(counts).collect()
    }

    /// Whether a client has made its own region unreadable. It must not hold up everybody's
    /// upgrade: its session ends, as after any other nonsense.
    fn is_broken(&self, session: &crate::session::Session) -> bool {
        let Ok(region) = session.region.memory().fd().try_clone_to_owned() else { return false };
        let Err(error) = Region::open(region) else { return false };
        if matches!(error, nebd_abi::region::RegionError::System { .. }) {
            return false;
        }
        tracing::warn!(session = %session.id, volume = %session.volume.name, %error,
            "session detached: its client has broken its region");
        session.publish_state(ServerState::Detached);
        self.server.end_session(session.id);
        true
    }

    /// Has the candidate prepare what changed since OFFER until nothing does, and then has the
    /// control plane stand still.
    fn close_gate(&self) -> Result<(), Failure> {
        let begin = monotonic_ns();
        let mut changed = 0;
        for _ in 0..DELTA_ROUNDS_MAX {
            let round = self.offer_changes(Instant::now() + self.holdings.step);
            let round = round.map_err(failed("READY"))?;
            changed += round;
            self.prepare("READY")?;
            if round == 0 || self.order.kind == UpgradeKind::DryRun {
                break;
            }
        }
        if self.order.kind == UpgradeKind::DryRun {
            return Ok(());
        }
        self.server
            .gate
            .close(Instant::now() + GATE_TIME_MAX)
            .map_err(|busy| failed("READY")(format!("still under way: {}", busy.join(", "))))?;
        let last = self.offer_changes(Instant::now() + FENCE_TIME_MAX).map_err(failed("READY"))?;
        // From here on registry, sessions and connections stand still, and guests do not yet.
        let deadline = Instant::now() + FENCE_TIME_MAX;
        self.offer_connections(deadline).map_err(failed("READY"))?;
        self.have_prepared("READY")?;
        if changed + last > 0 {
            let detail = format!("{} descriptors changed meanwhile", changed + last);
            self.server.upgrades.report().step("DELTA", begin, detail);
        }
        Ok(())
    }

    /// Stops the data path, and tells the candidate. Returns the sessions that still have requests
    /// at their storage, and where the end of these is told.
    fn freeze(
        &self,
        prepared: &Prepared,
    ) -> Result<(Vec<SessionId>, Receiver<FreezeEvent>), Failure> {
        let begin = monotonic_ns();
        let (sender, events) = crossbeam::channel::unbounded();
        let deadline = Instant::now() + self.holdings.freeze;
        for shard in &self.server.shards {
            shard.send(Command::Freeze(Freeze { deadline, events: sender.clone() }));
        }
        let patience = deadline + FENCE_TIME_MAX;
        let seals = Seals::collect(self.server.shards.len(), &events, patience)
            .ok_or_else(|| failed("FREEZE")("a shard does not answer"))?;
        let Seals { left, last_ns } = seals;
        crate::failpoint!("owner-frozen");
        let changed = self.offer_changes(patience).map_err(failed("FREEZE"))?;
        let detail = format!(
            "{} sessions, {} with requests at their storage, {changed} descriptors",
            prepared.sessions,
            left.len()
        );
        let report = {
            let mut report = self.server.upgrades.report();
            report.step("FREEZE", begin, detail);
            report.to_bytes()
        };
        let frozen = Frozen {
            report,
            last_ns: last_ns.into_iter().map(|(id, ns)| (SessionId(id), ns)).collect(),
            left: left.clone(),
            probation_ms: self.order.probation.as_millis() as u64,
        };
        Message::Frozen(frozen).send(self.socket()?, patience).map_err(failed("FREEZE"))?;
        Ok((left, events))
    }

    fn offer_connections(&self, deadline: Instant) -> Result<(), WireError> {
        let Some(candidate) = &self.candidate else { return Err(WireError::Gone) };
        let speakers = self.server.speakers();
        let connections = speakers.iter().filter_map(|(session, socket)| {
            // One that cannot be duplicated is closed with this process: its client comes back.
            Some((*session, socket.try_clone().ok()?))
        });
        Message::Connections(connections.collect()).send(&candidate.socket, deadline)
    }

    fn fence(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + FENCE_TIME_MAX;
        match Message::receive(self.socket()?, deadline).map_err(failed("FENCE"))? {
            Message::Fenced(_) => Ok(()),
            other => Err(failed("FENCE")(unexpected(&other))),
        }
    }

    /// Gives up what the new owner waits for, and goes.
    fn release(
        &mut self,
        left: Vec<SessionId>,
        events: &Receiver<FreezeEvent>,
    ) -> Result<Never, Failure> {
        crate::failpoint!("owner-fenced");
        let volume_of = |id: SessionId| self.server.session(id).map(|s| s.volume.name.clone());
        // By queue: a session may be there several times.
        let mut waiting = BTreeMap::<VolumeName, usize>::new();
        for name in left.into_iter().filter_map(volume_of) {
            *waiting.entry(name).or_default() += 1;
        }
        let open: BTreeSet<VolumeName> =
            self.server.sessions().iter().map(|session| session.volume.name.clone()).collect();
        for name in &open {
            let fences = |volume: Arc<OpenVolume>| volume.capabilities.fences;
            if self.server.volumes.open(name).is_some_and(fences) {
                // The new server does not wait for what is in flight here: it must not touch the
                // memory of clients any more.
                waiting.remove(name);
            }
            if !waiting.contains_key(name) {
                self.relinquish(name);
            }
        }
        if let Ok(socket) = self.socket() {
            let _ = Message::Released.send(socket, Instant::now() + FENCE_TIME_MAX);
        }
        let server = self.server.clone();
        // On a thread of its own: it waits for calls that run.
        let _ = std::thread::Builder::new().spawn(move || server.upgrades.stop_admin());
        self.see_out(waiting, events)
    }

    /// Unlocks what is drained later, and goes once the new server serves and the service manager
    /// knows it.
    fn see_out(
        &mut self,
        mut waiting: BTreeMap<VolumeName, usize>,
        events: &Receiver<FreezeEvent>,
    ) -> Result<Never, Failure> {
        let begin = Instant::now();
        let (mut has_resumed, mut has_settled) = (false, false);
        loop {
            if !waiting.is_empty() && begin.elapsed() > LINGER_TIME_MAX {
                // The kernel lets go of their locks once their last request has ended.
                waiting.clear();
            }
            let pause = if waiting.is_empty() { RESUME_TIME_MAX } else { DRAIN_PAUSE };
            match events.recv_timeout(if waiting.is_empty() { Duration::ZERO } else { pause }) {
                Ok(FreezeEvent::Drained(id)) => {
                    let name = self.server.session(id).map(|s| s.volume.name.clone());
                    let Some(name) = name else { continue };
                    let Some(count) = waiting.get_mut(&name) else { continue };
                    *count -= 1;
                    if *count == 0 {
                        waiting.remove(&name);
                        self.relinquish(&name);
                    }
                    continue;
                }
                Ok(FreezeEvent::Sealed { .. }) => continue,
                Err(_) => {}
            }
            if waiting.is_empty() {
                crate::failpoint!("owner-released");
            }
            // Nothing more will be said then: before the wait for it.
            if has_settled && waiting.is_empty() {
                tracing::info!(event = "takeover", "handed over; this server goes");
                crate::failpoint!("owner-linger");
                std::process::exit(0);
            }
            let limit = if has_resumed { SETTLE_TIME_MAX } else { RESUME_TIME_MAX };
            let deadline = begin + limit;
            let until = if waiting.is_empty() { deadline } else { Instant::now() };
            let heard = self.socket().map(|socket| Message::receive(socket, until));
            match heard {
                Ok(Ok(Message::Resumed)) => has_resumed = true,
                Ok(Ok(Message::Settled)) => has_settled = true,
                Ok(Ok(_)) => {}
                Ok(Err(WireError::Late(_))) if Instant::now() < deadline => {}
                _ if has_resumed => has_settled = true,
                _ => self.give_up_new_server(),
            }
        }
    }

    /// The new server has not served within the time, or has died: the next one is the keeper's.
    fn give_up_new_server(&mut self) {
        tracing::error!(event = "takeover", "the new server does not serve; it is killed");
        if let Some(candidate) = &mut self.candidate
            && let Err(error) = candidate.child.kill().and_then(|()| candidate.child.wait())
        {
            tracing::error!(%error, "the end of the new server cannot be awaited");
        }
        std::process::exit(1);
    }

    fn relinquish(&self, name: &VolumeName) {
        if let Some(volume) = self.server.volumes.open(name) {
            volume.volume.relinquish();
        }
    }

    /// The failure, with the candidate's own reason if it refused: that it has gone may have been
    /// noticed before what it had said. It closed with messages of ours unread, so the first look may
    /// find that and nothing else.
    fn with_last_words(&self, failure: Failure) -> Failure {
        let Some(candidate) = &self.candidate else { return failure };
        let look = |_| Message::receive(&candidate.socket, Instant::now());
        let reason = (0..LAST_LOOKS).map(look).find_map(|heard| match heard {
            Ok(Message::Refused(reason)) => Some(reason),
            _ => None,
        });
        match (failure, reason) {
            (Failure::Refused(_), Some(reason)) => Failure::Refused(reason),
            (Failure::Failed { step, .. }, Some(reason)) => Failure::Failed { step, reason },
            (failure, _) => failure,
        }
    }

    /// The candidate is gone for certain after this; this server goes on, or goes.
    fn go_on(&mut self) {
        self.server.store.forget_changes();
        if let Some(mut candidate) = self.candidate.take() {
            let reason = Message::Dismissed("it is not needed".into());
            let _ = reason.send(&candidate.socket, Instant::now());
            let ended = candidate.child.kill().and_then(|()| candidate.child.wait());
            if let Err(error) = ended {
                tracing::error!(%error, "the end of the candidate cannot be awaited");
            }
        }
        if self.holdings.host.generation() != self.server.tenure.generation() {
            tracing::error!(event = "takeover", "the candidate had taken over and was lost");
            std::process::exit(1);
        }
        for shard in &self.server.shards {
            shard.send(Command::Thaw);
        }
        self.server.gate.open();
        if let Some(notifier) = &self.holdings.notifier {
            notifier.candidate(0);
        }
    }
}

fn unexpected(message: &Message) -> String {
    match message {
        Message::Refused(reason) | Message::Dismissed(reason) => reason.clone(),
        _ => "the candidate sent a message that nobody asked for".into(),
    }
}
