//! What is counted, and how it is told.
//!
//! ```text
//!   shard: Tally ─ once a batch ─► ledger of the session ─┐                ┌► endpoint (Prometheus)
//!                                      │ session ends     ├─► Snapshot ────┤
//!   takeovers, phases, blackouts ─► statistics ◄──────────┘                └► admin API (nebdctl top)
//! ```
//!
//! Ledgers and statistics are memory in the descriptor store: a successor counts on where its
//! predecessor stopped, however that ended. A session is tracked from the moment a successor finds it
//! in the store, though its volume may be long in opening: no counter ever seems to fall.
//!
//! There is one server in a process, and one [`Metrics`]; what is noted before [`start`] is lost.

pub mod alarm;
pub mod counters;
pub mod endpoint;
pub mod exposition;
pub mod snapshot;
pub mod stats;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nebd_abi::host::DeathCause;
use nebd_abi::layout::SessionId;
use nebd_abi::{Generation, VolumeName};
use nebd_backend::FdStore;

pub use counters::{Counters, OP_NAMES, Tally, Totals};
pub use stats::{LastTakeover, Stats, TakeoverKind};

use crate::session::ledger::Ledger;

/// The statistics' name in the descriptor store.
pub const STORE_NAME: &str = "stats";
/// A blackout that a client tells of is cut off here: it is the client's word.
const CLIENT_BLACKOUT_MAX: Duration = Duration::from_secs(3600);

static METRICS: OnceLock<Metrics> = OnceLock::new();

/// What this server knows of counters.
struct Metrics {
    stats: Stats,
    /// How this server took over.
    kind: Option<TakeoverKind>,
    started_unix_ms: u64,
    /// Sessions that have not ended; locked while counters move from there to the statistics.
    tracked: Mutex<HashMap<SessionId, Tracked>>,
}

struct Tracked {
    volume: VolumeName,
    ledger: Ledger,
}

impl Metrics {
    fn tracked(&self) -> MutexGuard<'_, HashMap<SessionId, Tracked>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kind of a takeover from the server of `seen`, which ended so; `None` if nobody served before.
pub fn unplanned(seen: Generation, cause: DeathCause) -> Option<TakeoverKind> {
    (seen.0 > 0).then_some(match cause {
        DeathCause::Unknown => TakeoverKind::Unknown,
        DeathCause::Exit => TakeoverKind::Exit,
        DeathCause::Killed => TakeoverKind::Killed,
        DeathCause::Crash => TakeoverKind::Crash,
        DeathCause::Watchdog => TakeoverKind::Watchdog,
    })
}

/// Takes up the statistics out of the store, or begins new ones, and notes the takeover by which
/// this server came to serve. To be called once, by the owner.
pub fn start(store: &dyn FdStore, generation: Generation, kind: Option<TakeoverKind>) {
    let found = store.fetch(STORE_NAME).and_then(|fd| {
        Stats::open(fd)
            .inspect_err(|error| tracing::warn!(%error, "the statistics begin anew"))
            .ok()
    });
    let stats = match found {
        Some(stats) => stats,
        None => match begin(store) {
            Ok(stats) => stats,
            Err(error) => {
                tracing::error!(%error, "no statistics: nothing is told of takeovers");
                return;
            }
        },
    };
    let started_unix_ms = unix_ms();
    if let Some(kind) = kind {
        stats.note_takeover(kind, generation, started_unix_ms);
    }
    let metrics = Metrics { stats, kind, started_unix_ms, tracked: Mutex::default() };
    if METRICS.set(metrics).is_err() {
        tracing::error!("the statistics were taken up twice");
    }
}

fn begin(store: &dyn FdStore) -> Result<Stats, nebd_abi::region::RegionError> {
    let stats = Stats::create()?;
    if let Err(error) = store.put(STORE_NAME, stats.fd()) {
        tracing::warn!(%error, "the statistics end with this server");
    }
    Ok(stats)
}

/// A phase of a takeover took so long.
pub fn note_phase(name: &str, took: Duration) {
    if let Some(metrics) = METRICS.get() {
        metrics.stats.note_phase(name, took);
    }
}

/// A volume had this blackout in the takeover by which this server came to serve.
pub fn note_blackout(volume: &VolumeName, blackout: Duration) {
    let Some(metrics) = METRICS.get() else { return };
    metrics.stats.note_blackout(metrics.kind.unwrap_or(TakeoverKind::Unknown), blackout);
    tracing::debug!(%volume, blackout_us = blackout.as_micros() as u64, "blackout");
}

/// As [`note_blackout`], by the word of a client. In planned takeovers the servers know better.
pub(crate) fn note_client_blackout(volume: &VolumeName, blackout: Duration) {
    let is_ours =
        |metrics: &Metrics| metrics.kind.is_some_and(|kind| kind != TakeoverKind::Planned);
    if METRICS.get().is_some_and(is_ours) {
        note_blackout(volume, blackout.min(CLIENT_BLACKOUT_MAX));
    }
}

/// A session of this volume counts in its ledger from now on.
pub(crate) fn track(id: SessionId, volume: &VolumeName, ledger: &Ledger) {
    if let Some(metrics) = METRICS.get() {
        let tracked = Tracked { volume: volume.clone(), ledger: ledger.clone() };
        metrics.tracked().insert(id, tracked);
    }
}

/// A session has ended: what it counted becomes its volume's. Before its ledger leaves the store.
pub(crate) fn retire(id: SessionId) {
    let Some(metrics) = METRICS.get() else { return };
    let mut tracked = metrics.tracked();
    let Some(Tracked { volume, ledger }) = tracked.remove(&id) else { return };
    if !metrics.stats.retire(&volume, ledger.counters()) {
        tracing::warn!(%volume, "no room in the statistics for what a session counted");
    }
}

/// A volume is deleted.
pub(crate) fn forget(volume: &VolumeName) {
    if let Some(metrics) = METRICS.get() {
        let _nobody_retires = metrics.tracked();
        metrics.stats.forget(volume);
    }
}

/// Counters of every volume that ever had a session, sessions that live included.
pub(crate) fn volumes() -> BTreeMap<VolumeName, Totals> {
    let Some(metrics) = METRICS.get() else { return BTreeMap::new() };
    let tracked = metrics.tracked();
    let mut volumes: BTreeMap<VolumeName, Totals> = metrics.stats.retired().into_iter().collect();
    for Tracked { volume, ledger } in tracked.values() {
        if let Some(totals) = volumes.get_mut(volume) {
            totals.add(ledger.counters());
        } else {
            let mut totals = Totals::default();
            totals.add(ledger.counters());
            volumes.insert(volume.clone(), totals);
        }
    }
    volumes
}

/// The statistics, once there are any.
pub(crate) fn stats() -> Option<&'static Stats> {
    METRICS.get().map(|metrics| &metrics.stats)
}

/// When this server began, in milliseconds since 1970.
pub(crate) fn started_unix_ms() -> u64 {
    METRICS.get().map_or(0, |metrics| metrics.started_unix_ms)
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
