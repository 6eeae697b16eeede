//! A disk with a file system: files of stamps, each written anew under another name, made durable,
//! and renamed into its place; so what was acknowledged outlives a reset of the guest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nebd_guest::board::{BLOCK_BYTES, Board, Kind, OfDisk, Value};
use nebd_guest::stamp::{Dice, mix};
use rustix::fs::{Advice, OFlags, fadvise};

use crate::blocks::{self, Aligned};
use crate::memory::Mapping;
use crate::meter::Meter;
use crate::system;

/// Files of each thread.
const FILES: u64 = 24;
/// Blocks of the largest file.
const BLOCKS_MAX: u64 = 24;
/// After a request that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// A mounted disk.
pub struct FileDisk {
    device: PathBuf,
    mounted: PathBuf,
    kind: Kind,
    board: Board<Mapping>,
    disk: usize,
    meter: Arc<Meter>,
}

impl FileDisk {
    /// Makes the file system if an earlier boot has not, and mounts it.
    pub fn mount(
        device: &Path,
        kind: Kind,
        board: Board<Mapping>,
        disk: usize,
        meter: Arc<Meter>,
    ) -> Result<FileDisk> {
        let mounted = PathBuf::from(format!("/mnt/{disk}"));
        fs::create_dir_all(&mounted)?;
        let files = FileDisk { device: device.to_owned(), mounted, kind, board, disk, meter };
        if board.of_disk(disk, OfDisk::Made) == 0 {
            let (program, arguments): (&str, &[&str]) = match kind {
                Kind::Xfs => ("/sbin/mkfs.xfs", &["-q", "-f"]),
                _ => ("/sbin/mkfs.ext4", &["-q", "-F"]),
            };
            ensure!(files.tool(program, arguments)?, "{program} failed");
            board.set_of_disk(disk, OfDisk::Made, 1);
        }
        system::mount_disk(&files.device, &files.mounted, files.name())?;
        Ok(files)
    }

    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Xfs => "xfs",
            _ => "ext4",
        }
    }

    /// Runs a tool on the disk; false if it does not like what it finds.
    fn tool(&self, program: &str, arguments: &[&str]) -> Result<bool> {
        let mut command = Command::new(program);
        let status = command.args(arguments).arg(&self.device).status().context("a tool")?;
        if !status.success() {
            println!("GUEST {program} {}: {status}", self.device.display());
        }
        Ok(status.success())
    }

    /// Unmounts.
    pub fn unmount(&self) -> Result<()> {
        system::unmount_disk(&self.mounted)
    }

    /// Unmounts, and has the file system checked.
    pub fn unmount_and_check(&self) -> Result<()> {
        self.unmount()?;
        let is_clean = match self.kind {
            Kind::Xfs => self.tool("/sbin/xfs_repair", &["-n"])?,
            _ => self.tool("/sbin/e2fsck", &["-f", "-n"])?,
        };
        self.board.set_of_disk(self.disk, OfDisk::Fsck, if is_clean { 1 } else { 2 });
        if !is_clean {
            println!("GUEST-WRONG disk {}: its file system is damaged", self.disk);
        }
        Ok(())
    }

    /// Writes, removes and reads files of this thread, one at a time.
    pub fn work(&self, thread: u64, seed: u64, rest: Duration, stop: &AtomicBool) {
        let mut dice = Dice::new(seed);
        let mut memory = Aligned::new(BLOCKS_MAX as usize);
        while !stop.load(SeqCst) {
            let slot = thread * FILES + dice.below(FILES);
            let is_in_doubt = self.board.entry(self.disk, slot as usize).is_in_doubt();
            match dice.below(100) {
                _ if is_in_doubt => self.compare_file(slot, true, &mut memory),
                0..50 => self.write(slot, dice.percent(50), &mut memory),
                50..60 => self.remove(slot),
                _ => self.compare_file(slot, dice.percent(50), &mut memory),
            }
            if !rest.is_zero() {
                std::thread::sleep(rest);
            }
        }
    }

    /// Compares all files with what was acknowledged.
    pub fn compare(&self, threads: u64) {
        let mut memory = Aligned::new(BLOCKS_MAX as usize);
        for slot in 0..threads * FILES {
            self.compare_file(slot, true, &mut memory);
        }
    }

    fn path(&self, slot: u64) -> PathBuf {
        self.mounted.join(format!("{slot}"))
    }

    fn write(&self, slot: u64, is_direct: bool, memory: &mut Aligned) {
        let value = Value::new(self.meter.number(), false);
        let blocks = blocks_of(slot, value.number());
        let bytes = memory.blocks(blocks as usize);
        for (index, bytes) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            blocks::fill(bytes, self.disk, block_of(slot, index as u64), value);
        }
        let new = self.mounted.join(format!("{slot}.new"));
        self.change(slot, value, "write a file", || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).custom_flags(direct(is_direct));
            let mut file = options.open(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, self.path(slot))?;
            File::open(&self.mounted)?.sync_all()
        });
    }

    fn remove(&self, slot: u64) {
        let value = Value::new(self.meter.number(), true);
        self.change(slot, value, "remove a file", || match fs::remove_file(self.path(slot)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => File::open(&self.mounted)?.sync_all(),
        });
    }

    fn change(
        &self,
        slot: u64,
        value: Value,
        what: &str,
        request: impl FnOnce() -> io::Result<()>,
    ) {
        self.board.begin(self.disk, slot as usize, value);
        match self.meter.measure(request) {
            Ok(()) => self.board.acknowledge(self.disk, slot as usize, value),
            Err(error) => self.failed(what, &error),
        }
    }

    fn compare_file(&self, slot: u64, is_direct: bool, memory: &mut Aligned) {
        let entry = self.board.entry(self.disk, slot as usize);
        let number = match self.meter.measure(|| self.read(slot, is_direct, memory)) {
            Ok(Ok(number)) => number,
            Ok(Err(what)) => return self.meter.mismatch(&format!("file {slot}: {what}")),
            Err(error) => return self.failed("read a file", &error),
        };
        self.meter.add(OfDisk::Checked, 1);
        match entry.settle(number) {
            Some(value) if entry.is_in_doubt() => {
                self.board.acknowledge(self.disk, slot as usize, value);
            }
            Some(_) => {}
            None => self.meter.mismatch(&format!("file {slot}: {number:?}, not {entry:?}")),
        }
    }

    /// The number of the write that a file holds, or `None` if there is no such file.
    fn read(
        &self,
        slot: u64,
        is_direct: bool,
        memory: &mut Aligned,
    ) -> io::Result<Result<Option<u64>, String>> {
        let path = self.path(slot);
        let opened = OpenOptions::new().read(true).custom_flags(direct(is_direct)).open(path);
        let mut file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Ok(None)),
            Err(error) => return Err(error),
        };
        if !is_direct {
            // So that it is the disk that is read.
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
        let length = file.metadata()?.len();
        if length == 0 || length % BLOCK_BYTES as u64 != 0 || length / 4096 > BLOCKS_MAX {
            return Ok(Err(format!("it has {length} bytes")));
        }
        let bytes = memory.blocks(length as usize / BLOCK_BYTES);
        file.read_exact(bytes)?;
        Ok(number_of(bytes, self.disk, slot).map(Some))
    }

    fn failed(&self, what: &str, error: &io::Error) {
        self.meter.error(what, error);
        std::thread::sleep(PAUSE);
    }
}

/// The number of the write that a whole file is of.
fn number_of(bytes: &[u8], disk: usize, slot: u64) -> Result<u64, String> {
    let mut of_file = None;
    for (index, bytes) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
        let number = blocks::number(bytes, disk, block_of(slot, index as u64))?;
        let number = number.ok_or_else(|| format!("block {index} is zeros"))?;
        if *of_file.get_or_insert(number) != number {
            return Err(format!("block {index} is of write {number}, others of {of_file:?}"));
        }
    }
    let number = of_file.ok_or("it is empty")?;
    let (blocks, expected) = ((bytes.len() / BLOCK_BYTES) as u64, blocks_of(slot, number));
    if blocks != expected {
        return Err(format!("write {number} had {expected} blocks, not {blocks}"));
    }
    Ok(number)
}

fn blocks_of(slot: u64, number: u64) -> u64 {
    1 + mix(slot ^ mix(number)) % BLOCKS_MAX
}

/// Stamps of a file's blocks differ from those of all others.
fn block_of(slot: u64, index: u64) -> u64 {
    slot * BLOCKS_MAX + index
}

fn direct(is_direct: bool) -> i32 {
    if is_direct { OFlags::DIRECT.bits() as i32 } else { 0 }
}
