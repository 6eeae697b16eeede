//! Volume names: `BACKEND:NAME`, the same everywhere.

use std::fmt;
use std::str::FromStr;

/// Longest `BACKEND:NAME`, in bytes.
pub const NAME_BYTES_MAX: usize = 192;

/// A parsed volume name such as `file:disk1`.
///
/// The part after the colon is a plain file name: letters, digits, `.`, `_` and `-`, not starting
/// with a dot, so that it can never leave the directory a backend keeps its volumes in.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName {
    text: String,
    colon: usize,
}

/// Why a text is not a volume name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeNameError {
    /// There is no `:` between backend and name.
    #[error("volume name {0:?} is not of the form BACKEND:NAME, such as file:disk1")]
    NoBackend(String),
    /// A part is empty.
    #[error("volume name {0:?} has an empty part")]
    Empty(String),
    /// A character that is not allowed.
    #[error(
        "volume name {0:?}: only letters, digits, '.', '_' and '-' are allowed, and no leading dot"
    )]
    Character(String),
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("volume name of {0} bytes is longer than {NAME_BYTES_MAX}")]
    Long(usize),
}

impl VolumeName {
    /// The backend's kind: the part before the colon.
    pub fn backend(&self) -> &str {
        &self.text[..self.colon]
    }

    /// The name within its backend: the part after the colon.
    pub fn name(&self) -> &str {
        &self.text[self.colon + 1..]
    }

    /// The whole, `BACKEND:NAME`.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for VolumeName {
    type Err = VolumeNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > NAME_BYTES_MAX {
            return Err(VolumeNameError::Long(text.len()));
        }
        let colon = text.find(':').ok_or_else(|| VolumeNameError::NoBackend(text.into()))?;
        let (backend, name) = (&text[..colon], &text[colon + 1..]);
        if backend.is_empty() || name.is_empty() {
            return Err(VolumeNameError::Empty(text.into()));
        }
        let plain = |part: &str| {
            !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if !plain(backend) || !plain(name) {
            return Err(VolumeNameError::Character(text.into()));
        }
        Ok(VolumeName { text: text.into(), colon })
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_should_and_nothing_else() {
        let name: VolumeName = "file:disk-1.raw".parse().unwrap();
        assert_eq!((name.backend(), name.name()), ("file", "disk-1.raw"));
        for bad in
            ["disk1", "file:", ":x", "file:../x", "file:a/b", "file:.hidden", "file:a:b", "f\0:x"]
        {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        assert!(
            "x:".chars()
                .chain("y".repeat(300).chars())
                .collect::<String>()
                .parse::<VolumeName>()
                .is_err()
        );
    }
}
