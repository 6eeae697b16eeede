//! How a server dies.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use nix::sys::signal::Signal;

use super::takeover::{ACTIONS, KEEPER_ACTIONS};

/// How a server dies, or is made to look dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kill {
    /// By a signal. SIGSTOP counts: the keeper notices, and kills what is stopped.
    Signal(Signal),
    /// Stopped, and continued before anybody acts: nobody dies.
    StopAndContinue,
    /// Not at all: another server takes over as planned.
    Takeover,
    /// The same, by this binary.
    TakeoverBy(PathBuf),
    /// At a point in its code. The server that runs is killed first, for the list of failpoints is
    /// read at start.
    Failpoint {
        /// The point.
        point: String,
        /// `kill`, `segv`, `abort`, `hang` or `stop`; at a point of a takeover also
        /// `keeper-kill`, `keeper-segv` or `keeper-stop`.
        action: String,
    },
}

impl Kill {
    /// SIGKILL.
    pub const SIGKILL: Kill = Kill::Signal(Signal::SIGKILL);
    /// SIGSEGV, with a core dump where they are on.
    pub const SIGSEGV: Kill = Kill::Signal(Signal::SIGSEGV);
    /// SIGABRT.
    pub const SIGABRT: Kill = Kill::Signal(Signal::SIGABRT);
    /// SIGSTOP.
    pub const SIGSTOP: Kill = Kill::Signal(Signal::SIGSTOP);

    /// Whether it is a planned takeover, or a point of one.
    pub(super) fn is_takeover(&self) -> bool {
        match self {
            Kill::Takeover | Kill::TakeoverBy(_) => true,
            Kill::Failpoint { point, .. } => is_of_takeover(point),
            _ => false,
        }
    }

    /// Whether somebody dies of SIGSEGV: with a core dump, where they are on.
    pub(super) fn dumps_core(&self) -> bool {
        match self {
            Kill::Failpoint { action, .. } => action.ends_with("segv"),
            kill => *kill == Kill::SIGSEGV,
        }
    }

    /// A failpoint.
    pub fn at(point: &str, action: &str) -> Kill {
        Kill::Failpoint { point: point.into(), action: action.into() }
    }
}

fn is_of_takeover(point: &str) -> bool {
    point.starts_with("owner-") || point.starts_with("candidate-")
}

/// Up to how often a server passes this point soon after its start.
pub(super) fn passages(point: &str) -> u64 {
    match point {
        "after-pop" | "before-submit" | "after-submit" | "before-publish" | "after-publish" => 200,
        "reissue" => 8,
        // At each message of a hypervisor.
        point if point.starts_with("vhost-") => 24,
        _ => 1,
    }
}

/// A text names no way to die.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of sigkill, sigsegv, sigabrt, sigstop, stop-cont, planned, POINT:ACTION")]
pub struct KillParseError(String);

impl FromStr for Kill {
    type Err = KillParseError;

    fn from_str(text: &str) -> Result<Kill, KillParseError> {
        Ok(match text {
            "sigkill" => Kill::SIGKILL,
            "sigsegv" => Kill::SIGSEGV,
            "sigabrt" => Kill::SIGABRT,
            "sigstop" => Kill::SIGSTOP,
            "stop-cont" => Kill::StopAndContinue,
            "planned" => Kill::Takeover,
            _ => match text.split_once(':') {
                Some((point, action)) if ACTIONS.contains(&action) => Kill::at(point, action),
                Some((point, action))
                    if KEEPER_ACTIONS.contains(&action) && is_of_takeover(point) =>
                {
                    Kill::at(point, action)
                }
                _ => return Err(KillParseError(text.into())),
            },
        })
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kill::Signal(signal) => f.write_str(&signal.as_str().to_lowercase()),
            Kill::StopAndContinue => f.write_str("stop-cont"),
            Kill::Takeover | Kill::TakeoverBy(_) => f.write_str("planned"),
            Kill::Failpoint { point, action } => write!(f, "{point}:{action}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read_back() {
        let signals = ["sigkill", "sigsegv", "sigabrt", "sigstop", "stop-cont", "planned"];
        for text in signals.into_iter().chain(["after-pop:hang", "owner-ready:keeper-kill"]) {
            assert_eq!(text.parse::<Kill>().unwrap().to_string(), text);
        }
        assert!("after-pop:keeper-kill".parse::<Kill>().is_err(), "nobody would start it again");
        assert!("after-pop:dance".parse::<Kill>().is_err());
    }
}
