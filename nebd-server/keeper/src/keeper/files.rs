//! The state directory: lock, pid files, and the record of the children.
//!
//! `server.pid` and `keeper.pid` hold one number, for scripts. `children` is for the next keeper:
//! start times tell a server of ours from a stranger that got its pid.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FlockOperation;

use super::config::{KeeperConfig, KeeperError};

/// Pid of the keeper.
pub(crate) const KEEPER_PID: &str = "keeper.pid";
/// Pid of the serving server.
pub(crate) const SERVER_PID: &str = "server.pid";
/// The record of the children.
pub(crate) const CHILDREN: &str = "children";
const LOCK: &str = "keeper.lock";

/// Makes the directories that are missing.
pub(crate) fn create_directories(config: &KeeperConfig) -> Result<(), KeeperError> {
    let create = |path: &Path, mode| {
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .map_err(KeeperError::file("create the directory", path))
    };
    create(&config.state_dir, 0o700)?;
    for socket in [&config.socket, &config.admin_socket] {
        if let Some(parent) = socket.parent().filter(|p| !p.as_os_str().is_empty()) {
            create(parent, 0o755)?;
        }
    }
    Ok(())
}

/// Becomes the one keeper of the state directory, for as long as the descriptor lives.
pub(crate) fn lock(state_dir: &Path) -> Result<File, KeeperError> {
    let path = state_dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(&path)
        .map_err(KeeperError::file("open", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let _unreadable = file.read_to_string(&mut text);
            let pid = text.trim().parse().unwrap_or(0);
            return Err(KeeperError::Locked { path: state_dir.to_owned(), pid });
        }
        Err(errno) => return Err(KeeperError::file("lock", &path)(errno)),
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(KeeperError::file("write", &path))?;
    Ok(file)
}

/// Replaces a file at once: readers see the old contents or the new.
pub(crate) fn write(state_dir: &Path, name: &str, contents: &str) -> Result<(), KeeperError> {
    let path = state_dir.join(name);
    let draft = state_dir.join(format!("{name}.new"));
    fs::write(&draft, contents)
        .and_then(|()| fs::rename(&draft, &path))
        .map_err(KeeperError::file("write", &path))
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "a file could not be removed");
        }
        _ => {}
    }
}

/// What a child is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It serves, or was told to.
    Serving,
    /// It may have taken over.
    Candidate,
    /// Standing by, or about to exit.
    Other,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Serving => "serving",
            Role::Candidate => "candidate",
            Role::Other => "other",
        }
    }
}

/// A line of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) role: Role,
    pub(crate) pid: i32,
    /// In clock ticks since boot.
    pub(crate) start: u64,
}

/// Writes down which children exist.
pub(crate) fn write_children(state_dir: &Path, records: &[Record]) -> Result<(), KeeperError> {
    let mut text = format!("boot {}\n", boot_id());
    for record in records {
        text.push_str(&format!("{} {} {}\n", record.role.word(), record.pid, record.start));
    }
    let path = state_dir.join(CHILDREN);
    overwrite(&path, text).map_err(KeeperError::file("write", &path))
}

/// Writes a small file in place, in one call that a death does not split. A rename would have to
/// wait for the file that it replaces to leave the disk, and a standby waits for us.
fn overwrite(path: &Path, mut text: String) -> io::Result<()> {
    // The end of longer contents is overwritten, too.
    text.push_str(&"\n".repeat(text.len().next_multiple_of(1024) - text.len()));
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(path)?;
    file.write_all_at(text.as_bytes(), 0)?;
    if file.metadata()?.len() > text.len() as u64 {
        file.set_len(text.len() as u64)?;
    }
    Ok(())
}

/// The children of the keeper before, if it ran since this boot.
pub(crate) fn read_children(state_dir: &Path) -> Vec<Record> {
    let text = fs::read_to_string(state_dir.join(CHILDREN)).unwrap_or_default();
    let mut lines = text.lines();
    if lines.next() != Some(&format!("boot {}", boot_id())) {
        return Vec::new();
    }
    let record = |line: &str| {
        let mut words = line.split(' ');
        let word = words.next()?;
        let known = [Role::Serving, Role::Candidate].into_iter().find(|r| r.word() == word);
        let role = known.unwrap_or(Role::Other);
        Some(Record { role, pid: words.next()?.parse().ok()?, start: words.next()?.parse().ok()? })
    };
    lines.filter_map(record).collect()
}

fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// When a process started, in clock ticks since boot; with the pid it names one process for good.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; field 22 of all is the 20th after it.
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The wait status of a process that has ended but was not reaped yet.
pub(crate) fn zombie_status(pid: i32, start: u64) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let same = fields.get(19)?.parse() == Ok(start);
    // Field 52 of all.
    (same && fields[0] == "Z").then(|| fields.get(49)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_read_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let records = [
            Record { role: Role::Serving, pid: 17, start: 99 },
            Record { role: Role::Candidate, pid: 18, start: 100 },
            Record { role: Role::Other, pid: 19, start: 100 },
        ];
        write_children(directory.path(), &records).unwrap();
        assert_eq!(read_children(directory.path()), records);
        let text = fs::read_to_string(directory.path().join(CHILDREN)).unwrap();
        fs::write(directory.path().join(CHILDREN), text.replace("boot ", "boot x")).unwrap();
        assert_eq!(read_children(directory.path()), []);
    }

    #[test]
    fn this_process_has_started() {
        assert!(start_time(std::process::id() as i32).unwrap() > 0);
        assert_eq!(start_time(i32::MAX), None);
    }

    #[test]
    fn one_keeper_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let first = lock(directory.path()).unwrap();
        let error = lock(directory.path()).unwrap_err();
        let pid = std::process::id();
        assert!(matches!(error, KeeperError::Locked { pid: holder, .. } if holder == pid));
        drop(first);
        lock(directory.path()).unwrap();
    }
}
