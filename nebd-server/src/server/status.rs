//! What the server tells of itself: to the operator, and to whoever scrapes its metrics.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use nebd_abi::VolumeName;
use nebd_abi::host::DeathCause;
use nebd_abi::layout::ServerState;
use nebd_rpc::admin;

use super::Server;
use crate::admin::{AdminApi, AdminError, Caller};
use crate::metrics::snapshot::{ClientCount, Snapshot, VolumeSnapshot};
use crate::metrics::{self, OP_NAMES, TakeoverKind, Totals};
use crate::session::Session;

/// What the sessions of a volume are doing.
#[derive(Clone, Copy, Default)]
struct Doing {
    sessions: u32,
    in_flight: u32,
    stalled: u32,
    oldest_waited_ns: u64,
}

impl Doing {
    fn add(&mut self, session: &Session) {
        self.sessions += 1;
        for queue in &session.live {
            self.in_flight += queue.in_flight.load(Relaxed);
            self.stalled += queue.stalled();
            self.oldest_waited_ns = self.oldest_waited_ns.max(queue.oldest_waited_ns());
        }
    }
}

fn doing(sessions: &[Arc<Session>]) -> HashMap<&VolumeName, Doing> {
    let mut doing: HashMap<&VolumeName, Doing> = HashMap::new();
    for session in sessions {
        doing.entry(&session.volume.name).or_default().add(session);
    }
    doing
}

impl Server {
    fn describe_session(&self, session: &Session) -> admin::Session {
        let header = session.region.header();
        let params = session.region.params();
        let attachment = session.ledger.attachment();
        let mut totals = Totals::default();
        totals.add(session.ledger.counters());
        let state = if session.is_draining() {
            "draining"
        } else if session.volume.parked().is_some() {
            "parked"
        } else {
            match ServerState::from_bits(header.server_state.load(Acquire)) {
                ServerState::Serving => "serving",
                ServerState::Parked => "parked",
                ServerState::Detached => "detached",
                ServerState::Absent => "opening",
            }
        };
        admin::Session {
            id: session.id.to_string(),
            volume: session.volume.name.to_string(),
            client_pid: attachment.client_pid,
            client_uid: attachment.client_uid,
            client_version: params.client_version.clone(),
            layout_version: params.version as u32,
            state: state.to_owned(),
            epoch: session.volume.epoch.to_string(),
            connected: session.is_connected(),
            queues: session
                .shards
                .iter()
                .zip(&session.live)
                .map(|(shard, live)| admin::Queue {
                    depth: params.geometry.queue_depth,
                    in_flight: live.in_flight.load(Relaxed),
                    shard: *shard as u32,
                })
                .collect(),
            requests: totals.requests(),
            errors: totals.errors(),
            bytes_read: totals.of(nebd_abi::Op::Read).bytes,
            bytes_written: totals.of(nebd_abi::Op::Write).bytes,
            takeovers: header.takeovers.load(Relaxed),
            blackout_last_us: header.blackout_last_us.load(Relaxed),
            blackout_worst_us: header.blackout_worst_us.load(Relaxed),
            reissued: session.reissued,
            stalled: session.live.iter().map(|queue| queue.stalled()).sum(),
        }
    }

    pub(super) fn describe_server(
        &self,
        caller: &Caller,
        request: &admin::GetStatusRequest,
    ) -> Result<admin::Status, AdminError> {
        let mut sessions = self.sessions();
        sessions.sort_by(|a, b| (&a.volume.name, a.id).cmp(&(&b.volume.name, b.id)));
        sessions.iter().for_each(|session| session.note_blackout());
        let visible = |session: &Session| {
            let record = self.registry.record(&session.volume.name);
            record.is_some_and(|record| record.permits(caller.uid, caller.gid, false))
        };
        let mut volumes = self.list_volumes(caller)?;
        self.add_doing(&mut volumes, &sessions, request.counters);
        let stats = metrics::stats();
        let takeovers = |stats: &metrics::Stats| {
            TakeoverKind::ALL.into_iter().map(|kind| stats.takeovers(kind)).sum()
        };
        Ok(admin::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            generation: self.tenure.generation().0,
            uptime_ms: self.tenure.duration().as_millis() as u64,
            file_engine: self.file_engine.clone(),
            fd_store: self.has_store(),
            sessions: sessions
                .iter()
                .filter(|session| visible(session))
                .map(|session| self.describe_session(session))
                .collect(),
            volumes,
            shards: self.shards.len() as u32,
            last_death: match self.tenure.last_death() {
                DeathCause::Unknown => String::new(),
                DeathCause::Exit => "exit".to_owned(),
                DeathCause::Killed => "killed".to_owned(),
                DeathCause::Crash => "crash".to_owned(),
                DeathCause::Watchdog => "watchdog".to_owned(),
            },
            resident_bytes: resident_bytes(),
            last_takeover: stats.and_then(metrics::Stats::last_takeover).map(|last| {
                admin::Takeover {
                    kind: last.kind.name().to_owned(),
                    generation: last.generation.0,
                    unix_ms: last.unix_ms,
                    blackout_us: last.blackout.as_micros() as u64,
                }
            }),
            takeovers: stats.map_or(0, takeovers),
        })
    }

    fn add_doing(
        &self,
        volumes: &mut [admin::Volume],
        sessions: &[Arc<Session>],
        with_counters: bool,
    ) {
        let doing = doing(sessions);
        let totals = if with_counters { metrics::volumes() } else { BTreeMap::new() };
        for volume in volumes {
            let Ok(name) = volume.name.parse::<VolumeName>() else { continue };
            let doing = doing.get(&name).copied().unwrap_or_default();
            volume.in_flight = doing.in_flight;
            volume.stalled = doing.stalled;
            volume.oldest_request_ms = doing.oldest_waited_ns / 1_000_000;
            if with_counters {
                let none = Totals::default();
                volume.counters = Some(counters(totals.get(&name).unwrap_or(&none)));
            }
        }
    }

    /// Everything that metrics are made of, as of now.
    pub fn snapshot(&self) -> Snapshot {
        let sessions = self.sessions();
        sessions.iter().for_each(|session| session.note_blackout());
        let doing = doing(&sessions);
        let mut totals = metrics::volumes();
        let volume = |(name, _): (VolumeName, _)| {
            let doing = doing.get(&name).copied().unwrap_or_default();
            let parked = self.volumes.open(&name).is_some_and(|open| open.parked().is_some());
            VolumeSnapshot {
                totals: totals.remove(&name).unwrap_or_default(),
                sessions: doing.sessions,
                in_flight: doing.in_flight,
                stalled: doing.stalled,
                oldest_waited_ns: doing.oldest_waited_ns,
                parked,
                name,
            }
        };
        let volumes = self.registry.records().into_iter().map(volume).collect();
        let mut clients: BTreeMap<(String, u32), u64> = BTreeMap::new();
        for session in &sessions {
            let params = session.region.params();
            // It may call itself anything.
            let printable = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
            let version = params.client_version.chars().map(printable).collect();
            let kind = (version, params.version as u32);
            *clients.entry(kind).or_default() += 1;
        }
        let client = |((version, layout), count)| ClientCount { version, layout, count };
        Snapshot {
            version: env!("CARGO_PKG_VERSION"),
            generation: self.tenure.generation().0,
            started_unix_ms: metrics::started_unix_ms(),
            sessions: sessions.len() as u64,
            sessions_connected: sessions.iter().filter(|s| s.is_connected()).count() as u64,
            clients: clients.into_iter().map(client).collect(),
            resident_bytes: resident_bytes(),
            open_fds: open_fds(),
            max_fds: max_fds(),
            volumes,
        }
    }
}

fn counters(totals: &Totals) -> admin::Counters {
    let op = |(name, op): (&&str, &metrics::counters::OpTotals)| admin::OpCounters {
        op: (*name).to_owned(),
        requests: op.requests,
        errors: op.errors,
        bytes: op.bytes,
    };
    let buckets = &totals.latency.buckets;
    let filled = buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    admin::Counters {
        ops: OP_NAMES.iter().zip(&totals.ops).map(op).collect(),
        stalls: totals.stalls,
        throttles: totals.throttles,
        throttled_us: totals.throttled_ns / 1000,
        latency_sum_us: totals.latency.sum_ns / 1000,
        latency_buckets: buckets[..filled].to_vec(),
    }
}

/// Private resident memory of this process.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut words = statm.split_whitespace().skip(1).map(|word| word.parse::<u64>().unwrap_or(0));
    let (resident, shared) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
    resident.saturating_sub(shared) * rustix::param::page_size() as u64
}

fn max_fds() -> u64 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.unwrap_or(u64::MAX)
}

fn open_fds() -> u64 {
    // One of them is the directory itself.
    std::fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count().saturating_sub(1) as u64)
}
