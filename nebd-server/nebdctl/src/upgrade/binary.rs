//! The new server's file, looked at before the server is asked to run it.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// Why a file is no program.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// It cannot be found or looked at.
    #[error("cannot see the new server {}", path.display())]
    Hidden {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, a device, a socket.
    #[error("the new server {} is no file", path.display())]
    NoFile {
        /// What was named.
        path: PathBuf,
    },
    /// Nobody may run it.
    #[error("the new server {0} is not executable (mode {mode:04o}); `chmod +x {0}` if it is one", path.display())]
    NotExecutable {
        /// What was named.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The admin API carries UTF-8.
    #[error("the path of the new server, {}, is not UTF-8", path.display())]
    NotUtf8 {
        /// What was named.
        path: PathBuf,
    },
}

/// The absolute path of an executable file: the server's working directory is another one.
pub fn checked(path: &Path) -> Result<String, Failure> {
    Ok(absolute(path).map_err(anyhow::Error::from)?)
}

fn absolute(path: &Path) -> Result<String, BinaryError> {
    let hidden = |source| BinaryError::Hidden { path: path.to_owned(), source };
    let path = std::path::absolute(path).map_err(hidden)?;
    let hidden = |source| BinaryError::Hidden { path: path.clone(), source };
    let data = std::fs::metadata(&path).map_err(hidden)?;
    if !data.is_file() {
        return Err(BinaryError::NoFile { path });
    }
    let mode = data.permissions().mode() & 0o7777;
    if mode & 0o111 == 0 {
        return Err(BinaryError::NotExecutable { path, mode });
    }
    path.into_os_string()
        .into_string()
        .map_err(|path| BinaryError::NotUtf8 { path: PathBuf::from(path) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_executable_file_passes() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("server");
        assert!(matches!(absolute(&file), Err(BinaryError::Hidden { .. })));
        assert!(matches!(absolute(directory.path()), Err(BinaryError::NoFile { .. })));
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let refused = absolute(&file).unwrap_err();
        assert!(matches!(refused, BinaryError::NotExecutable { mode: 0o640, .. }), "{refused}");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(absolute(&file).unwrap(), file.to_str().unwrap());
    }
}
