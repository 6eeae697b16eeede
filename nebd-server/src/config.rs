//! The configuration: one TOML file, every key optional, unknown keys refused by name and line.
//!
//! Command-line flags win over the file; without a file every default works for root.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Everything that can be configured.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The client socket; the admin socket is beside it, with `.admin` appended.
    pub socket: PathBuf,
    /// Where volumes, images and pid files are kept.
    pub state_dir: PathBuf,
    /// Shard threads; 0 means one for each core.
    pub shards: usize,
    /// Level of the log on standard error: error, warn, info, debug or trace.
    pub log: String,
    /// Who may connect.
    pub access: Access,
    /// The shared-memory rings.
    pub ring: Ring,
    /// The `file` backend.
    pub file: File,
    /// The keeper.
    pub keeper: Keeper,
    /// Planned takeovers.
    pub upgrade: Upgrade,
    /// The metrics.
    pub metrics: Metrics,
    /// Hypervisors that attach by vhost-user-blk.
    pub vhost_user: VhostUser,
}

/// Who may connect to the sockets; who may attach a volume is the volume's own business.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Access {
    /// Mode of both sockets, octal; bits for others are refused.
    pub mode: String,
    /// Group of both sockets, by number; none means the server's own.
    pub gid: Option<u32>,
    /// Memory that each user may have registered, in GiB, sparse or not; root has no limit.
    pub memory_gib_max: u64,
}

/// How the rings are served.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Ring {
    /// Longest spin before a shard sleeps, in microseconds; 0 never spins.
    pub spin_us: u64,
    /// Cores that all shards together may burn by spinning; 0 is no limit.
    pub spin_cores_max: f64,
    /// Requests taken from one queue before the next queue has its turn.
    pub batch: u32,
    /// A request that its storage has not answered for this long raises an alarm.
    pub stall_alarm_ms: u64,
}

/// The `file` backend.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    /// Where images are made; none means `images` in the state directory.
    pub dir: Option<PathBuf>,
    /// `auto`, `io_uring` or `threads`.
    pub engine: String,
    /// Threads of the thread engine.
    pub threads: usize,
}

/// Planned takeovers.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Upgrade {
    /// How long requests at their storage are waited for while everything stands still; what takes
    /// longer holds back its own volume alone.
    pub freeze_ms: u64,
    /// How long each step before may take, while the old server serves on.
    pub step_timeout_ms: u64,
}

/// The keeper.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Keeper {
    /// Keep a warm standby beside the server.
    pub standby: bool,
    /// A server thread that answers no probe for this long is hung.
    pub hang_timeout_ms: u64,
    /// First pause before restarting a server that died before it was ready.
    pub backoff_min_ms: u64,
    /// Longest such pause.
    pub backoff_max_ms: u64,
}

/// The metrics. They are always told at a Unix socket, the client socket's path with `.metrics`
/// appended.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Address and port where they are told too, to whoever connects; none by default.
    pub listen: Option<SocketAddr>,
}

/// Hypervisors that attach by vhost-user-blk.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct VhostUser {
    /// Map guests' memory that is not sealed against shrinking (files, memfds without seals). A
    /// hypervisor that truncates such memory kills the server, again and again.
    pub unsealed_memory: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            socket: "/run/nebd/nebd.sock".into(),
            state_dir: "/var/lib/nebd".into(),
            shards: 0,
            log: "info".into(),
            access: Access::default(),
            ring: Ring::default(),
            file: File::default(),
            keeper: Keeper::default(),
            upgrade: Upgrade::default(),
            metrics: Metrics::default(),
            vhost_user: VhostUser::default(),
        }
    }
}

impl Default for Access {
    fn default() -> Self {
        Access { mode: "0660".into(), gid: None, memory_gib_max: 16 << 10 }
    }
}

impl Default for Ring {
    fn default() -> Self {
        Ring { spin_us: 100, spin_cores_max: 0.0, batch: 64, stall_alarm_ms: 10_000 }
    }
}

impl Default for File {
    fn default() -> Self {
        File { dir: None, engine: "auto".into(), threads: 8 }
    }
}

impl Default for Upgrade {
    fn default() -> Self {
        Upgrade { freeze_ms: 5, step_timeout_ms: 60_000 }
    }
}

impl Default for Keeper {
    fn default() -> Self {
        Keeper {
            standby: false,
            hang_timeout_ms: 2000,
            backoff_min_ms: 100,
            backoff_max_ms: 10_000,
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key; the source names key and line.
    #[error("the configuration {path} is not valid: {source}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and where.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its bounds.
    #[error("configuration key {key}: {value:?} is not {expected}")]
    Value {
        /// Which key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        expected: &'static str,
    },
}

impl Config {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let config: Config = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: source.into() })?;
        config.socket_mode()?;
        config.check_engine()?;
        config.check_spinning()?;
        Ok(config)
    }

    fn check_engine(&self) -> Result<(), ConfigError> {
        match self.file.engine.as_str() {
            "auto" | "io_uring" | "threads" => Ok(()),
            other => Err(ConfigError::Value {
                key: "file.engine",
                value: other.into(),
                expected: "auto, io_uring or threads",
            }),
        }
    }

    fn check_spinning(&self) -> Result<(), ConfigError> {
        let cores = self.ring.spin_cores_max;
        if cores.is_finite() && cores >= 0.0 {
            return Ok(());
        }
        Err(ConfigError::Value {
            key: "ring.spin_cores_max",
            value: cores.to_string(),
            expected: "a number of cores, such as 0.5, or 0 for no limit",
        })
    }

    /// Mode of the sockets.
    pub fn socket_mode(&self) -> Result<u32, ConfigError> {
        u32::from_str_radix(self.access.mode.trim_start_matches("0o"), 8)
            .ok()
            .filter(|mode| mode & !0o770 == 0)
            .ok_or_else(|| ConfigError::Value {
                key: "access.mode",
                value: self.access.mode.clone(),
                expected: "an octal mode without bits for others, such as 0660",
            })
    }

    /// The admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.beside_socket(".admin")
    }

    /// The socket of the metrics.
    pub fn metrics_socket(&self) -> PathBuf {
        self.beside_socket(".metrics")
    }

    fn beside_socket(&self, suffix: &str) -> PathBuf {
        let mut path = self.socket.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    /// Where images are made.
    pub fn image_dir(&self) -> PathBuf {
        self.file.dir.clone().unwrap_or_else(|| self.state_dir.join("images"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(file.path())
    }

    #[test]
    fn every_key_is_optional() {
        assert_eq!(load("").unwrap(), Config::default());
        assert_eq!(
            load("[ring]\nspin_us = 5\n").unwrap().ring,
            Ring { spin_us: 5, ..Ring::default() }
        );
    }

    #[test]
    fn an_unknown_key_is_refused_by_name_and_line() {
        let message = load("shards = 1\n\n[file]\nengin = \"auto\"\n").unwrap_err().to_string();
        assert!(message.contains("engin") && message.contains("line 4"), "{message}");
    }

    #[test]
    fn metrics_are_told_at_an_address_with_a_port() {
        assert_eq!(load("").unwrap().metrics.listen, None);
        let listen = load("[metrics]\nlisten = \"127.0.0.1:9150\"\n").unwrap().metrics.listen;
        assert_eq!(listen, Some(([127, 0, 0, 1], 9150).into()));
        let message = load("[metrics]\nlisten = \"localhost\"\n").unwrap_err().to_string();
        assert!(message.contains("listen") && message.contains("line 2"), "{message}");
    }

    #[test]
    fn a_spin_budget_is_a_number_of_cores() {
        let ring = load("[ring]\nspin_cores_max = 0.5\n").unwrap().ring;
        assert_eq!(ring, Ring { spin_cores_max: 0.5, ..Ring::default() });
        for wrong in ["-1.0", "nan", "inf"] {
            let message = load(&format!("[ring]\nspin_cores_max = {wrong}\n")).unwrap_err();
            assert!(message.to_string().contains("ring.spin_cores_max"), "{message}");
        }
    }

    #[test]
    fn a_world_writable_socket_is_refused() {
        assert!(
            load("[access]\nmode = \"0666\"\n").unwrap_err().to_string().contains("access.mode")
        );
        assert!(load("[file]\nengine = \"fast\"\n").unwrap_err().to_string().contains("io_uring"));
    }
}
