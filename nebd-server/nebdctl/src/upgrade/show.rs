//! What the operator sees while a takeover goes on: a line for each step, and on a terminal a live
//! one below them for the step under way and for what is left of the probation.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use nebd_rpc::admin::{Upgrade, UpgradeState};

use crate::units::Micros;
use crate::upgrade::report::{self, Blackout};
use crate::upgrade::steps::{Told, running};

/// The lines so far. What is live is gone when this is dropped.
pub struct Show {
    live: ProgressBar,
    /// Standard output is for the JSON alone.
    is_json: bool,
    told: Told,
    is_in_probation: bool,
    /// The step under way, and since when it is seen to be.
    step: (String, Instant),
}

impl Show {
    /// Nothing is drawn yet.
    pub fn new(is_json: bool) -> Show {
        let live = match io::stderr().is_terminal() {
            false => ProgressBar::hidden(),
            true => {
                let style = ProgressStyle::with_template("{spinner} {wide_msg}");
                let bar = ProgressBar::new_spinner();
                // It turns while the server that goes and the one that comes are both silent.
                bar.enable_steady_tick(Duration::from_millis(100));
                bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
            }
        };
        let step = (String::new(), Instant::now());
        Show { live, is_json, told: Told::default(), is_in_probation: false, step }
    }

    /// Tells what is new.
    pub fn report(&mut self, report: &Upgrade) {
        for line in self.told.news(report) {
            self.line(&line);
        }
        if report.state() == UpgradeState::Probation && !self.is_in_probation {
            self.is_in_probation = true;
            self.line(&probation_begins(report));
        }
        let name = running(report).unwrap_or("waiting");
        if name != self.step.0 {
            self.step = (name.to_owned(), Instant::now());
        }
        self.live.set_message(live(report, name, self.step.1.elapsed()));
    }

    /// Tells that the takeover goes on without the operator.
    pub fn interrupted(&self) {
        self.live.suspend(|| {
            eprintln!("nebdctl: the takeover goes on; `nebdctl status` tells how it ends");
        });
    }

    fn line(&self, text: &str) {
        self.live.suspend(|| {
            // A reader that has gone away does not end what it no longer looks at.
            let _ = match self.is_json {
                true => writeln!(io::stderr(), "{text}"),
                false => writeln!(io::stdout(), "{text}"),
            };
        });
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        self.live.finish_and_clear();
    }
}

fn probation_begins(report: &Upgrade) -> String {
    let left = Micros(report.probation_left_ms.saturating_mul(1000));
    let new = report::server(report.to.as_ref());
    format!("{new} serves, on probation for {left}")
}

fn live(report: &Upgrade, step: &str, since: Duration) -> String {
    if report.state() != UpgradeState::Probation {
        return format!("{step}, {}", Micros(since.as_micros() as u64));
    }
    let seconds = report.probation_left_ms.div_ceil(1000);
    let blackout = Blackout::of(&report.blackouts)
        .map(|blackout| format!(", blackout {}", blackout.figures()))
        .unwrap_or_default();
    format!("probation, {seconds} s left{blackout}; `nebdctl rollback` goes back at once")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nebd_rpc::admin::{self, Server};

    #[test]
    fn the_live_line_tells_the_step_or_what_is_left() {
        let mut report = Upgrade { state: UpgradeState::Running.into(), ..Upgrade::default() };
        assert_eq!(live(&report, "PREPARE", Duration::from_micros(12_340)), "PREPARE, 12.3 ms");
        report.state = UpgradeState::Probation.into();
        report.probation_left_ms = 42_001;
        report.to = Some(Server { version: "2".into(), pid: 7, ..Server::default() });
        report.blackouts = vec![admin::Blackout { blackout_us: 3100, ..Default::default() }];
        let text = live(&report, "PROBATION", Duration::ZERO);
        assert!(text.contains("43 s left") && text.contains("worst 3.10 ms"), "{text}");
        let begun = probation_begins(&report);
        assert_eq!(begun, "2 (pid 7) serves, on probation for 42.00 s");
    }
}
