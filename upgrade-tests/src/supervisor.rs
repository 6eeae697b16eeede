//! A server under test: starts its keeper, kills it in every way, waits for its successor, and
//! leaves nothing behind.
//!
//! ```text
//!   Host::start ─► keeper ─► server ◄── kill, stop, failpoints
//!                    │          │
//!                    └──────────┴─► successor: another pid in state/server.pid
//! ```

mod admin;
mod process;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

pub use admin::{Admin, AdminError};
pub use process::Process;

/// Why the server under test cannot be handled.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A program is not where it should be.
    #[error(
        "{program} is not at {}: build it (cargo build -p {package} --features test-hooks), \
         or say where it is with --{program} or {variable}", path.display()
    )]
    Missing {
        /// Its name.
        program: &'static str,
        /// The package that makes it.
        package: &'static str,
        /// The environment variable that can name it.
        variable: &'static str,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Nobody serves, or nobody new.
    #[error("{waited_for} did not happen within {limit:?}; the end of the log:\n{log}")]
    Late {
        /// What was waited for.
        waited_for: &'static str,
        /// For how long.
        limit: Duration,
        /// The end of the keeper's and the server's log.
        log: String,
    },
    /// The admin API refused.
    #[error(transparent)]
    Admin(#[from] AdminError),
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError::System { action, source }
}

fn system_nix(action: &'static str) -> impl FnOnce(nix::Error) -> HostError {
    move |errno| HostError::System { action, source: errno.into() }
}

/// The programs under test.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `nebd-server`.
    pub server: PathBuf,
    /// `fence-store`.
    pub fence_store: PathBuf,
}

/// Environment variable that names `nebd-server`.
pub const SERVER_ENV: &str = "NEBD_SERVER_BIN";
/// Environment variable that names `fence-store`.
pub const FENCE_STORE_ENV: &str = "NEBD_FENCE_STORE_BIN";

impl Programs {
    /// As told, as the environment says, or beside this program.
    pub fn find(server: Option<PathBuf>, store: Option<PathBuf>) -> Result<Programs, HostError> {
        Ok(Programs {
            server: Programs::find_server(server)?,
            fence_store: find(store, "fence-store", "nebd-upgrade-tests", FENCE_STORE_ENV)?,
        })
    }

    /// The server alone.
    pub fn find_server(told: Option<PathBuf>) -> Result<PathBuf, HostError> {
        find(told, "nebd-server", "nebd-server", SERVER_ENV)
    }
}

fn find(
    told: Option<PathBuf>,
    program: &'static str,
    package: &'static str,
    variable: &'static str,
) -> Result<PathBuf, HostError> {
    let told = told.or_else(|| std::env::var_os(variable).map(PathBuf::from));
    let path = match told {
        Some(path) => path,
        None => {
            let mut dir = std::env::current_exe().map_err(system("find this program"))?;
            dir.pop();
            if dir.ends_with("deps") {
                dir.pop(); // a test: its programs are one up
            }
            dir.join(program)
        }
    };
    if !path.is_file() {
        return Err(HostError::Missing { program, package, variable, path });
    }
    Ok(path)
}

/// How a host is set up.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// `nebd-server`.
    pub server: PathBuf,
    /// Keep a warm standby.
    pub standby: bool,
    /// After how long a hung server is killed, in milliseconds.
    pub hang_timeout_ms: u64,
    /// `auto`, `io_uring` or `threads`.
    pub file_engine: &'static str,
    /// Shard threads; 0 for one a core.
    pub shards: u32,
    /// Environment of the keeper and its servers.
    pub environment: Vec<(String, String)>,
    /// How long a step of a planned takeover may take, in milliseconds.
    pub step_timeout_ms: u64,
    /// Let a crash write a core dump (into the temporary directory).
    pub core_dumps: bool,
}

impl HostConfig {
    /// The defaults of the harness for this server.
    pub fn new(server: impl Into<PathBuf>) -> HostConfig {
        HostConfig {
            server: server.into(),
            standby: false,
            hang_timeout_ms: 1000,
            file_engine: "auto",
            shards: 0,
            environment: Vec::new(),
            step_timeout_ms: 60_000,
            core_dumps: false,
        }
    }

    /// With a variable in the environment.
    pub fn with_env(mut self, name: &str, value: impl ToString) -> HostConfig {
        self.environment.push((name.into(), value.to_string()));
        self
    }

    fn toml(&self) -> String {
        format!(
            "shards = {}\n[file]\nengine = \"{}\"\n[keeper]\nstandby = {}\nhang_timeout_ms = {}\n\
             backoff_min_ms = 1\nbackoff_max_ms = 200\n[upgrade]\nstep_timeout_ms = {}\n",
            self.shards, self.file_engine, self.standby, self.hang_timeout_ms, self.step_timeout_ms
        )
    }
}

/// A keeper with its server, in a temporary directory.
pub struct Host {
    config: HostConfig,
    keeper: Process,
    socket: PathBuf,
    state_dir: PathBuf,
    /// Last, so that the processes are gone before their directory is.
    _dir: tempfile::TempDir,
}

/// How long anything may take before it is called late.
pub const PATIENCE: Duration = Duration::from_secs(30);

impl Host {
    /// Starts a keeper and waits until its server serves.
    pub fn start(config: &HostConfig) -> Result<Host, HostError> {
        let dir = tempfile::Builder::new().prefix("nebd-upgrade-").tempdir();
        let dir = dir.map_err(system("make a temporary directory"))?;
        let path = dir.path();
        fs::write(path.join("nebd.toml"), config.toml()).map_err(system("write nebd.toml"))?;
        let (socket, state_dir) = (path.join("nebd.sock"), path.join("state"));
        fs::create_dir(&state_dir).map_err(system("make the state directory"))?;
        if config.core_dumps {
            process::allow_core_dumps().map_err(system_nix("allow core dumps"))?;
        }
        let keeper = start_keeper(config, path)?;
        let host = Host { config: config.clone(), keeper, socket, state_dir, _dir: dir };
        host.wait_for("the first server", |host| {
            host.server_pid().is_some() && host.socket.exists()
        })?;
        Ok(host)
    }

    /// Starts a keeper in the place of one that has died, or is about to: as an operator would, or
    /// systemd.
    pub fn restart_keeper(&mut self) -> Result<(), HostError> {
        if !self.keeper.wait(PATIENCE) {
            let (waited_for, log) = ("the end of the keeper", self.log());
            return Err(HostError::Late { waited_for, limit: PATIENCE, log });
        }
        // What the dead one wrote is not to be taken for the word of this one, which writes it anew
        // when it has all that a server registers.
        let _ = fs::remove_file(self.state_dir.join("server.pid"));
        self.keeper = start_keeper(&self.config, self._dir.path())?;
        Ok(())
    }

    /// Waits until this keeper keeps the one server that there is.
    pub fn wait_for_order(&self) -> Result<(), HostError> {
        self.wait_for("one server under one keeper", |host| {
            let keeper = fs::read_to_string(host.state_dir.join("keeper.pid")).unwrap_or_default();
            let serving = host.server_pid().into_iter().collect::<Vec<i32>>();
            keeper.trim() == host.keeper_pid().to_string()
                && processes_of(&host.state_dir, "keeper") == [host.keeper_pid() as i32]
                && servers_of(&host.state_dir, &serving) == serving
                && host.kept() == serving
        })
    }

    /// The processes that the keeper has noted as its servers.
    fn kept(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.state_dir.join("children")).unwrap_or_default();
        let pid = |line: &str| line.strip_prefix("serving ")?.split(' ').next()?.parse().ok();
        text.lines().filter_map(pid).collect()
    }

    /// The client socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The admin API.
    pub fn admin(&self) -> Result<Admin, HostError> {
        Ok(Admin::new(&self.socket)?)
    }

    /// The keeper's process id.
    pub fn keeper_pid(&self) -> u32 {
        self.keeper.id()
    }

    /// The process id of the standby, once it follows the store.
    pub fn standby_pid(&self) -> Option<i32> {
        // A server that was a standby is told from one by being the server.
        let server = self.server_pid();
        let follows = |pid: &i32| {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let mut names =
                tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
            names.any(|name| name.trim() == "nebd-prepare")
        };
        let keeper = self.keeper_pid().cast_signed();
        let children = crate::growth::children(keeper).into_iter();
        children
            .filter(|pid| Some(*pid) != server && has_argument(*pid, b"--standby"))
            .find(follows)
    }

    /// The process id of the serving server, if one serves.
    pub fn server_pid(&self) -> Option<i32> {
        fs::read_to_string(self.state_dir.join("server.pid")).ok()?.trim().parse().ok()
    }

    /// Whether the server lives that is said to serve.
    pub fn is_served(&self) -> bool {
        self.server_pid().is_some_and(|pid| is_of_this_host(pid, &self.state_dir))
    }

    /// Waits until a server other than `old` serves, and returns its process id.
    pub fn wait_for_successor(&self, old: i32) -> Result<i32, HostError> {
        let mut successor = None;
        self.wait_for("a successor", |host| {
            successor = host.server_pid().filter(|pid| *pid != old);
            successor.is_some()
        })?;
        Ok(successor.unwrap_or(old))
    }

    /// Sends a signal to a server.
    pub fn signal(&self, server: i32, signal: Signal) -> Result<(), HostError> {
        match nix::sys::signal::kill(Pid::from_raw(server), signal) {
            // It met what was armed for it just now.
            Err(nix::Error::ESRCH) if signal == Signal::SIGKILL => Ok(()),
            sent => sent.map_err(system_nix("signal")),
        }
    }

    /// Has the next server (the present one has read its list already) do `action` when it passes
    /// `point` for the `nth` time: `kill`, `segv`, `abort`, `hang` or `stop`, or to the keeper
    /// `keeper-kill`, `keeper-segv` or `keeper-stop`.
    pub fn arm(&self, point: &str, action: &str, nth: u64) -> Result<(), HostError> {
        let path = self.state_dir.join("failpoints");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        // A server that read an earlier line, and never met it, is not to take this one for it.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        text.push_str(&format!("{point} {action} {nth} {}\n", NUMBER.fetch_add(1, Relaxed)));
        fs::write(path, text).map_err(system("write failpoints"))
    }

    /// Failpoints that have not fired.
    pub fn armed(&self) -> usize {
        fs::read_to_string(self.state_dir.join("failpoints")).map_or(0, |t| t.lines().count())
    }

    /// The end of the keeper's and the server's log.
    pub fn log(&self) -> String {
        self.keeper.log_tail()
    }

    /// Waits for something, within [`PATIENCE`].
    pub fn wait_for(
        &self,
        waited_for: &'static str,
        mut is_so: impl FnMut(&Host) -> bool,
    ) -> Result<(), HostError> {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            if Instant::now() > deadline {
                return Err(HostError::Late { waited_for, limit: PATIENCE, log: self.log() });
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The keeper first, asked politely: it ends its servers. Then whoever is left, by pid: the
        // server may be stopped, or may not have noticed that its keeper is gone.
        let server = self.server_pid();
        self.keeper.end(Duration::from_secs(3));
        if let Some(pid) = server.filter(|pid| is_of_this_host(*pid, &self.state_dir)) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = wait_for_death(pid, Duration::from_secs(3));
        }
    }
}

fn start_keeper(config: &HostConfig, dir: &Path) -> Result<Process, HostError> {
    let mut command = std::process::Command::new(&config.server);
    command.arg("keeper").arg("--config").arg(dir.join("nebd.toml"));
    command.arg("--socket").arg(dir.join("nebd.sock")).arg("--state-dir").arg(dir.join("state"));
    command.current_dir(dir).envs(config.environment.iter().cloned());
    Process::start(command, &dir.join("log")).map_err(system("start the keeper"))
}

/// The living servers, but for those that stand by. One that serves may have stood by.
fn servers_of(state_dir: &Path, serving: &[i32]) -> Vec<i32> {
    let stands_by = |pid: &i32| !serving.contains(pid) && has_argument(*pid, b"--standby");
    processes_of(state_dir, "run").into_iter().filter(|pid| !stands_by(pid)).collect()
}

/// The living processes that were started with this command on this state directory, but for the
/// holders of servers' memory.
fn processes_of(state_dir: &Path, command: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_one = |pid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        is_of_this_host(*pid, state_dir)
            && has_argument(*pid, command.as_bytes())
            && name.trim() != "nebd-memory"
    };
    pids.filter(is_one).collect()
}

/// Whether this process was started with our state directory, and is no later bearer of the pid.
fn is_of_this_host(pid: i32, state_dir: &Path) -> bool {
    has_argument(pid, state_dir.as_os_str().as_encoded_bytes())
}

fn has_argument(pid: i32, argument: &[u8]) -> bool {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments.split(|byte| *byte == 0).any(|one| one == argument)
}

/// Waits until a process has died. `Ok(false)` if it has not within the limit.
pub fn wait_for_death(pid: i32, limit: Duration) -> io::Result<bool> {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else { return Ok(true) };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: limit.subsec_nanos().into(),
    };
    Ok(rustix::event::poll(&mut polled, Some(&timeout))? > 0)
}

/// A fence-store in a temporary directory.
pub struct FenceStore {
    process: Process,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl FenceStore {
    /// Starts it, with these arguments beside its socket's.
    pub fn start(program: &Path, arguments: &[&str]) -> Result<FenceStore, HostError> {
        let dir = tempfile::Builder::new().prefix("nebd-fence-").tempdir();
        let dir = dir.map_err(system("make a temporary directory"))?;
        let socket = dir.path().join("store.sock");
        let mut command = std::process::Command::new(program);
        command.arg("--socket").arg(&socket).args(arguments);
        let process = Process::start(command, &dir.path().join("log"));
        let process = process.map_err(system("start the fence-store"))?;
        let store = FenceStore { process, socket, _dir: dir };
        let deadline = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(&store.socket).is_err() {
            if Instant::now() > deadline {
                let (waited_for, log) = ("the fence-store", store.process.log_tail());
                return Err(HostError::Late { waited_for, limit: PATIENCE, log });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(store)
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for FenceStore {
    fn drop(&mut self) {
        self.process.end(Duration::ZERO);
    }
}
