//! Planned takeovers: what the operator asks for and is told.
//!
//! ```text
//!  nebdctl ─StartUpgrade─► the report says RUNNING ─► owner (a thread of the old server)
//!                                                      │ Frozen carries the report along
//!  nebdctl ─GetUpgrade──► whichever server answers ◄───┴─► candidate: PROBATION ─► DONE
//!                                                                        └─► back to the old binary
//! ```
//!
//! The report is a file in the state directory, too: a server that is killed in its probation leaves
//! it to the one that follows, which is the old binary again.

mod candidate;
mod checks;
mod owner;
mod probation;
mod report;
mod seals;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender};
use nebd_rpc::admin::{StartUpgradeRequest, Upgrade, UpgradeKind, UpgradeState};

use crate::admin::{AdminError, AdminHandle};
use crate::holdings::Holdings;
use crate::server::Server;
pub use candidate::run as run_candidate;
pub(crate) use probation::Probation;
pub(crate) use report::Report;

/// A planned takeover that was asked for.
#[derive(Clone, Debug)]
pub struct Order {
    kind: UpgradeKind,
    binary: Option<PathBuf>,
    canary: String,
    probation: Duration,
}

/// The planned takeovers of a server.
#[derive(Default)]
pub struct Upgrades {
    report: Mutex<Report>,
    orders: OnceLock<Sender<Order>>,
    /// Stopped when this server has handed over: whoever calls then is to reach the new one.
    admin: Mutex<Option<AdminHandle>>,
}

impl Upgrades {
    pub(crate) fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The service to stop when this server has handed over.
    pub(crate) fn set_admin(&self, admin: AdminHandle) {
        *self.admin.lock().unwrap_or_else(PoisonError::into_inner) = Some(admin);
    }

    fn stop_admin(&self) {
        let admin = self.admin.lock().unwrap_or_else(PoisonError::into_inner).take();
        admin.into_iter().for_each(AdminHandle::stop);
    }

    /// What `nebdctl` is told.
    pub fn last(&self) -> Upgrade {
        self.report().to_message()
    }

    /// Starts a planned takeover; a repeated one is answered as the first time.
    pub fn start(&self, request: &StartUpgradeRequest) -> Result<Upgrade, AdminError> {
        let kind = request.kind();
        let mut report = self.report();
        if !request.operation_id.is_empty() && report.is_of(&request.operation_id) {
            return Ok(report.to_message());
        }
        match report.state() {
            UpgradeState::Running => return Err(AdminError::UpgradeRunning),
            // Not even a check: the report is the probation's.
            UpgradeState::Probation if kind != UpgradeKind::Rollback => {
                return Err(AdminError::OnProbation);
            }
            _ => {}
        }
        let order = Order {
            kind,
            binary: match kind {
                UpgradeKind::Rollback => {
                    Some(report.previous_binary().ok_or(AdminError::NoPrevious)?)
                }
                _ => (!request.binary.is_empty()).then(|| request.binary.clone().into()),
            },
            canary: request.canary.clone(),
            probation: Duration::from_millis(request.probation_ms),
        };
        report.begin(&request.operation_id, kind);
        let message = report.to_message();
        drop(report);
        self.send(order);
        Ok(message)
    }

    fn send(&self, order: Order) {
        if self.orders.get().is_none_or(|orders| orders.send(order).is_err()) {
            self.report().finish(UpgradeState::Refused, "this server cannot be taken over");
        }
    }
}

/// Starts the thread that hands this server over, once it serves; it sleeps until it is asked.
pub(crate) fn spawn(server: &Arc<Server>, holdings: &Arc<Holdings>) -> std::io::Result<()> {
    let (orders, receiver) = crossbeam::channel::unbounded();
    let _ = server.upgrades.orders.set(orders);
    let (server, holdings) = (server.clone(), holdings.clone());
    std::thread::Builder::new()
        .name("nebd-upgrade".into())
        .spawn(move || work(&server, &holdings, &receiver))?;
    Ok(())
}

fn work(server: &Arc<Server>, holdings: &Holdings, orders: &Receiver<Order>) {
    while let Ok(order) = orders.recv() {
        owner::hand_over(server, holdings, &order);
    }
}
