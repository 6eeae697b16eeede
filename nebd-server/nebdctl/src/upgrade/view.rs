//! A takeover as JSON.

use nebd_rpc::admin::{self, ClientSupport, Server, Upgrade, UpgradeKind, UpgradeState};

use crate::upgrade::report::Blackout;

/// A takeover as JSON: names with units, stable for scripts.
#[derive(Debug, serde::Serialize)]
pub struct View<'a> {
    operation_id: String,
    kind: &'static str,
    state: &'static str,
    reason: Option<&'a str>,
    from: Option<ServerView<'a>>,
    to: Option<ServerView<'a>>,
    steps: Vec<StepView<'a>>,
    blackout_us: Option<Blackout>,
    blackouts: Vec<BlackoutView<'a>>,
    clients: Vec<ClientView<'a>>,
    probation_left_ms: u64,
}

#[derive(Debug, serde::Serialize)]
struct ServerView<'a> {
    version: &'a str,
    binary: &'a str,
    pid: u32,
    generation: u32,
}

#[derive(Debug, serde::Serialize)]
struct StepView<'a> {
    name: &'a str,
    at_us: u64,
    duration_us: u64,
    detail: &'a str,
}

#[derive(Debug, serde::Serialize)]
struct BlackoutView<'a> {
    volume: &'a str,
    session: &'a str,
    blackout_us: u64,
}

#[derive(Debug, serde::Serialize)]
struct ClientView<'a> {
    session: &'a str,
    volume: &'a str,
    client_pid: u32,
    client_version: &'a str,
    layout_version: u32,
    supported: bool,
    reason: Option<&'a str>,
}

fn filled(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

impl<'a> View<'a> {
    /// As the server told it.
    pub fn of(report: &'a Upgrade) -> View<'a> {
        let server = |server: &'a Server| ServerView {
            version: &server.version,
            binary: &server.binary,
            pid: server.pid,
            generation: server.generation,
        };
        let step = |step: &'a admin::UpgradeStep| StepView {
            name: &step.name,
            at_us: step.at_us,
            duration_us: step.duration_us,
            detail: &step.detail,
        };
        let blackout = |blackout: &'a admin::Blackout| BlackoutView {
            volume: &blackout.volume,
            session: &blackout.session,
            blackout_us: blackout.blackout_us,
        };
        let client = |client: &'a ClientSupport| ClientView {
            session: &client.session,
            volume: &client.volume,
            client_pid: client.client_pid,
            client_version: &client.client_version,
            layout_version: client.layout_version,
            supported: client.supported,
            reason: filled(&client.reason),
        };
        View {
            operation_id: report.operation_id.iter().map(|byte| format!("{byte:02x}")).collect(),
            kind: kind_name(report.kind()),
            state: state_name(report.state()),
            reason: filled(&report.reason),
            from: report.from.as_ref().map(server),
            to: report.to.as_ref().map(server),
            steps: report.steps.iter().map(step).collect(),
            blackout_us: Blackout::of(&report.blackouts),
            blackouts: report.blackouts.iter().map(blackout).collect(),
            clients: report.clients.iter().map(client).collect(),
            probation_left_ms: report.probation_left_ms,
        }
    }

    /// As it was known last, before everyone who knew it was gone.
    pub fn lost(report: &'a Upgrade, why: &'a str) -> View<'a> {
        View { state: "lost", reason: Some(why), ..View::of(report) }
    }
}

/// For JSON.
fn state_name(state: UpgradeState) -> &'static str {
    match state {
        UpgradeState::None => "none",
        UpgradeState::Running => "running",
        UpgradeState::Probation => "probation",
        UpgradeState::Done => "done",
        UpgradeState::Refused => "refused",
        UpgradeState::Failed => "failed",
        UpgradeState::RolledBack => "rolled_back",
    }
}

/// For JSON.
fn kind_name(kind: UpgradeKind) -> &'static str {
    match kind {
        UpgradeKind::Unspecified => "unspecified",
        UpgradeKind::Upgrade => "upgrade",
        UpgradeKind::Rollback => "rollback",
        UpgradeKind::DryRun => "dry_run",
        UpgradeKind::Check => "check",
    }
}
