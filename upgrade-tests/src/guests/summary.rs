//! What guests met, for people and for scripts.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::cores::Cores;
use super::fault::Fault;

/// What one kind of fault did to the disks of a guest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FaultSummary {
    /// How often.
    pub count: usize,
    /// Half of the longest gaps between two completions of the disk without a file system, while
    /// requests waited, were shorter; in milliseconds.
    pub gap_median_ms: f64,
    /// The longest.
    pub gap_worst_ms: f64,
    /// The longest on the disks with file systems.
    pub files_gap_worst_ms: f64,
    /// Fewest requests in flight on the disk without a file system, the moment before.
    pub in_flight_min: u64,
    /// The longest that the host took to put another server in the place, or the old one again.
    pub host_worst_ms: f64,
    /// How long after the guest began the longest came, in seconds.
    pub worst_at_seconds: f64,
}

/// A fault that has happened.
#[derive(Clone, Copy, Debug)]
pub struct Happened {
    /// Which.
    pub fault: Fault,
    /// Longest gap on the disk without a file system, in microseconds.
    pub gap_us: u64,
    /// Longest gap on the others.
    pub files_gap_us: u64,
    /// Requests in flight the moment before, on the disk without a file system.
    pub in_flight: u64,
    /// How long the host's part took: until another server served, or the old one again; in microseconds.
    pub host_us: u64,
    /// How long after the guest began, in seconds.
    pub at_seconds: f64,
}

/// What a guest met on one way.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WaySummary {
    /// How the disks came in, and what served them.
    pub way: String,
    /// By fault.
    pub faults: BTreeMap<Fault, FaultSummary>,
    /// Servers that died.
    pub kills: usize,
    /// Planned takeovers that were carried out.
    pub takeovers: usize,
    /// Boots of guests.
    pub boots: u64,
    /// Requests answered, and files written or read.
    pub requests: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Blocks and files that held what they must not.
    pub mismatches: u64,
    /// Blocks and files compared.
    pub checked: u64,
    /// File systems checked at the end, and clean.
    pub file_systems_clean: usize,
    /// File systems.
    pub file_systems: usize,
    /// What crashes left.
    pub cores: Cores,
    /// How long it took.
    pub seconds: f64,
    /// Whatever else was wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

impl WaySummary {
    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.errors == 0
            && self.mismatches == 0
            && self.problems.is_empty()
            && self.file_systems_clean == self.file_systems
            && self.checked > 0
            && self.cores.is_complete()
    }

    /// Sums up what happened.
    pub fn sum_up(&mut self, happened: &[Happened]) {
        for fault in Fault::ALL {
            let of: Vec<&Happened> = happened.iter().filter(|one| one.fault == fault).collect();
            let Some(worst) = of.iter().max_by_key(|one| one.gap_us) else { continue };
            let mut gaps: Vec<u64> = of.iter().map(|one| one.gap_us).collect();
            gaps.sort_unstable();
            let ms = |us: u64| us as f64 / 1000.0;
            let summary = FaultSummary {
                count: of.len(),
                gap_median_ms: ms(gaps[gaps.len() / 2]),
                gap_worst_ms: ms(worst.gap_us),
                files_gap_worst_ms: ms(of.iter().map(|one| one.files_gap_us).max().unwrap_or(0)),
                in_flight_min: of.iter().map(|one| one.in_flight).min().unwrap_or(0),
                host_worst_ms: ms(of.iter().map(|one| one.host_us).max().unwrap_or(0)),
                worst_at_seconds: worst.at_seconds,
            };
            self.faults.insert(fault, summary);
            self.kills += if fault.is_kill() { of.len() } else { 0 };
            self.takeovers += if fault.is_takeover() { of.len() } else { 0 };
        }
    }

    /// A table in Markdown, with a row for each fault.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "### {}\n\n| fault | times | gap, median ms | worst ms | worst ms, files | in flight, min |\n\
             | --- | --- | --- | --- | --- | --- |\n",
            self.way
        );
        for (fault, of) in &self.faults {
            let FaultSummary { count, gap_median_ms, gap_worst_ms, files_gap_worst_ms, .. } = of;
            if fault.leaves_guest() {
                text += &format!(
                    "| {fault} | {count} | {gap_median_ms:.0} | {gap_worst_ms:.0} | \
                     {files_gap_worst_ms:.0} | {} |\n",
                    of.in_flight_min
                );
            } else {
                text += &format!("| {fault} | {count} | – | – | – | {} |\n", of.in_flight_min);
            }
        }
        let WaySummary { kills, takeovers, boots, requests, errors, mismatches, checked, .. } =
            self;
        text + &format!(
            "\n{kills} kills, {takeovers} planned takeovers, {boots} boots, {requests} requests, {checked} \
             blocks and files compared: errors {errors}, mismatches {mismatches}, {} of {} file systems \
             clean, {} other problems; {}; {:.0} s\n",
            self.file_systems_clean,
            self.file_systems,
            self.problems.len(),
            self.cores,
            self.seconds
        )
    }
}

impl fmt::Display for WaySummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.markdown())?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n{problem}\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_those_of_their_fault() {
        let one = |fault, gap_us| Happened {
            fault,
            gap_us,
            files_gap_us: 2 * gap_us,
            in_flight: gap_us / 1000,
            host_us: gap_us,
            at_seconds: gap_us as f64,
        };
        let happened = [
            one(Fault::Kill, 3000),
            one(Fault::Nothing, 9000),
            one(Fault::Kill, 1000),
            one(Fault::Kill, 5000),
            one(Fault::Takeover, 7000),
        ];
        let mut summary = WaySummary { checked: 1, ..WaySummary::default() };
        summary.sum_up(&happened);
        let kill = &summary.faults[&Fault::Kill];
        assert_eq!((kill.count, kill.gap_median_ms, kill.gap_worst_ms), (3, 3.0, 5.0));
        assert_eq!((kill.files_gap_worst_ms, kill.in_flight_min), (10.0, 1));
        assert_eq!((summary.kills, summary.takeovers), (3, 1));
        assert!(summary.is_clean());
        assert!(summary.markdown().contains("| SIGKILL | 3 | 3 | 5 | 10 | 1 |"));
        summary.file_systems = 1;
        assert!(!summary.is_clean(), "a file system that was not checked is not clean");
    }
}
