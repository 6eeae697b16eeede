//! A real keeper and server, built for the tests that share it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nebd_upgrade_tests::supervisor::SERVER_ENV;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub const NEBDCTL: &str = env!("CARGO_BIN_EXE_nebdctl");

/// The server: the one that the environment names, else one that is built here and now, and copied
/// so that no later build with other features puts it aside.
pub fn server() -> &'static Path {
    static SERVER: OnceLock<PathBuf> = OnceLock::new();
    SERVER.get_or_init(|| match std::env::var_os(SERVER_ENV) {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = scratch.parent().expect("the scratch directory is in the target directory");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--message-format=json", "--package", "nebd-server"])
        .args(["--bin", "nebd-server", "--target-dir"])
        .arg(target)
        .output()
        .expect("cargo can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let built = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
        .next_back()
        .expect("cargo says where it put the program");
    let kept = scratch.join("nebd-server-for-nebdctl");
    let fresh = scratch.join(format!("nebd-server-{}", std::process::id()));
    fs::copy(&built, &fresh).expect("the program can be copied");
    fs::rename(&fresh, &kept).expect("the copy can be put in place");
    kept
}

/// A keeper in a directory of its own.
pub struct Stage {
    directory: tempfile::TempDir,
    keeper: Child,
}

impl Stage {
    pub fn start() -> Stage {
        let server = server();
        let directory = tempfile::Builder::new().prefix("nebdctl-").tempdir_in("/tmp").unwrap();
        let at = directory.path();
        fs::write(at.join("nebd.toml"), "log = \"warn\"\n[keeper]\nstandby = true\n").unwrap();
        fs::create_dir(at.join("state")).unwrap();
        let keeper = Command::new(server)
            .args(["keeper", "--config", "nebd.toml", "--socket", "s", "--state-dir", "state"])
            .current_dir(at)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let stage = Stage { directory, keeper };
        stage.until("the server answers", || {
            stage.run("status").status.success() && stage.server_pid().is_some()
        });
        stage
    }

    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(NEBDCTL);
        command.arg("--socket").arg(self.directory.path().join("s"));
        // Files are named from here, and a file for a short time has its place here too.
        command.current_dir(self.directory.path()).env("TMPDIR", self.directory.path());
        command.args(arguments.split_whitespace());
        command
    }

    pub fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A place for a file of the test.
    #[allow(dead_code, reason = "not every test has files")]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn server_pid(&self) -> Option<u32> {
        let file = self.directory.path().join("state/server.pid");
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    /// Kills the server with SIGKILL, and waits for its successor.
    pub fn kill_server(&self) {
        let old = self.server_pid().unwrap();
        kill(Pid::from_raw(old as i32), Signal::SIGKILL).unwrap();
        self.until("a successor serves", || self.server_pid().is_some_and(|pid| pid != old));
    }

    pub fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !is_so() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.keeper.id() as i32), Signal::SIGTERM);
        let _ = self.keeper.wait();
    }
}

pub fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().last().unwrap_or_else(|| panic!("no output; {errors}"));
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {text}{errors}"))
}
