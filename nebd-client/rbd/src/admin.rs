//! Creating and removing volumes. The client socket has no message for either, and the admin API is
//! gRPC, which has no place in a hypervisor: so `nebdctl` does it, as a child process.

use std::process::{Command, Output, Stdio};

use nebd_client::Errno;

use crate::config::Config;
use crate::failure::{BUSY, EXIST, NOENT, REFUSED, tell};

/// Of volumes whose host says nothing else.
const BLOCK_SIZE_DEFAULT: u32 = 4096;
/// What `nebdctl` ends with where it reached no server.
const EXIT_UNREACHABLE: i32 = 3;

/// Creates a volume of at least `size` bytes.
pub fn create(config: &Config, volume: &str, size: u64) -> Result<(), Errno> {
    let block = config.block_size.unwrap_or(BLOCK_SIZE_DEFAULT);
    let size = size.checked_next_multiple_of(u64::from(block).max(1)).ok_or(Errno::INVAL)?;
    let arguments = ["create", volume, "--size", &size.to_string(), "--block-size"];
    let output = run(config, &[&arguments[..], &[&block.to_string()]].concat())?;
    conclude(&output, || match is_there(config, volume) {
        true => EXIST,
        false => Errno::INVAL,
    })
}

/// Removes a volume.
pub fn remove(config: &Config, volume: &str) -> Result<(), Errno> {
    let output = run(config, &["delete", volume])?;
    conclude(&output, || match is_there(config, volume) {
        true => BUSY,
        false => NOENT,
    })
}

fn is_there(config: &Config, volume: &str) -> bool {
    run(config, &["info", volume]).is_ok_and(|output| output.status.success())
}

fn run(config: &Config, arguments: &[&str]) -> Result<Output, Errno> {
    let program = config.nebdctl.as_deref().unwrap_or("nebdctl".as_ref());
    let mut command = Command::new(program);
    if let Some(socket) = &config.socket {
        command.arg("--socket").arg(socket);
    }
    command.arg("volume").args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    command.output().map_err(|error| {
        tell(&format!("cannot run {}: {error}; NEBDCTL can say where it is", program.display()));
        Errno::NOTSUP
    })
}

/// What the command came to; `refusal` finds out what a refusal is as an errno.
fn conclude(output: &Output, refusal: impl FnOnce() -> Errno) -> Result<(), Errno> {
    if output.status.success() {
        return Ok(());
    }
    tell(String::from_utf8_lossy(&output.stderr).trim_end());
    Err(match output.status.code() {
        Some(1) => refusal(),
        Some(EXIT_UNREACHABLE) => REFUSED,
        _ => Errno::INVAL,
    })
}
