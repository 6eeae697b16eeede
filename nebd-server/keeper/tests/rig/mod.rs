//! A keeper with fake servers in a temporary directory.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// Far longer than anything here takes; only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Rig {
    pub dir: TempDir,
    pub keeper: Child,
    pub options: Vec<String>,
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    pub pid: i32,
    pub generation: u32,
    /// Of the server before.
    pub cause: String,
    pub standby: bool,
    pub predecessor: bool,
    pub store: BTreeMap<String, String>,
}

pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Rig {
    pub fn start(options: &[&str]) -> Rig {
        Rig::start_in(tempfile::tempdir().unwrap(), options)
    }

    pub fn start_in(dir: TempDir, options: &[&str]) -> Rig {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        let keeper = spawn(&dir, &options, Stdio::inherit());
        Rig { dir, keeper, options }
    }

    /// A keeper that has a child which ended before it began: that of an image before it.
    pub fn start_with_a_dead_child() -> Rig {
        use std::os::unix::process::CommandExt;
        let dir = tempfile::tempdir().unwrap();
        let mut command = command(&dir, &[], Stdio::inherit());
        // SAFETY: the process that forks has one thread, and is about to become the keeper.
        let bear = || match unsafe { libc::fork() } {
            // SAFETY: in the child; ends it.
            0 => unsafe { libc::_exit(0) },
            pid if pid > 0 => {
                let options = libc::WEXITED | libc::WNOWAIT;
                // SAFETY: the kernel fills in the structure, for which all zeros are valid.
                unsafe { libc::waitid(libc::P_PID, pid as _, &mut std::mem::zeroed(), options) };
                Ok(())
            }
            _ => Err(io::Error::last_os_error()),
        };
        // SAFETY: system calls only.
        unsafe { command.pre_exec(bear) };
        let keeper = command.spawn().unwrap();
        Rig { dir, keeper, options: Vec::new() }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nebd.sock")
    }

    pub fn admin(&self) -> PathBuf {
        self.dir.path().join("nebd.sock.admin")
    }

    /// Makes the servers to come fail in this way.
    pub fn write_state(&self, file: &str, contents: &str) {
        std::fs::create_dir_all(self.state_dir()).unwrap();
        std::fs::write(self.state_dir().join(file), contents).unwrap();
    }

    pub fn remove_state(&self, file: &str) {
        std::fs::remove_file(self.state_dir().join(file)).unwrap();
    }

    pub fn second_keeper(&self) -> Child {
        spawn(&self.dir, &self.options, Stdio::piped())
    }

    /// One attempt; an error if the server died on it.
    pub fn ask(&self, line: &str) -> io::Result<String> {
        ask_at(&self.admin(), line)
    }

    /// This very server or candidate.
    pub fn ask_pid(&self, pid: i32, line: &str) -> io::Result<String> {
        ask_at(&self.state_dir().join(format!("{pid}.sock")), line)
    }

    pub fn tell_pid(&self, pid: i32, line: &str) {
        assert_eq!(self.ask_pid(pid, line).unwrap(), "ok", "{line}");
    }

    /// Of this very server.
    pub fn info_of(&self, pid: i32) -> Info {
        parse_info(&self.ask_pid(pid, "info").unwrap())
    }

    /// A candidate of this server that has all it needs.
    pub fn candidate(&self, server: i32, program: &str) -> i32 {
        let pid = self.ask_pid(server, format!("candidate {program}").trim()).unwrap();
        let pid = pid.parse().unwrap_or_else(|_| panic!("{pid}"));
        eventually("a candidate", || self.ask_pid(pid, "info").ok());
        pid
    }

    /// Nobody whom the keeper started met a server or a candidate that was alive.
    pub fn assert_no_rivals(&self) {
        let rivals = std::fs::read_to_string(self.state_dir().join("rivals"));
        assert!(rivals.is_err(), "{rivals:?}");
    }

    /// Children of the keeper that ended and were not taken note of.
    pub fn zombies(&self) -> Vec<i32> {
        let children = format!("/proc/{0}/task/{0}/children", self.keeper_pid());
        let children = std::fs::read_to_string(children).unwrap();
        let pids = children.split_ascii_whitespace().map(|pid| pid.parse().unwrap());
        pids.filter(|pid| !is_alive(*pid)).collect()
    }

    /// Whether the keeper's record names it, and as what.
    pub fn role(&self, pid: i32) -> Option<String> {
        let record = std::fs::read_to_string(self.state_dir().join("children")).unwrap();
        record.lines().find_map(|line| {
            let (role, rest) = line.split_once(' ')?;
            (rest.split(' ').next() == Some(&pid.to_string())).then(|| role.to_owned())
        })
    }

    pub fn tell(&self, line: &str) {
        assert_eq!(self.ask(line).unwrap(), "ok", "{line}");
    }

    /// A server that will not answer this.
    pub fn tell_last(&self, line: &str) {
        assert!(self.ask(line).is_err(), "{line}");
    }

    /// Of whichever server is there, as soon as one is.
    pub fn info(&self) -> Info {
        let text = eventually("a server answers", || self.ask("info").ok());
        parse_info(&text)
    }

    /// Of the server after `before`.
    pub fn successor(&self, before: &Info) -> Info {
        eventually("a successor", || Some(self.info()).filter(|info| info.pid != before.pid))
    }

    /// The pid of a standby that knows the whole store, other than `not`.
    pub fn standby(&self, not: &[i32]) -> i32 {
        eventually("a standby in sync", || {
            let text = std::fs::read_to_string(self.state_dir().join("synced")).ok()?;
            let pid = text.split(' ').next()?.parse().ok()?;
            (!not.contains(&pid) && is_alive(pid)).then_some(pid)
        })
    }

    pub fn pid_file(&self, name: &str) -> Option<i32> {
        std::fs::read_to_string(self.state_dir().join(name)).ok()?.trim().parse().ok()
    }

    pub fn keeper_pid(&self) -> i32 {
        self.keeper.id() as i32
    }

    /// Ends the keeper as an operator does.
    pub fn stop(&mut self) -> ExitStatus {
        signal(self.keeper_pid(), Signal::TERM);
        self.keeper.wait().unwrap()
    }

    /// The keeper dies, and another is started.
    pub fn replace_killed_keeper(&mut self) {
        self.kill_keeper();
        self.replace_dead_keeper();
    }

    pub fn replace_dead_keeper(&mut self) {
        self.keeper = spawn(&self.dir, &self.options, Stdio::inherit());
    }

    pub fn kill_keeper(&mut self) {
        signal(self.keeper_pid(), Signal::KILL);
        self.keeper.wait().unwrap();
    }
}

fn ask_at(path: &Path, line: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    match reply.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(reply),
    }
}

fn parse_info(text: &str) -> Info {
    let mut fields = BTreeMap::new();
    let mut store = BTreeMap::new();
    for word in text.split(' ') {
        match (word.split_once('='), word.split_once(':')) {
            (Some((key, value)), _) => drop(fields.insert(key, value)),
            (_, Some((name, value))) => drop(store.insert(name.to_owned(), value.to_owned())),
            _ => panic!("{text}"),
        }
    }
    Info {
        pid: fields["pid"].parse().unwrap(),
        generation: fields["generation"].parse().unwrap(),
        cause: fields["cause"].to_owned(),
        standby: fields["standby"] == "true",
        predecessor: fields["predecessor"] == "true",
        store,
    }
}

fn spawn(dir: &TempDir, options: &[String], stderr: Stdio) -> Child {
    command(dir, options, stderr).spawn().unwrap()
}

fn command(dir: &TempDir, options: &[String], stderr: Stdio) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nebd-keeper-fake"));
    command
        .arg("keeper")
        .arg(dir.path().join("nebd.sock"))
        .arg(dir.path().join("state"))
        .args(options)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stderr(stderr);
    command
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.keeper.try_wait().is_ok_and(|status| status.is_none()) {
            self.stop();
        }
        // Whoever outlived a keeper that a test killed.
        let record = std::fs::read_to_string(self.state_dir().join("children"));
        for line in record.unwrap_or_default().lines().skip(1) {
            if let Some(pid) = line.split(' ').nth(1).and_then(|pid| pid.parse().ok())
                && is_alive(pid)
            {
                signal(pid, Signal::KILL);
            }
        }
    }
}

pub fn signal(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Exists and is no zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

/// Open descriptors of a process.
pub fn count_fds(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// How often a process has gone to sleep.
pub fn count_sleeps(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches"));
    line.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}
