//! QEMU, and what is in guests: `upgrade-tests/guest/install.sh` has how they come to the machine.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nebd_guest::kernel::Kernel;

use crate::cargo;

/// The script's word for what this machine cannot do.
const NOT_POSSIBLE: i32 = 3;

/// Installs what is missing, and fetches a kernel for guests into `dir` if it is not there. `Err`, with
/// the reason, where that is not possible.
pub fn prepare(dir: &Path) -> Result<Result<Kernel, String>> {
    let script = crate::repo_root().join("upgrade-tests/guest/install.sh");
    let output = Command::new(&script).arg(dir).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| script.display().to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    match output.status.code() {
        Some(0) => {}
        Some(NOT_POSSIBLE) => {
            return Ok(Err(text.trim_end().lines().next_back().unwrap_or_default().to_owned()));
        }
        _ => bail!("{}: {}", script.display(), output.status),
    }
    Ok(Ok(Kernel::find(dir).context("the kernel's package has no kernel")?))
}

/// The directory that guests of all steps share, so that a kernel is fetched once.
pub fn shared_dir() -> Result<std::path::PathBuf> {
    Ok(cargo::target_dir()?.join("guests"))
}
