//! What a process becomes when it claims the host's volumes.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nebd_abi::Generation;
use nebd_abi::host::DeathCause;

/// Set up long before, a server learns at its claim which generation it is. Nothing that bears the
/// generation is made before.
#[derive(Debug, Default)]
pub struct Tenure(OnceLock<(Generation, DeathCause, Instant)>);

impl Tenure {
    /// This process has claimed `generation`; its predecessor ended for this cause.
    pub fn begin(&self, generation: Generation, last_death: DeathCause) {
        // A second claim is impossible: the page grants one to a process.
        let _ = self.0.set((generation, last_death, Instant::now()));
    }

    /// The generation that was claimed; 0 before.
    pub fn generation(&self) -> Generation {
        self.0.get().map_or(Generation(0), |(generation, ..)| *generation)
    }

    /// How the predecessor ended.
    pub fn last_death(&self) -> DeathCause {
        self.0.get().map_or(DeathCause::Unknown, |(_, cause, _)| *cause)
    }

    /// For how long this process has been the server.
    pub fn duration(&self) -> Duration {
        self.0.get().map_or(Duration::ZERO, |(.., since)| since.elapsed())
    }
}
