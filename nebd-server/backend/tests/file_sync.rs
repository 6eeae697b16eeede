//! What reaches the storage: an FSYNC for each FLUSH and FUA, and errors, which arrive once and are
//! not lost with the server that was told of them. On a FUSE file system.

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;

use common::fuse::Mount;
use common::*;
use nebd_abi::{Errno, Op, OpFlags};
use nebd_backend::{
    Backend, FileBackend, FileConfig, FileEngineChoice, NoStore, Volume, VolumeSpec,
};

const SIZE: u64 = 1 << 20;

/// What a volume keeps.
const WITNESSES: usize = 8;

/// Servers, one after the other, over one file.
struct Host {
    backend: FileBackend,
    spec: VolumeSpec,
    store: Arc<TestStore>,
    generation: u32,
    /// Last, for it can go only when nobody has the file open.
    mount: Mount,
}

impl Host {
    fn new(engine: FileEngineChoice, write_back: bool) -> Option<Host> {
        Host::on(Mount::new(SIZE as usize, write_back)?, engine, write_back)
    }

    fn on(mount: Mount, engine: FileEngineChoice, write_back: bool) -> Option<Host> {
        let config = FileConfig { engine, direct: !write_back, ..FileConfig::new("/nonexistent") };
        let backend = match FileBackend::new(config) {
            Ok(backend) => backend,
            Err(refusal) => {
                skip(&refusal.to_string());
                return None;
            }
        };
        let spec = VolumeSpec { path: Some(mount.file()), ..spec("file:v", 0, 4096) };
        let spec = backend.create(&spec).unwrap();
        Some(Host { mount, backend, spec, store: TestStore::new(), generation: 0 })
    }

    /// The next server. Its predecessor's volume must have been dropped.
    fn open(&mut self) -> Arc<dyn Volume> {
        let previous = (self.generation > 0).then_some(7);
        self.open_after(previous)
    }

    /// The next server, to whom the session is new, or was left by an owner of this epoch.
    fn open_after(&mut self, previous: Option<u32>) -> Arc<dyn Volume> {
        self.generation += 1;
        let context = context(self.store.clone(), previous, self.generation);
        self.backend.open(&self.spec, &context).unwrap().volume
    }

    fn witnesses(&self) -> Vec<String> {
        use nebd_backend::FdStore;
        self.store.names("w.v.")
    }

    /// Flushes until the witnesses are renewed: that follows the answer, and after an error it is
    /// begun by a later flush.
    fn flush_until(
        &self,
        shard: &mut Shard,
        volume: &dyn Volume,
        done: impl Fn(&[String]) -> bool,
    ) {
        for _ in 0..30_000 {
            shard.flush(volume).unwrap();
            if done(&self.witnesses()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("witnesses are not renewed: {:?}", self.witnesses());
    }

    /// Makes the kernel lose a cached write, in a flush.
    fn fail_a_flush(&self, shard: &mut Shard, volume: &dyn Volume) {
        shard.write(volume, 0, &pattern(4096, 1), OpFlags::NONE).unwrap();
        self.mount.control.state().write_error = Some(libc::EIO);
        assert_eq!(shard.flush(volume), Err(Errno::IO));
        self.mount.control.state().write_error = None;
    }
}

/// So that what was answered counts as published.
fn publish(shard: &mut Shard) {
    let mut none = Vec::new();
    (0..3).for_each(|_| shard.lane.drain(&mut none));
    assert_eq!(none, []);
}

fn for_each_engine(write_back: bool, test: impl Fn(&mut Host, &mut Shard)) {
    for engine in ENGINES {
        let Some(mut host) = Host::new(engine, write_back) else { return };
        eprintln!("{}", host.backend.engine());
        test(&mut host, &mut Shard::new());
    }
}

#[test]
fn an_fsync_for_each_flush_and_fua() {
    for_each_engine(false, |host, shard| {
        let volume = host.open();
        let control = host.mount.control.clone();
        let mut expected = 0;
        let mut check = |grown: u64| {
            expected += grown;
            assert_eq!(control.fsyncs(), expected);
        };
        for _ in 0..3 {
            shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::NONE).unwrap();
            check(0);
            shard.flush(&*volume).unwrap();
            check(1);
            shard.write(&*volume, 4096, &pattern(8192, 1), OpFlags::FUA).unwrap();
            check(1);
            // There is no fallocate here: zeros are written.
            shard.plain(&*volume, Op::WriteZeroes, OpFlags::FUA, 4096, 4096).unwrap();
            check(1);
            shard.plain(&*volume, Op::WriteZeroes, OpFlags::NONE, 0, 4096).unwrap();
            shard.plain(&*volume, Op::Discard, OpFlags::NONE, 0, 4096).unwrap();
            shard.read(&*volume, 0, 4096).unwrap();
            check(0);
        }
        let mut zeros_then_data = vec![0; 8192];
        zeros_then_data.extend_from_slice(&pattern(8192, 1)[4096..]);
        assert!(host.mount.control.state().data[..12288] == zeros_then_data);

        // Right after a takeover, too: a witness, the volume's own descriptor before the witness is
        // replaced, and the one for the request.
        drop(volume);
        let volume = host.open();
        shard.write(&*volume, 4096, &pattern(8192, 1), OpFlags::FUA).unwrap();
        check(3);
        shard.flush(&*volume).unwrap();
        check(1);
    });
}

#[test]
fn errors_arrive_as_their_errno_once() {
    for_each_engine(false, |host, shard| {
        let volume = host.open();
        let control = host.mount.control.clone();
        for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::ENODEV] {
            control.state().write_error = Some(errno);
            let result = shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::NONE);
            assert_eq!(result, Err(Errno(errno)));
            control.state().write_error = None;
            shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::FUA).unwrap();
            control.state().fsync_error = Some(errno);
            assert_eq!(shard.flush(&*volume), Err(Errno(errno)));
            let result = shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::FUA);
            assert_eq!(result, Err(Errno(errno)));
            control.state().fsync_error = None;
            shard.flush(&*volume).unwrap();
            control.state().read_error = Some(errno);
            assert_eq!(shard.read(&*volume, 65536, 4096), Err(Errno(errno)));
            control.state().read_error = None;
            shard.read(&*volume, 65536, 4096).unwrap();
        }
        // The client asked for nothing invalid, so it is never told so.
        control.state().write_error = Some(libc::EINVAL);
        let result = shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::NONE);
        assert_eq!(result, Err(Errno::IO));
    });
}

#[test]
fn a_failed_flush_whose_report_died_is_reported_by_the_successor() {
    for_each_engine(true, |host, shard| {
        let volume = host.open();
        assert_eq!(host.witnesses().len(), WITNESSES);
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        // The gap: whoever opens the file now is told nothing.
        std::fs::File::open(host.mount.file()).unwrap().sync_data().unwrap();
        let volume = host.open();
        assert_eq!(shard.flush(&*volume), Err(Errno::IO));
        shard.flush(&*volume).unwrap();
    });
}

#[test]
fn so_does_its_first_fua_write() {
    for_each_engine(true, |host, shard| {
        let volume = host.open();
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        let volume = host.open();
        shard.write(&*volume, 8192, &pattern(4096, 2), OpFlags::NONE).unwrap();
        let result = shard.write(&*volume, 8192, &pattern(4096, 2), OpFlags::FUA);
        assert_eq!(result, Err(Errno::IO));
    });
}

#[test]
fn deaths_in_a_row_do_not_lose_it() {
    for_each_engine(true, |host, shard| {
        let volume = host.open();
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        // Each successor uses a witness and dies before its answer is published; the last finds
        // none left and fails to be safe.
        for left in (0..WITNESSES).rev().chain([0]) {
            let volume = host.open();
            assert_eq!(shard.flush(&*volume), Err(Errno::IO), "{left} left");
            assert_eq!(host.witnesses().len(), left);
            drop(volume);
        }
        let volume = host.open();
        assert_eq!(shard.flush(&*volume), Err(Errno::IO));
        // This time the answer is published, so the error is history.
        publish(shard);
        host.flush_until(shard, &*volume, |names| names.len() == WITNESSES);
        drop(volume);
        let volume = host.open();
        shard.flush(&*volume).unwrap();
    });
}

/// The keeper is away, and hears of nothing: a witness that was used is known by itself, and nobody
/// waits for the store.
#[test]
fn a_used_witness_is_not_used_again_though_the_store_has_not_heard() {
    for_each_engine(true, |host, shard| {
        let volume = host.open();
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        *host.store.budget.lock().unwrap() = Some(0);
        host.store.log.lock().unwrap().clear();
        for _ in 0..=WITNESSES {
            let volume = host.open();
            assert_eq!(shard.flush(&*volume), Err(Errno::IO));
            assert_eq!(host.witnesses().len(), WITNESSES);
            drop(volume);
        }
        let log = host.store.log.lock().unwrap();
        assert!(!log.iter().any(|call| call == "barrier"), "{log:?}");
    });
}

#[test]
fn a_successful_first_flush_renews_the_witness_and_later_errors_are_not_lost() {
    for_each_engine(true, |host, shard| {
        let mut volume = host.open();
        for _ in 0..6 {
            drop(volume);
            volume = host.open();
            shard.write(&*volume, 0, &pattern(4096, 3), OpFlags::NONE).unwrap();
            let before = host.witnesses();
            host.flush_until(shard, &*volume, |names| names.len() == WITNESSES && names != before);
        }
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        let volume = host.open();
        assert_eq!(shard.flush(&*volume), Err(Errno::IO));
    });
}

#[test]
fn a_death_between_use_and_renewal_costs_one_witness() {
    for_each_engine(true, |host, shard| {
        drop(host.open());
        let volume = host.open();
        // The removal takes effect, the renewal does not.
        *host.store.budget.lock().unwrap() = Some(1);
        shard.flush(&*volume).unwrap();
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        *host.store.budget.lock().unwrap() = None;
        assert_eq!(host.witnesses().len(), WITNESSES - 1);
        let volume = host.open();
        assert_eq!(shard.flush(&*volume), Err(Errno::IO));
    });
}

#[test]
fn a_published_error_is_not_reported_again_after_the_next_takeover() {
    for_each_engine(true, |host, shard| {
        let volume = host.open();
        let before = host.witnesses();
        host.fail_a_flush(shard, &*volume);
        publish(shard);
        let renewed = |names: &[String]| names.iter().all(|name| !before.contains(name));
        host.flush_until(shard, &*volume, |names| names.len() == WITNESSES && renewed(names));
        drop(volume);
        let volume = host.open();
        shard.flush(&*volume).unwrap();
    });
}

#[test]
fn all_syncs_that_wait_for_the_verdict_get_it() {
    for_each_engine(true, |host, shard| {
        let volume = host.open();
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        let volume = host.open();
        for _ in 0..8 {
            let flush = shard.request(Op::Flush, OpFlags::NONE, 0, 0);
            volume.submit(&mut shard.lane, flush);
        }
        let done = shard.wait(8);
        assert!(done.iter().any(|done| done.result == Err(Errno::IO)), "{done:?}");
        assert!(done[0].result.is_err(), "none is reported clean before the verdict: {done:?}");
    });
}

#[test]
fn close_removes_witnesses_and_a_drop_does_not() {
    for_each_engine(true, |host, _| {
        drop(host.open());
        assert_eq!(host.witnesses().len(), WITNESSES);
        let volume = host.open();
        volume.close();
        assert_eq!(host.witnesses(), Vec::<String>::new());
    });
}

/// A server is killed while it makes or removes a set, and finds some of it at the next first open.
#[test]
fn an_unfinished_set_of_witnesses_is_made_whole_and_tells_what_it_knows() {
    use nebd_backend::FdStore;
    let leave_one = |host: &Host| {
        let names = host.witnesses();
        names.iter().skip(1).for_each(|name| host.store.remove(name).unwrap());
    };
    for_each_engine(true, |host, shard| {
        drop(host.open());
        leave_one(host);
        let volume = host.open_after(None);
        // As many deaths as ever, none of which sees the end of a flush.
        assert_eq!(host.witnesses().len(), WITNESSES);
        shard.flush(&*volume).unwrap();
        host.fail_a_flush(shard, &*volume);
        drop(volume);
        leave_one(host);
        let volume = host.open_after(None);
        assert_eq!(shard.flush(&*volume), Err(Errno::IO));
    });
}

#[test]
fn witnesses_of_other_volumes_are_left_alone() {
    use nebd_backend::FdStore;
    for_each_engine(true, |host, shard| {
        let file = std::fs::File::open("/dev/null").unwrap();
        for name in ["w.v.x.100", "w.v.1.2", "w.vv.1", "m.v"] {
            host.store.put(name, file.as_fd()).unwrap();
        }
        drop(host.open());
        let volume = host.open();
        shard.flush(&*volume).unwrap();
        volume.close();
        assert_eq!(host.store.names(""), ["m.v", "w.v.1.2", "w.v.x.100", "w.vv.1"]);
    });
}

#[test]
fn without_a_durable_store_it_works_all_the_same() {
    for_each_engine(true, |host, shard| {
        for previous in [None, Some(7)] {
            let context = context(Arc::new(NoStore::default()), previous, 1);
            let volume = host.backend.open(&host.spec, &context).unwrap().volume;
            shard.flush(&*volume).unwrap();
        }
    });
}

/// In threads: io_uring goes on with a short write by itself, and FUSE does not tell it where (Linux
/// 6.18), which nobody here can mend.
#[test]
fn short_writes_go_on_or_end_in_an_error() {
    let Some(mount) = Mount::that_may_be_short(SIZE as usize) else { return };
    let Some(mut host) = Host::on(mount, FileEngineChoice::Threads, false) else { return };
    let (mut shard, volume) = (Shard::new(), host.open());
    let data = pattern(8192, 1);
    let control = host.mount.control.clone();
    // Pieces that end within a block.
    control.state().bytes_max = Some(1000);
    shard.write(&*volume, 4096, &data, OpFlags::NONE).unwrap();
    assert!(control.state().data[4096..][..8192] == data);
    // Pieces that never come to the end of one.
    control.state().bytes_max = Some(100);
    assert_eq!(shard.write(&*volume, 4096, &data, OpFlags::NONE), Err(Errno::IO));
    control.state().bytes_max = None;
    shard.write(&*volume, 4096, &data, OpFlags::FUA).unwrap();
    assert!(shard.read(&*volume, 4096, 8192).unwrap() == data);
}
