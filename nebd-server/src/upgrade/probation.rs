//! A new server proves itself, or goes back by itself.
//!
//! ```text
//!  RESUME ─► every second: sessions served? errors that were none before? ─► DONE
//!                             └─ no ─► an ordinary takeover by the binary before
//! ```
//!
//! A server that dies in its probation is followed by the old binary anyway: the keeper is told of
//! the new one only at the end.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use nebd_abi::layout::SessionId;
use nebd_rpc::admin::{Blackout, UpgradeKind, UpgradeState};

use super::Order;
use crate::holdings::Holdings;
use crate::metrics::Totals;
use crate::server::Server;
use crate::session::Session;

/// Between looks.
const PERIOD: Duration = Duration::from_secs(1);
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Clients write down what they saw of the takeover with their first completion after it.
const BLACKOUT_TIME: Duration = Duration::from_millis(200);
/// A session that is not served this long after the takeover is a reason to go back.
const RESUME_TIME_MAX: Duration = Duration::from_secs(30);
/// So many new errors, and so many in a thousand requests, are a reason to go back.
const ERRORS_MAX: u64 = 10;
const ERRORS_PER_MILLE_MAX: u64 = 10;

/// Errors and requests of each session when the probation began.
type Begun = HashMap<SessionId, (u64, u64)>;

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
        let sessions = server.sessions();
        let begun: Begun = sessions.iter().map(|session| (session.id, tally(session))).collect();
        drop(sessions);
        if !self.length.is_zero() {
            std::thread::sleep(BLACKOUT_TIME.min(self.length));
            take_blackouts(server);
        }
        let mut has_failed = false;
        loop {
            let elapsed = start.elapsed();
            if elapsed < self.length
                && !is_left(server)
                && let Some(reason) = complaint(server, &begun, elapsed)
            {
                has_failed = true;
                go_back(server, &reason);
            }
            let left = self.length.saturating_sub(elapsed);
            {
                let mut report = server.upgrades.report();
                // A way back that failed leaves this server on probation, whatever the report says.
                if left.is_zero() && report.state() != UpgradeState::Running {
                    // Under the lock: no way back may begin in between.
                    if let Some(notifier) = holdings.notifier.as_ref().filter(|_| !has_failed) {
                        notifier.binary(&holdings.binary);
                    }
                    if report.state() == UpgradeState::Probation {
                        report.step("PROBATION", begin_ns, "nothing to complain of");
                        report.finish(UpgradeState::Done, "");
                    }
                    return;
                }
                report.set_probation_left_ms(left.as_millis() as u64);
            }
            // A little even at the end: a way back may be under way.
            std::thread::sleep(PERIOD.min(left.max(PAUSE_MIN)));
        }
    }
}

/// Whether a way back is under way.
fn is_left(server: &Server) -> bool {
    server.upgrades.report().state() == UpgradeState::Running
}

/// What the clients saw, in place of what the servers reckoned, where they have noted it.
fn take_blackouts(server: &Server) {
    let mut report = server.upgrades.report();
    let mut blackouts = report.to_message().blackouts;
    for Blackout { session, blackout_us, .. } in &mut blackouts {
        let Some(session) = session.parse().ok().and_then(|id| server.session(id)) else {
            continue;
        };
        let header = session.region.header();
        if header.blackout_generation.load(Acquire) == server.tenure.generation().0 {
            *blackout_us = header.blackout_last_us.load(Relaxed);
        }
    }
    report.set_blackouts(blackouts);
}

fn complaint(server: &Server, begun: &Begun, elapsed: Duration) -> Option<String> {
    if let Some(reason) = crate::hooks::complaint() {
        return Some(reason);
    }
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
        let now = tally(session);
        let since =
            |before: &(u64, u64)| (now.0.saturating_sub(before.0), now.1.saturating_sub(before.1));
        // One that came later has counted under predecessors too.
        let (errors, requests) =
            begun.get(&session.id).map_or_else(|| session.counted_here(), since);
        let is_bad = errors > ERRORS_MAX && errors * 1000 > requests * ERRORS_PER_MILLE_MAX;
        is_bad.then(|| {
            format!("volume {}: {errors} errors in {requests} requests", session.volume.name)
        })
    })
}

/// Errors and requests of a session, over all its servers.
fn tally(session: &Session) -> (u64, u64) {
    let mut totals = Totals::default();
    totals.add(session.ledger.counters());
    (totals.errors(), totals.requests())
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
