//! What a connection was told: keys of a `conf` file and of `rados_conf_set`.
//!
//! Keys that begin with `nebd_` are ours, and one that is unknown is refused: a misspelt socket must
//! not silently become the default one. All others are Ceph's, and mean nothing here.

use std::io;
use std::path::{Path, PathBuf};

use nebd_client::{Errno, Options};

use crate::failure::{NOENT, tell};

/// Requests in flight a disk can have without waiting in a list; QEMU's queues hold 256.
const DEPTH: u32 = 256;
/// Pieces of guest memory in one request before it is split; a virtio disk sends up to 254.
const IOVECS: u32 = 64;

/// What a connection was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `nebd_socket`: the server's client socket, if not that of the environment.
    pub socket: Option<PathBuf>,
    /// `nebd_exclusive`: no other session may hold the volume.
    pub is_exclusive: bool,
    /// `nebd_block_size`: of volumes to be created.
    pub block_size: Option<u32>,
    /// `nebd_ctl`: the program that creates and removes volumes.
    pub nebdctl: Option<PathBuf>,
    /// `nebd_log`: tell at close what the image has done.
    pub tells_statistics: bool,
}

impl Config {
    /// What the environment says.
    pub fn of_environment() -> Config {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Config {
            nebdctl: path("NEBDCTL").map(PathBuf::from),
            tells_statistics: path("NEBD_LOG").is_some(),
            ..Config::default()
        }
    }

    /// Takes the keys of a file.
    pub fn read(&mut self, path: &Path) -> Result<(), Errno> {
        let text = std::fs::read(path).map_err(|error: io::Error| {
            tell(&format!("cannot read {}: {error}", path.display()));
            Errno::from_io(&error)
        })?;
        self.parse(&String::from_utf8_lossy(&text)).inspect_err(|_| {
            tell(&format!("{} has a nebd_ key that is not known or not valid", path.display()));
        })
    }

    fn parse(&mut self, text: &str) -> Result<(), Errno> {
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or("");
            if let Some((key, value)) = line.split_once('=') {
                self.set(key, value)?;
            }
        }
        Ok(())
    }

    /// Takes one key.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        // Ceph lets words of a key be joined by any of these.
        let key = key.trim().to_ascii_lowercase().replace([' ', '-'], "_");
        let value = value.trim();
        match key.as_str() {
            "nebd_socket" if !value.is_empty() => self.socket = Some(value.into()),
            "nebd_exclusive" => self.is_exclusive = boolean(value)?,
            "nebd_log" => self.tells_statistics = boolean(value)?,
            "nebd_ctl" if !value.is_empty() => self.nebdctl = Some(value.into()),
            "nebd_block_size" => {
                let size = value.parse().map_err(|_| Errno::INVAL)?;
                self.block_size = Some(size);
            }
            key if key.starts_with("nebd_") => return Err(NOENT),
            _ => {}
        }
        Ok(())
    }

    /// How to open a volume.
    pub fn options(&self) -> Options {
        let options =
            Options::new().depth(DEPTH).iovecs_per_slot(IOVECS).exclusive(self.is_exclusive);
        match &self.socket {
            Some(path) => options.socket(path),
            None => options,
        }
    }
}

fn boolean(value: &str) -> Result<bool, Errno> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err(Errno::INVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_ceph_with_our_keys() {
        let mut config = Config::default();
        let text = "[global]\n# nebd_socket = /no\nauth supported = none\n\
                    nebd socket = /run/a.sock ; why\n  NEBD-exclusive=yes\nnebd_block_size = 512\n";
        config.parse(text).unwrap();
        let expected = Config {
            socket: Some("/run/a.sock".into()),
            is_exclusive: true,
            block_size: Some(512),
            ..Config::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let mut config = Config::default();
        assert_eq!(config.set("nebd_sockt", "/run/a.sock"), Err(NOENT));
        assert_eq!(config.set("nebd_exclusive", "perhaps"), Err(Errno::INVAL));
        assert_eq!(config.set("rbd_cache", "false"), Ok(()));
        assert_eq!(config, Config::default());
    }

    #[test]
    fn no_file_is_an_error_and_an_empty_one_is_not() {
        let mut config = Config::default();
        assert_eq!(config.read(Path::new("/nonexistent/ceph.conf")), Err(NOENT));
        assert_eq!(config.read(Path::new("/dev/null")), Ok(()));
    }
}
