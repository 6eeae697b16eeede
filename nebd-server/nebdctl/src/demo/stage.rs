//! A keeper and a server of the demo's own, in a temporary directory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use nebd_rpc::admin::{CreateVolumeRequest, Volume};

use crate::connection::{Connection, operation_id};
use crate::demo::process;
use crate::failure::Failure;
use crate::status;

/// How long a server may take to come up, at first and after each kill.
const START_LIMIT: Duration = Duration::from_secs(15);

/// What runs, and where. Dropping it ends the processes, then removes the directory.
#[derive(Debug)]
pub struct Stage {
    keeper: Child,
    connection: Connection,
    directory: tempfile::TempDir,
}

impl Stage {
    /// Starts a keeper of this `nebd-server`.
    pub fn start(
        server: &Path,
        directory: tempfile::TempDir,
        standby: bool,
    ) -> Result<Stage, Failure> {
        let at = directory.path();
        let config = at.join("nebd.toml");
        let text = format!("log = \"warn\"\n\n[keeper]\nstandby = {standby}\n");
        fs::write(&config, text).context("cannot write the demo's configuration")?;
        let log = File::create(at.join("log")).context("cannot make the demo's log")?;
        let mut command = Command::new(server);
        command.arg("keeper").arg("--config").arg(&config);
        command.arg("--socket").arg(at.join("nebd.sock"));
        command.arg("--state-dir").arg(at.join("state"));
        fs::create_dir(at.join("state")).context("cannot make the demo's state directory")?;
        let keeper = process::spawn(&mut command, log)
            .with_context(|| format!("cannot start {}", server.display()))?;
        let connection = Connection::new(&at.join("nebd.sock"), START_LIMIT)
            .context("cannot start the admin client");
        let connection = connection?;
        let mut stage = Stage { keeper, connection, directory };
        stage.wait_until_up()?;
        Ok(stage)
    }

    fn wait_until_up(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let failure = match status::ask(&self.connection) {
                Ok(_) if self.server_pid().is_some() => return Ok(()),
                Ok(_) => Failure::Other(anyhow!("the keeper wrote no server.pid")),
                Err(failure) => failure,
            };
            if let Ok(Some(status)) = self.keeper.try_wait() {
                let log = self.log_tail();
                return Err(
                    anyhow!("the keeper ended at once ({status}); its log says:\n{log}").into()
                );
            }
            if process::is_interrupted() {
                return Err(Failure::Interrupted);
            }
            if Instant::now() >= deadline {
                let log = self.log_tail();
                return Err(anyhow!(
                    "the server did not come up ({failure}); its log says:\n{log}"
                )
                .into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The admin API.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The client socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nebd.sock")
    }

    /// The demo's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The server that serves now, as the keeper tells.
    pub fn server_pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.directory.path().join("state/server.pid")).ok()?;
        text.trim().parse().ok()
    }

    /// Waits until a server other than `old` serves.
    pub fn wait_for_successor(&self, old: u32) -> Result<u32, Failure> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(pid) = self.server_pid().filter(|pid| *pid != old) {
                return Ok(pid);
            }
            if process::is_interrupted() {
                return Err(Failure::Interrupted);
            }
            if Instant::now() >= deadline {
                let log = self.log_tail();
                let seconds = START_LIMIT.as_secs();
                return Err(anyhow!(
                    "no server came up within {seconds} s of the death of {old}; the log says:\n{log}"
                )
                .into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes a volume.
    pub fn create(&self, name: &str, size_bytes: u64) -> Result<Volume, Failure> {
        let request = CreateVolumeRequest {
            operation_id: operation_id().context("cannot draw an operation id")?.into(),
            name: name.into(),
            size_bytes,
            block_size: 4096,
            ..CreateVolumeRequest::default()
        };
        self.connection.call(|mut c| {
            let request = request.clone();
            async move { c.create_volume(request).await }
        })
    }

    /// The end of the log, for an error message.
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.directory.path().join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        process::end(&mut self.keeper);
        // The directory is removed by its own drop, after this.
    }
}

/// Finds the `nebd-server` to run.
pub fn find_server(given: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return match path.is_file() {
            true => Ok(path.into()),
            false => {
                Err(anyhow!("{} (from --server or NEBD_SERVER) is no file", path.display()).into())
            }
        };
    }
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| Some(own.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join("nebd-server"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            anyhow!(
                "cannot find nebd-server: it is neither beside nebdctl nor in PATH. Name it with \
                 --server or NEBD_SERVER (from a checkout: `cargo build --release -p nebd-server`)"
            )
            .into()
        })
}
