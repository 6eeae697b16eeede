//! The report of a planned takeover, begun by one server and finished by the next.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nebd_rpc::admin::{
    self, Blackout, ClientSupport, Upgrade, UpgradeKind, UpgradeState, UpgradeStep,
};
use prost::Message as _;

use crate::shard::monotonic_ns;

const FILE: &str = "upgrade.report";

/// A report; an empty one says that there was none.
#[derive(Debug, Default)]
pub struct Report {
    message: Upgrade,
    /// The binary before this one, if a takeover brought us here.
    previous: Option<PathBuf>,
    /// Where it is written; nowhere before the server owns its host.
    state_dir: Option<PathBuf>,
}

impl Report {
    /// What a dead or an earlier server left. `binary` is this server's.
    pub(crate) fn load(state_dir: &Path, binary: &Path) -> Report {
        let bytes = fs::read(state_dir.join(FILE)).unwrap_or_default();
        let mut message = Upgrade::decode(&*bytes).unwrap_or_default();
        let own = binary.to_string_lossy();
        let is_undone = match message.state() {
            // Nobody else is alive: the one that was to be on probation is not.
            UpgradeState::Probation => {
                message.set_state(UpgradeState::RolledBack);
                message.reason = "the new server died in its probation".into();
                true
            }
            UpgradeState::Running => {
                message.set_state(UpgradeState::Failed);
                message.reason = "the server died on the way".into();
                true
            }
            _ => false,
        };
        let sides = [message.from.as_ref(), message.to.as_ref()];
        let other = sides.into_iter().flatten().map(|side| &side.binary).find(|b| **b != own);
        let previous = other.filter(|binary| !binary.is_empty()).map(PathBuf::from);
        let report = Report { message, previous, state_dir: Some(state_dir.into()) };
        if is_undone {
            tracing::warn!(reason = report.message.reason, "the last upgrade was undone");
            report.write();
        }
        report
    }

    /// What the predecessor handed over; `binary` is the predecessor's.
    pub(crate) fn adopt(&mut self, bytes: &[u8], state_dir: &Path, previous: &str) {
        self.message = Upgrade::decode(bytes).unwrap_or_default();
        self.previous = (!previous.is_empty()).then(|| previous.into());
        self.state_dir = Some(state_dir.into());
    }

    pub(crate) fn to_message(&self) -> Upgrade {
        self.message.clone()
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.message.encode_to_vec()
    }

    pub(crate) fn is_of(&self, operation: &[u8]) -> bool {
        self.message.operation_id == operation
    }

    pub(crate) fn state(&self) -> UpgradeState {
        self.message.state()
    }

    /// Why it is, or was, undone.
    pub(crate) fn reason(&self) -> String {
        self.message.reason.clone()
    }

    pub(crate) fn previous_binary(&self) -> Option<PathBuf> {
        self.previous.clone()
    }

    /// A new takeover begins.
    pub(crate) fn begin(&mut self, operation: &[u8], kind: UpgradeKind) {
        self.message = Upgrade {
            operation_id: operation.to_vec().into(),
            kind: kind.into(),
            state: UpgradeState::Running.into(),
            started_ns: monotonic_ns(),
            ..Upgrade::default()
        };
    }

    pub(crate) fn set_from(&mut self, server: admin::Server) {
        self.message.from = Some(server);
    }

    pub(crate) fn set_to(&mut self, server: admin::Server) {
        self.message.to = Some(server);
    }

    pub(crate) fn set_clients(&mut self, clients: Vec<ClientSupport>) {
        self.message.clients = clients;
    }

    pub(crate) fn set_blackouts(&mut self, blackouts: Vec<Blackout>) {
        self.message.blackouts = blackouts;
    }

    pub(crate) fn set_probation_left_ms(&mut self, left: u64) {
        self.message.probation_left_ms = left;
    }

    /// A step that began at `begin_ns` of the monotonic clock has ended.
    pub(crate) fn step(&mut self, name: &str, begin_ns: u64, detail: impl Into<String>) {
        let (detail, now) = (detail.into(), monotonic_ns());
        let step = UpgradeStep {
            name: name.into(),
            at_us: begin_ns.saturating_sub(self.message.started_ns) / 1000,
            duration_us: now.saturating_sub(begin_ns) / 1000,
            detail,
        };
        crate::metrics::note_phase(name, Duration::from_nanos(now.saturating_sub(begin_ns)));
        tracing::info!(
            event = "takeover",
            step = name,
            at_us = step.at_us,
            duration_us = step.duration_us,
            detail = step.detail
        );
        self.message.steps.push(step);
    }

    /// The takeover has another state.
    pub(crate) fn finish(&mut self, state: UpgradeState, reason: impl Into<String>) {
        self.message.set_state(state);
        self.message.reason = reason.into();
        self.message.probation_left_ms = 0;
        tracing::info!(
            event = "takeover",
            state = state.as_str_name(),
            reason = self.message.reason,
            from_pid = self.message.from.as_ref().map_or(0, |server| server.pid),
            to_pid = self.message.to.as_ref().map_or(0, |server| server.pid),
        );
        self.write();
    }

    /// For the next server, if this one dies. It is an aid, not a record: no sync.
    pub(crate) fn write(&self) {
        let Some(dir) = &self.state_dir else { return };
        let write = || {
            let new = dir.join("upgrade.report.new");
            fs::File::create(&new)?.write_all(&self.to_bytes())?;
            fs::rename(new, dir.join(FILE))
        };
        if let Err(error) = write() {
            tracing::warn!(%error, "the report of the upgrade cannot be written");
        }
    }
}
