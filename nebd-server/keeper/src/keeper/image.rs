//! What a keeper leaves to its own next image over exec: descriptors by number, listed in a memfd.
//!
//! Lines of words; a line that starts with an unknown word is skipped, so that an older keeper can
//! follow a newer one.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nebd_abi::Generation;

use super::config::KeeperError;
use super::process::{Process, memfd};
use crate::sys;

/// Names the memfd's number.
pub(crate) const VARIABLE: &str = "NEBD_KEEPER_IMAGE";

/// Collects the state.
#[derive(Default)]
pub(crate) struct Writer<'a> {
    text: String,
    fds: Vec<BorrowedFd<'a>>,
}

impl<'a> Writer<'a> {
    /// A descriptor with a role, and a detail.
    pub(crate) fn fd(&mut self, role: &str, detail: &str, fd: impl Into<BorrowedFd<'a>>) {
        let fd = fd.into();
        self.text.push_str(&format!("fd {} {role} {detail}\n", fd.as_raw_fd()));
        self.fds.push(fd);
    }

    /// The program that servers were switched to.
    pub(crate) fn binary(&mut self, path: &Path) {
        self.text.push_str(&format!("binary {}\n", path.display()));
    }

    /// A candidate.
    pub(crate) fn candidate(&mut self, process: &'a Process, seen: Generation) {
        let detail = format!("{} {} 0 {}", process.pid, process.start, seen.0);
        self.fd("candidate", &detail, process.pidfd.as_fd());
    }

    /// A process.
    pub(crate) fn process(&mut self, role: &str, process: &'a Process, ready: bool) {
        let detail = format!("{} {} {}", process.pid, process.start, u8::from(ready));
        self.fd(role, &detail, process.pidfd.as_fd());
    }

    /// Leaves everything open over exec and calls `exec`; if that returns, all is as before.
    pub(crate) fn hand_over(self, exec: impl FnOnce(RawFd) -> std::io::Error) -> std::io::Error {
        let list = match memfd("nebd-keeper-image", self.text.as_bytes()) {
            Ok(list) => list,
            Err(error) => return error,
        };
        let all = || self.fds.iter().copied().chain([list.as_fd()]);
        let opened = all().try_for_each(|fd| sys::set_inheritable(fd, true));
        let error = match opened {
            Ok(()) => exec(list.as_raw_fd()),
            Err(error) => error,
        };
        for fd in all() {
            if let Err(error) = sys::set_inheritable(fd, false) {
                tracing::error!(%error, "a descriptor stays open over exec");
            }
        }
        error
    }
}

/// A descriptor of the earlier image.
pub(crate) struct Entry {
    pub(crate) role: String,
    pub(crate) detail: String,
    pub(crate) fd: OwnedFd,
}

impl Entry {
    /// The process that [`Writer::process`] wrote, and whether it was ready.
    pub(crate) fn process(self) -> Option<(Process, bool)> {
        let mut words = self.detail.split(' ');
        let pid = words.next()?.parse().ok()?;
        let start = words.next()?.parse().ok()?;
        let ready = words.next()? == "1";
        Some((Process { pid, pidfd: self.fd, start, by_watchdog: false }, ready))
    }

    /// The candidate that [`Writer::candidate`] wrote, and the generation before it.
    pub(crate) fn candidate(self) -> Option<(Process, Generation)> {
        let seen = self.detail.split(' ').nth(3)?.parse().ok()?;
        self.process().map(|(process, _)| (process, Generation(seen)))
    }
}

/// What the earlier image of this process left.
pub(crate) struct Image {
    pub(crate) entries: Vec<Entry>,
    pub(crate) binary: Option<PathBuf>,
}

/// Reads it; `None` if there was no earlier image.
pub(crate) fn read() -> Result<Option<Image>, KeeperError> {
    let Some(number) = std::env::var_os(VARIABLE) else { return Ok(None) };
    let number = number.to_str().and_then(|n| n.parse::<RawFd>().ok());
    let number = number.ok_or(KeeperError::Image { what: "its memfd's number" })?;
    let mut taken = sys::take_once(&[number]).map_err(KeeperError::system("take the memfd"))?;
    let fd = taken.pop().ok_or(KeeperError::Image { what: "its memfd" })?;
    let mut file = File::from(fd);
    let mut text = String::new();
    file.rewind()
        .and_then(|()| file.read_to_string(&mut text))
        .map_err(KeeperError::system("read the earlier image's state"))?;
    let mut lines = Vec::new();
    let binary = text.lines().find_map(|line| line.strip_prefix("binary ")).map(PathBuf::from);
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        let (Some("fd"), Some(number), Some(role)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let number = number.parse().map_err(|_| KeeperError::Image { what: "a number" })?;
        lines.push((number, role.to_owned(), words.next().unwrap_or("").to_owned()));
    }
    let numbers: Vec<RawFd> = lines.iter().map(|(number, ..)| *number).collect();
    let fds = sys::take(&numbers).map_err(KeeperError::system("take over the descriptors"))?;
    let entry = |((_, role, detail), fd)| Entry { role, detail, fd };
    Ok(Some(Image { entries: lines.into_iter().zip(fds).map(entry).collect(), binary }))
}
