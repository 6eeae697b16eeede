//! The `file` backend in unusual places: a full file system, one without direct IO, block devices.
//! Needs root; says so where it skips.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::*;
use nebd_abi::{Errno, Op, OpFlags};
use nebd_backend::{
    Backend, BackendError, FileBackend, FileConfig, FileEngineChoice, NoStore, PrepareContext,
    Volume, VolumeSpec,
};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

const MIB: u64 = 1 << 20;

fn open(backend: &FileBackend, spec: &VolumeSpec) -> Arc<dyn Volume> {
    backend.open(spec, &context(Arc::new(NoStore::default()), None, 1)).unwrap().volume
}

/// Runs `test` in a thread whose mounts nobody else sees, over a tmpfs of one mebibyte.
fn in_small_tmpfs(test: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            let mounted = nix::sched::unshare(CloneFlags::CLONE_NEWNS)
                .and_then(|()| {
                    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
                })
                .and_then(|()| {
                    let (kind, options) = (Some("tmpfs"), Some("size=1m"));
                    nix::mount::mount(kind, dir.path(), kind, MsFlags::empty(), options)
                });
            match mounted {
                Ok(()) => test(dir.path()),
                Err(errno) => skip(&format!("cannot mount a tmpfs: {errno}")),
            }
        });
    });
}

#[test]
fn no_space_is_reported_and_mended() {
    for engine in ENGINES {
        in_small_tmpfs(|dir| {
            let config = FileConfig { engine, ..FileConfig::new(dir) };
            let Ok(backend) = FileBackend::new(config) else { return skip("no io_uring") };
            let mut shard = Shard::new();
            let spec = backend.create(&spec("file:big", 4 * MIB, 4096)).unwrap();
            let volume = open(&backend, &spec);
            let data = pattern(64 << 10, 1);
            let mut result = Ok(());
            let mut written = 0;
            while result.is_ok() && written < 4 * MIB {
                result = shard.write(&*volume, written, &data, OpFlags::NONE);
                written += data.len() as u64;
            }
            assert_eq!(result, Err(Errno::NOSPC));
            assert!(shard.read(&*volume, 0, data.len()).unwrap() == data);
            shard.flush(&*volume).unwrap();
            shard.plain(&*volume, Op::Discard, OpFlags::NONE, 0, MIB / 2).unwrap();
            shard.write(&*volume, 3 * MIB, &data, OpFlags::FUA).unwrap();
            assert!(shard.read(&*volume, 3 * MIB, data.len()).unwrap() == data);
            assert!(shard.read(&*volume, 0, 4096).unwrap() == [0; 4096]);
        });
    }
}

/// A loop device over a file, detached at the end.
struct Loop {
    device: PathBuf,
    dir: tempfile::TempDir,
}

impl Loop {
    fn new(bytes: u64, sector_bytes: u32) -> Option<Loop> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector_bytes.to_string()])
            .arg(&file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let device = String::from_utf8(output.stdout).unwrap().trim().into();
                Some(Loop { device, dir })
            }
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).into_owned();
                skip(&format!("no loop device: {}", why.trim()));
                None
            }
            Err(error) => {
                skip(&format!("no losetup: {error}"));
                None
            }
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

fn device_spec(device: &Loop, block_size: u32) -> VolumeSpec {
    VolumeSpec { path: Some(device.device.clone()), ..spec("file:disk", 0, block_size) }
}

#[test]
fn a_block_device_is_a_volume() {
    for engine in ENGINES {
        // 512-byte blocks over 4096-byte sectors cannot be direct; all the same they work.
        for (sector_bytes, block_size) in [(512, 512), (512, 4096), (4096, 4096), (4096, 512)] {
            let Some(device) = Loop::new(8 * MIB, sector_bytes) else { return };
            let config = FileConfig { engine, ..FileConfig::new("/nonexistent") };
            let Ok(backend) = FileBackend::new(config) else { return skip("no io_uring") };
            let mut shard = Shard::new();
            let wrong = VolumeSpec { size: MIB, ..device_spec(&device, block_size) };
            assert!(matches!(backend.create(&wrong), Err(BackendError::Size { .. })));
            let spec = backend.create(&device_spec(&device, block_size)).unwrap();
            assert_eq!(spec.size, 8 * MIB);
            let volume = open(&backend, &spec);
            let data = pattern(4 * MIB as usize, 1);
            shard.write(&*volume, 0, &data, OpFlags::FUA).unwrap();
            let unit = u64::from(block_size);
            shard.write(&*volume, unit, &pattern(unit as usize, 2), OpFlags::NONE).unwrap();
            shard.plain(&*volume, Op::Discard, OpFlags::NONE, 2 * MIB, MIB).unwrap();
            shard.plain(&*volume, Op::WriteZeroes, OpFlags::FUA, MIB, MIB + unit).unwrap();
            let kept = OpFlags::NO_UNMAP;
            shard.plain(&*volume, Op::WriteZeroes, kept, 3 * MIB + unit, MIB / 2).unwrap();
            shard.flush(&*volume).unwrap();
            let mut expected = data;
            expected[unit as usize..2 * unit as usize].copy_from_slice(&pattern(unit as usize, 2));
            // What is discarded on a loop device reads as zeros.
            expected[MIB as usize..3 * MIB as usize].fill(0);
            expected[(3 * MIB + unit) as usize..][..MIB as usize / 2].fill(0);
            assert!(shard.read(&*volume, 0, 4 * MIB as usize).unwrap() == expected);
            let mut memory = Memory::new(2 * unit as usize, 1);
            let mut read = shard.request(Op::Read, OpFlags::NONE, unit, 2 * unit);
            read.segments = memory.segments(&[3]);
            shard.run(&*volume, read).unwrap();
            assert!(memory.as_ref() == &expected[unit as usize..3 * unit as usize]);
            let resized = volume.resize(16 * MIB);
            assert!(matches!(resized, Err(BackendError::Unsupported { .. })));
            volume.close();
        }
    }
}

/// Another name for a device; not a link, but a node of its own.
fn node_of(device: &Loop) -> PathBuf {
    use nix::sys::stat::{Mode, SFlag, mknod, stat};
    let path = device.dir.path().join("node");
    let number = stat(&device.device).unwrap().st_rdev;
    mknod(&path, SFlag::S_IFBLK, Mode::S_IRWXU, number).unwrap();
    path
}

#[test]
fn a_device_has_one_owner_whatever_its_nodes() {
    let Some(device) = Loop::new(MIB, 512) else { return };
    let backend = backend(Path::new("/nonexistent"), FileEngineChoice::Auto);
    let first = backend.create(&device_spec(&device, 4096)).unwrap();
    let second = VolumeSpec { path: Some(node_of(&device)), ..first.clone() };
    let owner = open(&backend, &first);
    let context = || context(Arc::new(NoStore::default()), None, 1);
    let refused = backend.open(&second, &context()).err();
    assert!(matches!(refused, Some(BackendError::Busy { .. })), "{refused:?}");
    assert_eq!(backend.observe(&second).unwrap(), MIB, "an observer needs no claim");
    owner.close();
    drop(owner);
    let mut shard = Shard::new();
    let volume = open(&backend, &second);
    shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::FUA).unwrap();
    volume.close();
}

#[test]
fn a_device_whose_storage_is_gone_reports_errors() {
    for engine in ENGINES {
        let Some(device) = Loop::new(8 * MIB, 512) else { return };
        let config = FileConfig { engine, ..FileConfig::new("/nonexistent") };
        let Ok(backend) = FileBackend::new(config) else { return skip("no io_uring") };
        let mut shard = Shard::new();
        let spec = backend.create(&device_spec(&device, 4096)).unwrap();
        let volume = open(&backend, &spec);
        shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::NONE).unwrap();
        std::fs::OpenOptions::new().write(true).open(device.file()).unwrap().set_len(MIB).unwrap();
        assert_eq!(shard.read(&*volume, 4 * MIB, 4096), Err(Errno::IO));
        shard.read(&*volume, 0, 4096).unwrap();
        // Shrunk as a device: what is beyond its end is an error, not zeros.
        let status = Command::new("losetup").arg("--set-capacity").arg(&device.device).status();
        if status.is_ok_and(|status| status.success()) {
            assert_eq!(shard.read(&*volume, 4 * MIB, 4096), Err(Errno::IO));
            let result = shard.write(&*volume, 4 * MIB, &pattern(4096, 1), OpFlags::NONE);
            assert!(result.is_err());
            let small = backend.open(&spec, &context(Arc::new(NoStore::default()), None, 1));
            assert!(small.is_err());
        }
        volume.close();
    }
}

#[test]
fn what_is_neither_file_nor_device_is_refused() {
    let backend = backend(Path::new("/nonexistent"), FileEngineChoice::Auto);
    for path in ["/dev/null", "/proc/self", "/dev"] {
        let spec = VolumeSpec { path: Some(path.into()), ..spec("file:x", 0, 4096) };
        assert!(backend.create(&spec).is_err(), "{path}");
        assert!(backend.observe(&spec).is_err(), "{path}");
    }
}

#[test]
fn a_device_is_given_up_by_a_living_owner() {
    for engine in ENGINES {
        let Some(device) = Loop::new(8 * MIB, 512) else { return };
        let config = FileConfig { engine, ..FileConfig::new("/nonexistent") };
        let [old, new] = [0, 1].map(|_| FileBackend::new(config.clone()));
        let (Ok(old), Ok(new)) = (old, new) else { return skip("no io_uring") };
        let store = || Arc::new(NoStore::default());
        let spec = old.create(&device_spec(&device, 4096)).unwrap();
        let owner = open(&old, &spec);
        let mut shard = Shard::new();
        let data = pattern(4096, 1);
        let prepared = new.prepare(&spec, &PrepareContext { store: store() }).unwrap();
        shard.write(&*owner, 0, &data, OpFlags::NONE).unwrap();
        let larger = VolumeSpec { size: 16 * MIB, ..spec.clone() };
        let refused = new.prepare(&larger, &PrepareContext { store: store() }).err();
        assert!(matches!(refused, Some(BackendError::Size { .. })), "{refused:?}");

        // It lives, and has a request in flight no more.
        owner.relinquish();
        let taken = prepared.open(&spec, &context(store(), Some(1), 2)).unwrap().volume;
        assert!(shard.read(&*taken, 0, 4096).unwrap() == data);
        assert_eq!(shard.write(&*owner, 0, &pattern(4096, 2), OpFlags::NONE), Err(Errno(9)));
        assert!(shard.read(&*taken, 0, 4096).unwrap() == data);
    }
}
