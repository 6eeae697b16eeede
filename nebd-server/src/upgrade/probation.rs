//! A new server proves itself, or goes back by itself.
//!
//! ```text
//!  RESUME ─► every second: sessions served? errors that were none before? ─► DONE
//!                             └─ no ─► an ordinary takeover by the binary before
//! ```
//!
//! A server that dies in its probation is followed by the old binary anyway: the keeper is told of
//! the new one only at the end.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_rpc::admin::{UpgradeKind, UpgradeState};

use super::Order;
use crate::holdings::Holdings;
use crate::server::Server;

/// Between looks.
const PERIOD: Duration = Duration::from_secs(1);
/// A session that is not served this long after the takeover is a reason to go back.
const RESUME_TIME_MAX: Duration = Duration::from_secs(30);
/// So many new errors, and so many in a thousand requests, are a reason to go back.
const ERRORS_MAX: u64 = 10;
const ERRORS_PER_MILLE_MAX: u64 = 10;

/// A probation that is about to begin.
pub(crate) struct Probation {
    length: Duration,
}

impl Probation {
    pub(crate) fn new(length: Duration) -> Probation {
        Probation { length }
    }

    /// Watches over this server on a thread that ends with the probation.
    pub(crate) fn spawn(self, server: &Arc<Server>, holdings: &Arc<Holdings>) -> io::Result<()> {
        let (server, holdings) = (server.clone(), holdings.clone());
        std::thread::Builder::new()
            .name("nebd-probation".into())
            .spawn(move || self.watch(&server, &holdings))?;
        Ok(())
    }

    fn watch(self, server: &Arc<Server>, holdings: &Holdings) {
        let start = Instant::now();
        let begin_ns = crate::shard::monotonic_ns();
        while start.elapsed() < self.length {
            if let Some(reason) = complaint(server, start.elapsed()) {
                return go_back(server, &reason);
            }
            let left = self.length.saturating_sub(start.elapsed());
            {
                let mut report = server.upgrades.report();
                if report.state() != UpgradeState::Probation {
                    // The operator has decided already.
                    return;
                }
                report.set_probation_left_ms(left.as_millis() as u64);
            }
            std::thread::sleep(PERIOD.min(left));
        }
        if let Some(notifier) = &holdings.notifier {
            notifier.binary(&holdings.binary);
        }
        let mut report = server.upgrades.report();
        if report.state() == UpgradeState::Probation {
            report.step("PROBATION", begin_ns, "nothing to complain of");
            report.finish(UpgradeState::Done, "");
        }
    }
}

fn complaint(server: &Server, elapsed: Duration) -> Option<String> {
    if elapsed > RESUME_TIME_MAX {
        let waiting = server.waiting_sessions();
        if let Some(volume) = waiting.first() {
            return Some(format!(
                "{} sessions are not served yet, {volume} among them",
                waiting.len()
            ));
        }
    }
    server.sessions().iter().find_map(|session| {
        let (errors, requests) = session.counted_here();
        let is_bad = errors > ERRORS_MAX && errors * 1000 > requests * ERRORS_PER_MILLE_MAX;
        is_bad.then(|| {
            format!("volume {}: {errors} errors in {requests} requests", session.volume.name)
        })
    })
}

fn go_back(server: &Server, reason: &str) {
    tracing::error!(event = "takeover", reason, "the probation failed; going back");
    let previous = {
        let mut report = server.upgrades.report();
        let previous = report.previous_binary();
        report.finish(UpgradeState::Running, reason);
        previous
    };
    server.upgrades.send(Order {
        kind: UpgradeKind::Rollback,
        binary: previous,
        canary: String::new(),
        probation: Duration::ZERO,
    });
}
