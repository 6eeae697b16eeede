//! Planned takeovers: a volume is looked at while another process owns it, given up, and taken.
//!
//! Two backends of one process stand for two processes: their descriptions are separate, and so are
//! the locks.

mod common;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use common::fuse::Mount;
use common::*;
use nebd_abi::{Errno, OpFlags};
use nebd_backend::{
    Backend, BackendError, FdStore, FileBackend, FileConfig, FileEngineChoice, MemBackend, NoStore,
    NullBackend, Opened, PrepareContext, PreparedVolume, Volume, VolumeSpec,
};

const BLOCK: usize = 4096;
const BYTES: u64 = 16 * BLOCK as u64;

fn look(store: &Arc<TestStore>) -> PrepareContext {
    PrepareContext { store: store.clone() }
}

fn backend_of(dir: &Path, engine: FileEngineChoice) -> Option<FileBackend> {
    FileBackend::new(FileConfig { engine, ..FileConfig::new(dir) })
        .inspect_err(|refusal| skip(&refusal.to_string()))
        .ok()
}

/// A planned takeover of generation 2.
fn take_over(
    prepared: Box<dyn PreparedVolume>,
    spec: &VolumeSpec,
    store: &Arc<TestStore>,
) -> Result<Opened, BackendError> {
    prepared.open(spec, &context(store.clone(), Some(1), 2))
}

fn write(shard: &mut Shard, volume: &dyn Volume, block: u64, seed: u64) -> Result<(), Errno> {
    shard.write(volume, block * BLOCK as u64, &pattern(BLOCK, seed), OpFlags::NONE)
}

fn read(shard: &mut Shard, volume: &dyn Volume, block: u64) -> Vec<u8> {
    shard.read(volume, block * BLOCK as u64, BLOCK).unwrap()
}

#[test]
fn a_file_is_prepared_while_its_owner_writes_and_taken_once_it_is_given_up() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let store = TestStore::new();
        let [old, new] = [0, 1].map(|_| backend_of(dir.path(), engine));
        let (Some(old), Some(new)) = (old, new) else { return };
        let spec = old.create(&spec("file:f", BYTES, BLOCK as u32)).unwrap();
        let owner = old.open(&spec, &context(store.clone(), None, 1)).unwrap().volume;
        let witnesses = store.names("w.");
        let mut shard = Shard::new();
        write(&mut shard, &*owner, 0, 1).unwrap();
        let prepared = new.prepare(&spec, &look(&store)).unwrap();
        write(&mut shard, &*owner, 0, 2).unwrap();
        // Whoever looked and went away has changed nothing.
        drop(new.prepare(&spec, &look(&store)).unwrap());
        assert_eq!(store.names("w."), witnesses);

        let taken = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| {
                let opened = take_over(prepared, &spec, &store).unwrap();
                taken.store(true, SeqCst);
                opened
            });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!taken.load(SeqCst), "taken from its owner");
            write(&mut shard, &*owner, 1, 3).unwrap();
            owner.relinquish();
            let opened = taker.join().unwrap();
            assert_eq!((opened.major, opened.volume.size()), (1, BYTES));
            for (block, seed) in [(0, 2), (1, 3)] {
                assert!(read(&mut shard, &*opened.volume, block) == pattern(BLOCK, seed));
            }
            shard.flush(&*opened.volume).unwrap();
            // What comes too late reaches nothing, and is not called a success.
            write(&mut shard, &*owner, 1, 4).unwrap_err();
            shard.flush(&*owner).unwrap_err();
            assert!(read(&mut shard, &*opened.volume, 1) == pattern(BLOCK, 3));
            owner.close();
            owner.relinquish();
            assert!(!store.names("w.").is_empty(), "they are the successor's");
            opened.volume.close();
            assert!(store.names("w.").is_empty());
        });
    }
}

#[test]
fn a_first_open_of_what_was_prepared_does_not_wait_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::new();
    let backend = backend(dir.path(), FileEngineChoice::Auto);
    let spec = backend.create(&spec("file:f", BYTES, BLOCK as u32)).unwrap();
    let _owner = backend.open(&spec, &context(store.clone(), None, 1)).unwrap().volume;
    let prepared = backend.prepare(&spec, &look(&store)).unwrap();
    let refused = prepared.open(&spec, &context(store, None, 2)).err();
    assert!(matches!(refused, Some(BackendError::Busy { .. })), "{refused:?}");
}

/// What happens between a look and the takeover; the volume is read at the end.
fn taken_after(change: impl FnOnce(&Path, &dyn Volume) -> VolumeSpec, expected: (u64, &[u8])) {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(NoStore::default());
    let choice = FileEngineChoice::Auto;
    let (old, new) = (backend(dir.path(), choice), backend(dir.path(), choice));
    let spec = old.create(&spec("file:f", BYTES, BLOCK as u32)).unwrap();
    let owner = old.open(&spec, &context(store.clone(), None, 1)).unwrap().volume;
    let mut shard = Shard::new();
    write(&mut shard, &*owner, 0, 1).unwrap();
    let prepared = new.prepare(&spec, &PrepareContext { store: store.clone() }).unwrap();
    let spec = change(&dir.path().join("f.img"), &*owner);
    owner.relinquish();
    let volume = prepared.open(&spec, &context(store, Some(1), 2)).unwrap().volume;
    assert_eq!(volume.size(), expected.0);
    assert!(read(&mut shard, &*volume, 0) == expected.1);
    write(&mut shard, &*volume, 1, 5).unwrap();
    assert!(read(&mut shard, &*volume, 1) == pattern(BLOCK, 5));
    let image = std::fs::read(dir.path().join("f.img")).unwrap();
    assert!(image[BLOCK..2 * BLOCK] == pattern(BLOCK, 5), "written to what lies at the path");
}

#[test]
fn what_was_resized_since_has_its_present_size() {
    for bytes in [2 * BYTES, BYTES / 2] {
        let resize = |_: &Path, owner: &dyn Volume| {
            owner.resize(bytes).unwrap();
            spec("file:f", bytes, BLOCK as u32)
        };
        taken_after(resize, (bytes, &pattern(BLOCK, 1)));
    }
}

#[test]
fn what_was_replaced_since_is_opened_anew() {
    let replace = |path: &Path, _: &dyn Volume| {
        let draft = path.with_extension("draft");
        std::fs::write(&draft, pattern(BYTES as usize, 9)).unwrap();
        std::fs::rename(draft, path).unwrap();
        spec("file:f", BYTES, BLOCK as u32)
    };
    taken_after(replace, (BYTES, &pattern(BYTES as usize, 9)[..BLOCK]));
}

#[test]
fn what_has_vanished_since_is_not_made_up() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::new();
    let backend = backend(dir.path(), FileEngineChoice::Auto);
    let spec = backend.create(&spec("file:f", BYTES, BLOCK as u32)).unwrap();
    let prepared = backend.prepare(&spec, &look(&store)).unwrap();
    std::fs::remove_file(dir.path().join("f.img")).unwrap();
    let refused = take_over(prepared, &spec, &store).err();
    assert!(matches!(refused, Some(BackendError::NotFound(_))), "{refused:?}");
    let refused = backend.prepare(&spec, &look(&store)).err();
    assert!(matches!(refused, Some(BackendError::NotFound(_))), "{refused:?}");
}

#[test]
fn a_block_that_cannot_be_read_refuses() {
    for engine in ENGINES {
        let Some(mount) = Mount::new(1 << 20, false) else { return };
        let Some(backend) = backend_of(Path::new("/nonexistent"), engine) else { return };
        let spec = VolumeSpec { path: Some(mount.file()), ..spec("file:v", 1 << 20, 4096) };
        let store = TestStore::new();
        mount.control.state().read_error = Some(libc::EIO);
        let refused = backend.prepare(&spec, &look(&store)).err();
        let Some(BackendError::System { source, .. }) = &refused else { panic!("{refused:?}") };
        assert_eq!(source.raw_os_error(), Some(libc::EIO));
        mount.control.state().read_error = None;
        let prepared = backend.prepare(&spec, &look(&store)).unwrap();
        take_over(prepared, &spec, &store).unwrap();
    }
}

/// A flush that fails between the look and the takeover, and whose report dies, is reported.
#[test]
fn an_error_between_the_two_is_not_lost() {
    let Some(mount) = Mount::new(1 << 20, true) else { return };
    let buffered = FileConfig { direct: false, ..FileConfig::new("/nonexistent") };
    let [old, new] = [0, 1].map(|_| FileBackend::new(buffered.clone()).unwrap());
    let spec = VolumeSpec { path: Some(mount.file()), ..spec("file:v", 1 << 20, 4096) };
    let store = TestStore::new();
    let owner = old.open(&spec, &context(store.clone(), None, 1)).unwrap().volume;
    let prepared = new.prepare(&spec, &look(&store)).unwrap();
    let mut shard = Shard::new();
    mount.control.state().write_error = Some(libc::EIO);
    write(&mut shard, &*owner, 0, 1).unwrap();
    shard.flush(&*owner).unwrap_err();
    mount.control.state().write_error = None;
    owner.relinquish();
    let volume = take_over(prepared, &spec, &store).unwrap().volume;
    shard.flush(&*volume).unwrap_err();
    write(&mut shard, &*volume, 0, 1).unwrap();
    shard.flush(&*volume).unwrap();
}

/// A standby looked at the file long ago. Meanwhile a flush failed, was reported, was mended, and the
/// witnesses were renewed: the error is history, and a cold successor would know nothing of it.
#[test]
fn an_error_that_was_told_since_the_look_is_not_told_again() {
    let Some(mount) = Mount::new(1 << 20, true) else { return };
    let buffered = FileConfig { direct: false, ..FileConfig::new("/nonexistent") };
    let [old, new] = [0, 1].map(|_| FileBackend::new(buffered.clone()).unwrap());
    let spec = VolumeSpec { path: Some(mount.file()), ..spec("file:v", 1 << 20, 4096) };
    let store = TestStore::new();
    let owner = old.open(&spec, &context(store.clone(), None, 1)).unwrap().volume;
    let before = store.names("w.");
    let prepared = new.prepare(&spec, &look(&store)).unwrap();
    let mut shard = Shard::new();
    mount.control.state().write_error = Some(libc::EIO);
    write(&mut shard, &*owner, 0, 1).unwrap();
    shard.flush(&*owner).unwrap_err();
    mount.control.state().write_error = None;
    // Published.
    (0..3).for_each(|_| shard.lane.drain(&mut Vec::new()));
    write(&mut shard, &*owner, 0, 1).unwrap();
    for _ in 0..10_000 {
        shard.flush(&*owner).unwrap();
        let names = store.names("w.");
        if !names.is_empty() && names.iter().all(|name| !before.contains(name)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(store.names("w.").iter().all(|name| !before.contains(name)), "renewed");
    // As the owner's process ends: nothing of the volume is written or synced.
    owner.relinquish();
    let volume = take_over(prepared, &spec, &store).unwrap().volume;
    shard.flush(&*volume).unwrap();
}

#[test]
fn memory_is_prepared_without_touching_it() {
    let store = TestStore::new();
    let [old, new] = [0, 1].map(|_| MemBackend::new(store.clone()));
    let spec = spec("mem:m", 64 << 20, BLOCK as u32);
    let refused = new.prepare(&spec, &look(&store)).err();
    assert!(matches!(refused, Some(BackendError::Lost(_))), "{refused:?}");
    let first = old.open(&spec, &context(store.clone(), None, 1)).unwrap();
    let mut shard = Shard::new();
    write(&mut shard, &*first.volume, 7, 1).unwrap();
    let blocks = |store: &TestStore| {
        rustix::fs::fstat(store.fetch("m.m").unwrap().as_fd()).unwrap().st_blocks
    };
    let before = blocks(&store);
    let prepared = new.prepare(&spec, &look(&store)).unwrap();
    assert_eq!(blocks(&store), before);
    write(&mut shard, &*first.volume, 8, 2).unwrap();
    first.volume.relinquish();
    let second = take_over(prepared, &spec, &store).unwrap();
    assert_eq!(second.incarnation, first.incarnation);
    for (block, seed) in [(7, 1), (8, 2)] {
        assert!(read(&mut shard, &*second.volume, block) == pattern(BLOCK, seed));
    }
}

#[test]
fn memory_that_changed_its_size_since_keeps_its_contents() {
    // Grown beyond what was mapped; and back and forth within what a larger one had before.
    for (before, steps) in [(BYTES, &[4 * BYTES][..]), (4 * BYTES, &[BYTES, 2 * BYTES])] {
        let store = TestStore::new();
        let [old, new] = [0, 1].map(|_| MemBackend::new(store.clone()));
        let mut spec = spec("mem:m", before, BLOCK as u32);
        let owner = old.open(&spec, &context(store.clone(), None, 1)).unwrap().volume;
        let prepared = new.prepare(&spec, &look(&store)).unwrap();
        for step in steps {
            spec.size = owner.resize(*step).unwrap();
        }
        let last = spec.size / BLOCK as u64 - 1;
        let mut shard = Shard::new();
        write(&mut shard, &*owner, last, 3).unwrap();
        owner.relinquish();
        let volume = take_over(prepared, &spec, &store).unwrap().volume;
        assert_eq!(volume.size(), spec.size);
        assert!(read(&mut shard, &*volume, last) == pattern(BLOCK, 3));
        write(&mut shard, &*volume, last, 4).unwrap();
        assert!(read(&mut shard, &*volume, last) == pattern(BLOCK, 4));
    }
}

#[test]
fn memory_that_was_deleted_and_made_again_since_is_mapped_anew() {
    let store = TestStore::new();
    let [old, new] = [0, 1].map(|_| MemBackend::new(store.clone()));
    let spec = spec("mem:m", BYTES, BLOCK as u32);
    let first = old.open(&spec, &context(store.clone(), None, 1)).unwrap();
    let prepared = new.prepare(&spec, &look(&store)).unwrap();
    first.volume.close();
    old.delete(&spec).unwrap();
    let again = old.open(&spec, &context(store.clone(), None, 1)).unwrap();
    let mut shard = Shard::new();
    write(&mut shard, &*again.volume, 0, 6).unwrap();
    again.volume.relinquish();
    let taken = take_over(prepared, &spec, &store).unwrap();
    assert_eq!(taken.incarnation, again.incarnation);
    assert!(read(&mut shard, &*taken.volume, 0) == pattern(BLOCK, 6));
}

#[test]
fn null_has_its_present_size() {
    let store = TestStore::new();
    let prepared = NullBackend.prepare(&spec("null:n", BYTES, 512), &look(&store)).unwrap();
    let taken = take_over(prepared, &spec("null:n", 2 * BYTES, 512), &store).unwrap();
    assert_eq!(taken.volume.size(), 2 * BYTES);
    taken.volume.relinquish();
}
