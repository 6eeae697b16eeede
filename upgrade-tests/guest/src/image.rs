//! The file system of a guest that verifies: `guest-verifier` as its first program, kernel modules,
//! and the tools of file systems with the libraries that they need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::archive::Archive;
use crate::kernel::{DISK_MODULES, Kernel};

/// Beside those of the disks. The kernel has ext4 built in.
const FILE_SYSTEM_MODULES: [&str; 2] = ["lib/libcrc32c.ko", "fs/xfs/xfs.ko"];
/// Where the guest finds its modules: their names begin with the order in which they are loaded.
pub const MODULES: &str = "/modules";
/// What makes and checks file systems, where the guest finds it.
const TOOLS: [&str; 4] = ["/sbin/mkfs.ext4", "/sbin/e2fsck", "/sbin/mkfs.xfs", "/sbin/xfs_repair"];
const DIRECTORIES: [&str; 6] = ["/dev", "/proc", "/sys", "/tmp", "/mnt", MODULES];

/// Puts the archive together.
pub fn build(verifier: &Path, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.program("/init", &read(verifier)?);
    DIRECTORIES.iter().for_each(|path| archive.directory(path));
    for (order, module) in DISK_MODULES.iter().chain(&FILE_SYSTEM_MODULES).enumerate() {
        let name = Path::new(module).file_name().context("a module has a name")?.to_string_lossy();
        archive.program(&format!("{MODULES}/{order:02}-{name}"), &kernel.module(module)?);
    }
    let mut libraries = BTreeSet::new();
    for tool in TOOLS {
        archive.program(tool, &read(Path::new(tool))?);
        libraries.extend(libraries_of(tool)?);
    }
    for library in libraries {
        archive.program(&library.to_string_lossy(), &read(&library)?);
    }
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

/// The libraries that a program loads, and its loader.
fn libraries_of(program: &str) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    ensure!(output.status.success(), "ldd {program}: {}", output.status);
    Ok(paths(&String::from_utf8_lossy(&output.stdout)))
}

/// Of `name => /path (0x…)` and of `/path (0x…)`.
fn paths(text: &str) -> Vec<PathBuf> {
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ldd_says() {
        let text =
            "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so (0x3)\n";
        assert_eq!(paths(text), [PathBuf::from("/lib/libc.so.6"), PathBuf::from("/lib64/ld.so")]);
    }
}
