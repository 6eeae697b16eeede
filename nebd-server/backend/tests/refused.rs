//! Where io_uring is refused, as in many containers: threads serve, and say why. A process of its
//! own, for the answer is found once a process.

mod common;

use std::sync::Arc;

use common::*;
use nebd_abi::{Errno, OpFlags};
use nebd_backend::{
    Backend, FileBackend, FileConfig, FileEngineChoice, NoStore, UringRefusal, uring_refusal,
};

/// From now on `io_uring_setup` fails with `EPERM` in this thread and its children.
fn refuse_io_uring() {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut program = [
        statement(0x20, 0), // load the number of the system call
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 },
        statement(0x06, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(0x06, libc::SECCOMP_RET_ALLOW),
    ];
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

#[test]
fn threads_serve_where_io_uring_is_refused() {
    refuse_io_uring();
    let refusal = UringRefusal::Refused(Errno(libc::EPERM));
    assert_eq!(uring_refusal(), Some(refusal));
    let dir = tempfile::tempdir().unwrap();
    let demanded = FileConfig { engine: FileEngineChoice::IoUring, ..FileConfig::new(dir.path()) };
    assert_eq!(FileBackend::new(demanded).err(), Some(refusal));
    let backend = backend(dir.path(), FileEngineChoice::Auto);
    let text = backend.engine().to_string();
    assert!(text.starts_with("threads (io_uring refused: Operation not permitted"), "{text}");
    let mut shard = Shard::new();
    assert_eq!((shard.lane.uring(), shard.lane.uring_refusal()), (None, Some(refusal)));
    let spec = backend.create(&spec("file:a", 1 << 20, 4096)).unwrap();
    let context = context(Arc::new(NoStore::default()), None, 1);
    let volume = backend.open(&spec, &context).unwrap().volume;
    shard.write(&*volume, 4096, &pattern(8192, 1), OpFlags::FUA).unwrap();
    shard.flush(&*volume).unwrap();
    assert!(shard.read(&*volume, 4096, 8192).unwrap() == pattern(8192, 1));
}
