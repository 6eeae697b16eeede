//! What the kernel refuses only once a volume is served: io_uring, threads. Each refusal holds for
//! the test's own thread.

mod common;

use std::sync::Arc;

use common::*;
use nebd_abi::{Op, OpFlags};
use nebd_backend::{Backend, FdStore, FileEngineChoice, NoStore, Volume};

/// From now on these system calls fail with `errno` in this thread and its children.
fn refuse(calls: &[libc::c_long], errno: i32) {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut program = vec![statement(0x20, 0)]; // load the number of the system call
    for call in calls {
        program.push(libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: *call as u32 });
        program.push(statement(0x06, libc::SECCOMP_RET_ERRNO | errno as u32));
    }
    program.push(statement(0x06, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program is copied during the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter),
            0
        );
    }
}

fn refuse_threads() {
    refuse(&[libc::SYS_clone, libc::SYS_clone3], libc::EAGAIN);
    assert!(std::thread::Builder::new().spawn(|| ()).is_err());
}

fn serve(shard: &mut Shard, volume: &dyn Volume, seed: u64) {
    let data = pattern(8192, seed);
    shard.write(volume, 4096, &data, OpFlags::FUA).unwrap();
    shard.flush(volume).unwrap();
    assert!(shard.read(volume, 4096, 8192).unwrap() == data);
}

#[test]
fn threads_take_over_from_an_io_uring_that_fails() {
    for call in [libc::SYS_io_uring_enter, libc::SYS_io_uring_register] {
        std::thread::spawn(move || {
            let dir = tempfile::tempdir().unwrap();
            let backend = backend(dir.path(), FileEngineChoice::Auto);
            let mut shard = Shard::new();
            if shard.lane.uring().is_none() {
                return skip("no io_uring");
            }
            let spec = backend.create(&spec("file:a", 1 << 20, 4096)).unwrap();
            let context = context(Arc::new(NoStore::default()), None, 1);
            let volume = backend.open(&spec, &context).unwrap().volume;
            if call == libc::SYS_io_uring_enter {
                serve(&mut shard, &*volume, 1);
            }
            refuse(&[call], libc::EPERM);
            // More than the ring has entries for.
            let mut memory = Memory::holding(&pattern(4096, 2), 0);
            for index in 0..1000 {
                let mut write = shard.request(Op::Write, OpFlags::NONE, 4096 * (index % 64), 4096);
                write.segments = memory.segments(&[]);
                volume.submit(&mut shard.lane, write);
            }
            let done = shard.wait(1000);
            assert!(done.iter().all(|done| done.result.is_ok()), "{:?}", done[0]);
            serve(&mut shard, &*volume, 3);
        })
        .join()
        .unwrap();
    }
}

#[test]
fn a_lack_of_threads_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let backend = backend(dir.path(), FileEngineChoice::Threads);
    let spec = backend.create(&spec("file:a", 1 << 20, 4096)).unwrap();
    let context = context(Arc::new(NoStore::default()), None, 1);
    let volume = backend.open(&spec, &context).unwrap().volume;
    refuse_threads();
    serve(&mut Shard::without_uring(), &*volume, 1);
}

#[test]
fn so_is_it_by_the_first_flush_of_an_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let backend = backend(dir.path(), FileEngineChoice::Auto);
    let spec = backend.create(&spec("file:a", 1 << 20, 4096)).unwrap();
    let store: Arc<dyn FdStore> = TestStore::new();
    drop(backend.open(&spec, &context(store.clone(), None, 1)).unwrap());
    let volume = backend.open(&spec, &context(store, Some(1), 2)).unwrap().volume;
    let mut shard = Shard::new();
    refuse_threads();
    for _ in 0..3 {
        let flush = shard.request(Op::Flush, OpFlags::NONE, 0, 0);
        volume.submit(&mut shard.lane, flush);
    }
    assert!(shard.wait(3).iter().all(|done| done.result.is_ok()));
}
