//! What is looked at before a candidate is started.

use std::path::Path;

use nebd_backend::FdStore;

use crate::server::Server;

/// Descriptors that a candidate needs for each entry of the store, and for itself.
const DESCRIPTORS_PER_ENTRY: u64 = 3;
const DESCRIPTORS_MIN: u64 = 512;
/// Memory that a candidate needs beside what it maps.
const MEMORY_KIB_MIN: u64 = 64 << 10;

/// Refuses what is no executable, and what others could have put there.
pub(super) fn check_binary(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let shown = path.display();
    let metadata =
        std::fs::metadata(path).map_err(|error| format!("{shown} cannot be used: {error}"))?;
    if !path.is_absolute() || !metadata.is_file() || metadata.mode() & 0o111 == 0 {
        return Err(format!("{shown} is no executable file with an absolute path"));
    }
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != 0 && metadata.uid() != own {
        return Err(format!("{shown} belongs to user {}, not to root or {own}", metadata.uid()));
    }
    if metadata.mode() & 0o002 != 0 {
        return Err(format!("{shown} can be written by everybody; chmod o-w it"));
    }
    let group = rustix::process::getegid().as_raw();
    if metadata.mode() & 0o020 != 0 && metadata.gid() != 0 && metadata.gid() != group {
        return Err(format!("{shown} can be written by group {}; chmod g-w it", metadata.gid()));
    }
    Ok(())
}

/// Refuses a host that has no room for two servers.
pub(super) fn check_means(server: &Server) -> Result<(), String> {
    let stored = server.store.names("").len() as u64;
    let wanted = DESCRIPTORS_MIN + stored * DESCRIPTORS_PER_ENTRY;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if limit.maximum.is_some_and(|limit| limit < wanted) {
        return Err(format!(
            "a candidate needs {wanted} descriptors, the limit is {}: raise LimitNOFILE",
            limit.maximum.unwrap_or_default()
        ));
    }
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    match available {
        Some(kib) if kib < MEMORY_KIB_MIN => Err(format!(
            "a second server needs {} MiB, and the host has {} MiB left",
            MEMORY_KIB_MIN >> 10,
            kib >> 10
        )),
        _ => Ok(()),
    }
}
