//! A region's first page from a stranger: refused, or a layout that fits into the memfd.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nebd_abi::region::{Region, SharedMemory};
use nebd_fuzz::{region, write};

fuzz_target!(|bytes: &[u8]| {
    let honest = region();
    // Half of the inputs replace the page, the others change an honest one somewhere.
    let memory = match bytes {
        [0, at, rest @ ..] => {
            write(honest.memory(), u64::from(*at) * 8, rest);
            honest.memory().fd().try_clone_to_owned().expect("a descriptor")
        }
        [_, pages, rest @ ..] => {
            let size = (u64::from(*pages) + 1) * 4096;
            let memory = SharedMemory::create("fuzz", size).expect("a memfd");
            write(&memory, 0, rest);
            memory.fd().try_clone_to_owned().expect("a descriptor")
        }
        _ => return,
    };
    if let Ok(opened) = Region::open(memory) {
        let opened = std::sync::Arc::new(opened);
        let geometry = *opened.geometry();
        assert_eq!(geometry.region_size(), opened.memory().size());
        for index in 0..geometry.queue_count {
            let queue = opened.queue(index).expect("within the count");
            // The last byte of each part is there to be read.
            let _ = queue.cq().last().map(|entry| &entry.reserved);
            let depth = geometry.queue_depth as usize;
            assert_eq!(queue.slots().len(), depth);
            assert_eq!(queue.iovecs(depth - 1).len(), geometry.iovecs_per_slot as usize);
            let last = queue.iovecs(depth - 1).last().expect("at least one");
            let _ = last.offset.load(std::sync::atomic::Ordering::Relaxed);
        }
        assert!(opened.queue(geometry.queue_count).is_none());
        assert!(opened.arena(0, geometry.arena_size).is_some());
        assert!(opened.arena(geometry.arena_size, 1).is_none());
        assert!(opened.arena(u64::MAX, 1).is_none());
    }
});
