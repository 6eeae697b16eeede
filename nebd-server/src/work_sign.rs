//! Telling the keeper that there is work, so that it looks after this server.
//!
//! A part client whose requests stall knocks at the client socket, and the keeper asks the server for a
//! sign of life. Hypervisors that were attached without our library do not knock. So a thread that
//! takes something up notes it in the host page, which costs a load, and wakes the keeper if that sleeps.

use std::sync::Arc;

use nebd_abi::host::HostPage;
use nebd_keeper::notify::Notifier;

/// Where threads note that they have work.
#[derive(Clone)]
pub struct WorkSign {
    host: Arc<HostPage>,
    /// A service manager has a watchdog of its own.
    keeper: Option<Arc<Notifier>>,
}

impl WorkSign {
    /// For a server on this host.
    pub fn new(host: Arc<HostPage>, notifier: Option<Arc<Notifier>>) -> WorkSign {
        WorkSign { host, keeper: notifier.filter(|notifier| notifier.is_keeper()) }
    }

    /// This thread takes something up; to be called before it does.
    pub fn note(&self) {
        if self.host.take_up_work()
            && let Some(keeper) = &self.keeper
        {
            keeper.work();
        }
    }

    /// Thread `probe` is alive, and whether it has work in hand.
    pub fn pong(&self, probe: usize, has_work: bool) {
        self.host.pong(probe);
        if has_work {
            self.note();
        }
    }
}
