//! `nebdctl upgrade`, `nebdctl rollback`: another server takes over, and the operator watches.
//!
//! ```text
//!   binary seen here ─► StartUpgrade ─► GetUpgrade, again and again ─► a state that is final
//!        │                   │            │ a step has ended: a line       ├ done: 0
//!        │                   │            │ the connection breaks: the     └ refused, failed,
//!        │                   │            │ old server went; whoever         rolled back: 1
//!        │                   │            │ serves now knows the report
//!        └ no program: 1     └ refused: 1 └ knows another one: lost, 1
//! ```

mod binary;
mod report;
mod show;
mod steps;
mod view;

use std::time::Duration;

use anyhow::Context as _;
use nebd_rpc::admin::{GetUpgradeRequest, StartUpgradeRequest, Upgrade, UpgradeKind, UpgradeState};

use crate::cli::OutputArgs;
use crate::cli::upgrade::UpgradeArgs;
use crate::connection::Connection;
use crate::demo::process::{is_interrupted, watch_interrupts};
use crate::failure::Failure;
use crate::status;
use crate::view::line;
use crate::volume::new_operation;
use show::Show;

pub use report::told;
pub use steps::running;
pub use view::View;

/// Pause between two questions: short beside a takeover of tens of milliseconds, and little work
/// for a server that has volumes to serve.
const POLL: Duration = Duration::from_millis(25);
/// The same while nothing but the probation goes on, which our own questions are not to disturb.
const POLL_PROBATION: Duration = Duration::from_millis(50);

/// What this side can tell of a takeover that was started.
pub struct Watched {
    /// What is known last: it is over, or goes on without us.
    pub last: Upgrade,
    /// What the server told that knows nothing of it: nobody knows how it ended.
    pub lost_to: Option<Upgrade>,
}

/// `nebdctl upgrade`: does it, and returns what to print.
pub fn run(connection: &Connection, args: &UpgradeArgs) -> Result<String, Failure> {
    let kind = match args {
        UpgradeArgs { check: true, .. } => UpgradeKind::Check,
        UpgradeArgs { dry_run: true, .. } => UpgradeKind::DryRun,
        _ => UpgradeKind::Upgrade,
    };
    let is_real = kind == UpgradeKind::Upgrade;
    let probation = if is_real { args.probation.0 } else { Duration::ZERO };
    let request = StartUpgradeRequest {
        binary: args.binary.as_deref().map(binary::checked).transpose()?.unwrap_or_default(),
        canary: args.canary.as_ref().map(ToString::to_string).unwrap_or_default(),
        probation_ms: probation.as_millis() as u64,
        ..request(kind)?
    };
    carry(connection, &request, !args.no_wait, args.output)
}

/// `nebdctl rollback`: does it, and returns what to print.
pub fn rollback(connection: &Connection, output: OutputArgs) -> Result<String, Failure> {
    carry(connection, &request(UpgradeKind::Rollback)?, true, output)
}

/// A request of this kind, with an operation id and nothing else.
pub fn request(kind: UpgradeKind) -> Result<StartUpgradeRequest, Failure> {
    Ok(StartUpgradeRequest {
        operation_id: new_operation()?.into(),
        kind: kind.into(),
        ..StartUpgradeRequest::default()
    })
}

/// Starts it; the answer is the first report.
pub fn start(connection: &Connection, request: &StartUpgradeRequest) -> Result<Upgrade, Failure> {
    let report = connection.call(|mut c| {
        let request = request.clone();
        async move { c.start_upgrade(request).await }
    })?;
    if report.operation_id == request.operation_id {
        return Ok(report);
    }
    Err(Failure::Refused {
        message: format!("another takeover comes first: {}", report::told(&report)),
        errno: None,
    })
}

/// The takeover under way, or the last one, as whoever serves now knows it.
pub fn ask(connection: &Connection) -> Result<Upgrade, Failure> {
    connection.call(|mut c| async move { c.get_upgrade(GetUpgradeRequest {}).await })
}

/// Asks again and again, and shows each report to `see`, until it is over or `see` has seen enough.
pub fn watch(
    connection: &Connection,
    first: Upgrade,
    mut see: impl FnMut(&Upgrade) -> Result<bool, Failure>,
) -> Result<Watched, Failure> {
    let mut report = first;
    loop {
        let is_enough = see(&report)?;
        if is_enough || report::is_final(report.state()) {
            return Ok(Watched { last: report, lost_to: None });
        }
        std::thread::sleep(match report.state() {
            UpgradeState::Probation => POLL_PROBATION,
            _ => POLL,
        });
        let next = ask(connection)?;
        if next.operation_id != report.operation_id {
            return Ok(Watched { last: report, lost_to: Some(next) });
        }
        report = next;
    }
}

fn carry(
    connection: &Connection,
    request: &StartUpgradeRequest,
    waits: bool,
    output: OutputArgs,
) -> Result<String, Failure> {
    let first = match start(connection, request) {
        Ok(first) => first,
        Err(Failure::Refused { message, .. }) => refused_at_once(request, message),
        Err(failure) => return Err(failure),
    };
    // From here on it goes on without us; that must be said.
    watch_interrupts().context("cannot catch Ctrl-C")?;
    let mut show = Show::new(output.json);
    let watched = watch(connection, first, |report| {
        if is_interrupted() {
            show.interrupted();
            return Err(Failure::Interrupted);
        }
        show.report(report);
        Ok(!waits && report.state() == UpgradeState::Probation)
    });
    drop(show);
    let Watched { last, lost_to } = watched?;
    match lost_to {
        None => finish(&last, output),
        Some(instead) => Err(lost(connection, &last, &instead, output)),
    }
}

/// A refusal that came as an error, as the report that it is.
fn refused_at_once(request: &StartUpgradeRequest, reason: String) -> Upgrade {
    Upgrade {
        operation_id: request.operation_id.clone(),
        kind: request.kind,
        state: UpgradeState::Refused.into(),
        reason,
        ..Upgrade::default()
    }
}

fn finish(report: &Upgrade, output: OutputArgs) -> Result<String, Failure> {
    let mut text = match output.json {
        true => String::new(),
        false => report::text(report),
    };
    if output.json {
        text.push_str(&line(&View::of(report))?);
    }
    match report::problem(report) {
        None => Ok(text),
        Some(message) => Err(Failure::Takeover { report: text, message }),
    }
}

fn lost(connection: &Connection, last: &Upgrade, instead: &Upgrade, output: OutputArgs) -> Failure {
    let message = match instead.operation_id.is_empty() {
        true => {
            let serving = status::ask(connection).map_or_else(
                |failure| format!("and nobody tells who serves now ({failure})"),
                |status| format!("{}, pid {}, serves now", status.version, status.pid),
            );
            format!(
                "the server died on the way, and its successor knows nothing of this takeover; \
                 {serving}. Its log and `nebdctl status` tell what happened; nothing needs to be \
                 undone before it is tried again"
            )
        }
        false => format!(
            "what became of this takeover is not known: another one was started since ({})",
            report::told(instead)
        ),
    };
    let report = match output.json {
        true => line(&View::lost(last, &message)),
        false => Ok(String::new()),
    };
    match report {
        Ok(report) => Failure::Takeover { report, message },
        Err(error) => error.into(),
    }
}
