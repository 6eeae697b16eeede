//! Planned takeovers under load, and what may happen to them.
//!
//! ```text
//!  Takeover                 it simply works
//!  owner-POINT:ACTION       the old server meets it  (it learns of the point by a takeover before)
//!  candidate-POINT:ACTION   the new one meets it
//!  …-POINT:keeper-ACTION    the keeper meets it, when that server passes the point
//! ```
//!
//! Whatever happens, IO goes on, nothing is wrong with a block, and in the end one server serves under
//! one keeper. A keeper that was struck shows in the end that it is one: its server is killed, too.

use std::path::Path;
use std::time::{Duration, Instant};

use nebd_rpc::admin::{Upgrade, UpgradeState};
use nix::sys::signal::Signal;

use super::{Campaign, CampaignError, Kill};
use crate::supervisor::HostError;

/// Points of the old server, in the order in which it passes them.
pub const OWNER_POINTS: [&str; 8] = [
    "owner-hello",
    "owner-offer",
    "owner-prepare",
    "owner-ready",
    "owner-frozen",
    "owner-fenced",
    "owner-released",
    "owner-linger",
];

/// Points of the new one.
pub const CANDIDATE_POINTS: [&str; 9] = [
    "candidate-start",
    "candidate-hello",
    "candidate-offer",
    "candidate-prepare",
    "candidate-ready",
    "candidate-before-claim",
    "candidate-after-claim",
    "candidate-fenced",
    "candidate-resumed",
];

/// What may happen at a point.
pub const ACTIONS: [&str; 5] = ["kill", "segv", "abort", "stop", "hang"];

/// What may happen to the keeper at a point. Killed by SIGKILL it is started again at once, by SIGSEGV
/// a while later; stopped it is continued when everybody's patience has ended.
pub const KEEPER_ACTIONS: [&str; 3] = ["keeper-kill", "keeper-segv", "keeper-stop"];

/// So long there is no keeper at all, if it is not started at once: most takeovers end before.
const KEEPER_AWAY: Duration = Duration::from_millis(400);
/// A step of a takeover, in test builds, takes no longer than this.
pub(super) const STEP_TIME_MAX: Duration = Duration::from_millis(1500);
/// Until then every takeover has come to an end, one way or the other.
const END_TIME_MAX: Duration = Duration::from_secs(10);

impl Campaign {
    /// One planned takeover, with its fault if it has one.
    pub(super) fn takeover(&mut self, kind: &Kill) -> Result<(), CampaignError> {
        let fault = match kind {
            Kill::Failpoint { point, action } => Some((point.as_str(), action.as_str())),
            _ => None,
        };
        if let Some((point, action)) = fault {
            self.host().arm(point, action, 1)?;
            if point.starts_with("owner-") {
                // The present server has read its list; its successor will meet the point.
                self.begin_takeover(None)?;
                self.end_takeover(|state| state == UpgradeState::Done)?;
            }
        }
        std::thread::sleep(Duration::from_millis(self.dice.below(self.config.pause_ms_max)));
        self.wait_for_writes()?;
        self.reset_gaps();
        let number = self.summary.kills + 1;
        self.timeline.note(format!("takeover #{number} ({kind})"));
        let owner = self.host().server_pid().unwrap_or(0);
        self.timeline.kill.arm(self.timeline.now());
        self.timeline.kill.happened();
        let before = self.completions();
        self.begin_takeover(match kind {
            Kill::TakeoverBy(binary) => Some(binary),
            _ => None,
        })?;
        match fault {
            None => {
                self.end_takeover(|state| state == UpgradeState::Done)?;
            }
            Some((_, action)) if is_keepers(action) => self.see_keeper_out(action)?,
            Some((_, action)) => self.see_out(owner, action)?,
        }
        self.host().wait_for_order()?;
        self.wait_until_all_go_on(&before)?;
        let gaps = self.gaps();
        self.summary.killed(kind, self.timeline.kill.held(), self.config.writes_min, &gaps);
        self.timeline.note(format!("takeover #{number} has ended"));
        if fault.is_some_and(|(_, action)| is_keepers(action)) {
            self.prove_keeper()?;
        }
        Ok(())
    }

    /// The keeper holds all that a server needs, and notices its death.
    fn prove_keeper(&mut self) -> Result<(), CampaignError> {
        let server = self.host().server_pid().unwrap_or(0);
        self.kill_victim(server, Signal::SIGKILL)?;
        let before = self.completions();
        let successor = self.host().wait_for_successor(server)?;
        self.timeline.note(format!("successor {successor}, of the keeper that was struck"));
        self.wait_until_all_go_on(&before)?;
        Ok(self.host().wait_for_order()?)
    }

    fn begin_takeover(&mut self, binary: Option<&Path>) -> Result<(), CampaignError> {
        let operation = self.dice.below(u64::MAX).to_le_bytes().repeat(2);
        let admin = self.host().admin()?;
        admin.start_upgrade(&operation, binary).map_err(HostError::from)?;
        Ok(())
    }

    /// Waits for this state; another end is an error of its own.
    fn end_takeover(
        &self,
        is_end: impl Fn(UpgradeState) -> bool,
    ) -> Result<Upgrade, CampaignError> {
        let admin = self.host().admin()?;
        let deadline = Instant::now() + END_TIME_MAX;
        loop {
            let upgrade = admin.upgrade().map_err(HostError::from)?;
            if is_end(upgrade.state()) {
                return Ok(upgrade);
            }
            if Instant::now() > deadline {
                let (state, log) = (upgrade.state().as_str_name(), self.host().log());
                let log = format!("{log}\nthe takeover: {state}: {}", upgrade.reason);
                let waited_for = "the end of a planned takeover";
                return Err(CampaignError::Late { waited_for, limit: END_TIME_MAX, log });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the fault has struck and nobody is in the middle of anything; those that were
    /// stopped are continued only then, and must do no harm.
    fn see_out(&mut self, owner: i32, action: &str) -> Result<(), CampaignError> {
        self.host().wait_for("the failpoint", |host| host.armed() == 0)?;
        let candidate = self.candidate_of(owner);
        if action == "stop" || action == "hang" {
            // Long enough for every deadline that ends such a silence.
            std::thread::sleep(STEP_TIME_MAX + Duration::from_millis(500));
            for pid in [Some(owner), candidate].into_iter().flatten() {
                let _ = self.host().signal(pid, Signal::SIGCONT);
            }
        }
        if self.end_takeover(is_over).is_ok() {
            return Ok(());
        }
        // A thread that hangs beside the data path harms nobody but the operator, who ends it.
        self.timeline.note("the old server's upgrade thread hangs; killed");
        self.kill_victim(owner, Signal::SIGKILL)?;
        self.host().wait_for_successor(owner)?;
        self.end_takeover(is_over)?;
        Ok(())
    }

    /// Waits until the keeper has met its fate, puts that right as whoever looks after it would, and
    /// waits until nobody is in the middle of anything.
    fn see_keeper_out(&mut self, action: &str) -> Result<(), CampaignError> {
        self.host().wait_for("the failpoint", |host| host.armed() == 0)?;
        match action {
            "keeper-stop" => {
                // Long enough for every deadline that ends such a silence.
                std::thread::sleep(STEP_TIME_MAX + Duration::from_millis(500));
                self.host().signal(self.host().keeper_pid() as i32, Signal::SIGCONT)?;
            }
            _ => {
                if action == "keeper-segv" {
                    std::thread::sleep(KEEPER_AWAY);
                }
                self.host.restart_keeper()?;
                self.timeline.note(format!("keeper {}", self.host().keeper_pid()));
            }
        }
        self.end_takeover(is_over)?;
        Ok(())
    }

    /// The child of the server that is to take over, if it lives.
    fn candidate_of(&self, owner: i32) -> Option<i32> {
        let path = format!("/proc/{owner}/task/{owner}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        let is_candidate = |pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|arg| arg == b"--candidate"))
        };
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_candidate)
    }
}

fn is_keepers(action: &str) -> bool {
    action.starts_with("keeper-")
}

fn is_over(state: UpgradeState) -> bool {
    !matches!(state, UpgradeState::Running | UpgradeState::Probation)
}
