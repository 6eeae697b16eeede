//! What crashes leave: cores, looked at and removed.

use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

/// Cores that a host's servers have written.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cores {
    /// Servers that have crashed.
    pub crashes: usize,
    /// Of these, with a core.
    pub written: usize,
    /// Bytes of the largest.
    pub bytes_max: u64,
    /// Why none can be expected here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_expected: Option<String>,
}

impl Cores {
    /// Asks this machine whether a server that crashes leaves a core in its working directory.
    pub fn new() -> Cores {
        let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
        let limit = getrlimit(Resource::RLIMIT_CORE).map_or(0, |(_, most)| most);
        let not_expected = match pattern.trim() {
            "" => Some("this kernel writes none".to_owned()),
            elsewhere if elsewhere.starts_with(['|', '/']) => {
                Some(format!("core_pattern is {elsewhere}"))
            }
            _ if limit == 0 => Some("their size is limited to nothing (ulimit -Hc)".into()),
            _ => None,
        };
        Cores { not_expected, ..Cores::default() }
    }

    /// A server that ran in this directory has crashed, and another serves.
    pub fn count(&mut self, dir: &Path) {
        self.crashes += 1;
        if self.not_expected.is_some() {
            return;
        }
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        for entry in
            entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"core"))
        {
            let bytes = entry.metadata().map_or(0, |metadata| metadata.len());
            self.written += usize::from(bytes > 0);
            self.bytes_max = self.bytes_max.max(bytes);
            // The next one is not to be taken for this; and they are large.
            let _ = fs::remove_file(entry.path());
        }
    }

    /// Whether one is missing that was to be expected.
    pub fn is_complete(&self) -> bool {
        self.not_expected.is_some() || self.written == self.crashes
    }
}

impl std::fmt::Display for Cores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Cores { crashes, written, bytes_max, not_expected } = self;
        match not_expected {
            Some(reason) => write!(f, "cores were not looked for: {reason}"),
            None => write!(
                f,
                "{written} cores of {crashes} crashes, the largest of {:.1} MiB",
                *bytes_max as f64 / (1 << 20) as f64
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_without_a_core_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut cores = Cores::default();
        fs::write(dir.path().join("core.7"), "ELF").unwrap();
        cores.count(dir.path());
        assert!(cores.is_complete() && cores.bytes_max == 3, "{cores:?}");
        cores.count(dir.path());
        assert!(!cores.is_complete(), "the first one's is not the second's: {cores:?}");
        cores.not_expected = Some("core_pattern is |/bin/cat".into());
        assert!(cores.is_complete());
    }
}
