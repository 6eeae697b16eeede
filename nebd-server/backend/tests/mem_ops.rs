//! The `mem` backend.

mod common;

use std::sync::Arc;

use common::*;
use nebd_abi::{Op, OpFlags};
use nebd_backend::{Backend, BackendError, FdStore, MemBackend, Opened};

const MIB: u64 = 1 << 20;

fn open(store: &Arc<TestStore>, size: u64, previous: Option<u32>) -> Result<Opened, BackendError> {
    let backend = MemBackend::new(store.clone());
    let spec = backend.create(&spec("mem:a", size, 512)).unwrap();
    backend.open(&spec, &context(store.clone(), previous, 1))
}

#[test]
fn reads_back_discards_and_zeroes() {
    let store = TestStore::new();
    let (volume, mut shard) = (open(&store, 4 * MIB, None).unwrap().volume, Shard::new());
    let data = pattern(MIB as usize, 1);
    let mut memory = Memory::holding(&data, 3);
    let mut write = shard.request(Op::Write, OpFlags::FUA, 512, MIB);
    write.segments = memory.segments(&[1, 5000, 77]);
    shard.run(&*volume, write).unwrap();
    shard.plain(&*volume, Op::Discard, OpFlags::NONE, 1024, 512).unwrap();
    shard.plain(&*volume, Op::WriteZeroes, OpFlags::NO_UNMAP, 8192, 65536 + 512).unwrap();
    shard.flush(&*volume).unwrap();
    let mut expected = vec![0; 4 * MIB as usize];
    expected[512..][..MIB as usize].copy_from_slice(&data);
    expected[1024..1536].fill(0);
    expected[8192..][..65536 + 512].fill(0);
    assert!(shard.read(&*volume, 0, 4 * MIB as usize).unwrap() == expected);
    assert!(shard.read(&*volume, 4 * MIB, 512).is_err(), "never beyond its memory");
}

#[test]
fn reading_what_was_never_written_takes_no_memory() {
    use std::os::unix::fs::MetadataExt;
    const SIZE: usize = 64 << 20;
    let store = TestStore::new();
    let (volume, mut shard) = (open(&store, SIZE as u64, None).unwrap().volume, Shard::new());
    let allocated = || {
        let file = std::fs::File::from(store.fetch("m.a").unwrap());
        file.metadata().unwrap().blocks() * 512
    };
    let mut expected = vec![0; SIZE];
    let (places, data) = ([0, 5 * 65536 - 4096, 5 * 65536, SIZE - 512], pattern(512, 1));
    for server in 0..2 {
        // The second one knows nothing of what was written.
        let volume = match server {
            0 => volume.clone(),
            _ => open(&store, SIZE as u64, Some(1)).unwrap().volume,
        };
        for offset in (0..SIZE).step_by(4 << 20) {
            let read = shard.read(&*volume, offset as u64, 4 << 20).unwrap();
            assert!(read == expected[offset..][..4 << 20], "server {server}, {offset}");
        }
        assert!(allocated() <= 1 << 20, "server {server}: {}", allocated());
        for place in places {
            shard.write(&*volume, place as u64, &data, OpFlags::NONE).unwrap();
            expected[place..][..512].copy_from_slice(&data);
        }
    }
    shard.plain(&*volume, Op::Discard, OpFlags::NONE, 65536, 6 * 65536).unwrap();
    expected[65536..][..6 * 65536].fill(0);
    assert!(shard.read(&*volume, 0, 4 << 20).unwrap() == expected[..4 << 20]);
    assert!(
        shard.read(&*volume, SIZE as u64 - MIB, MIB as usize).unwrap()
            == expected[SIZE - MIB as usize..]
    );
}

#[test]
fn outlives_its_server_and_knows_itself() {
    let (store, mut shard) = (TestStore::new(), Shard::new());
    let first = open(&store, MIB, None).unwrap();
    assert_ne!(first.incarnation, 0);
    assert_eq!(*store.log.lock().unwrap(), ["put m.a", "barrier"], "held before it is served");
    shard.write(&*first.volume, 4096, &pattern(4096, 1), OpFlags::NONE).unwrap();
    drop(first.volume);
    let second = open(&store, MIB, Some(1)).unwrap();
    assert_eq!((second.incarnation, second.major), (first.incarnation, 1));
    assert!(shard.read(&*second.volume, 4096, 4096).unwrap() == pattern(4096, 1));
    second.volume.close();
    // Closed is not deleted.
    let third = open(&store, MIB, None).unwrap();
    assert!(shard.read(&*third.volume, 4096, 4096).unwrap() == pattern(4096, 1));
    MemBackend::new(store.clone()).delete(&spec("mem:a", MIB, 512)).unwrap();
    assert!(store.names("m.").is_empty());
    assert!(matches!(open(&store, MIB, Some(1)).err(), Some(BackendError::Lost(_))));
    let anew = open(&store, MIB, None).unwrap();
    assert_ne!(anew.incarnation, first.incarnation);
    assert!(shard.read(&*anew.volume, 4096, 4096).unwrap() == [0; 4096]);
}

#[test]
fn its_memory_cannot_shrink() {
    let store = TestStore::new();
    let _volume = open(&store, MIB, None).unwrap();
    let file = std::fs::File::from(store.fetch("m.a").unwrap());
    assert!(file.set_len(4096).is_err());
}

#[test]
fn resizes_also_across_servers() {
    let (store, mut shard) = (TestStore::new(), Shard::new());
    let volume = open(&store, MIB, None).unwrap().volume;
    shard.write(&*volume, 0, &pattern(MIB as usize, 1), OpFlags::NONE).unwrap();
    assert_eq!(volume.resize(2 * MIB).unwrap(), 2 * MIB);
    shard.write(&*volume, MIB, &pattern(MIB as usize, 2), OpFlags::NONE).unwrap();
    assert!(shard.read(&*volume, 0, MIB as usize).unwrap() == pattern(MIB as usize, 1));
    assert_eq!(volume.resize(4096).unwrap(), 4096);
    assert_eq!(volume.resize(8192).unwrap(), 8192);
    let mut expected = pattern(4096, 0);
    expected.copy_from_slice(&pattern(MIB as usize, 1)[..4096]);
    expected.resize(8192, 0);
    assert!(shard.read(&*volume, 0, 8192).unwrap() == expected, "what was cut off is gone");
    assert!(volume.resize(0).is_err());
    drop(volume);
    // The registry grew, the server died before the memory did.
    let volume = open(&store, 4 * MIB, Some(1)).unwrap().volume;
    assert_eq!(volume.size(), 4 * MIB);
    shard.write(&*volume, 4 * MIB - 512, &pattern(512, 1), OpFlags::NONE).unwrap();
    assert!(shard.read(&*volume, 0, 4096).unwrap() == expected[..4096]);
}

#[test]
fn a_write_that_comes_after_the_end_moved_is_not_found_when_it_moves_back() {
    let (store, mut shard) = (TestStore::new(), Shard::new());
    let volume = open(&store, MIB, None).unwrap().volume;
    volume.resize(4096).unwrap();
    // It had been checked against the size of before.
    shard.write(&*volume, 8192, &pattern(4096, 1), OpFlags::NONE).unwrap();
    volume.resize(65536).unwrap();
    assert!(shard.read(&*volume, 4096, 61440).unwrap() == [0; 61440]);
}
