//! Every step of a planned takeover × every fault: what `upgrade-tests matrix` does.
//!
//! Each cell is a campaign of its own, with servers, volumes and load of its own, so a cell that fails
//! says nothing of the others.

use std::fmt;
use std::time::Instant;

use serde::Serialize;

use crate::campaign::{
    self, ACTIONS, CANDIDATE_POINTS, CampaignConfig, KEEPER_ACTIONS, Kill, OWNER_POINTS,
};

/// One fault at one step.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// The step: what is about to happen, and whose.
    pub point: &'static str,
    /// What happens there, to that server or to the keeper.
    pub action: &'static str,
    /// Longest gap between completions of any volume while requests waited, in milliseconds.
    pub blackout_ms: f64,
    /// Requests answered.
    pub requests: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Blocks that held what they must not.
    pub mismatches: u64,
    /// Requests never answered, and the like.
    pub failures: u64,
    /// What was wrong, if anything was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wrong: Option<String>,
}

impl Cell {
    fn run(base: &CampaignConfig, point: &'static str, action: &'static str) -> Cell {
        let kind = Kill::at(point, action);
        let name = kind.to_string();
        let config = CampaignConfig { kinds: vec![kind], kills: 1, ..base.clone() };
        let mut cell = Cell {
            point,
            action,
            blackout_ms: 0.0,
            requests: 0,
            errors: 0,
            mismatches: 0,
            failures: 0,
            wrong: None,
        };
        match campaign::run(config) {
            Ok(summary) => {
                let report = &summary.report;
                (cell.requests, cell.errors) = (report.requests, report.errors);
                (cell.mismatches, cell.failures) = (report.mismatches, report.failures);
                cell.blackout_ms = summary.blackout_ms.get(&name).map_or(0.0, |of| of.max);
                cell.wrong = (!summary.is_clean()).then(|| summary.to_string());
            }
            Err(error) => cell.wrong = Some(format!("{:#}", anyhow::Error::from(error))),
        }
        cell
    }
}

/// All cells.
#[derive(Clone, Debug, Serialize)]
pub struct Matrix {
    /// The backend.
    pub backend: String,
    /// Volumes under load in each cell.
    pub sessions: usize,
    /// Cells in which nothing was wrong.
    pub passed: usize,
    /// Requests answered in all of them.
    pub requests: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Blocks that held what they must not.
    pub mismatches: u64,
    /// Requests never answered, and the like.
    pub failures: u64,
    /// How long it took.
    pub seconds: f64,
    /// By step, and then by fault.
    pub cells: Vec<Cell>,
}

/// Every fault, in the order of columns.
pub fn actions() -> impl Iterator<Item = &'static str> + Clone {
    ACTIONS.into_iter().chain(KEEPER_ACTIONS)
}

/// Every step, in the order of rows.
pub fn points() -> impl Iterator<Item = &'static str> + Clone {
    OWNER_POINTS.into_iter().chain(CANDIDATE_POINTS)
}

/// Runs every cell, each as `base` says but for its kills; `progress` hears of each.
pub fn run(base: &CampaignConfig, mut progress: impl FnMut(&Cell)) -> Matrix {
    let begun = Instant::now();
    let mut cells = Vec::new();
    for (point, action) in points().flat_map(|point| actions().map(move |action| (point, action))) {
        let seed = base.seed + cells.len() as u64;
        let cell = Cell::run(&CampaignConfig { seed, ..base.clone() }, point, action);
        progress(&cell);
        cells.push(cell);
    }
    let sum = |of: fn(&Cell) -> u64| cells.iter().map(of).sum();
    Matrix {
        backend: base.backend.clone(),
        sessions: base.sessions,
        passed: cells.iter().filter(|cell| cell.wrong.is_none()).count(),
        requests: sum(|cell| cell.requests),
        errors: sum(|cell| cell.errors),
        mismatches: sum(|cell| cell.mismatches),
        failures: sum(|cell| cell.failures),
        seconds: begun.elapsed().as_secs_f64(),
        cells,
    }
}

impl Matrix {
    /// Whether nothing was wrong in any cell.
    pub fn is_clean(&self) -> bool {
        self.passed == self.cells.len()
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24}", "blackout in ms")?;
        actions().try_for_each(|action| write!(f, "{action:>13}"))?;
        for point in points() {
            write!(f, "\n{point:<24}")?;
            for cell in self.cells.iter().filter(|cell| cell.point == point) {
                match cell.wrong {
                    None => write!(f, "{:>13.1}", cell.blackout_ms)?,
                    Some(_) => write!(f, "{:>13}", "FAIL")?,
                }
            }
        }
        let Matrix { backend, sessions, passed, requests, errors, mismatches, failures, .. } = self;
        write!(
            f,
            "\n\n{passed} of {} passed on {backend}, {sessions} volumes each, {:.0} s\n\
             {requests} requests, errors {errors}, mismatches {mismatches}, failures {failures}",
            self.cells.len(),
            self.seconds,
        )?;
        self.cells.iter().try_for_each(|cell| match &cell.wrong {
            Some(wrong) => write!(f, "\n--- {}:{}\n{wrong}", cell.point, cell.action),
            None => Ok(()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_cell_is_seen_and_its_neighbours_keep_their_figures() {
        let cells = points().flat_map(|point| actions().map(move |action| (point, action)));
        let cell = |(point, action)| Cell {
            point,
            action,
            blackout_ms: 7.25,
            requests: 10,
            errors: 0,
            mismatches: 0,
            failures: 0,
            wrong: (point == "owner-ready" && action == "keeper-stop").then(|| "lost".into()),
        };
        let matrix = Matrix {
            backend: "file".into(),
            sessions: 2,
            passed: 135,
            requests: 1360,
            errors: 0,
            mismatches: 0,
            failures: 0,
            seconds: 1.0,
            cells: cells.map(cell).collect(),
        };
        assert_eq!(matrix.cells.len(), 136);
        assert!(!matrix.is_clean());
        let text = matrix.to_string();
        let row = text.lines().find(|line| line.starts_with("owner-ready")).unwrap();
        assert_eq!((row.matches("7.2").count(), row.matches("FAIL").count()), (7, 1));
        assert!(text.ends_with("--- owner-ready:keeper-stop\nlost"));
    }
}
