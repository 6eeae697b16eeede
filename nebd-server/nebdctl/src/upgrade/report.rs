//! What is known of a takeover, in words.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use nebd_rpc::admin::{self, ClientSupport, Server, Upgrade, UpgradeKind, UpgradeState};

use crate::table::Table;
use crate::units::Micros;
use crate::upgrade::steps::running;
use crate::volume::dash;

/// How long the volumes were not served, over all volumes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Blackout {
    volumes: usize,
    p50: u64,
    p99: u64,
    worst: u64,
    worst_volume: String,
}

impl Blackout {
    /// A volume's is the longest of its sessions'; none if there are no volumes.
    pub fn of(blackouts: &[admin::Blackout]) -> Option<Blackout> {
        let mut volumes: BTreeMap<&str, u64> = BTreeMap::new();
        for blackout in blackouts {
            let longest = volumes.entry(&blackout.volume).or_default();
            *longest = blackout.blackout_us.max(*longest);
        }
        let mut sorted: Vec<(u64, &str)> =
            volumes.into_iter().map(|(name, us)| (us, name)).collect();
        sorted.sort_unstable();
        let (worst, worst_volume) = *sorted.last()?;
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).map_or(worst, |(us, _)| *us)
        };
        let worst_volume = worst_volume.to_owned();
        Some(Blackout { volumes: sorted.len(), p50: at(50), p99: at(99), worst, worst_volume })
    }

    /// `p50 3.10 ms, p99 7.90 ms, worst 9.20 ms (file:a)`
    pub fn figures(&self) -> String {
        let (p50, p99, worst) = (Micros(self.p50), Micros(self.p99), Micros(self.worst));
        format!("p50 {p50}, p99 {p99}, worst {worst} ({})", self.worst_volume)
    }
}

/// Whether nothing more will happen.
pub fn is_final(state: UpgradeState) -> bool {
    !matches!(state, UpgradeState::Running | UpgradeState::Probation)
}

/// For people.
fn what(report: &Upgrade) -> &'static str {
    match report.kind() {
        UpgradeKind::Unspecified => "takeover",
        UpgradeKind::Upgrade => "upgrade",
        UpgradeKind::Rollback => "rollback",
        UpgradeKind::DryRun => "dry run",
        UpgradeKind::Check => "check",
    }
}

/// Text that may have come from another program, on one line.
pub fn one_line(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

fn reason(report: &Upgrade) -> String {
    match one_line(&report.reason) {
        empty if empty.is_empty() => "the server gives no reason; look at its log".into(),
        reason => reason.trim_end_matches('.').into(),
    }
}

/// `0.2.0 (pid 40)`
pub fn server(server: Option<&Server>) -> String {
    match server {
        None => "an unknown server".into(),
        Some(Server { version, pid: 0, .. }) => one_line(&dash(version)),
        Some(Server { version, pid, .. }) => format!("{} (pid {pid})", one_line(&dash(version))),
    }
}

fn from_to(report: &Upgrade) -> String {
    format!("{} → {}", server(report.from.as_ref()), server(report.to.as_ref()))
}

/// Everything in one line, for `nebdctl status`.
pub fn told(report: &Upgrade) -> String {
    let (what, from_to) = (what(report), from_to(report));
    let blackout = Blackout::of(&report.blackouts)
        .map(|blackout| format!(", blackout {}", blackout.figures()))
        .unwrap_or_default();
    match report.state() {
        UpgradeState::None => "no takeover is known".into(),
        UpgradeState::Running => {
            format!("{what} under way, in {}: {from_to}", running(report).unwrap_or("-"))
        }
        UpgradeState::Probation => {
            let seconds = report.probation_left_ms.div_ceil(1000);
            format!(
                "probation, {seconds} s left: {from_to}{blackout}; `nebdctl rollback` goes back at \
                 once"
            )
        }
        UpgradeState::Done => format!("{what} done: {from_to}{blackout}"),
        UpgradeState::Refused => format!("{what} refused: {}", reason(report)),
        UpgradeState::Failed => format!("{what} failed: {from_to}: {}", reason(report)),
        UpgradeState::RolledBack => {
            format!("{what} rolled back: {from_to}{blackout}: {}", reason(report))
        }
    }
}

/// The result, for people; of a bad one what is worth a table.
pub fn text(report: &Upgrade) -> String {
    let mut text = String::new();
    let is_check = report.kind() == UpgradeKind::Check;
    if !report.clients.is_empty() && (is_check || unsupported(report).next().is_some()) {
        let _ = write!(text, "{}", clients(&report.clients));
    }
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<10}  {value}");
    };
    if let Some(blackout) = Blackout::of(&report.blackouts) {
        line("blackout", format!("{} volume(s): {}", blackout.volumes, blackout.figures()));
    }
    if problem(report).is_some() {
        return text;
    }
    match (report.state(), report.kind()) {
        (UpgradeState::Probation, _) => {
            let left = Micros(report.probation_left_ms.saturating_mul(1000));
            line("serving", from_to(report));
            line(
                "probation",
                format!("{left} left; `nebdctl status` shows it, `nebdctl rollback` ends it"),
            );
        }
        (_, UpgradeKind::Check) => {
            let (new, sessions) = (candidate(report), report.clients.len());
            line("check", format!("{new} supports all of {sessions} session(s)"));
        }
        (_, UpgradeKind::DryRun) => {
            let old = server(report.from.as_ref());
            line("dry run", format!("{} could take over; {old} serves on", candidate(report)));
        }
        _ => line("done", from_to(report)),
    }
    text
}

/// `0.2.0 (/usr/bin/nebd-server)`: a candidate's pid is of no use once it has ended.
fn candidate(report: &Upgrade) -> String {
    match &report.to {
        Some(Server { version, binary, .. }) if !binary.is_empty() => {
            format!("{} ({})", one_line(&dash(version)), one_line(binary))
        }
        other => server(other.as_ref()),
    }
}

fn unsupported(report: &Upgrade) -> impl Iterator<Item = &ClientSupport> {
    report.clients.iter().filter(|client| !client.supported)
}

/// One row a session; those that the new server does not support come first.
fn clients(clients: &[ClientSupport]) -> Table {
    let mut table = Table::new(&[
        "SESSION",
        "VOLUME",
        ">CLIENT PID",
        "CLIENT VERSION",
        ">LAYOUT",
        "SUPPORTED",
        "REASON",
    ]);
    let mut sorted: Vec<&ClientSupport> = clients.iter().collect();
    sorted.sort_by_key(|client| (client.supported, &client.volume, &client.session));
    for client in sorted {
        table.row(vec![
            client.session.chars().take(8).collect(),
            client.volume.clone(),
            client.client_pid.to_string(),
            one_line(&dash(&client.client_version)),
            client.layout_version.to_string(),
            if client.supported { "yes" } else { "NO" }.into(),
            one_line(&dash(&client.reason)),
        ]);
    }
    table
}

/// Why it did not come to its good end, who serves now, and what to do; none if it did.
pub fn problem(report: &Upgrade) -> Option<String> {
    let (what, reason, old) = (what(report), reason(report), server(report.from.as_ref()));
    let serves = match &report.from {
        Some(_) => format!("{old} serves on"),
        None => "the old server serves on".into(),
    };
    let count = unsupported(report).count();
    Some(match (report.state(), report.kind()) {
        (UpgradeState::Running | UpgradeState::Probation, _) => return None,
        (UpgradeState::Done, UpgradeKind::Check | UpgradeKind::DryRun) if count > 0 => format!(
            "{} does not support {count} of {} session(s); move these clients away or restart \
             them with a newer libnebd before the upgrade, which would be refused now",
            candidate(report),
            report.clients.len()
        ),
        (UpgradeState::Done, _) => return None,
        (UpgradeState::None, _) => {
            "the server tells a state that this nebdctl does not know; `nebdctl status` shows who \
             serves"
                .into()
        }
        (UpgradeState::Refused, UpgradeKind::Upgrade) => format!(
            "{what} refused: {reason}. Nothing was moved, {serves}; mend the reason and try again \
             (with --dry-run everything is tried but the change of owner)"
        ),
        (UpgradeState::Refused, _) => {
            format!("{what} refused: {reason}. Nothing was moved, {serves}")
        }
        (UpgradeState::Failed, _) => {
            let step = report.steps.last().map_or("HELLO", |step| &step.name);
            format!(
                "{what} failed at {step}: {reason}. {serves}, and no request was lost; the log has \
                 what the new server said before it ended"
            )
        }
        (UpgradeState::RolledBack, _) => {
            let binary = report.from.as_ref().map_or("", |old| &old.binary);
            let again = if binary.is_empty() { "the old binary" } else { binary };
            format!(
                "{what} rolled back: {reason}. {} serves again; look at the log of the time between \
                 before you try it again",
                one_line(again)
            )
        }
    })
}
