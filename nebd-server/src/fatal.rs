//! Fatal signals end the process at once.

use nix::sys::signal::{SigHandler, Signal, signal};

/// Takes the runtime's stack overflow handler away: it returns from a SIGSEGV that another process
/// sent, so that the first one would only be noticed by the second. A core dump, if the limit
/// allows one, is small: regions and volumes in memory are kept out of it.
pub fn die_at_once() {
    for fatal in [Signal::SIGSEGV, Signal::SIGBUS] {
        // SAFETY: the default action runs no code of ours, and no thread depends on the handler
        // that is replaced; stack guard pages still end the process.
        if let Err(error) = unsafe { signal(fatal, SigHandler::SigDfl) } {
            tracing::warn!(%error, %fatal, "cannot restore the default action");
        }
    }
}
