//! How long requests waited when the server changed, written to the region for `nebdctl status`.
//!
//! The blackout of a takeover is the time from the last completion before the first one under the
//! new epoch, or from when the oldest waiting request began to wait, whichever is later, to that
//! first one. The hot path pays one clock read a batch and one comparison a completion.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, Release};

use nebd_abi::{Epoch, Generation};

use crate::core::Core;

/// What was seen of servers so far.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Highest generation seen in any way.
    generation: AtomicU32,
    /// Highest generation whose blackout was measured.
    measured: AtomicU32,
}

impl Meter {
    /// A server answered on the control socket.
    pub(crate) fn saw_generation(&self, core: &Core, generation: Generation) {
        let before = self.generation.fetch_max(generation.0, Relaxed);
        if before == 0 {
            // The first server took nothing over.
            self.measured.fetch_max(generation.0, Relaxed);
        } else if before < generation.0 {
            core.region.header().takeovers.fetch_add(1, Relaxed);
        }
    }

    /// A completion came under an epoch that its queue had not seen before.
    pub(crate) fn saw_epoch(&self, core: &Core, epoch: Epoch, now_ns: u64) {
        let generation = Generation(epoch.minor);
        self.saw_generation(core, generation);
        if self.measured.fetch_max(generation.0, Relaxed) >= generation.0 {
            return;
        }
        let stamps = || core.queues.iter().map(|queue| queue.stamps());
        let completed_ns = stamps().map(|(completed_ns, _)| completed_ns).max().unwrap_or(now_ns);
        let waiting_ns = stamps().filter_map(|(_, waiting_ns)| waiting_ns).min().unwrap_or(now_ns);
        let blackout_us = now_ns.saturating_sub(completed_ns.max(waiting_ns)) / 1000;
        let header = core.region.header();
        header.blackout_last_us.store(blackout_us, Relaxed);
        header.blackout_worst_us.fetch_max(blackout_us, Relaxed);
        // Last: who finds it finds the rest.
        header.blackout_generation.store(generation.0, Release);
    }
}
