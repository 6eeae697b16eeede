//! One server process: starting it, telling how it ended.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nebd_abi::host::DeathCause;
use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};

use super::config::{KeeperConfig, KeeperError};
use super::files;
use crate::notify::{KEEPER_VARIABLE, wait};
use crate::{names, sys};

/// Names longer than this together travel in a memfd; execve takes 128 KiB a string.
const NAMES_BYTES_MAX: usize = 96 << 10;

/// A server or a standby, ours or adopted.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// See [`files::start_time`].
    pub(crate) start: u64,
    /// We killed it because it hung.
    pub(crate) by_watchdog: bool,
}

/// How a process ended, for the host page and for people.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) cause: DeathCause,
    /// Exit status, if it exited.
    pub(crate) status: Option<i32>,
    /// Signal, if one ended it.
    pub(crate) signal: Option<i32>,
}

impl Process {
    /// The process with this pid, if it is the one that started at `start` (if that is known).
    pub(crate) fn open(pid: i32, start: Option<u64>) -> Option<Process> {
        let pidfd = rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // Looked at after the pidfd was opened: if it agrees now, the pidfd is of that process.
        let found = files::start_time(pid)?;
        if start.is_some_and(|start| start != found) {
            return None;
        }
        let process = Process { pid, pidfd, start: found, by_watchdog: false };
        (!process.is_dead()).then_some(process)
    }

    /// Starts a program with these descriptors; it waits until [`Starting::go`].
    pub(crate) fn start(program: &sys::Program, fds: &[BorrowedFd<'_>]) -> io::Result<Starting> {
        let flags = rustix::pipe::PipeFlags::CLOEXEC;
        let (read, gate) = rustix::pipe::pipe_with(flags)?;
        let ends = sys::Gate { read: read.as_fd(), write: gate.as_fd() };
        let pid = program.spawn(fds, ends)?;
        match Process::open(pid, None) {
            Some(process) => Ok(Starting { process, gate }),
            None => {
                // At the end of its gate it exits at once.
                drop(gate);
                let options = rustix::process::WaitOptions::empty();
                rustix::process::waitpid(Pid::from_raw(pid), options)?;
                Err(io::Error::from_raw_os_error(libc::EMFILE))
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => tracing::error!(pid = self.pid, %errno, "a signal could not be sent"),
        }
    }

    /// Whether it runs the program at `path`, as that is now; false if that cannot be told.
    pub(crate) fn runs(&self, path: &Path) -> bool {
        let file = |path: &Path| std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let running = file(Path::new(&format!("/proc/{}/exe", self.pid)));
        running.is_some() && running == file(path)
    }

    pub(crate) fn is_dead(&self) -> bool {
        wait(&self.pidfd, PollFlags::IN, Some(Duration::ZERO)).unwrap_or(false)
    }

    /// How it ended, if it has; reaps it if it is our child.
    pub(crate) fn end(&self) -> Option<End> {
        if !self.is_dead() {
            return None;
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
        let mut end = match status {
            Ok(Some(status)) => End::of(&status),
            _ => self.end_of_adopted(),
        };
        if self.by_watchdog {
            end.cause = DeathCause::Watchdog;
        }
        Some(end)
    }

    /// Its parent, init, is told. We see it as long as it is a zombie, and newer kernels keep it for
    /// holders of a pidfd.
    fn end_of_adopted(&self) -> End {
        let raw = files::zombie_status(self.pid, self.start);
        let raw = raw.or_else(|| sys::end_of_stranger(self.pidfd.as_fd()).ok().flatten());
        let unknown = End { cause: DeathCause::Unknown, status: None, signal: None };
        raw.map_or(unknown, End::of_raw)
    }

    /// Whether it was stopped (true) or continued (false) since this was last asked.
    pub(crate) fn stop_report(&self) -> Option<bool> {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::CONTINUED | WaitIdOptions::NOHANG;
        let mut report = None;
        while let Ok(Some(status)) =
            rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options)
        {
            report = Some(status.stopped() || status.trapped());
        }
        report
    }
}

impl End {
    fn of(status: &WaitIdStatus) -> End {
        End::from_parts(status.exit_status(), status.terminating_signal())
    }

    /// From the encoding of `wait(2)`.
    fn of_raw(raw: i32) -> End {
        match raw & 0x7f {
            0 => End::from_parts(Some((raw >> 8) & 0xff), None),
            signal => End::from_parts(None, Some(signal)),
        }
    }

    fn from_parts(status: Option<i32>, signal: Option<i32>) -> End {
        let crashes = [
            Signal::SEGV,
            Signal::BUS,
            Signal::ABORT,
            Signal::ILL,
            Signal::FPE,
            Signal::TRAP,
            Signal::SYS,
        ];
        let cause = match signal {
            None => DeathCause::Exit,
            Some(signal) if crashes.iter().any(|c| c.as_raw() == signal) => DeathCause::Crash,
            Some(_) => DeathCause::Killed,
        };
        End { cause, status, signal }
    }
}

/// Kills what a server of ours has named as its child, and not waited for: the pid is still its own.
pub(crate) fn kill_unknown(pid: i32) {
    let Some(pid) = Pid::from_raw(pid).filter(|pid| !pid.is_init()) else { return };
    match rustix::process::kill_process(pid, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(errno) => tracing::error!(?pid, %errno, "it could not be killed"),
    }
}

/// A child that exists, but does nothing before it was written down.
pub(crate) struct Starting {
    pub(crate) process: Process,
    gate: OwnedFd,
}

impl Starting {
    pub(crate) fn go(self) -> Process {
        if let Err(error) = File::from(self.gate).write_all(b"1") {
            tracing::error!(pid = self.process.pid, %error, "the child did not wait");
        }
        self.process
    }
}

/// The program of a server, `binary` if that is given and can be found. Descriptors will be passed
/// under these names; the memfd, if any, is to be passed before them.
pub(crate) fn server_program(
    config: &KeeperConfig,
    binary: Option<&Path>,
    names_of_fds: &[&str],
    standby: bool,
) -> Result<(sys::Program, Option<OwnedFd>), KeeperError> {
    let mut argv = config.server_argv.clone();
    argv[0] = match binary.filter(|path| path.is_file()) {
        Some(path) => path.into(),
        None => find_program(&argv[0])?.into(),
    };
    if standby {
        argv.push("--standby".into());
    }
    let mut list = names_of_fds.join(":");
    let mut count = names_of_fds.len();
    let mut long = None;
    if list.len() > NAMES_BYTES_MAX {
        let failed = KeeperError::system("write the names of the store");
        long = Some(memfd("nebd-names", list.as_bytes()).map_err(failed)?);
        list = names::NAMES.to_owned();
        count += 1;
    }
    let ours = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "NOTIFY_SOCKET"];
    let foreign = ["WATCHDOG_USEC", "WATCHDOG_PID", super::image::VARIABLE, KEEPER_VARIABLE];
    let mut env: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(name, _)| !ours.iter().chain(&foreign).any(|n| name == n))
        .collect();
    env.push(("LISTEN_FDS".into(), count.to_string().into()));
    env.push(("LISTEN_FDNAMES".into(), list.into()));
    env.push(("NOTIFY_SOCKET".into(), config.notify_socket().into()));
    env.push((KEEPER_VARIABLE.into(), "1".into()));
    let program = sys::Program::new(&argv, env).map_err(KeeperError::system("prepare a server"))?;
    Ok((program, long))
}

/// A memfd with these contents.
pub(crate) fn memfd(name: &str, contents: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(contents)?;
    Ok(file.into())
}

/// The file of a program: as it is if it has a slash, else from `PATH`.
pub(crate) fn find_program(program: &OsString) -> Result<PathBuf, KeeperError> {
    let path = PathBuf::from(program);
    let candidates: Vec<PathBuf> = if path.components().count() > 1 || path.is_absolute() {
        vec![path.clone()]
    } else {
        let directories = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&directories).map(|d| d.join(&path)).collect()
    };
    let found = candidates.into_iter().find(|p| p.is_file());
    found.ok_or(KeeperError::Program { program: path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_apart() {
        let cause = |raw| End::of_raw(raw).cause;
        assert_eq!(cause(0), DeathCause::Exit);
        assert_eq!(cause(3 << 8), DeathCause::Exit);
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
            assert_eq!(cause(signal), DeathCause::Killed);
        }
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGILL, libc::SIGFPE] {
            assert_eq!(cause(signal), DeathCause::Crash);
            assert_eq!(cause(signal | 0x80), DeathCause::Crash);
        }
        assert_eq!(cause(libc::SIGTRAP), DeathCause::Crash);
    }
}
