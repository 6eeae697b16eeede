//! Curve's client file: lines of `key=value`, of which the socket's path means something here.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where Curve's client looks for its file.
pub const DEFAULT_PATH: &str = "/etc/nebd/nebd-client.conf";
/// Names the server's socket.
const ADDRESS: &str = "nebdserver.serverAddress";

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The server's socket; `None` for the default one.
    pub socket: Option<PathBuf>,
    /// Keys without a meaning here.
    pub ignored: Vec<String>,
}

/// Why there is no configuration.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read, or is no text.
    Read(io::Error),
    /// A line is neither empty nor a comment nor `key=value`.
    Line(usize),
    /// The socket's path is missing or empty.
    NoAddress,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Read(error) => error.fmt(f),
            ConfigError::Line(line) => write!(f, "line {line} is not of the form key=value"),
            ConfigError::NoAddress => write!(f, "there is no {ADDRESS}"),
        }
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        Config::parse(&fs::read_to_string(path).map_err(ConfigError::Read)?)
    }

    /// Reads the default file; without one everything is as the library has it by default.
    pub fn read_default() -> Result<Config, ConfigError> {
        match Config::read(Path::new(DEFAULT_PATH)) {
            Err(ConfigError::Read(error)) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Config::default())
            }
            read => read,
        }
    }

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, value) = line.split_once('=').ok_or(ConfigError::Line(index + 1))?;
            if key.trim() == ADDRESS {
                let value = without_comment(value);
                config.socket = (!value.is_empty()).then(|| PathBuf::from(value));
            } else {
                config.ignored.push(key.trim().to_owned());
            }
        }
        if config.socket.is_none() { Err(ConfigError::NoAddress) } else { Ok(config) }
    }
}

/// Curve's templates have comments behind values, set off by white space.
fn without_comment(value: &str) -> &str {
    let mut end = value.len();
    for (at, _) in value.match_indices('#') {
        if value[..at].ends_with(char::is_whitespace) {
            end = at;
            break;
        }
    }
    value[..end].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_address_and_names_the_rest() {
        let text = "# the server\n nebdserver.serverAddress = /run/a#b.sock   # a comment\n\n\
                    metacache.fileLockPath=/data/lock\r\nlog.path=/data/log  # more\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.socket, Some(PathBuf::from("/run/a#b.sock")));
        assert_eq!(config.ignored, ["metacache.fileLockPath", "log.path"]);
    }

    #[test]
    fn refuses_what_says_no_address() {
        let no_address = ["", "# only\n", "log.path=/x\n", "nebdserver.serverAddress= # none\n"];
        for text in no_address {
            assert!(matches!(Config::parse(text), Err(ConfigError::NoAddress)), "{text:?}");
        }
        let text = "nebdserver.serverAddress=/a\nnonsense\n";
        assert!(matches!(Config::parse(text), Err(ConfigError::Line(2))));
        let none = Config::read(Path::new("/nonexistent/nebd-client.conf"));
        assert!(matches!(none, Err(ConfigError::Read(_))));
    }
}
