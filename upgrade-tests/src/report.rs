//! What was found: the figures of a volume, and every problem with the block and the events around it.

use std::fmt;

use serde::Serialize;

use crate::oracle::{ANYTHING, Entry, Moment, ZEROS};
use crate::stamp::Found;
use crate::timeline::{Timeline, seconds};

/// Problems kept in full for each volume; more are counted.
pub const PROBLEMS_KEPT: usize = 8;

/// What kind of problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// A block held what it must not.
    Mismatch,
    /// A request was answered with an error.
    Error,
    /// A request was not answered within the limit.
    Stall,
    /// An answer came to a request that was not in flight.
    StrayCompletion,
    /// The device stopped working.
    DeviceGone,
}

/// One problem.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// What kind.
    pub kind: ProblemKind,
    /// The volume, as the harness numbers them.
    pub volume: u64,
    /// The block, if it is about one.
    pub block: Option<u64>,
    /// What was expected.
    pub expected: Vec<String>,
    /// What was found instead.
    pub found: String,
    /// When it was seen, in nanoseconds from the start.
    pub at: Moment,
    /// Between which events.
    pub events: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on volume {}", self.kind, self.volume)?;
        if let Some(block) = self.block {
            write!(f, ", block {block}")?;
        }
        write!(f, ", {} ({})\n    found: {}", seconds(self.at), self.events, self.found)?;
        self.expected.iter().try_for_each(|line| write!(f, "\n    expected: {line}"))
    }
}

/// What happened on one volume.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VolumeReport {
    /// Requests answered.
    pub requests: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Of these, flushes.
    pub flushes: u64,
    /// Of these, with FUA.
    pub fua: u64,
    /// Blocks read and judged.
    pub blocks_checked: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Blocks that held what they must not.
    pub mismatches: u64,
    /// Requests never answered, answers never asked for, and devices that went away.
    pub failures: u64,
    /// Longest gap between completions while requests waited, in microseconds.
    pub blackout_us_max: u64,
    /// Longest time from submission to completion, in microseconds.
    pub latency_us_max: u64,
    /// Sum of these times, in microseconds.
    pub latency_us_sum: u64,
    /// The first problems, in full.
    pub problems: Vec<Problem>,
}

impl VolumeReport {
    /// Whether nothing at all was wrong.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.mismatches == 0 && self.failures == 0
    }

    /// Adds what happened on another volume.
    pub fn add(&mut self, other: &VolumeReport) {
        self.requests += other.requests;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.fua += other.fua;
        self.blocks_checked += other.blocks_checked;
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.failures += other.failures;
        self.blackout_us_max = self.blackout_us_max.max(other.blackout_us_max);
        self.latency_us_max = self.latency_us_max.max(other.latency_us_max);
        self.latency_us_sum += other.latency_us_sum;
        let room = (4 * PROBLEMS_KEPT).saturating_sub(self.problems.len());
        self.problems.extend(other.problems.iter().take(room).cloned());
    }

    /// Counts a problem, and keeps it if it is among the first.
    pub fn record(&mut self, problem: Problem) {
        match problem.kind {
            ProblemKind::Mismatch => self.mismatches += 1,
            ProblemKind::Error => self.errors += 1,
            _ => self.failures += 1,
        }
        if self.problems.len() < PROBLEMS_KEPT {
            self.problems.push(problem);
        }
    }

    /// Says again, with all events known, between which ones each problem lies.
    pub fn place(&mut self, timeline: &Timeline) {
        for problem in &mut self.problems {
            problem.events = timeline.around(problem.at);
        }
    }
}

/// A value that was allowed, for people.
pub fn expected(entry: &Entry, timeline: &Timeline) -> String {
    let value = match entry.value {
        ZEROS => "zeros".to_owned(),
        ANYTHING => "anything".to_owned(),
        write => format!("write {write}"),
    };
    match entry.ended {
        Some(0) => format!("{value}, since before the run"),
        Some(ended) => format!(
            "{value}, submitted at {}, answered at {} ({})",
            seconds(entry.begun),
            seconds(ended),
            timeline.around(ended)
        ),
        None => format!("{value}, in flight since {}", seconds(entry.begun)),
    }
}

/// The problem of a block that holds what it must not.
pub struct WrongBlock<'a> {
    /// The volume.
    pub volume: u64,
    /// The block.
    pub block: u64,
    /// The sector in the block.
    pub sector: u32,
    /// What it holds.
    pub found: Found,
    /// What it may hold.
    pub allowed: &'a [Entry],
    /// When the read was submitted.
    pub submitted: Moment,
    /// When it completed.
    pub completed: Moment,
}

impl WrongBlock<'_> {
    /// In words.
    pub fn describe(&self, timeline: &Timeline) -> Problem {
        let WrongBlock { volume, block, sector, found, submitted, completed, .. } = *self;
        Problem {
            kind: ProblemKind::Mismatch,
            volume,
            block: Some(block),
            expected: self.allowed.iter().map(|entry| expected(entry, timeline)).collect(),
            found: format!("sector {sector} holds {found}; read from {}", seconds(submitted)),
            at: completed,
            events: timeline.around(completed),
        }
    }
}
