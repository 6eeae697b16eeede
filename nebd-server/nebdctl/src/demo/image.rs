//! The real input: a file system image, made on the spot or copied.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nebd_upgrade_tests::stamp::Dice;

/// Size of an image made on the spot.
const IMAGE_BYTES: u64 = 64 << 20;
/// Most bytes of real files to put into it.
const FILES_BYTES_MAX: u64 = 24 << 20;
/// Where real files are found on most machines, none of them secret.
const FILE_SOURCES: [&str; 4] =
    ["/usr/share/doc", "/usr/share/common-licenses", "/usr/share/perl", "/usr/share/zoneinfo"];

/// An image in the demo's directory.
#[derive(Debug)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
    /// What it is, for people.
    pub description: String,
}

/// What e2fsck says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// No fault.
    Clean,
    /// Faults.
    Damaged,
    /// Not ext2, ext3 or ext4, or e2fsck is not there.
    Skipped,
}

impl Image {
    /// A copy of the operator's image.
    pub fn copied(source: &Path, directory: &Path) -> Result<Image> {
        let path = directory.join("image");
        let bytes = fs::copy(source, &path)
            .with_context(|| format!("cannot copy the image {}", source.display()))?;
        ensure!(bytes > 0, "the image {} is empty", source.display());
        Ok(Image { path, description: format!("a copy of {}", source.display()) })
    }

    /// An ext4 with real files in it; without mkfs.ext4, random bytes.
    pub fn made(directory: &Path) -> Result<Image> {
        let path = directory.join("image");
        let file = File::create_new(&path).context("cannot make the image")?;
        file.set_len(IMAGE_BYTES).context("cannot make the image")?;
        let tree = directory.join("tree");
        let files = plant(&tree).context("cannot gather files for the image")?;
        let made = Command::new("mkfs.ext4")
            .env("PATH", search_path())
            .args(["-q", "-F", "-b", "4096", "-m", "0", "-d"])
            .args([&tree, &path])
            .stdin(Stdio::null())
            .output();
        fs::remove_dir_all(&tree).context("cannot remove the gathered files")?;
        match made {
            Ok(output) if output.status.success() => {
                Ok(Image { path, description: format!("ext4 with {files} real files") })
            }
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                fill(&file).context("cannot fill the image")?;
                Ok(Image { path, description: format!("random bytes (mkfs.ext4 failed: {why})") })
            }
            Err(_) => {
                fill(&file).context("cannot fill the image")?;
                Ok(Image { path, description: "random bytes (mkfs.ext4 is not here)".into() })
            }
        }
    }
}

/// Checks the file system in `path` without changing it.
pub fn check(path: &Path) -> Result<Check> {
    if !is_ext(path)? {
        return Ok(Check::Skipped);
    }
    let checked = Command::new("e2fsck")
        .env("PATH", search_path())
        .args(["-f", "-n"])
        .arg(path)
        .stdin(Stdio::null())
        .output();
    match checked {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Check::Skipped),
        Err(error) => Err(error).context("cannot run e2fsck"),
        Ok(output) if output.status.success() => Ok(Check::Clean),
        Ok(output) => {
            eprintln!("{}", String::from_utf8_lossy(&output.stdout).trim_end());
            Ok(Check::Damaged)
        }
    }
}

/// Whether the superblock has the magic number of ext2, ext3 and ext4.
fn is_ext(path: &Path) -> Result<bool> {
    let mut magic = [0; 2];
    let read = File::open(path)?.read_exact_at(&mut magic, 1024 + 56);
    Ok(read.is_ok() && magic == 0xEF53u16.to_le_bytes())
}

/// The tools lie where an ordinary user's path does not lead.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Copies real files into `tree`; returns how many there are.
fn plant(tree: &Path) -> io::Result<u64> {
    fs::create_dir(tree)?;
    let mut planted = Planted { count: 0, bytes: 0 };
    for source in FILE_SOURCES {
        let target = tree.join(source.trim_start_matches('/').replace('/', "-"));
        planted.copy_tree(Path::new(source), &target, 0)?;
    }
    // On a bare machine there are none.
    for number in planted.count..64 {
        let mut file = File::create(tree.join(format!("file-{number:02}")))?;
        for line in 0..number * 50 {
            writeln!(file, "line {line} of file {number}")?;
        }
        planted.count += 1;
    }
    Ok(planted.count)
}

struct Planted {
    count: u64,
    bytes: u64,
}

impl Planted {
    /// Regular files and directories; what cannot be read is left out.
    fn copy_tree(&mut self, source: &Path, target: &Path, depth: u32) -> io::Result<()> {
        let Ok(entries) = fs::read_dir(source) else { return Ok(()) };
        fs::create_dir(target)?;
        for entry in entries.flatten() {
            if self.bytes >= FILES_BYTES_MAX || self.count >= 2000 {
                break;
            }
            let Ok(kind) = entry.file_type() else { continue };
            let (from, to) = (entry.path(), target.join(entry.file_name()));
            if kind.is_dir() && depth < 4 {
                self.copy_tree(&from, &to, depth + 1)?;
            } else if kind.is_file()
                && entry.metadata().is_ok_and(|data| data.len() <= 1 << 20)
                && let Ok(bytes) = fs::copy(&from, &to)
            {
                self.bytes += bytes;
                self.count += 1;
            }
        }
        Ok(())
    }
}

fn fill(file: &File) -> io::Result<()> {
    let mut dice = Dice::new(4711);
    let mut block = vec![0; 1 << 20];
    for at in 0..IMAGE_BYTES / block.len() as u64 {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&dice.bits().to_le_bytes());
        }
        file.write_all_at(&block, at * block.len() as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_made_checked_and_its_damage_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::made(directory.path()).unwrap();
        assert_eq!(fs::metadata(&image.path).unwrap().len(), IMAGE_BYTES);
        let before = check(&image.path).unwrap();
        if before == Check::Skipped {
            println!("skipped: {}, or e2fsck is not here", image.description);
            return;
        }
        assert_eq!(before, Check::Clean);
        let file = File::options().write(true).open(&image.path).unwrap();
        // The group descriptors.
        file.write_all_at(&[0xFF; 2048], 4096).unwrap();
        assert_eq!(check(&image.path).unwrap(), Check::Damaged);
    }
}
