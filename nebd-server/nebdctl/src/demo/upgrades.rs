//! `nebdctl demo --upgrade`: the server is replaced in every way there is, while the load runs.
//!
//! ```text
//!   planned      the same binary takes over                           a new pid
//!   refused      a program that is no nebd-server                     the same pid
//!   rolled-back  the new server is killed while it prepares           the same pid
//!   sigkill      the server is killed; the standby takes over         a new pid
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use nebd_rpc::admin::{StartUpgradeRequest, Upgrade, UpgradeKind, UpgradeState};

use crate::connection::Connection;
use crate::demo::candidate;
use crate::demo::event::{Events, Kind};
use crate::demo::process::is_interrupted;
use crate::demo::say;
use crate::demo::stage::Stage;
use crate::failure::Failure;
use crate::upgrade::{self, Watched};

/// A candidate that cannot be met on its way is given this many successors.
const TRIES: u32 = 5;
/// A question while the candidate is stopped: if it is the owner already, nobody answers.
const SHORT: Duration = Duration::from_millis(500);

/// All four, evenly over the time.
pub fn run(events: &mut Events<'_>, seconds: u64) -> Result<(), Failure> {
    let interval = Duration::from_secs(seconds) / 5;
    let begun = Instant::now();
    type Act = fn(&mut Events<'_>) -> Result<(), Failure>;
    let acts: [Act; 4] = [planned, refused, rolled_back, |events| events.sigkill()];
    for (number, act) in (1..).zip(acts) {
        events.rest_until(begun + interval * number)?;
        act(events)?;
    }
    events.rest_until(begun + interval * 5)
}

fn planned(events: &mut Events<'_>) -> Result<(), Failure> {
    let stage = events.stage;
    let begun = events.begin()?;
    let report = over(stage, upgrade::start(stage.connection(), &request("")?)?)?;
    if report.state() != UpgradeState::Done {
        return Err(unexpected(stage, "the planned upgrade", &report));
    }
    let successor = stage.wait_for_successor(begun.pid)?;
    let detail = format!("{} steps", report.steps.len());
    events.end(&begun, Kind::Planned, successor, detail)
}

fn refused(events: &mut Events<'_>) -> Result<(), Failure> {
    let stage = events.stage;
    let impostor = impostor(stage.directory())?;
    let begun = events.begin()?;
    let reason = match upgrade::start(stage.connection(), &request(&impostor)?) {
        Err(Failure::Refused { message, .. }) => message,
        Err(failure) => return Err(failure),
        Ok(first) => match over(stage, first)? {
            report if report.state() == UpgradeState::Refused => report.reason,
            report => return Err(unexpected(stage, "the upgrade to no nebd-server", &report)),
        },
    };
    unmoved(stage, begun.pid)?;
    events.end(&begun, Kind::Refused, begun.pid, reason)
}

fn rolled_back(events: &mut Events<'_>) -> Result<(), Failure> {
    let stage = events.stage;
    let short = Connection::new(&stage.socket(), SHORT).context("cannot start the admin client")?;
    for _ in 0..TRIES {
        let begun = events.begin()?;
        let first = upgrade::start(stage.connection(), &request("")?)?;
        let id = first.operation_id.clone();
        let killed_in = candidate::kill_on_the_way(&short, first, begun.pid)?;
        let report = upgrade::ask(stage.connection())?;
        let is_ours = report.operation_id == id;
        let report = if is_ours { over(stage, report)? } else { report };
        match (killed_in, report.state()) {
            (Some(step), UpgradeState::Failed | UpgradeState::RolledBack) => {
                unmoved(stage, begun.pid)?;
                let detail = format!("killed in {step}: {}", report.reason);
                return events.end(&begun, Kind::RolledBack, begun.pid, detail);
            }
            // Too fast for us: it took over, or it died as the owner. Both are survived.
            _ => say(format_args!("the new server was not met on its way; once more")),
        }
    }
    Err(anyhow!("no new server could be killed on its way in {TRIES} tries").into())
}

/// Without a probation: what is shown here is how it fails before that.
fn request(binary: &str) -> Result<StartUpgradeRequest, Failure> {
    Ok(StartUpgradeRequest { binary: binary.into(), ..upgrade::request(UpgradeKind::Upgrade)? })
}

/// How it ended.
fn over(stage: &Stage, first: Upgrade) -> Result<Upgrade, Failure> {
    let watched = upgrade::watch(stage.connection(), first, |_| match is_interrupted() {
        true => Err(Failure::Interrupted),
        false => Ok(false),
    })?;
    let Watched { last, lost_to } = watched;
    // What is not known any more is not done.
    let state = lost_to.map_or(last.state(), |_| UpgradeState::None);
    Ok(Upgrade { state: state.into(), ..last })
}

/// An executable file that ends at once and says nothing.
fn impostor(directory: &Path) -> anyhow::Result<String> {
    let path = directory.join("not-a-server");
    fs::write(&path, "#!/bin/sh\nexit 0\n").context("cannot make a program that is no server")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .context("cannot make a program that is no server")?;
    path.into_os_string().into_string().map_err(|path| anyhow!("{} is not UTF-8", path.display()))
}

fn unmoved(stage: &Stage, pid: u32) -> anyhow::Result<()> {
    let now = stage.server_pid();
    ensure!(now == Some(pid), "the server {pid} was to serve on, but now it is {now:?}");
    Ok(())
}

fn unexpected(stage: &Stage, what: &str, report: &Upgrade) -> Failure {
    let (told, log) = (upgrade::told(report), stage.log_tail());
    anyhow!("{what} ended otherwise than it should: {told}; the log says:\n{log}").into()
}
