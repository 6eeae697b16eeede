//! qcow2 through `qemu-img`, as far as nebd goes with the format: its header.
//!
//! A qcow2 can name other files of this host, which QEMU would then read as a part of the disk. Who
//! imports does so with the rights of root, so such an image is refused before `qemu-img` sees it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow};

use crate::demo::process::is_interrupted;
use crate::failure::Failure;

/// The first bytes of every qcow2.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a header that nebd looks at.
pub const HEADER_BYTES: usize = 80;
/// Incompatible features: the data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// How often to look whether `qemu-img` has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Whether an image begins as a qcow2 does.
pub fn is_qcow2(head: &[u8]) -> bool {
    head.starts_with(&MAGIC)
}

/// What nebd knows of a qcow2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub size: u64,
}

/// Why an image is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is none.
    #[error("it is no qcow2 image")]
    Magic,
    /// Another format of that family.
    #[error("qcow2 version {0} is not known, only 2 and 3")]
    Version(u32),
    /// It is only what differs from another.
    #[error(
        "it has a backing file, which is not followed; make it whole first: \
         qemu-img convert -O qcow2 IMAGE WHOLE"
    )]
    Backing,
    /// It is only what leads to another.
    #[error(
        "its data is in another file, which is not followed; make it whole first: \
         qemu-img convert -O qcow2 IMAGE WHOLE"
    )]
    ExternalData,
}

impl Header {
    /// Reads it.
    pub fn parse(head: &[u8]) -> Result<Header, HeaderError> {
        let u64_at = |at: usize| {
            let bytes = head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u64::from_be_bytes).ok_or(HeaderError::Magic)
        };
        if !is_qcow2(head) {
            return Err(HeaderError::Magic);
        }
        let version = u64_at(4)? >> 32;
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version as u32));
        }
        if u64_at(8)? != 0 {
            return Err(HeaderError::Backing);
        }
        if version == 3 && u64_at(72)? & EXTERNAL_DATA != 0 {
            return Err(HeaderError::ExternalData);
        }
        Ok(Header { size: u64_at(24)? })
    }

    /// Reads that of a file.
    pub fn of_file(file: &File) -> Result<Header, Failure> {
        let mut head = [0; HEADER_BYTES];
        let length = file.read_at(&mut head, 0).context("cannot read the image")?;
        Ok(Header::parse(&head[..length]).context("cannot import the image")?)
    }
}

/// Converts between `raw` and `qcow2`; both files exist.
pub fn convert(from: (&str, &Path), to: (&str, &Path)) -> Result<(), Failure> {
    let mut command = qemu_img("convert");
    command.args(["-f", from.0, "-O", to.0]).args([from.1, to.1]);
    run(command, "convert")
}

/// Compares a qcow2 with the raw image that it was made of, or that was made of it.
pub fn compare(qcow2: &Path, raw: &Path) -> Result<(), Failure> {
    let mut command = qemu_img("compare");
    command.args(["-f", "qcow2", "-F", "raw"]).args([qcow2, raw]);
    run(command, "compare")
}

fn qemu_img(action: &str) -> Command {
    let mut command = Command::new("qemu-img");
    command.arg(action);
    command
}

/// Fails without `qemu-img`, before anything else is done.
pub fn require() -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.arg("--version");
    run(command, "tell its version")
}

fn run(mut command: Command, action: &'static str) -> Result<(), Failure> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Ctrl-C is for nebdctl, which then ends the other.
    let mut child = command.process_group(0).spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => anyhow!(
            "qcow2 images need qemu-img, which is not installed: it is in the package qemu-utils \
             (Debian, Ubuntu) or qemu-img (Fedora, RHEL)"
        ),
        _ => anyhow!("cannot start qemu-img: {error}"),
    })?;
    let status = wait(&mut child)?;
    if status.success() {
        return Ok(());
    }
    let mut words = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What cannot be read is not told; the status says enough.
        let _ = stderr.read_to_string(&mut words);
    }
    let words = words.trim();
    Err(anyhow!("qemu-img could not {action} the image ({status}) {words}").into())
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus, Failure> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for qemu-img")? {
            return Ok(status);
        }
        if is_interrupted() {
            // It may have ended by itself just now.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure::Interrupted);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32) -> Vec<u8> {
        let mut head = vec![0; HEADER_BYTES];
        head[..4].copy_from_slice(&MAGIC);
        head[4..8].copy_from_slice(&version.to_be_bytes());
        head[24..32].copy_from_slice(&(5u64 << 20).to_be_bytes());
        head
    }

    #[test]
    fn a_header_is_read() {
        for version in [2, 3] {
            assert_eq!(Header::parse(&header(version)), Ok(Header { size: 5 << 20 }));
        }
        assert_eq!(Header::parse(&header(1)), Err(HeaderError::Version(1)));
        assert_eq!(Header::parse(&header(3)[..60]), Err(HeaderError::Magic));
        assert_eq!(Header::parse(b""), Err(HeaderError::Magic));
    }

    #[test]
    fn other_files_are_not_followed() {
        let mut backed = header(2);
        backed[15] = 104;
        assert_eq!(Header::parse(&backed), Err(HeaderError::Backing));
        let mut external = header(3);
        external[79] = 4;
        assert_eq!(Header::parse(&external), Err(HeaderError::ExternalData));
    }
}
