//! A file that appears under its name when it is complete, or not at all.
//!
//! It has no name until then where the file system can do that (`O_TMPFILE`), so that even SIGKILL
//! leaves nothing; elsewhere it has a hidden name that is removed on the way out.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tempfile::TempPath;

/// The file, readable and writable, for its owner alone.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    hidden: Option<TempPath>,
}

impl NewFile {
    /// Empty, in this directory.
    pub fn new(directory: &Path) -> io::Result<NewFile> {
        NewFile::unnamed(directory).or_else(|_| NewFile::hidden(directory))
    }

    fn unnamed(directory: &Path) -> io::Result<NewFile> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(NewFile { file: file.into(), hidden: None })
    }

    fn hidden(directory: &Path) -> io::Result<NewFile> {
        let named = tempfile::Builder::new().prefix(".nebdctl-").tempfile_in(directory)?;
        let (file, path) = named.into_parts();
        Ok(NewFile { file, hidden: Some(path) })
    }

    /// Empty, where temporary files of the size of a disk go: `TMPDIR`, else `/var/tmp`.
    pub fn temporary() -> io::Result<NewFile> {
        let directory = std::env::var_os("TMPDIR").filter(|path| !path.is_empty());
        NewFile::new(&directory.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from))
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A path that leads to it as long as this process has it open.
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }

    /// Makes it durable and gives it its name; `AlreadyExists` if that is taken and not to be replaced.
    pub fn publish(self, path: &Path, replaces: bool) -> io::Result<()> {
        self.file.sync_all()?;
        let directory = directory_of(path);
        match self.hidden {
            Some(hidden) if replaces => hidden.persist(path)?,
            Some(hidden) => hidden.persist_noclobber(path)?,
            None if replaces => {
                // A link replaces nothing, a rename does: through a name that nobody else has.
                let hidden = tempfile::Builder::new()
                    .prefix(".nebdctl-")
                    .make_in(directory, |path| link(&self.file, path))?;
                hidden.into_temp_path().persist(path)?;
            }
            None => link(&self.file, path)?,
        }
        File::open(directory)?.sync_all()
    }
}

fn link(file: &File, path: &Path) -> io::Result<()> {
    Ok(rustix::fs::linkat(CWD, path_of(file), CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// A path for other programs of ours that leads to an open file, whatever its name.
pub fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// The directory that a file is in.
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        for new in [NewFile::new, NewFile::hidden] {
            let directory = tempfile::tempdir().unwrap();
            let names = || std::fs::read_dir(directory.path()).unwrap().count();
            let path = directory.path().join("a");
            let make = |text: &str| {
                let file = new(directory.path()).unwrap();
                file.file().write_all(text.as_bytes()).unwrap();
                file
            };
            drop(make("lost"));
            assert_eq!(names(), 0);
            make("one").publish(&path, false).unwrap();
            let error = make("two").publish(&path, false).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "one");
            make("three").publish(&path, true).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "three");
            assert_eq!(names(), 1);
        }
    }

    #[test]
    fn a_file_knows_its_directory() {
        assert_eq!(directory_of(Path::new("a")), Path::new("."));
        assert_eq!(directory_of(Path::new("/a/b")), Path::new("/a"));
    }
}
