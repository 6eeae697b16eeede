//! Why guests cannot be tested. What they find wrong is no such reason: it is the result.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::supervisor::{AdminError, HostError};

/// Why guests cannot be tested.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The server under test cannot be handled.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A file is not where it should be.
    #[error("{what} is not at {}: {hint}", path.display())]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// How to come by it.
        hint: &'static str,
    },
    /// The guest's file system cannot be put together.
    #[error("cannot put the guest together")]
    Image(#[source] anyhow::Error),
    /// Something did not happen.
    #[error("{waited_for} did not happen within {limit:?}\n{log}")]
    Late {
        /// What was waited for.
        waited_for: String,
        /// For how long.
        limit: Duration,
        /// What the guest, QEMU and the server said last.
        log: String,
    },
    /// A volume is not served to QEMU.
    #[error("nebdctl attach: {0}")]
    Attach(String),
    /// QEMU is gone.
    #[error("QEMU ended by itself\n{0}")]
    Gone(String),
    /// QEMU's monitor refused.
    #[error("QEMU's monitor: {0}")]
    Monitor(String),
    /// A signal has asked for the end.
    #[error("interrupted")]
    Interrupted,
}

impl From<AdminError> for GuestError {
    fn from(error: AdminError) -> GuestError {
        GuestError::Host(error.into())
    }
}

/// For `map_err`.
pub(super) fn system(action: &'static str) -> impl FnOnce(io::Error) -> GuestError {
    move |source| GuestError::System { action, source }
}
