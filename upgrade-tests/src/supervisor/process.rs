//! A child process that does not outlive its guard, and its log.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A child process, ended when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    is_ended: bool,
}

/// Bytes of the log's end that are shown.
const LOG_TAIL_BYTES: usize = 6000;

impl Process {
    /// Starts `command` with its output at the end of the file `log`, in a process group of its own.
    pub fn start(mut command: Command, log: &Path) -> io::Result<Process> {
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        Ok(Process { child: command.spawn()?, log: log.into(), is_ended: false })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has ended by itself; false if it has not within `patience`.
    pub fn wait(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while !self.is_ended {
            self.is_ended = matches!(self.child.try_wait(), Ok(Some(_)));
            if !self.is_ended {
                if Instant::now() > deadline {
                    return false;
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        }
        true
    }

    /// The end of what it, and its children, wrote.
    pub fn log_tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(LOG_TAIL_BYTES)..];
        without_colours(&String::from_utf8_lossy(tail))
    }

    /// Asks it to end, waits, then makes it end.
    pub fn end(&mut self, patience: Duration) {
        if self.is_ended {
            return;
        }
        let pid = Pid::from_raw(self.child.id() as i32);
        if !patience.is_zero() {
            // A signal that cannot be sent means that it has ended already; `wait` tells.
            let _ = kill(pid, Signal::SIGTERM);
        }
        if self.wait(patience) {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.is_ended = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// The text without the escape sequences that colour a log.
fn without_colours(text: &str) -> String {
    let mut pieces = text.split('\x1b');
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let end = piece.find(|c: char| c.is_ascii_alphabetic()).map_or(piece.len(), |at| at + 1);
        plain.push_str(&piece[end..]);
    }
    plain
}

/// Raises the soft limit of core files to the hard one, for this process and its children.
pub(super) fn allow_core_dumps() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_CORE)?;
    setrlimit(Resource::RLIMIT_CORE, most, most)
}

#[cfg(test)]
mod tests {
    use super::without_colours;

    #[test]
    fn colours_go_and_the_text_stays() {
        assert_eq!(
            without_colours("\x1b[2m10:00\x1b[0m \x1b[32m INFO\x1b[0m hello"),
            "10:00  INFO hello"
        );
    }
}
