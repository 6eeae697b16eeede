//! The guest's file system: `init.c`, and the kernel modules that it loads, as an archive that
//! the kernel unpacks (`newc`, of cpio).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::qemu::Kernel;
use crate::cargo;

/// Modules, where they stand among the drivers; `init.c` has their order.
const MODULES: [&str; 6] = [
    "virtio/virtio_ring.ko",
    "virtio/virtio.ko",
    "virtio/virtio_pci_legacy_dev.ko",
    "virtio/virtio_pci_modern_dev.ko",
    "virtio/virtio_pci.ko",
    "block/virtio_blk.ko",
];
const DIRECTORY: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;

/// Builds the archive; the guest works for `seconds`.
pub fn build(work_dir: &Path, kernel: &Kernel, seconds: u32) -> Result<PathBuf> {
    let source = crate::repo_root().join("xtask/src/hypervisors/init.c");
    let init = work_dir.join("init");
    let mut cc = Command::new("cc");
    cc.args(["-static", "-O2", "-Wall", "-Wextra", "-Werror"]);
    cc.arg(format!("-DSECONDS={seconds}")).arg("-o").arg(&init).arg(source);
    cargo::run(&mut cc)?;
    let mut archive = Archive::default();
    archive.add("init", PROGRAM, &fs::read(&init)?);
    archive.add("modules", DIRECTORY, &[]);
    for module in MODULES {
        let path = kernel.modules.join(module);
        let name = Path::new(module).file_name().context("a module has a name")?;
        let content = fs::read(&path).with_context(|| path.display().to_string())?;
        archive.add(&format!("modules/{}", name.to_string_lossy()), PROGRAM, &content);
    }
    let path = work_dir.join("initrd");
    fs::write(&path, archive.finish())?;
    Ok(path)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (links, name_bytes) = (1, name.len() + 1);
        // inode, mode, uid, gid, links, mtime, size, four of devices, length of the name, checksum
        let numbers = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name_bytes as u32,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend(numbers.iter().flat_map(|number| format!("{number:08x}").into_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_of_one_file() {
        let mut archive = Archive::default();
        archive.add("init", PROGRAM, b"abc");
        let text = String::from_utf8(archive.finish()).unwrap();
        let header = "070701".to_owned() + "00000001" + "000081ed" + &"00000000".repeat(2);
        assert!(text.starts_with(&header), "{text}");
        let rest = format!("{}{}init\0\0abc\0070701", "00000005", "00000000");
        assert!(text[header.len()..].contains(&rest), "{text}");
    }
}
