//! What a successor does before it owns anything, and what it does once it owns all.
//!
//! ```text
//!  warm standby ── follows the store ──┐
//!                                      ├─► Preparation: regions mapped, volumes opened as an observer
//!  candidate ── is offered the store ──┘                    │ claim
//!                                                           ▼
//!                                      resume: locks taken, rings looked at, queues given to shards
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use nebd_abi::VolumeName;
use nebd_abi::layout::SessionId;
use nebd_backend::{PrepareContext, PreparedVolume};

use crate::server::{AttachRequest, Server};
use crate::session::Session;
use crate::shard::{Hold, monotonic_ns};

/// Volumes are opened in parallel: storage takes its time.
const PREPARE_THREADS_MAX: usize = 16;
/// If all that resume sessions wait for their storage this long, more begin.
const PATIENCE: Duration = Duration::from_millis(1);
/// What is not served after this is served later, on threads of its own.
const RESUME_TIME_MAX: Duration = Duration::from_millis(500);

/// Sessions that are mapped, and volumes that were opened as an observer.
pub(crate) struct Preparation {
    server: Arc<Server>,
    state: Mutex<State>,
    /// No volume is being opened.
    opened: Condvar,
}

#[derive(Default)]
struct State {
    sessions: HashMap<SessionId, AttachRequest>,
    /// Sessions whose descriptors changed since they were mapped.
    changed: HashSet<SessionId>,
    volumes: BTreeSet<VolumeName>,
    /// Volumes that are being opened, or are to be, and whether they are wanted still.
    opening: BTreeMap<VolumeName, bool>,
    queue: VecDeque<VolumeName>,
    /// Threads that open volumes.
    workers: usize,
    /// See [`Progress`].
    failures: Vec<(String, String)>,
    /// The time of preparing is over.
    is_taken: bool,
}

/// What came of preparing.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) volumes: usize,
    pub(crate) sessions: usize,
    /// What cannot be prepared, and why: a session, a volume, or the registry (no name).
    pub(crate) failures: Vec<(String, String)>,
}

/// A volume opened as an observer, or why not.
type Opening = Result<Box<dyn PreparedVolume>, String>;

impl Preparation {
    /// Nothing is prepared yet.
    pub(crate) fn new(server: Arc<Server>) -> Arc<Preparation> {
        Arc::new(Preparation { server, state: Mutex::default(), opened: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store holds something else since a moment, or nothing, under this name. What was mapped
    /// is let go at once: it may be of a session that has ended.
    pub(crate) fn note_change(&self, name: &str) {
        let Some(id) = Session::of_store_name(name) else {
            // The memory of a volume: a mapping of another would keep that one from being freed.
            let volume =
                name.strip_prefix("m.").and_then(|name| format!("mem:{name}").parse().ok());
            let Some(volume): Option<VolumeName> = volume else { return };
            let mut state = self.state();
            state.volumes.remove(&volume);
            state.opening.entry(volume.clone()).and_modify(|is_wanted| *is_wanted = false);
            let mapped = self.server.prepared().remove(&volume);
            drop(state);
            drop(mapped);
            return;
        };
        let mut state = self.state();
        state.changed.insert(id);
        let mapped = state.sessions.remove(&id);
        drop(state);
        drop(mapped);
    }

    /// Maps the sessions and opens the volumes that are not yet, and lets go of those that are
    /// needed no longer. Waits as long as their storage does.
    pub(crate) fn update(self: &Arc<Self>) -> Progress {
        self.begin_update();
        let mut state = self
            .opened
            .wait_while(self.state(), |state| !state.opening.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let failures = std::mem::take(&mut state.failures);
        Progress { volumes: state.volumes.len(), sessions: state.sessions.len(), failures }
    }

    /// The same, but for the waiting: volumes whose storage does not answer hold up no others.
    pub(crate) fn begin_update(self: &Arc<Self>) {
        if self.state().is_taken {
            // A server that serves knows its registry, and has mapped its sessions.
            return;
        }
        let mut failures = Vec::new();
        if let Err(error) = self.server.registry.reload() {
            failures.push((String::new(), error.to_string()));
        }
        self.map_sessions(&mut failures);
        for (name, error) in &failures {
            tracing::debug!(name, error, "cannot be prepared");
        }
        let missing = self.sort_volumes();
        let mut state = self.state();
        if state.is_taken {
            return;
        }
        state.failures = failures;
        for name in missing {
            state.opening.insert(name.clone(), true);
            state.queue.push_back(name);
        }
        let workers = state.queue.len().min(PREPARE_THREADS_MAX - state.workers);
        state.workers += workers;
        drop(state);
        for _ in 0..workers {
            let this = self.clone();
            self.server.jobs.spawn(move || this.open_queued());
        }
    }

    fn map_sessions(&self, failures: &mut Vec<(String, String)>) {
        let stored = self.server.stored_sessions();
        let missing: Vec<SessionId> = {
            let mut state = self.state();
            state.changed.clear();
            stored.into_iter().filter(|id| !state.sessions.contains_key(id)).collect()
        };
        for id in missing {
            if self.state().is_taken {
                return;
            }
            match self.server.stored_request(id) {
                Ok(request) => {
                    let mut state = self.state();
                    // It may have changed while it was being mapped.
                    if !state.is_taken && !state.changed.contains(&id) {
                        state.sessions.insert(id, request);
                    }
                }
                Err(error) => failures.push((id.to_string(), error.to_string())),
            }
        }
    }

    /// Forgets the volumes that no session has any more; returns those to be opened.
    fn sort_volumes(&self) -> Vec<VolumeName> {
        let mut state = self.state();
        if state.is_taken {
            return Vec::new();
        }
        let wanted: BTreeSet<VolumeName> = state.sessions.values().map(volume_of).collect();
        let State { volumes, opening, .. } = &mut *state;
        let unwanted: Vec<_> = volumes.difference(&wanted).cloned().collect();
        unwanted.iter().for_each(|name| _ = volumes.remove(name));
        opening.iter_mut().for_each(|(name, is_wanted)| *is_wanted &= wanted.contains(name));
        let mut prepared = self.server.prepared();
        let closed: Vec<_> = unwanted.iter().filter_map(|name| prepared.remove(name)).collect();
        drop(prepared);
        let is_missing = |name: &VolumeName| !volumes.contains(name) && !opening.contains_key(name);
        let missing = wanted.into_iter().filter(is_missing).collect();
        drop(state);
        drop(closed);
        missing
    }

    /// Opens volumes as an observer for as long as there are any.
    fn open_queued(&self) {
        loop {
            let name = {
                let mut state = self.state();
                let Some(name) = state.queue.pop_front() else {
                    state.workers -= 1;
                    return;
                };
                name
            };
            let result = self.open(&name);
            let mut state = self.state();
            // What it was opened for may be gone, or another volume by now.
            let is_wanted = state.opening.remove(&name) == Some(true) && !state.is_taken;
            // Wanted again, meanwhile.
            let has_session = |state: &State| state.sessions.values().any(|r| volume_of(r) == name);
            let is_again = !is_wanted && !state.is_taken && has_session(&state);
            let again = is_again.then(|| name.clone());
            let unwanted = match result {
                Ok(volume) if is_wanted => {
                    state.volumes.insert(name.clone());
                    self.server.prepared().insert(name, volume)
                }
                Ok(volume) => Some(volume),
                Err(error) => {
                    tracing::debug!(volume = %name, error, "cannot be prepared");
                    state.failures.push((name.to_string(), error));
                    None
                }
            };
            if let Some(name) = again {
                state.opening.insert(name.clone(), true);
                state.queue.push_back(name);
            }
            if state.opening.is_empty() {
                self.opened.notify_all();
            }
            drop(state);
            drop(unwanted);
        }
    }

    fn open(&self, name: &VolumeName) -> Opening {
        let server = &self.server;
        let record = server.registry.record(name).ok_or("it is not in the registry")?;
        let backend = server.backend(name).ok_or("this binary has no such backend")?;
        let context = PrepareContext { store: server.store.clone() };
        backend.prepare(&record.spec(name), &context).map_err(|error| error.to_string())
    }

    /// Ends the time of preparing: the sessions that are mapped, as the store has them.
    pub(crate) fn take(&self) -> HashMap<SessionId, AttachRequest> {
        let mut state = self.state();
        state.is_taken = true;
        // What is not open yet is opened as it is needed.
        for name in std::mem::take(&mut state.queue) {
            state.opening.remove(&name);
        }
        if state.opening.is_empty() {
            self.opened.notify_all();
        }
        std::mem::take(&mut state.sessions)
    }
}

fn volume_of(request: &AttachRequest) -> VolumeName {
    request.region.params().volume.clone()
}

/// A session that is served, and since when (`CLOCK_MONOTONIC`).
pub(crate) type Served = (SessionId, VolumeName, u64);

/// What a new owner is to resume.
pub(crate) struct Resumption {
    server: Arc<Server>,
    now: VecDeque<AttachRequest>,
    later: Vec<AttachRequest>,
}

impl Resumption {
    /// Gives every session of the store its place, before anybody else can ask for its volume.
    /// Sessions in `left`, and others of their volumes, have a lock that is not free yet.
    pub(crate) fn reserve(
        server: &Arc<Server>,
        mut prepared: HashMap<SessionId, AttachRequest>,
        left: &[SessionId],
    ) -> Resumption {
        server.frontends.load(server);
        let left: HashSet<SessionId> = left.iter().copied().collect();
        // A lock is a volume's: all of its sessions wait if one has requests at its storage.
        let locked: HashSet<VolumeName> =
            left.iter().filter_map(|id| prepared.get(id).map(volume_of)).collect();
        let (mut now, mut later) = (VecDeque::new(), Vec::new());
        for id in server.stored_sessions() {
            match prepared.remove(&id) {
                Some(request) if !locked.contains(&volume_of(&request)) => now.push_back(request),
                Some(request) => later.push(request),
                None => later.extend(server.stored_request_or_forget(id)),
            }
        }
        let wanted: HashSet<VolumeName> = now.iter().chain(&later).map(volume_of).collect();
        server.prepared().retain(|name, _| wanted.contains(name));
        now.iter().chain(&later).for_each(|request| server.reserve_for(request));
        Resumption { server: server.clone(), now, later }
    }

    /// Serves every session that was prepared; the others, and those whose locks come later, start
    /// on threads of their own. Returns when each was served.
    pub(crate) fn run(self) -> Vec<Served> {
        let Resumption { server, now, later } = self;
        let (start, count) = (Instant::now(), now.len());
        let is_all = later.is_empty();
        // First: what is not prepared must not wait for what is.
        server.resume_all(later);
        let served = attach_all(&server, now);
        if is_all && count > 0 && served.len() == count {
            crate::metrics::note_phase("resume", start.elapsed());
        }
        served
    }
}

/// Attaches these on a few threads, and returns those that are served after a while. One that waits
/// for its storage holds up nothing but its thread; one that fails is tried again on another.
fn attach_all(server: &Arc<Server>, requests: VecDeque<AttachRequest>) -> Vec<Served> {
    let count = requests.len();
    let queue = Arc::new(Mutex::new(requests));
    let (sender, results) = crossbeam::channel::unbounded();
    let next = |queue: &Mutex<VecDeque<AttachRequest>>| {
        queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    };
    let hold = Hold::begin(&server.shards);
    let spawn = || {
        let (server, queue, sender) = (server.clone(), queue.clone(), sender.clone());
        let hold = hold.clone();
        server.clone().jobs.spawn(move || {
            while let Some(request) = next(&queue) {
                let id = request.region.params().session;
                let volume = volume_of(&request);
                let served = match server.attach_stored(request) {
                    Ok(_) => Some((id, volume, monotonic_ns())),
                    Err(error) => {
                        tracing::warn!(session = %id, %error, "session waits");
                        // Here, and not by whoever reads the results: nobody may read this one.
                        let again = server.clone();
                        server.jobs.spawn(move || again.resume_stored(id));
                        None
                    }
                };
                let _ = sender.send(served);
            }
            // None is left, but for those that wait.
            hold.end();
        });
    };
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    (0..threads.min(count)).for_each(|_| spawn());
    let deadline = Instant::now() + RESUME_TIME_MAX;
    let (mut served, mut heard) = (Vec::with_capacity(count), 0);
    while heard < count && Instant::now() < deadline {
        match results.recv_timeout(PATIENCE) {
            Ok(one) => {
                heard += 1;
                served.extend(one);
            }
            Err(RecvTimeoutError::Timeout) => {
                let left = queue.lock().unwrap_or_else(PoisonError::into_inner).len();
                // Twice as many each time: they hold up those behind them for a few times that.
                (0..threads.min(left)).for_each(|_| spawn());
                threads *= 2;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    hold.end();
    // They were known to their shards before, and served from then on.
    let over_ns = hold.over_ns();
    served.iter_mut().for_each(|(.., served_ns)| *served_ns = over_ns.max(*served_ns));
    let rest = std::mem::take(&mut *queue.lock().unwrap_or_else(PoisonError::into_inner));
    server.resume_all(rest.into());
    served
}

#[cfg(test)]
mod tests;
