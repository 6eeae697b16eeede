//! What the keeper does for a server and systemd does not: there the server sees to it itself.
//!
//! ```text
//!  start   the unit's note of how the last server ended ─► host page
//!  claim   nebd.host, nebd.lock ─► store, barrier ─► claim ─► nebd.pidfd ─► store
//!  serve   probes answered ─► WATCHDOG=1                    (if the unit has WatchdogSec=)
//! ```
//!
//! A successor finds all of it in `LISTEN_FDNAMES`, as if a keeper had passed it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nebd_abi::host::{DeathCause, HostPage};
use nebd_keeper::names;
use nebd_keeper::notify::Notifier;
use rustix::event::EventfdFlags;
use rustix::process::PidfdFlags;

use crate::holdings::LOCK;

/// The file in which the unit's `ExecStopPost=` leaves `$SERVICE_RESULT $EXIT_CODE $EXIT_STATUS`,
/// anew before each start but the first. It is not the server's to remove.
const LAST_EXIT_VARIABLE: &str = "NEBD_LAST_EXIT";
/// The unit's `WatchdogSec=`, in microseconds.
const WATCHDOG_VARIABLE: &str = "WATCHDOG_USEC";
/// Longest wait for systemd to confirm that it holds what it was given.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(30);
/// Signs of life in each `WatchdogSec=`: one may come late.
const SIGNS_OF_LIFE: u32 = 3;

/// systemd, or whatever else speaks its protocol and is no keeper of ours.
pub struct ServiceManager {
    notifier: Arc<Notifier>,
}

impl ServiceManager {
    /// `None` under a keeper, and alone.
    pub fn of(notifier: Option<Arc<Notifier>>) -> Option<ServiceManager> {
        let notifier = notifier.filter(|notifier| !notifier.is_keeper())?;
        Some(ServiceManager { notifier })
    }

    /// Notes on the host page how the owner of its generation ended, if the unit left word. Not for
    /// candidates: their predecessor lives.
    pub fn record_death(&self, host: &HostPage) {
        let Some(path) = std::env::var_os(LAST_EXIT_VARIABLE).map(PathBuf::from) else { return };
        let Ok(text) = std::fs::read_to_string(&path) else { return };
        if host.death_of(host.generation()) == DeathCause::Unknown {
            host.record_death(cause(&text));
        }
    }

    /// Before the first claim: a host page that nobody else has yet, and the lock on the state
    /// directory, which from now on is held by whoever holds the store.
    pub fn keep(&self, host: &HostPage, lock: BorrowedFd<'_>) -> io::Result<()> {
        self.notifier.store(names::HOST, host.fd())?;
        self.notifier.store(LOCK, lock)?;
        self.notifier.barrier(BARRIER_TIMEOUT)
    }

    /// After each claim: this process is what a successor has to see dead. Until systemd has heard
    /// of it, its end of everything in the unit's cgroup is all there is.
    pub fn note_owner(&self) -> io::Result<()> {
        let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        self.notifier.store(names::PREDECESSOR, own.as_fd())
    }

    /// The doorbell of the probes, where no keeper has passed one; `None` if the unit wants no signs
    /// of life.
    pub fn probe(&self) -> io::Result<Option<OwnedFd>> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        watchdog_interval().map(|_| Ok(rustix::event::eventfd(0, flags)?)).transpose()
    }

    /// Gives signs of life as long as every probed thread gives some.
    ///
    /// `WATCHDOG_PID` is not looked at: after a planned takeover it names the server before.
    pub fn give_signs_of_life(self, host: &Arc<HostPage>, probe: OwnedFd) -> io::Result<()> {
        let Some(interval) = watchdog_interval() else { return Ok(()) };
        let (host, notifier) = (host.clone(), self.notifier);
        let give = move || loop {
            let ping = host.ping();
            // A counter that is full was not read: the silence tells.
            let _ = rustix::io::write(&probe, &1_u64.to_ne_bytes());
            std::thread::sleep(interval / SIGNS_OF_LIFE);
            match host.silent_probes(ping) {
                Some(0) => notifier.alive(),
                silent => tracing::warn!(silent, "threads do not answer; no sign of life is given"),
            }
        };
        std::thread::Builder::new().name("nebd-watchdog".into()).spawn(give).map(drop)
    }
}

fn watchdog_interval() -> Option<Duration> {
    std::env::var(WATCHDOG_VARIABLE).ok()?.parse().ok().map(Duration::from_micros)
}

/// What `$SERVICE_RESULT $EXIT_CODE $EXIT_STATUS` say.
fn cause(text: &str) -> DeathCause {
    let mut words = text.split_whitespace();
    let (result, code, status) = (words.next(), words.next(), words.next());
    match (result, code, status) {
        (Some("watchdog"), ..) => DeathCause::Watchdog,
        (_, Some("exited"), _) => DeathCause::Exit,
        (
            _,
            Some("killed" | "dumped"),
            Some("SEGV" | "BUS" | "ABRT" | "ILL" | "FPE" | "TRAP" | "SYS"),
        ) => DeathCause::Crash,
        (_, Some("killed" | "dumped"), _) => DeathCause::Killed,
        _ => DeathCause::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_as_systemd_tells_them() {
        assert_eq!(cause("signal killed KILL\n"), DeathCause::Killed);
        assert_eq!(cause("success killed TERM\n"), DeathCause::Killed);
        assert_eq!(cause("core-dump dumped SEGV\n"), DeathCause::Crash);
        assert_eq!(cause("signal killed ABRT\n"), DeathCause::Crash);
        assert_eq!(cause("watchdog killed KILL\n"), DeathCause::Watchdog);
        assert_eq!(cause("exit-code exited 1\n"), DeathCause::Exit);
        assert_eq!(cause("oom-kill killed KILL\n"), DeathCause::Killed);
        assert_eq!(cause(""), DeathCause::Unknown);
    }
}
