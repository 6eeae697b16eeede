//! Every operation of the `file` backend, on both engines.

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use common::*;
use nebd_abi::{Errno, Op, OpFlags};
use nebd_backend::{
    Backend, BackendError, FileBackend, FileConfig, FileEngineChoice, NoStore, Volume, VolumeSpec,
};

const MIB: u64 = 1 << 20;

fn open(backend: &FileBackend, spec: &VolumeSpec) -> Arc<dyn Volume> {
    backend.open(spec, &context(Arc::new(NoStore::default()), None, 1)).unwrap().volume
}

fn for_each_engine(test: impl Fn(&FileBackend, &Path, &mut Shard)) {
    for engine in ENGINES {
        for direct in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let config = FileConfig { engine, direct, ..FileConfig::new(dir.path()) };
            let backend = match FileBackend::new(config) {
                Ok(backend) => backend,
                Err(refusal) => return skip(&refusal.to_string()),
            };
            eprintln!("{} direct {direct}", backend.engine());
            test(&backend, dir.path(), &mut Shard::new());
        }
    }
}

#[test]
fn reads_back_what_was_written() {
    for_each_engine(|backend, _, shard| {
        let spec = backend.create(&spec("file:a", 8 * MIB, 4096)).unwrap();
        let volume = open(backend, &spec);
        assert_eq!(volume.size(), 8 * MIB);
        for (index, length) in [4096, 8192, 65536, MIB as usize].into_iter().enumerate() {
            let data = pattern(length, index as u64);
            let offset = 4096 * (index as u64 + 3);
            shard.write(&*volume, offset, &data, OpFlags::NONE).unwrap();
            assert!(shard.read(&*volume, offset, length).unwrap() == data, "{length}");
        }
        assert!(shard.read(&*volume, 7 * MIB, 4096).unwrap().iter().all(|byte| *byte == 0));
        shard.flush(&*volume).unwrap();
        volume.close();
    });
}

#[test]
fn takes_memory_of_any_alignment() {
    for_each_engine(|backend, _, shard| {
        let spec = backend.create(&spec("file:a", 2 * MIB, 512)).unwrap();
        let volume = open(backend, &spec);
        let length = 512 * 1031; // more than one stand-in buffer
        for (misalignment, cuts) in [
            (0, &[][..]),
            (1, &[]),
            (512, &[512, 1024]),
            (3, &[1, 5, 4096, 511]),
            (0, &[4096, 100_000]),
            (0, &[512, 300_000, 7]),
        ] {
            let data = pattern(length, misalignment as u64 + cuts.len() as u64);
            let mut memory = Memory::holding(&data, misalignment);
            let mut write = shard.request(Op::Write, OpFlags::FUA, 512, length as u64);
            write.segments = memory.segments(cuts);
            shard.run(&*volume, write).unwrap();
            let mut memory = Memory::new(length, misalignment + 1);
            let mut read = shard.request(Op::Read, OpFlags::NONE, 512, length as u64);
            read.segments = memory.segments(cuts);
            shard.run(&*volume, read).unwrap();
            assert!(memory.as_ref() == data, "{misalignment} {cuts:?}");
        }
    });
}

#[test]
fn takes_more_segments_than_one_system_call() {
    for_each_engine(|backend, _, shard| {
        let spec = backend.create(&spec("file:a", 8 * MIB, 4096)).unwrap();
        let volume = open(backend, &spec);
        let (cuts, data) = ([4096; 1500], pattern(4096 * 1501, 9));
        let mut memory = Memory::holding(&data, 0);
        let mut write = shard.request(Op::Write, OpFlags::NONE, 4096, data.len() as u64);
        write.segments = memory.segments(&cuts);
        shard.run(&*volume, write).unwrap();
        let mut memory = Memory::new(data.len(), 0);
        let mut read = shard.request(Op::Read, OpFlags::NONE, 4096, data.len() as u64);
        read.segments = memory.segments(&cuts);
        shard.run(&*volume, read).unwrap();
        assert!(memory.as_ref() == data);
    });
}

#[test]
fn reads_zeros_beyond_the_end_of_a_short_file() {
    for_each_engine(|backend, dir, shard| {
        let spec = backend.create(&spec("file:a", MIB, 512)).unwrap();
        let volume = open(backend, &spec);
        shard.write(&*volume, 0, &pattern(65536, 1), OpFlags::FUA).unwrap();
        let image = std::fs::OpenOptions::new().write(true).open(dir.join("a.img")).unwrap();
        for length in [10_000, 8192, 512, 1, 0] {
            image.set_len(length).unwrap();
            let mut expected = pattern(65536, 1);
            expected[length as usize..].fill(0);
            assert!(shard.read(&*volume, 0, 65536).unwrap() == expected, "{length}");
            let mut memory = Memory::new(65536, 1);
            let mut read = shard.request(Op::Read, OpFlags::NONE, 0, 65536);
            read.segments = memory.segments(&[512, 8000, 5]);
            shard.run(&*volume, read).unwrap();
            assert!(memory.as_ref() == expected, "{length}, misaligned");
        }
        assert!(shard.read(&*volume, MIB - 512, 512).unwrap() == [0; 512]);
        // A write beyond the end makes it longer.
        shard.write(&*volume, MIB - 512, &pattern(512, 2), OpFlags::NONE).unwrap();
        assert!(shard.read(&*volume, MIB - 512, 512).unwrap() == pattern(512, 2));
    });
}

#[test]
fn discard_frees_and_write_zeroes_zeroes() {
    for_each_engine(|backend, dir, shard| {
        let spec = backend.create(&spec("file:a", 4 * MIB, 512)).unwrap();
        let volume = open(backend, &spec);
        let blocks = || std::fs::metadata(dir.join("a.img")).unwrap().blocks() * 512;
        shard.write(&*volume, 0, &pattern(4 * MIB as usize, 3), OpFlags::FUA).unwrap();
        assert!(blocks() >= 4 * MIB);
        shard.plain(&*volume, Op::Discard, OpFlags::NONE, 0, MIB).unwrap();
        assert!(blocks() <= 3 * MIB + 65536);
        shard.plain(&*volume, Op::WriteZeroes, OpFlags::FUA, MIB, MIB).unwrap();
        assert!(blocks() <= 2 * MIB + 65536);
        let kept = OpFlags::NO_UNMAP | OpFlags::FUA;
        shard.plain(&*volume, Op::WriteZeroes, kept, 2 * MIB + 512, MIB).unwrap();
        assert!(blocks() >= 2 * MIB);
        let mut expected = pattern(4 * MIB as usize, 3);
        expected[..2 * MIB as usize].fill(0);
        expected[2 * MIB as usize + 512..][..MIB as usize].fill(0);
        assert!(shard.read(&*volume, 0, 4 * MIB as usize).unwrap() == expected);
        assert_eq!(std::fs::metadata(dir.join("a.img")).unwrap().len(), 4 * MIB);
        for op in [Op::Discard, Op::WriteZeroes, Op::Read, Op::Write] {
            shard.plain(&*volume, op, OpFlags::FUA, 0, 0).unwrap();
        }
    });
}

#[test]
fn many_at_once_on_several_volumes() {
    for_each_engine(|backend, _, shard| {
        let volumes: Vec<_> = (0..3)
            .map(|index| {
                let spec =
                    backend.create(&spec(&format!("file:v{index}"), 16 * MIB, 4096)).unwrap();
                open(backend, &spec)
            })
            .collect();
        // More than the queues of the ring hold.
        let count = 3000;
        let mut memory: Vec<_> =
            (0..count).map(|index| Memory::holding(&pattern(4096, index), 0)).collect();
        for op in [Op::Write, Op::Read] {
            for (index, memory) in memory.iter_mut().enumerate() {
                if op == Op::Read {
                    memory.as_mut().fill(0xEE);
                }
                let offset = (index / 3) as u64 * 4096;
                let mut request = shard.request(op, OpFlags::NONE, offset, 4096);
                request.segments = memory.segments(&[]);
                volumes[index % 3].submit(&mut shard.lane, request);
            }
            let done = shard.wait(count as usize);
            let mut tags: Vec<_> = done.iter().map(|done| done.tag).collect();
            tags.sort_unstable();
            tags.dedup();
            assert_eq!(tags.len(), count as usize);
            assert!(done.iter().all(|done| done.result.is_ok()));
        }
        for (index, memory) in memory.iter().enumerate() {
            assert!(memory.as_ref() == pattern(4096, index as u64), "{index}");
        }
    });
}

#[test]
fn create_never_overwrites_and_delete_deletes() {
    for_each_engine(|backend, dir, _| {
        let wanted = spec("file:a", MIB, 4096);
        std::fs::write(dir.join("a.img"), b"precious").unwrap();
        assert!(matches!(backend.create(&wanted), Err(BackendError::Exists(_))));
        assert_eq!(std::fs::read(dir.join("a.img")).unwrap(), b"precious");
        std::fs::remove_file(dir.join("a.img")).unwrap();
        assert!(matches!(backend.observe(&wanted), Err(BackendError::NotFound(_))));
        backend.create(&wanted).unwrap();
        assert_eq!(backend.observe(&wanted).unwrap(), MIB);
        let volume = open(backend, &wanted);
        assert!(matches!(backend.delete(&wanted), Err(BackendError::Busy { .. })));
        volume.close();
        drop(volume);
        backend.delete(&wanted).unwrap();
        assert!(matches!(backend.delete(&wanted), Err(BackendError::NotFound(_))));
        for size in [0, 4097, u64::MAX - 4095] {
            let wanted = spec("file:b", size, 4096);
            assert!(matches!(backend.create(&wanted), Err(BackendError::Size { .. })), "{size}");
        }
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0, "no litter");
    });
}

#[test]
fn an_existing_file_is_used_in_place() {
    for_each_engine(|backend, dir, shard| {
        let path = dir.join("other");
        std::fs::write(&path, pattern(65536, 5)).unwrap();
        let with_size = |size| VolumeSpec { path: Some(path.clone()), ..spec("file:o", size, 512) };
        assert!(matches!(backend.create(&with_size(512)), Err(BackendError::Size { .. })));
        assert!(matches!(backend.create(&with_size(MIB)), Err(BackendError::Size { .. })));
        assert_eq!(backend.create(&with_size(65536)).unwrap().size, 65536);
        let spec = backend.create(&with_size(0)).unwrap();
        assert_eq!(spec.size, 65536);
        let volume = open(backend, &spec);
        assert!(shard.read(&*volume, 0, 65536).unwrap() == pattern(65536, 5));
        volume.close();
        backend.delete(&spec).unwrap();
        assert!(path.exists());
        let directory = VolumeSpec { path: Some(dir.to_owned()), ..spec };
        assert!(backend.create(&directory).is_err());
    });
}

#[test]
fn resize_grows_and_shrinks() {
    for_each_engine(|backend, dir, shard| {
        let spec = backend.create(&spec("file:a", MIB, 4096)).unwrap();
        let volume = open(backend, &spec);
        shard.write(&*volume, 0, &pattern(MIB as usize, 1), OpFlags::NONE).unwrap();
        assert_eq!(volume.resize(2 * MIB).unwrap(), 2 * MIB);
        assert_eq!((volume.size(), backend.observe(&spec).unwrap()), (2 * MIB, 2 * MIB));
        assert!(shard.read(&*volume, MIB, MIB as usize).unwrap().iter().all(|byte| *byte == 0));
        shard.write(&*volume, 2 * MIB - 4096, &pattern(4096, 2), OpFlags::FUA).unwrap();
        assert_eq!(volume.resize(MIB / 2).unwrap(), MIB / 2);
        assert_eq!(std::fs::metadata(dir.join("a.img")).unwrap().len(), MIB / 2);
        assert!(matches!(volume.resize(5000), Err(BackendError::Size { .. })));
        assert!(matches!(volume.resize(0), Err(BackendError::Size { .. })));
        assert!(shard.read(&*volume, 0, 4096).unwrap() == pattern(4096, 1));
    });
}

#[test]
fn a_write_that_comes_after_the_end_moved_is_not_found_when_it_moves_back() {
    for_each_engine(|backend, _, shard| {
        let spec = backend.create(&spec("file:a", MIB, 4096)).unwrap();
        let volume = open(backend, &spec);
        volume.resize(4096).unwrap();
        // It had been checked against the size of before.
        shard.write(&*volume, 8192, &pattern(4096, 1), OpFlags::NONE).unwrap();
        volume.resize(65536).unwrap();
        assert!(shard.read(&*volume, 4096, 61440).unwrap() == [0; 61440]);
        volume.close();
    });
}

#[test]
fn a_file_without_a_name_fails_to_flush() {
    for_each_engine(|backend, dir, shard| {
        let spec = backend.create(&spec("file:a", MIB, 4096)).unwrap();
        let volume = open(backend, &spec);
        shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::FUA).unwrap();
        std::fs::remove_file(dir.join("a.img")).unwrap();
        assert_eq!(shard.flush(&*volume), Err(Errno(libc::ENOENT)));
        let result = shard.write(&*volume, 0, &pattern(4096, 2), OpFlags::FUA);
        assert_eq!(result, Err(Errno(libc::ENOENT)));
        volume.close();
        drop(volume);
        let opened = backend.open(&spec, &context(Arc::new(NoStore::default()), Some(1), 2));
        assert!(matches!(opened.err(), Some(BackendError::NotFound(_))));
    });
}

#[test]
fn a_lane_without_a_ring_serves_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let backend = backend(dir.path(), FileEngineChoice::Auto);
    let spec = backend.create(&spec("file:a", MIB, 4096)).unwrap();
    let volume = open(&backend, &spec);
    let mut shard = Shard::without_uring();
    assert!(shard.lane.uring().is_none());
    shard.write(&*volume, 4096, &pattern(8192, 1), OpFlags::FUA).unwrap();
    assert!(shard.read(&*volume, 4096, 8192).unwrap() == pattern(8192, 1));
    shard.flush(&*volume).unwrap();
    let image = std::fs::File::open(dir.path().join("a.img")).unwrap();
    let mut bytes = vec![0; 8192];
    image.read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes == pattern(8192, 1));
}
