//! The guest's file system: `init.c`, and the kernel modules that it loads.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nebd_guest::archive::Archive;
use nebd_guest::kernel::{DISK_MODULES, Kernel};

use crate::cargo;

/// Builds it; the guest works for `seconds`.
pub fn build(work_dir: &Path, kernel: &Kernel, seconds: u32) -> Result<PathBuf> {
    let source = crate::repo_root().join("xtask/src/hypervisors/init.c");
    let init = work_dir.join("init");
    let mut cc = Command::new("cc");
    cc.args(["-static", "-O2", "-Wall", "-Wextra", "-Werror"]);
    cc.arg(format!("-DSECONDS={seconds}")).arg("-o").arg(&init).arg(source);
    cargo::run(&mut cc)?;
    let mut archive = Archive::default();
    archive.program("init", &fs::read(&init)?);
    for module in DISK_MODULES {
        let name = Path::new(module).file_name().context("a module has a name")?;
        archive.program(&format!("modules/{}", name.to_string_lossy()), &kernel.module(module)?);
    }
    let path = work_dir.join("initrd");
    fs::write(&path, archive.finish())?;
    Ok(path)
}
