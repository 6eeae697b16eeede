//! What metrics are made of, at one moment; and the metrics themselves.

use nebd_abi::VolumeName;

use super::counters::{BUCKETS, OP_NAMES, Times, Totals, bucket_end_us};
use super::exposition::{Exposition, Kind, Metric};
use super::stats::{Stats, TakeoverKind};

/// The server, its sessions and volumes.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "the catalogue below says what they are")]
pub struct Snapshot {
    pub version: &'static str,
    pub generation: u32,
    pub started_unix_ms: u64,
    pub sessions: u64,
    pub sessions_connected: u64,
    pub clients: Vec<ClientCount>,
    pub resident_bytes: u64,
    pub open_fds: u64,
    pub max_fds: u64,
    pub volumes: Vec<VolumeSnapshot>,
}

/// How many sessions have a client library of this version and region layout.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "see there")]
pub struct ClientCount {
    pub version: String,
    pub layout: u32,
    pub count: u64,
}

/// A volume.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the catalogue below says what they are")]
pub struct VolumeSnapshot {
    pub name: VolumeName,
    pub totals: Totals,
    pub sessions: u32,
    pub in_flight: u32,
    pub stalled: u32,
    pub oldest_waited_ns: u64,
    pub parked: bool,
}

/// Client versions that are told apart: a client may call itself anything.
const CLIENTS_MAX: usize = 16;
/// Bounds of the histograms: powers of two of microseconds, 8 µs to 67 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 3..=26;

macro_rules! catalogue {
    ($($konst:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(const $konst: Metric = Metric {
            name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help,
        };)*
        /// Every metric there is; `docs/operations.md` lists the same.
        pub const CATALOGUE: &[Metric] = &[$($konst),*];
    };
}

catalogue! {
    BUILD_INFO Gauge "nebd_build_info" ["version"] "The server's version; always 1.";
    GENERATION Gauge "nebd_generation" [] "Generation of the server, raised by each takeover.";
    START_TIME Gauge "nebd_start_time_seconds" [] "When this server began to serve, since 1970.";
    TAKEOVERS Counter "nebd_takeovers_total" ["kind"] "Takeovers, by how the server before ended.";
    LAST_TIME Gauge "nebd_takeover_last_timestamp_seconds" []
        "When the last takeover was, since 1970; 0 if there was none.";
    LAST_BLACKOUT Gauge "nebd_takeover_last_blackout_seconds" []
        "Longest blackout of a volume in the last takeover.";
    PHASES Summary "nebd_takeover_phase_seconds" ["phase"] "How long phases of takeovers took.";
    PHASES_LAST Gauge "nebd_takeover_phase_last_seconds" ["phase"]
        "How long a phase took in the last takeover that had it.";
    BLACKOUTS Histogram "nebd_blackout_seconds" ["kind"]
        "Blackouts of volumes, in planned and in unplanned takeovers.";
    SESSIONS Gauge "nebd_sessions" [] "Sessions that are served.";
    CONNECTED Gauge "nebd_sessions_connected" [] "Of them, those whose client is connected.";
    CLIENT_INFO Gauge "nebd_client_info" ["version", "layout"]
        "Sessions by version and region layout of the client library.";
    OLDEST_LAYOUT Gauge "nebd_oldest_client_layout" []
        "Oldest region layout that is attached; 0 if there is no session.";
    RESIDENT Gauge "nebd_resident_bytes" [] "Private resident memory of the server.";
    OPEN_FDS Gauge "nebd_open_fds" [] "Descriptors that the server has open.";
    MAX_FDS Gauge "nebd_max_fds" [] "Descriptors that the server may have open.";
    REQUESTS Counter "nebd_volume_requests_total" ["volume", "op"] "Requests answered.";
    ERRORS Counter "nebd_volume_errors_total" ["volume", "op"]
        "Requests answered with an error.";
    BYTES Counter "nebd_volume_bytes_total" ["volume", "op"]
        "Bytes of requests answered without an error.";
    LATENCY Histogram "nebd_volume_latency_seconds" ["volume"]
        "From being taken from the ring to being answered.";
    IN_FLIGHT Gauge "nebd_volume_in_flight" ["volume"] "Requests at the storage.";
    STALLED Gauge "nebd_volume_stalled_requests" ["volume"]
        "Requests at the storage for longer than ring.stall_alarm_ms.";
    STALLS Counter "nebd_volume_stalls_total" ["volume"]
        "Requests that the storage did not answer for ring.stall_alarm_ms.";
    OLDEST Gauge "nebd_oldest_request_seconds" ["volume"]
        "Age of the oldest request at the storage; 0 below a quarter of a second.";
    PARKED Gauge "nebd_volume_parked" ["volume"] "1 if the volume is parked.";
    VOLUME_SESSIONS Gauge "nebd_volume_sessions" ["volume"] "Sessions of the volume.";
    THROTTLES Counter "nebd_volume_throttled_total" ["volume"]
        "How often a queue was held back by the volume's limits.";
    THROTTLED Counter "nebd_volume_throttled_seconds_total" ["volume"]
        "For how long queues were held back, all together.";
}

/// The operations whose bytes are told.
const WITH_BYTES: [usize; 4] = [1, 2, 4, 5];

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

impl Snapshot {
    /// As text for Prometheus; `stats` are the host's.
    pub fn exposition(&self, stats: Option<&Stats>) -> String {
        let mut out = Exposition::default();
        out.family(&BUILD_INFO).sample(&[self.version], 1.0);
        out.family(&GENERATION).sample(&[], f64::from(self.generation));
        out.family(&START_TIME).sample(&[], self.started_unix_ms as f64 / 1e3);
        takeovers(&mut out, stats);
        out.family(&SESSIONS).sample(&[], self.sessions as f64);
        out.family(&CONNECTED).sample(&[], self.sessions_connected as f64);
        self.clients(&mut out);
        out.family(&RESIDENT).sample(&[], self.resident_bytes as f64);
        out.family(&OPEN_FDS).sample(&[], self.open_fds as f64);
        out.family(&MAX_FDS).sample(&[], self.max_fds as f64);
        self.counters(&mut out);
        self.gauges(&mut out);
        out.finish()
    }

    fn clients(&self, out: &mut Exposition) {
        let mut clients: Vec<&ClientCount> = self.clients.iter().collect();
        clients.sort_by_key(|client| std::cmp::Reverse(client.count));
        let rest = clients.split_off(clients.len().min(CLIENTS_MAX));
        let mut family = out.family(&CLIENT_INFO);
        for ClientCount { version, layout, count } in clients {
            family.sample(&[version, &layout.to_string()], *count as f64);
        }
        if !rest.is_empty() {
            let count: u64 = rest.iter().map(|client| client.count).sum();
            family.sample(&["others", "others"], count as f64);
        }
        let oldest = self.clients.iter().map(|client| client.layout).min().unwrap_or(0);
        out.family(&OLDEST_LAYOUT).sample(&[], f64::from(oldest));
    }

    fn counters(&self, out: &mut Exposition) {
        type Value = fn(&super::counters::OpTotals) -> u64;
        let by_op: [(&Metric, Value); 2] =
            [(&REQUESTS, |op| op.requests), (&ERRORS, |op| op.errors)];
        for (metric, value) in by_op {
            let mut family = out.family(metric);
            for volume in &self.volumes {
                for (name, op) in OP_NAMES.iter().zip(&volume.totals.ops) {
                    family.sample(&[volume.name.as_str(), name], value(op) as f64);
                }
            }
        }
        let mut family = out.family(&BYTES);
        for volume in &self.volumes {
            for op in WITH_BYTES {
                let bytes = volume.totals.ops[op].bytes;
                family.sample(&[volume.name.as_str(), OP_NAMES[op]], bytes as f64);
            }
        }
        let mut family = out.family(&LATENCY);
        for volume in &self.volumes {
            let (buckets, count) = cumulative(&volume.totals.latency);
            let sum = seconds(volume.totals.latency.sum_ns);
            family.histogram(&[volume.name.as_str()], &buckets, sum, count);
        }
    }

    fn gauges(&self, out: &mut Exposition) {
        type Value = fn(&VolumeSnapshot) -> f64;
        let each: [(&Metric, Value); 8] = [
            (&IN_FLIGHT, |volume| f64::from(volume.in_flight)),
            (&STALLED, |volume| f64::from(volume.stalled)),
            (&STALLS, |volume| volume.totals.stalls as f64),
            (&OLDEST, |volume| seconds(volume.oldest_waited_ns)),
            (&PARKED, |volume| f64::from(u8::from(volume.parked))),
            (&VOLUME_SESSIONS, |volume| f64::from(volume.sessions)),
            (&THROTTLES, |volume| volume.totals.throttles as f64),
            (&THROTTLED, |volume| seconds(volume.totals.throttled_ns)),
        ];
        for (metric, value) in each {
            let mut family = out.family(metric);
            for volume in &self.volumes {
                family.sample(&[volume.name.as_str()], value(volume));
            }
        }
    }
}

fn takeovers(out: &mut Exposition, stats: Option<&Stats>) {
    let mut family = out.family(&TAKEOVERS);
    for kind in TakeoverKind::ALL {
        let count = stats.map_or(0, |stats| stats.takeovers(kind));
        family.sample(&[kind.name()], count as f64);
    }
    let last = stats.and_then(Stats::last_takeover);
    let at = last.map_or(0.0, |last| last.unix_ms as f64 / 1e3);
    out.family(&LAST_TIME).sample(&[], at);
    let blackout = last.map_or(0.0, |last| last.blackout.as_secs_f64());
    out.family(&LAST_BLACKOUT).sample(&[], blackout);
    let phases = stats.map(Stats::phases).unwrap_or_default();
    let mut family = out.family(&PHASES);
    for phase in &phases {
        family.summary(&[&phase.name], seconds(phase.sum_ns), phase.count);
    }
    let mut family = out.family(&PHASES_LAST);
    for phase in &phases {
        family.sample(&[&phase.name], seconds(phase.last_ns));
    }
    let mut family = out.family(&BLACKOUTS);
    for (kind, planned) in [("planned", true), ("unplanned", false)] {
        let times = stats.map(|stats| stats.blackouts(planned)).unwrap_or_default();
        let (buckets, count) = cumulative(&times);
        family.histogram(&[kind], &buckets, seconds(times.sum_ns), count);
    }
}

/// Bounds in seconds with how many times are not beyond them, and how many there are in all.
fn cumulative(times: &Times) -> (Vec<(f64, u64)>, u64) {
    let mut buckets = Vec::with_capacity(BOUNDS.count());
    let (mut next, mut count) = (0, 0u64);
    for power in BOUNDS {
        while next < BUCKETS && bucket_end_us(next) <= 1 << power {
            count = count.wrapping_add(times.buckets[next]);
            next += 1;
        }
        buckets.push(((1u64 << power) as f64 / 1e6, count));
    }
    let rest = times.buckets[next..].iter().fold(count, |sum, more| sum.wrapping_add(*more));
    (buckets, rest)
}
