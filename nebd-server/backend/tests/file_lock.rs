//! One owner at a time: the lock of a file, and what pins it.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use common::fuse::Mount;
use common::*;
use nebd_abi::{Op, OpFlags};
use nebd_backend::{
    Backend, BackendError, FileBackend, FileConfig, FileEngineChoice, NoStore, VolumeSpec,
};

const CHILD: &str = "NEBD_TEST_CHILD_FILE";

fn store() -> Arc<NoStore> {
    Arc::new(NoStore::default())
}

fn backend_of(engine: FileEngineChoice) -> Option<FileBackend> {
    FileBackend::new(FileConfig { engine, ..FileConfig::new("/nonexistent") })
        .inspect_err(|refusal| skip(&refusal.to_string()))
        .ok()
}

#[test]
fn a_foreign_owner_makes_a_first_open_busy_and_a_takeover_wait() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let Some(backend) = backend_of(engine) else { return };
        let path = dir.path().join("f");
        std::fs::write(&path, vec![0; 65536]).unwrap();
        let spec = VolumeSpec { path: Some(path), ..spec("file:f", 65536, 4096) };
        let owner = backend.open(&spec, &context(store(), None, 1)).unwrap().volume;
        let refused = backend.open(&spec, &context(store(), None, 1)).err();
        assert!(matches!(refused, Some(BackendError::Busy { .. })), "{refused:?}");
        assert_eq!(backend.observe(&spec).unwrap(), 65536, "an observer needs no lock");
        let opened = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                backend.open(&spec, &context(store(), Some(1), 2)).unwrap();
                opened.store(true, SeqCst);
            });
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(!opened.load(SeqCst));
            drop(owner);
        });
        assert!(opened.load(SeqCst));
    }
}

#[test]
fn the_lock_is_given_up_by_close_even_if_the_volume_lingers() {
    let dir = tempfile::tempdir().unwrap();
    let backend = backend(dir.path(), FileEngineChoice::Auto);
    let spec = backend.create(&spec("file:f", 65536, 4096)).unwrap();
    let lingering = backend.open(&spec, &context(store(), None, 1)).unwrap().volume;
    lingering.close();
    backend.open(&spec, &context(store(), None, 1)).unwrap();
}

#[test]
fn requests_in_flight_of_a_dead_process_pin_its_lock() {
    let Some(backend) = backend_of(FileEngineChoice::IoUring) else { return };
    let Some(mount) = Mount::new(1 << 20, false) else { return };
    let spec = VolumeSpec { path: Some(mount.file()), ..spec("file:v", 1 << 20, 4096) };
    mount.control.state().holds_writes = true;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_with_requests_in_flight", "--ignored", "--nocapture"])
        .env(CHILD, mount.file())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    assert!(output.lines().any(|line| line.unwrap().contains("submitted")));
    mount.control.wait_until(|state| state.held.len() == 4);
    child.kill().unwrap();
    child.wait().unwrap();

    // It is dead, its writes are not.
    let refused = backend.open(&spec, &context(store(), None, 1)).err();
    assert!(matches!(refused, Some(BackendError::Busy { .. })), "{refused:?}");
    let opened = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let volume = backend.open(&spec, &context(store(), Some(1), 2)).unwrap().volume;
            opened.store(true, SeqCst);
            let mut shard = Shard::new();
            shard.write(&*volume, 0, &pattern(4096, 2), OpFlags::FUA).unwrap();
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!opened.load(SeqCst), "opened over requests in flight");
        mount.control.release();
    });
    assert!(mount.control.state().data[..4096] == pattern(4096, 2));
}

/// Not a test: run as a process by the test above.
#[test]
#[ignore = "a part of another test"]
fn child_with_requests_in_flight() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let backend = backend_of(FileEngineChoice::IoUring).unwrap();
    let spec = VolumeSpec { path: Some(path.into()), ..spec("file:v", 1 << 20, 4096) };
    let volume = backend.open(&spec, &context(store(), None, 1)).unwrap().volume;
    let mut shard = Shard::new();
    let mut memory: Vec<_> = (0..4).map(|seed| Memory::holding(&pattern(4096, seed), 0)).collect();
    for (index, memory) in memory.iter_mut().enumerate() {
        let mut request = shard.request(Op::Write, OpFlags::NONE, 4096 * index as u64, 4096);
        request.segments = memory.segments(&[]);
        volume.submit(&mut shard.lane, request);
    }
    shard.lane.flush();
    println!("submitted");
    loop {
        std::thread::park();
    }
}
