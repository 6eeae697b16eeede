//! A guest's kernel, as `install.sh` unpacked it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A kernel, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// The directory that has its modules.
    modules: PathBuf,
}

/// What a guest needs to find disks of virtio at a PCI bus, in the order in which they are loaded.
pub const DISK_MODULES: [&str; 6] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
];

impl Kernel {
    /// The newest kernel in `DIR/kernel`, where `install.sh DIR` puts it.
    pub fn find(dir: &Path) -> Option<Kernel> {
        let unpacked = dir.join("kernel");
        let entries = fs::read_dir(unpacked.join("boot")).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let release =
            names.filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned())).max()?;
        let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
        let modules = unpacked.join("lib/modules").join(release).join("kernel");
        Some(Kernel { image, modules })
    }

    /// A module's content, by its path among the modules.
    pub fn module(&self, path: &str) -> io::Result<Vec<u8>> {
        let path = self.modules.join(path);
        fs::read(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("kernel module {}: {error}", path.display()))
        })
    }
}
