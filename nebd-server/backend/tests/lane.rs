//! The lane: no lost wakeup, no forgotten request, and its descriptions.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use common::*;
use nebd_abi::{Errno, Op, OpFlags};
use nebd_backend::{
    Backend, Done, FileBackend, FileConfig, FileEngine, FileEngineChoice, LaneConfig, NoStore,
    TaskRun, UringRefusal, Volume,
};

fn volume(
    dir: &std::path::Path,
    engine: FileEngineChoice,
    direct: bool,
) -> Option<Arc<dyn Volume>> {
    let config = FileConfig { engine, direct, ..FileConfig::new(dir) };
    let backend =
        FileBackend::new(config).inspect_err(|refusal| skip(&refusal.to_string())).ok()?;
    let spec = backend.create(&spec("file:a", 4 << 20, 4096)).unwrap();
    Some(backend.open(&spec, &context(Arc::new(NoStore::default()), None, 1)).unwrap().volume)
}

/// Sleeps as often as it can between few requests; a lost wakeup ends in a panic.
fn stress(engine: FileEngineChoice, task_run: TaskRun, direct: bool, rounds: usize) {
    stress_with(engine, task_run, direct, rounds, false);
    stress_with(engine, task_run, direct, rounds, true);
}

/// `noisy`: another thread completes and knocks meanwhile, which would hide a wakeup that is lost.
fn stress_with(
    engine: FileEngineChoice,
    task_run: TaskRun,
    direct: bool,
    rounds: usize,
    noisy: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let Some(volume) = volume(dir.path(), engine, direct) else { return };
    let mut shard = Shard::with(&LaneConfig { task_run, ..LaneConfig::default() });
    // So that reads meet data: holes are read without sleeping.
    shard.write(&*volume, 0, &pattern(4 << 20, 1), OpFlags::FUA).unwrap();
    let mut memory: Vec<_> = (0..4).map(|_| Memory::new(4096, 0)).collect();
    let stop = AtomicBool::new(false);
    let mailbox = shard.lane.mailbox().clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut tag = 1 << 40;
            while noisy && !stop.load(SeqCst) {
                tag += 1;
                mailbox.post(Done { tag, result: Ok(()) });
                mailbox.ring();
                std::thread::sleep(std::time::Duration::from_micros(tag % 300));
            }
        });
        for round in 0..rounds {
            let count = 1 + round % 4;
            for memory in &mut memory[..count] {
                let op = if round % 16 == 0 { Op::Flush } else { Op::Read };
                let length = if op == Op::Flush { 0 } else { 4096 };
                let mut request =
                    shard.request(op, OpFlags::NONE, (round as u64 % 1024) * 4096, length);
                if op == Op::Read {
                    request.segments = memory.segments(&[]);
                }
                volume.submit(&mut shard.lane, request);
            }
            shard.lane.flush();
            let (mut done, mut own) = (Vec::new(), 0);
            while own < count {
                done.clear();
                shard.lane.drain(&mut done);
                assert!(done.iter().all(|done| done.result.is_ok()));
                own += done.iter().filter(|done| done.tag < 1 << 40).count();
                if own < count {
                    shard.sleep();
                }
            }
        }
        stop.store(true, SeqCst);
    });
    eprintln!("{engine:?} {task_run:?} noisy {noisy}: {} sleeps in {rounds} rounds", shard.sleeps);
    assert!(shard.sleeps > 0);
}

#[test]
fn no_wakeup_is_lost_with_deferred_completions() {
    stress(FileEngineChoice::IoUring, TaskRun::Deferred, true, 3000);
    stress(FileEngineChoice::IoUring, TaskRun::Deferred, false, 3000);
}

#[test]
fn nor_with_cooperative_ones() {
    stress(FileEngineChoice::IoUring, TaskRun::Cooperative, true, 3000);
}

#[test]
fn nor_with_interrupting_ones() {
    stress(FileEngineChoice::IoUring, TaskRun::Interrupting, true, 3000);
}

#[test]
fn nor_from_the_threads_of_the_pool() {
    stress(FileEngineChoice::Threads, TaskRun::Deferred, true, 3000);
}

#[test]
fn a_forgotten_request_is_answered_with_an_error() {
    let mut shard = Shard::new();
    let request = shard.request(Op::Write, OpFlags::NONE, 0, 4096);
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || drop(request)));
    assert_eq!(dropped.is_err(), cfg!(debug_assertions), "it is a bug, and said to be one");
    let request = shard.request(Op::Read, OpFlags::NONE, 0, 4096);
    // A backend's thread that panics over a request.
    let thread = std::thread::spawn(move || {
        let _request = request;
        panic!("planted");
    });
    assert!(thread.join().is_err());
    let done = shard.wait(1);
    assert_eq!(done.last().unwrap().result, Err(Errno::IO));
}

#[test]
fn a_lane_may_be_made_elsewhere_and_dropped_with_requests_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let Some(volume) = volume(dir.path(), FileEngineChoice::IoUring, true) else { return };
    let mut shard = Shard::new();
    let data = pattern(4096, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            shard.write(&*volume, 0, &data, OpFlags::FUA).unwrap();
            let mut memory: Vec<_> = (0..64).map(|_| Memory::new(65536, 0)).collect();
            for memory in &mut memory {
                let mut request = shard.request(Op::Read, OpFlags::NONE, 0, 65536);
                request.segments = memory.segments(&[]);
                volume.submit(&mut shard.lane, request);
            }
            drop(shard);
            assert!(memory.iter().all(|memory| memory.as_ref()[..4096] == data), "all are done");
        });
    });
}

#[test]
fn says_which_engine_it_uses_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let threads = backend(dir.path(), FileEngineChoice::Threads).engine();
    assert_eq!(threads.to_string(), "threads (as configured)");
    let refused = FileEngine::Threads(UringRefusal::Refused(Errno(libc::EPERM)));
    assert!(refused.to_string().starts_with("threads (io_uring refused: Operation not permitted"));
    let auto = backend(dir.path(), FileEngineChoice::Auto).engine();
    match nebd_backend::uring_refusal() {
        None => assert_eq!(auto.to_string(), "io_uring"),
        Some(refusal) => assert_eq!(auto, FileEngine::Threads(refusal)),
    }
    let shard = Shard::without_uring();
    assert_eq!(shard.lane.uring_refusal(), Some(UringRefusal::NotWanted));
}
