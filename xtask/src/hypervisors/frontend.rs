//! Ways in by `nebdctl attach`: a volume, its attachment, a guest with QEMU's lines, an upgrade under it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use nebd_guest::kernel::Kernel;

use super::Run;

/// As `nebdctl attach --as` has them; the blocks of each are named after it.
pub const WAYS: [&str; 1] = ["vhost-user"];
/// Blocks of each, in this order; the upgrade happens while the guest runs.
const BLOCKS: [&str; 5] = ["create", "attach", "guest", "upgrade", "detach"];
/// QEMU's options for the disk, which `nebdctl attach` prints.
const DISK_OPTIONS: [&str; 3] = ["-chardev ", "-blockdev ", "-device "];
/// How the page says where the client socket is.
const SOCKET_DIR: &str = "${NEBD_SOCKET%/*}";

/// The names of one way's blocks.
pub fn blocks(way: &str) -> Vec<String> {
    BLOCKS.iter().map(|block| format!("{way}-{block}")).collect()
}

impl Run<'_> {
    /// Runs all blocks of one way.
    pub(super) fn frontend(&self, way: &str, kernel: &Kernel, initrd: &Path) -> Result<()> {
        self.block(&format!("{way}-create"))?;
        let printed = self.block(&format!("{way}-attach"))?;
        let (guest, upgrade) = (format!("{way}-guest"), format!("{way}-upgrade"));
        let dir = self.host.socket().parent().context("the socket is in a directory")?;
        let lines = disk_options(self.document.block(&guest)?, &dir.to_string_lossy());
        ensure!(!lines.is_empty(), "{guest}: there is no disk");
        for line in lines {
            ensure!(printed.contains(&line), "{guest}: nebdctl attach does not print {line:?}");
        }
        self.boot(&guest, kernel, initrd, Some(&upgrade))?;
        self.block(&format!("{way}-detach"))?;
        Ok(())
    }
}

/// Lines of a block that give QEMU its disk.
fn disk_options(block: &str, socket_dir: &str) -> Vec<String> {
    let lines = block.lines().map(|line| line.trim().trim_end_matches('\\').trim_end());
    let lines = lines.filter(|line| DISK_OPTIONS.iter().any(|option| line.starts_with(option)));
    lines.map(|line| line.replace(SOCKET_DIR, socket_dir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_disk_s_options() {
        let block =
            "qemu \\\n  -chardev path=${NEBD_SOCKET%/*}/v.sock \\\n  -device vhost \\\n  \"$@\"\n";
        assert_eq!(
            disk_options(block, "/run/nebd"),
            ["-chardev path=/run/nebd/v.sock", "-device vhost"]
        );
    }
}
