//! What happens to the server while the load runs, and what the clients notice of it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use nebd_upgrade_tests::timeline::Timeline;
use serde::Serialize;

use crate::demo::load::Load;
use crate::demo::process::{self, is_interrupted};
use crate::demo::stage::Stage;
use crate::demo::{round, say};
use crate::failure::Failure;
use crate::units::Micros;

/// A kill that meets fewer writes in flight is made again.
const WRITES_MIN: u64 = 8;
/// How long to wait for enough writes in flight, and for completions after a kill.
const LOAD_LIMIT: Duration = Duration::from_secs(20);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A planned takeover.
    Planned,
    /// One that the server refused.
    Refused,
    /// One that failed on the way.
    RolledBack,
    /// The server was killed.
    Sigkill,
}

impl Kind {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Planned => "planned",
            Kind::Refused => "refused",
            Kind::RolledBack => "rolled-back",
            Kind::Sigkill => "sigkill",
        }
    }
}

/// One event.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// What happened.
    pub kind: Kind,
    /// The longest gap between completions on either volume, from before the event until both went
    /// on after it.
    pub blackout_ms: f64,
    /// Who served before.
    pub pid: u32,
    /// Who serves after.
    pub successor_pid: u32,
    /// Writes that were in flight when it happened.
    pub writes_in_flight: u32,
    /// What the server said of it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// An event that has begun.
pub struct Begun {
    /// Who serves.
    pub pid: u32,
    writes_in_flight: u32,
}

/// Makes events happen, and keeps what came of them.
pub struct Events<'a> {
    /// Where.
    pub stage: &'a Stage,
    load: &'a Load,
    timeline: &'a Timeline,
    list: Vec<Event>,
    quiet_ns_max: u64,
}

impl<'a> Events<'a> {
    /// None yet; gaps count from here.
    pub fn new(stage: &'a Stage, load: &'a Load, timeline: &'a Timeline) -> Events<'a> {
        load.take_gap_ns();
        Events { stage, load, timeline, list: Vec::new(), quiet_ns_max: 0 }
    }

    /// What happened, and the longest gap while nothing did, in milliseconds.
    pub fn into_list(self) -> (Vec<Event>, f64) {
        (self.list, round(self.quiet_ns_max as f64 / 1e6))
    }

    /// Lets the load run until then.
    pub fn rest_until(&self, due: Instant) -> Result<(), Failure> {
        while Instant::now() < due && !self.load.is_broken() {
            if is_interrupted() {
                return Err(Failure::Interrupted);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits for enough writes in flight; from here on gaps are the event's.
    pub fn begin(&mut self) -> Result<Begun, Failure> {
        let pid = self.stage.server_pid().context("the keeper's server.pid is gone")?;
        self.until("there were never enough writes in flight", |load| {
            load.writes_in_flight() >= 2 * WRITES_MIN
        })?;
        self.quiet_ns_max = self.quiet_ns_max.max(self.load.take_gap_ns());
        let writes_in_flight = u32::try_from(self.load.writes_in_flight()).unwrap_or(u32::MAX);
        Ok(Begun { pid, writes_in_flight })
    }

    /// Waits until both volumes go on, and tells what they noticed.
    pub fn end(
        &mut self,
        begun: &Begun,
        kind: Kind,
        successor_pid: u32,
        detail: String,
    ) -> Result<(), Failure> {
        let Begun { pid, writes_in_flight } = *begun;
        self.timeline.note(format!("{} (server {pid}, then {successor_pid})", kind.name()));
        let before = self.load.completions();
        self.until("a volume was not served again", |load| {
            load.completions().iter().zip(before).all(|(now, before)| *now > before + 16)
        })?;
        let gap_ns = self.load.take_gap_ns();
        let blackout_ms = round(gap_ns as f64 / 1e6);
        // Only a killed server leaves its writes to be counted by the client.
        let writes_in_flight = match kind {
            Kind::Sigkill => self.timeline.kill.held(),
            _ => writes_in_flight,
        };
        let after = Micros(gap_ns / 1000);
        let said = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
        say(format_args!(
            "{}: server {pid}, {writes_in_flight} writes in flight, blackout {after}{said}",
            kind.name()
        ));
        let event = Event { kind, blackout_ms, pid, successor_pid, writes_in_flight, detail };
        self.list.push(event);
        Ok(())
    }

    /// Kills the server, again if it had too little to do, and waits until both volumes go on.
    pub fn sigkill(&mut self) -> Result<(), Failure> {
        loop {
            let begun = self.begin()?;
            let pid = begun.pid;
            self.timeline.kill.arm(self.timeline.now());
            process::kill_by_pidfd(pid).with_context(|| format!("cannot kill the server {pid}"))?;
            self.timeline.kill.happened();
            self.timeline.note(format!("sigkill of {pid}"));
            let successor = self.stage.wait_for_successor(pid)?;
            self.end(&begun, Kind::Sigkill, successor, String::new())?;
            let met = self.list.last().map_or(0, |event| event.writes_in_flight);
            if u64::from(met) >= WRITES_MIN {
                return Ok(());
            }
        }
    }

    fn until(&self, otherwise: &str, is_so: impl Fn(&Load) -> bool) -> Result<(), Failure> {
        let deadline = Instant::now() + LOAD_LIMIT;
        while !is_so(self.load) {
            if is_interrupted() {
                return Err(Failure::Interrupted);
            }
            if self.load.is_broken() {
                return Err(anyhow!("the load ended early: {otherwise}").into());
            }
            if Instant::now() >= deadline {
                return Err(anyhow!("{otherwise} within {} s", LOAD_LIMIT.as_secs()).into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}
