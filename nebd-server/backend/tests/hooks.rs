//! The switch that turns flush off, in a process of its own because it is global.

#![cfg(feature = "test-hooks")]

mod common;

use std::sync::Arc;

use common::fuse::Mount;
use common::*;
use nebd_abi::OpFlags;
use nebd_backend::{Backend, FileBackend, FileConfig, NoStore, VolumeSpec, hooks};

#[test]
fn with_flush_off_nothing_is_synced() {
    for engine in ENGINES {
        let Some(mount) = Mount::new(1 << 20, false) else { return };
        let config = FileConfig { engine, ..FileConfig::new("/nonexistent") };
        let Ok(backend) = FileBackend::new(config) else { return skip("no io_uring") };
        let spec = VolumeSpec { path: Some(mount.file()), ..spec("file:v", 1 << 20, 4096) };
        let context = context(Arc::new(NoStore::default()), None, 1);
        let volume = backend.open(&spec, &context).unwrap().volume;
        let mut shard = Shard::new();
        for (off, expected) in [(true, 0), (false, 2)] {
            hooks::set_flush_off(off);
            shard.write(&*volume, 0, &pattern(4096, 1), OpFlags::FUA).unwrap();
            shard.flush(&*volume).unwrap();
            assert_eq!(mount.control.fsyncs(), expected);
        }
    }
}
