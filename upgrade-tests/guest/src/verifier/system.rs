//! The guest's kernel: what it mounts, loads, finds and ends with.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nebd_guest::board::{Board, Common, MAGIC, State};
use nebd_guest::image::MODULES;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::memory::Mapping;

/// Of the device that shows memory of the host: Red Hat, ivshmem.
const VENDOR: &str = "0x1af4";
const DEVICE: &str = "0x1110";
/// VIRTIO_F_RING_PACKED, a bit.
const RING_PACKED: usize = 34;
const NO_PARAMETERS: &CStr = c"";
/// The board's memory, among the device's resources.
const RESOURCE: &str = "resource2";

/// What any program finds on a system.
pub fn prepare() -> Result<()> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, at, kind, MountFlags::empty(), None).with_context(|| format!("mount {at}"))?;
    }
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(())
}

/// Loads every module there is, in the order of their names.
pub fn load_modules() -> Result<()> {
    let entries = fs::read_dir(MODULES)?.map(|entry| Ok(entry?.path()));
    let mut modules = entries.collect::<io::Result<Vec<PathBuf>>>()?;
    modules.sort();
    for module in modules {
        match finit_module(File::open(&module)?, NO_PARAMETERS, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => bail!("{}: {error}", module.display()),
        }
    }
    Ok(())
}

/// Finds the board, and counts this boot.
pub fn board() -> Result<Board<Mapping>> {
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let device = entry?.path();
        let is = |file: &str, value: &str| {
            fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim() == value)
        };
        if !is("vendor", VENDOR) || !is("device", DEVICE) {
            continue;
        }
        fs::write(device.join("enable"), "1").context("enable the board's device")?;
        let resource = OpenOptions::new().read(true).write(true).open(device.join(RESOURCE))?;
        let board = Board(Mapping::new(&resource).context("map the board")?);
        ensure!(board.get(Common::Magic) == MAGIC, "the board has not been written");
        board.set(Common::State, State::Prepares as u64);
        board.set(Common::Boots, board.get(Common::Boots) + 1);
        return Ok(board);
    }
    bail!("there is no board");
}

/// The device node of a disk, once it is there and has this size.
pub fn disk(index: usize, bytes: u64) -> Result<PathBuf> {
    let letter = char::from(b'a' + index as u8);
    let path = PathBuf::from(format!("/dev/vd{letter}"));
    let size = PathBuf::from(format!("/sys/block/vd{letter}/size"));
    for _ in 0..600 {
        let sectors = fs::read_to_string(&size).unwrap_or_default();
        if path.exists() && sectors.trim().parse() == Ok(bytes / 512) {
            return Ok(path);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let found = fs::read_to_string(&size).unwrap_or_else(|error| error.to_string());
    bail!("{}: {bytes} bytes were expected, sectors found: {}", path.display(), found.trim());
}

/// How many virtqueues of a disk this kernel uses, and whether they are packed.
pub fn virtqueues(device: &Path) -> Result<(usize, bool)> {
    let name = device.file_name().context("a disk has a name")?;
    let of_disk = Path::new("/sys/block").join(name);
    let queues = fs::read_dir(of_disk.join("mq")).context("the disk's queues")?.count();
    let features = fs::read_to_string(of_disk.join("device/features")).context("features")?;
    Ok((queues, features.as_bytes().get(RING_PACKED) == Some(&b'1')))
}

/// Mounts a file system.
pub fn mount_disk(disk: &Path, at: &Path, kind: &str) -> Result<()> {
    mount(disk, at, kind, MountFlags::NOATIME, None)
        .with_context(|| format!("mount {} ({kind})", disk.display()))
}

/// Unmounts one.
pub fn unmount_disk(at: &Path) -> Result<()> {
    unmount(at, UnmountFlags::empty()).with_context(|| format!("unmount {}", at.display()))
}

/// Boots again.
pub fn boot_again() {
    if let Err(error) = reboot(RebootCommand::Restart) {
        println!("GUEST-FAILED reboot: {error}");
    }
}

/// Switches the machine off.
pub fn power_off() -> ! {
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        println!("GUEST-FAILED power off: {error}");
    }
    loop {
        std::thread::park();
    }
}
