//! The steps of a takeover, one line each, told once each as it ends.
//!
//! A server may list a step when it begins (duration 0) or when it ends; both are read here. A step
//! has ended once it has a duration, or another one follows it, or everything is over.

use nebd_rpc::admin::{Upgrade, UpgradeState, UpgradeStep};

use crate::units::Micros;
use crate::upgrade::report::{is_final, one_line};

/// In this order.
const ORDER: [&str; 9] =
    ["HELLO", "OFFER", "PREPARE", "READY", "FREEZE", "FENCE", "RESUME", "LINGER", "PROBATION"];

/// What was told so far.
#[derive(Debug, Default)]
pub struct Told(usize);

impl Told {
    /// Lines for the steps that have ended since the last time.
    pub fn news(&mut self, report: &Upgrade) -> Vec<String> {
        let is_over = is_final(report.state());
        let ended = |index: usize, step: &UpgradeStep| {
            is_over || step.duration_us > 0 || index + 1 < report.steps.len()
        };
        let steps = report.steps.iter().enumerate().skip(self.0);
        let news: Vec<String> = steps
            .take_while(|(index, step)| ended(*index, step))
            .map(|(_, step)| line(step))
            .collect();
        self.0 += news.len();
        news
    }
}

/// Which step is under way; none while nothing is.
pub fn running(report: &Upgrade) -> Option<&str> {
    if !matches!(report.state(), UpgradeState::Running | UpgradeState::Probation) {
        return None;
    }
    let Some(last) = report.steps.last() else { return Some(ORDER[0]) };
    if last.duration_us == 0 {
        return Some(&last.name);
    }
    let at = ORDER.iter().position(|name| *name == last.name);
    at.and_then(|at| ORDER.get(at + 1)).copied()
}

/// `  1.204 ms  PREPARE   256 volumes, 256 canary reads      38.1 ms`
fn line(step: &UpgradeStep) -> String {
    let at_ms = step.at_us as f64 / 1e3;
    let (detail, took) = (one_line(&step.detail), Micros(step.duration_us));
    format!("{at_ms:>10.3} ms  {:<9}  {detail:<44}  {took:>8}", step.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, at_us: u64, duration_us: u64) -> UpgradeStep {
        UpgradeStep { name: name.into(), at_us, duration_us, detail: "3\nvolumes".into() }
    }

    fn report(state: UpgradeState, steps: &[UpgradeStep]) -> Upgrade {
        Upgrade { state: state.into(), steps: steps.to_vec(), ..Upgrade::default() }
    }

    #[test]
    fn each_step_is_told_once_when_it_has_ended() {
        let (hello, offer) = (step("HELLO", 10, 500), step("OFFER", 510, 0));
        let mut told = Told::default();
        let first = told.news(&report(UpgradeState::Running, &[hello.clone(), offer.clone()]));
        assert_eq!(first.len(), 1);
        assert_eq!(first[0], format!("     0.010 ms  HELLO      {:<44}    500 µs", "3 volumes"));
        let prepare = step("PREPARE", 1204, 0);
        let steps = [hello, offer, prepare];
        let second = told.news(&report(UpgradeState::Running, &steps));
        assert!(second.len() == 1 && second[0].contains("OFFER"), "{second:?}");
        assert!(told.news(&report(UpgradeState::Running, &steps)).is_empty());
        let last = told.news(&report(UpgradeState::Failed, &steps));
        assert!(last.len() == 1 && last[0].contains("1.204 ms  PREPARE"), "{last:?}");
        // A successor that was handed fewer of them is no reason to tell any twice.
        assert!(told.news(&report(UpgradeState::Failed, &steps[..1])).is_empty());
    }

    #[test]
    fn the_running_step_is_the_one_that_began_or_the_one_after_those_that_ended() {
        let name = |state, steps: &[UpgradeStep]| running(&report(state, steps)).map(str::to_owned);
        assert_eq!(name(UpgradeState::Running, &[]).as_deref(), Some("HELLO"));
        let began = [step("HELLO", 1, 5), step("OFFER", 6, 0)];
        assert_eq!(name(UpgradeState::Running, &began).as_deref(), Some("OFFER"));
        let ended = [step("HELLO", 1, 5), step("OFFER", 6, 1)];
        assert_eq!(name(UpgradeState::Running, &ended).as_deref(), Some("PREPARE"));
        assert_eq!(
            name(UpgradeState::Probation, &[step("LINGER", 1, 1)]).as_deref(),
            Some("PROBATION")
        );
        assert_eq!(name(UpgradeState::Done, &ended), None);
        assert_eq!(name(UpgradeState::Running, &[step("SOMETHING", 1, 1)]), None);
    }
}
