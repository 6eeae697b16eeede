//! What a campaign found, for people and for scripts.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::{CampaignConfig, Kill};
use crate::fence_store::control::StoreStats;
use crate::growth::Comparison;
use crate::report::VolumeReport;
use crate::vhost_device::Figures;

/// Blackouts: for each kill and volume, the longest gap between two completions while requests
/// waited; in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Blackouts {
    /// Half of them were shorter.
    pub p50: f64,
    /// 99 of 100 were shorter.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Blackouts {
    fn of(gaps_us: &mut [u64]) -> Blackouts {
        gaps_us.sort_unstable();
        let at = |share: f64| {
            let index = (gaps_us.len() as f64 * share) as usize;
            let gap = gaps_us.get(index.min(gaps_us.len().saturating_sub(1)));
            gap.map_or(0.0, |us| *us as f64 / 1000.0)
        };
        Blackouts { p50: at(0.50), p99: at(0.99), max: at(1.0) }
    }
}

/// What a campaign found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// The backend.
    pub backend: String,
    /// Volumes, each attached once.
    pub sessions: usize,
    /// Deaths.
    pub kills: usize,
    /// Deaths that met enough writes in flight.
    pub kills_counted: usize,
    /// Deaths that counted, by kind.
    pub kills_by_kind: BTreeMap<String, usize>,
    /// Fewest writes in flight at a kill that counted.
    pub writes_in_flight_min: u32,
    /// Blackouts by kind of death.
    pub blackout_ms: BTreeMap<String, Blackouts>,
    /// Seconds from the first request to the end of the sweep.
    pub seconds: f64,
    /// What happened on all volumes together.
    #[serde(flatten)]
    pub report: VolumeReport,
    /// What the fence-store did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreStats>,
    /// What happened to the connections of volumes that are attached by vhost-user.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<Figures>,
    /// What the processes held at the beginning and at the end, if they were looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub growth: Vec<Comparison>,
    /// The end of the keeper's and the server's log, if something was wrong.
    #[serde(skip)]
    pub log: String,
    #[serde(skip)]
    gaps_us: BTreeMap<String, Vec<u64>>,
}

impl Summary {
    pub(super) fn new(config: &CampaignConfig) -> Summary {
        let (backend, sessions) = (config.backend.clone(), config.sessions);
        Summary { backend, sessions, ..Summary::default() }
    }

    pub(super) fn killed(&mut self, kind: &Kill, held: u32, writes_min: u64, gaps_us: &[u64]) {
        self.kills += 1;
        let kind = kind.to_string();
        let gaps = self.gaps_us.entry(kind.clone()).or_default();
        gaps.extend_from_slice(gaps_us);
        self.blackout_ms.insert(kind.clone(), Blackouts::of(gaps));
        if u64::from(held) < writes_min {
            return;
        }
        let fewest = if self.kills_counted == 0 { held } else { self.writes_in_flight_min };
        self.writes_in_flight_min = fewest.min(held);
        self.kills_counted += 1;
        *self.kills_by_kind.entry(kind).or_default() += 1;
    }

    /// Whether no guest would have noticed more than a pause.
    pub fn is_clean(&self) -> bool {
        self.report.is_clean()
    }

    /// Whether a process holds more than at the beginning.
    pub fn has_grown(&self) -> bool {
        self.growth.iter().any(|comparison| comparison.has_grown)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { backend, sessions, kills, kills_counted, report, .. } = self;
        writeln!(f, "{sessions} volumes on {backend}, {:.1} s", self.seconds)?;
        writeln!(
            f,
            "{} requests ({} writes, {} flushes, {} with FUA), {} blocks checked, {:.0} requests/s",
            report.requests,
            report.writes,
            report.flushes,
            report.fua,
            report.blocks_checked,
            report.requests as f64 / self.seconds.max(0.001),
        )?;
        let fewest = self.writes_in_flight_min;
        writeln!(
            f,
            "{kills} kills, {kills_counted} of them with {fewest} or more writes in flight"
        )?;
        for (kind, Blackouts { p50, p99, max }) in &self.blackout_ms {
            writeln!(f, "  {kind}: blackout p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms")?;
        }
        self.growth.iter().try_for_each(|comparison| writeln!(f, "  {comparison}"))?;
        for Figures { controls, reconnects, losses, .. } in &self.drivers {
            writeln!(
                f,
                "  vhost-user: {controls} controls under load, connected again {reconnects} times, \
                 {losses} of them because the server hung up"
            )?;
        }
        if let Some(store) = &self.store {
            writeln!(f, "storage: {store:?}")?;
        }
        let VolumeReport { errors, mismatches, failures, .. } = report;
        write!(f, "errors {errors}, mismatches {mismatches}, failures {failures}")?;
        report.problems.iter().try_for_each(|problem| write!(f, "\n{problem}"))?;
        if !self.log.is_empty() {
            write!(f, "\n--- the end of the server's log\n{}", self.log)?;
        }
        Ok(())
    }
}
