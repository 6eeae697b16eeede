//! Many deaths under load: what `upgrade-tests soak` does.
//!
//! ```text
//!  start ─► create, attach ─► load ─►┌ wait: 8 writes in flight ┐─► sweep ─► summary
//!                                    │ kill, successor          │
//!                                    └ every volume goes on ────┘ × n
//! ```
//!
//! A kill counts only if at least [`CampaignConfig::writes_min`] writes were in flight at its
//! instant: submitted before it, and reaped after it.

mod attach;
mod kill;
mod power;
mod summary;
mod takeover;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::device::Device;
use crate::fence_store::control;
use crate::growth::{self, Growth};
use crate::load::{Load, total};
use crate::stamp::Dice;
use crate::supervisor::{FenceStore, Host, HostConfig, HostError, Programs};
use crate::timeline::Timeline;
use crate::vhost_device::Driver;
use crate::workload::Mix;

pub use attach::Way;
pub use kill::{Kill, KillParseError};
pub use power::run_power_cuts;
pub use summary::{Blackouts, Summary};
pub use takeover::{ACTIONS, CANDIDATE_POINTS, KEEPER_ACTIONS, OWNER_POINTS};

/// What a campaign does.
#[derive(Clone, Debug)]
pub struct CampaignConfig {
    /// The programs under test.
    pub programs: Programs,
    /// `file`, `mem` or `fence-test`.
    pub backend: String,
    /// How volumes are attached.
    pub way: Way,
    /// Volumes, each attached once.
    pub sessions: usize,
    /// Kills that must count.
    pub kills: usize,
    /// Taken in turn.
    pub kinds: Vec<Kill>,
    /// Requests in flight on each volume.
    pub depth: u32,
    /// Size of each volume.
    pub volume_bytes: u64,
    /// 4096 or 512.
    pub block_bytes: u32,
    /// Writes in flight without which a kill does not count.
    pub writes_min: u64,
    /// Keep a warm standby.
    pub standby: bool,
    /// Load between two kills: up to this long.
    pub pause_ms_max: u64,
    /// Seed of the scripts and of the pauses.
    pub seed: u64,
    /// What is mixed.
    pub mix: Mix,
    /// Threads of the harness.
    pub threads: usize,
    /// A request that takes longer is taken for lost.
    pub stall_limit: Duration,
    /// More arguments for the fence-store.
    pub store_arguments: Vec<String>,
    /// More environment for the server.
    pub environment: Vec<(String, String)>,
    /// `auto`, `io_uring` or `threads`.
    pub file_engine: &'static str,
    /// After how long a hung server is killed, in milliseconds.
    pub hang_timeout_ms: u64,
    /// Compare what every process holds in its first so many looks with the last; 0 for no look.
    pub growth_window: usize,
}

impl CampaignConfig {
    /// A campaign of SIGKILLs on one volume.
    pub fn new(programs: Programs, backend: &str) -> CampaignConfig {
        CampaignConfig {
            programs,
            backend: backend.into(),
            way: Way::Library,
            sessions: 1,
            kills: 10,
            kinds: vec![Kill::SIGKILL],
            depth: 32,
            volume_bytes: 16 << 20,
            block_bytes: 4096,
            writes_min: 8,
            standby: false,
            pause_ms_max: 30,
            seed: 1,
            mix: Mix::default(),
            threads: 1,
            stall_limit: Duration::from_secs(20),
            store_arguments: Vec::new(),
            environment: Vec::new(),
            file_engine: "auto",
            hang_timeout_ms: 500,
            growth_window: 0,
        }
    }
}

/// What is there for a moment only is gone after this.
const LOOK_TIME_MAX: Duration = Duration::from_millis(100);

/// Why a campaign could not be carried out. Wrong blocks are no such reason: they are its result.
#[derive(Debug, thiserror::Error)]
pub enum CampaignError {
    /// The server under test cannot be handled.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A volume cannot be attached.
    #[error("cannot attach {volume}; the end of the log:\n{log}")]
    Attach {
        /// Which.
        volume: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// The end of the keeper's and the server's log.
        log: String,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The load never had enough writes in flight, or IO did not go on.
    #[error("{waited_for} did not happen within {limit:?}; the end of the log:\n{log}")]
    Late {
        /// What was waited for.
        waited_for: &'static str,
        /// For how long.
        limit: Duration,
        /// The end of the keeper's and the server's log.
        log: String,
    },
    /// Too many kills met too few writes.
    #[error("of {kills} kills only {counted} met enough writes in flight")]
    Idle {
        /// Kills in all.
        kills: usize,
        /// Kills that counted.
        counted: usize,
    },
}

/// A server under load.
pub struct Campaign {
    config: CampaignConfig,
    timeline: Arc<Timeline>,
    load: Option<Load<Box<dyn Device>>>,
    /// Of volumes that are attached by vhost-user.
    drivers: Vec<Driver>,
    // Dropped in this order: clients first, then the server, then its storage.
    host: Host,
    store: Option<FenceStore>,
    dice: Dice,
    summary: Summary,
    growth: Growth,
    /// How the present server came to be.
    last_kind: Option<String>,
    begun: Instant,
}

impl Campaign {
    /// Starts everything, and puts every volume under load.
    pub fn start(config: CampaignConfig) -> Result<Campaign, CampaignError> {
        let mut campaign = Campaign::prepare(config)?;
        let streams = campaign.start_streams(false)?;
        campaign.load = Some(Load::start(streams, campaign.config.threads));
        Ok(campaign)
    }

    /// Starts everything but the load.
    fn prepare(config: CampaignConfig) -> Result<Campaign, CampaignError> {
        let mut host_config = HostConfig::new(&config.programs.server);
        host_config.standby = config.standby;
        host_config.file_engine = config.file_engine;
        host_config.hang_timeout_ms = config.hang_timeout_ms;
        host_config.environment = config.environment.clone();
        host_config.step_timeout_ms = takeover::STEP_TIME_MAX.as_millis() as u64;
        host_config.core_dumps = config.kinds.iter().any(Kill::dumps_core);
        let mut store = None;
        if config.backend == "fence-test" {
            let arguments: Vec<&str> = config.store_arguments.iter().map(String::as_str).collect();
            let started = FenceStore::start(&config.programs.fence_store, &arguments)?;
            let socket = started.socket().display();
            host_config = host_config.with_env("NEBD_FENCE_STORE", socket);
            store = Some(started);
        }
        let host = Host::start(&host_config)?;
        Ok(Campaign {
            dice: Dice::new(config.seed),
            summary: Summary::new(&config),
            growth: Growth::default(),
            last_kind: None,
            begun: Instant::now(),
            load: None,
            drivers: Vec::new(),
            config,
            timeline: Timeline::shared(),
            host,
            store,
        })
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The volumes under load.
    pub fn load(&self) -> Option<&Load<Box<dyn Device>>> {
        self.load.as_ref()
    }

    /// The drivers of volumes that are attached by vhost-user.
    pub fn drivers(&self) -> &[Driver] {
        &self.drivers
    }

    /// The storage that fences, if there is one.
    pub fn store(&self) -> Option<&FenceStore> {
        self.store.as_ref()
    }

    /// Kills until enough kills have counted, or something is wrong.
    pub fn kill_all(&mut self) -> Result<(), CampaignError> {
        let mut turn = 0;
        while self.summary.kills_counted < self.config.kills && self.problems() == 0 {
            let kind = self.config.kinds[turn % self.config.kinds.len()].clone();
            turn += 1;
            self.kill(&kind)?;
            let (kills, counted) = (self.summary.kills, self.summary.kills_counted);
            if kills > 20 + 4 * self.config.kills {
                return Err(CampaignError::Idle { kills, counted });
            }
        }
        Ok(())
    }

    /// One kill, and what comes after it.
    pub fn kill(&mut self, kind: &Kill) -> Result<(), CampaignError> {
        if self.config.standby {
            self.host.wait_for("a standby", |host| host.standby_pid().is_some())?;
            // Half of them with all prepared, half in the middle of it.
            std::thread::sleep(Duration::from_millis(100 * self.dice.below(2)));
        }
        if self.config.growth_window > 0 {
            self.look_for_growth();
            self.last_kind = Some(kind.to_string());
        }
        if kind.is_takeover() {
            return self.takeover(kind);
        }
        std::thread::sleep(Duration::from_millis(self.dice.below(self.config.pause_ms_max)));
        self.wait_for_writes()?;
        self.reset_gaps();
        let number = self.summary.kills + 1;
        self.timeline.note(format!("kill #{number} ({kind})"));
        // The one before may have died at a failpoint only just now.
        self.host.wait_for("a living server", Host::is_served)?;
        let victim = self.host.server_pid().unwrap_or(0);
        let happened = self.strike(kind, victim)?;
        if !happened {
            return Ok(()); // stopped and continued: nobody died
        }
        let before = self.completions();
        let successor = self.host.wait_for_successor(victim)?;
        self.timeline.note(format!("successor {successor} of kill #{number}"));
        self.wait_until_all_go_on(&before)?;
        let gaps = self.gaps();
        self.summary.killed(kind, self.timeline.kill.held(), self.config.writes_min, &gaps);
        Ok(())
    }

    /// What every process holds between two kills.
    fn look_for_growth(&mut self) {
        let keeper = self.host.keeper_pid().cast_signed();
        let server = self.host.server_pid().unwrap_or(0);
        let role = self
            .last_kind
            .as_deref()
            .map_or_else(|| "first server".to_owned(), |kind| format!("server after {kind}"));
        self.growth.look(&role, server, LOOK_TIME_MAX);
        self.growth.look("keeper", keeper, LOOK_TIME_MAX);
        if let Some(standby) = self.host.standby_pid() {
            self.growth.look("standby", standby, LOOK_TIME_MAX);
        }
        self.growth.look(growth::CLIENT, std::process::id().cast_signed(), LOOK_TIME_MAX);
    }

    /// Sends the signal, or waits for the failpoint; whether the server died of it.
    fn strike(&mut self, kind: &Kill, victim: i32) -> Result<bool, CampaignError> {
        match kind {
            Kill::Signal(signal) => self.kill_victim(victim, *signal)?,
            // Of `takeover`.
            Kill::Takeover | Kill::TakeoverBy(_) => return Ok(false),
            Kill::StopAndContinue => {
                self.host.signal(victim, Signal::SIGSTOP)?;
                std::thread::sleep(Duration::from_millis(self.config.hang_timeout_ms / 8));
                self.host.signal(victim, Signal::SIGCONT)?;
                return Ok(false);
            }
            Kill::Failpoint { point, action } => {
                // The present server has read its list; its successor will meet the point.
                let nth = 1 + self.dice.below(kill::passages(point));
                self.host.arm(point, action, nth)?;
                self.renew_standby()?;
                self.kill_victim(victim, Signal::SIGKILL)?;
                self.host.wait_for("the failpoint", |host| host.armed() == 0)?;
                self.timeline.kill.arm(self.timeline.now());
                self.timeline.kill.happened();
                self.timeline.note(format!("failpoint {point} ({action}, passage {nth})"));
            }
        }
        Ok(true)
    }

    /// The standby that is to take over has read what is armed.
    fn renew_standby(&self) -> Result<(), CampaignError> {
        let Some(old) = self.host.standby_pid().filter(|_| self.config.standby) else {
            return Ok(());
        };
        self.host.signal(old, Signal::SIGKILL)?;
        let is_new = |host: &Host| host.standby_pid().is_some_and(|pid| pid != old);
        Ok(self.host.wait_for("another standby", is_new)?)
    }

    fn kill_victim(&self, victim: i32, signal: Signal) -> Result<(), CampaignError> {
        let mut victim = victim;
        loop {
            self.timeline.kill.arm(self.timeline.now());
            match self.host.signal(victim, signal) {
                // It had met its failpoint already, and died of it only now: its successor is next.
                Err(HostError::System { source, .. })
                    if source.raw_os_error() == Some(Errno::ESRCH as i32) =>
                {
                    victim = self.host.wait_for_successor(victim)?;
                }
                signalled => break signalled?,
            }
        }
        self.timeline.kill.happened();
        Ok(())
    }

    /// Whatever was found so far.
    pub fn problems(&self) -> u64 {
        self.load.as_ref().map_or(0, Load::problems)
    }

    /// Ends the load, reads every block again, and sums up.
    pub fn finish(mut self) -> Summary {
        self.drivers.iter().for_each(|driver| driver.churn(None));
        let streams = self.load.take().map(Load::sweep).unwrap_or_default();
        self.summary.report = total(&streams);
        self.summary.seconds = self.begun.elapsed().as_secs_f64();
        if self.config.growth_window > 0 {
            self.summary.growth = self.growth.compare(self.config.growth_window);
        }
        self.summary.drivers = self.drivers.iter().map(Driver::figures).collect();
        self.summary.store =
            self.store.as_ref().and_then(|store| control::stats(store.socket()).ok());
        if !self.summary.report.is_clean() {
            self.summary.log = self.host.log();
        }
        self.summary
    }

    fn late(&self, waited_for: &'static str, limit: Duration) -> CampaignError {
        CampaignError::Late { waited_for, limit, log: self.host.log() }
    }

    fn wait_for_writes(&self) -> Result<(), CampaignError> {
        let Some(load) = &self.load else { return Ok(()) };
        let deadline = Instant::now() + self.config.stall_limit;
        // A little more than needed: some may be answered before the signal arrives.
        while load.writes_in_flight() < self.config.writes_min + 4 && load.problems() == 0 {
            if Instant::now() > deadline {
                return Err(self.late("enough writes in flight", self.config.stall_limit));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn completions(&self) -> Vec<u64> {
        let gauges = self.load.iter().flat_map(Load::gauges);
        gauges.map(|gauges| gauges.completions.load(SeqCst)).collect()
    }

    fn reset_gaps(&self) {
        for gauges in self.load.iter().flat_map(Load::gauges) {
            gauges.gap_ns_max.store(0, SeqCst);
        }
    }

    /// Waits until every volume has completed more than it had in flight.
    fn wait_until_all_go_on(&self, before: &[u64]) -> Result<(), CampaignError> {
        let enough = 2 * u64::from(self.config.depth);
        let limit = self.config.stall_limit + Duration::from_secs(10);
        let deadline = Instant::now() + limit;
        while self.problems() == 0 {
            let now = self.completions();
            if now.iter().zip(before).all(|(now, before)| now - before > enough) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.late("IO on every volume after a kill", limit));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Longest gap of each volume since [`reset_gaps`](Self::reset_gaps), in microseconds.
    fn gaps(&self) -> Vec<u64> {
        let gauges = self.load.iter().flat_map(Load::gauges);
        gauges.map(|gauges| gauges.gap_ns_max.load(SeqCst) / 1000).collect()
    }
}

/// Runs a whole campaign.
pub fn run(config: CampaignConfig) -> Result<Summary, CampaignError> {
    let mut campaign = Campaign::start(config)?;
    campaign.kill_all()?;
    Ok(campaign.finish())
}
