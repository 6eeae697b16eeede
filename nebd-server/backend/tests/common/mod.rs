//! What the tests share: a shard in miniature, memory to read and write, a store that "survives".

#![allow(dead_code, missing_docs, reason = "each test uses a part of it")]

pub mod fuse;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nebd_abi::{Errno, Generation, Op, OpFlags};
use nebd_backend::{
    Done, FdStore, FileBackend, FileConfig, FileEngineChoice, Lane, LaneConfig, NoStore,
    OpenContext, Request, Segment, Segments, Volume, VolumeSpec,
};
use rustix::event::epoll;

pub const ENGINES: [FileEngineChoice; 2] = [FileEngineChoice::IoUring, FileEngineChoice::Threads];

/// Memory whose address a test chooses to the byte.
pub struct Memory {
    bytes: Box<[u8]>,
    start: usize,
    length: usize,
}

impl Memory {
    pub fn new(length: usize, misalignment: usize) -> Memory {
        let bytes = vec![0xEE; length + 8192].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(4096) + misalignment;
        Memory { bytes, start, length }
    }

    pub fn holding(data: &[u8], misalignment: usize) -> Memory {
        let mut memory = Memory::new(data.len(), misalignment);
        memory.as_mut().copy_from_slice(data);
        memory
    }

    pub fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    pub fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }

    /// The memory cut into segments of these lengths; the last takes the rest.
    pub fn segments(&mut self, lengths: &[usize]) -> Segments {
        let mut rest = self.as_mut();
        let mut segments = Vec::new();
        for length in lengths {
            let (piece, after) = rest.split_at_mut(*length);
            segments.push(Segment { pointer: piece.as_mut_ptr(), length: *length });
            rest = after;
        }
        if !rest.is_empty() {
            segments.push(Segment { pointer: rest.as_mut_ptr(), length: rest.len() });
        }
        match segments.as_slice() {
            [one] => Segments::One(*one),
            _ => Segments::Many(segments.into()),
        }
    }
}

pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A shard in miniature; it sleeps in `epoll_wait`, edge-triggered, as the server does.
pub struct Shard {
    pub lane: Lane,
    epoll: OwnedFd,
    tag: u64,
    pub sleeps: u64,
}

impl Shard {
    pub fn new() -> Shard {
        Shard::with(&LaneConfig::default())
    }

    pub fn without_uring() -> Shard {
        Shard::with(&LaneConfig { io_uring: false, ..LaneConfig::default() })
    }

    pub fn with(config: &LaneConfig) -> Shard {
        let lane = Lane::new(config).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for (index, fd) in lane.wait_fds().into_iter().enumerate() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, fd, epoll::EventData::new_u64(index as u64), flags).unwrap();
        }
        Shard { lane, epoll, tag: 0, sleeps: 0 }
    }

    /// Sleeps until something is to be drained. A wakeup that does not come in half a minute is
    /// lost.
    pub fn sleep(&mut self) {
        if self.lane.sleep() {
            self.sleeps += 1;
            let mut events = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }; 4];
            let limit = rustix::time::Timespec { tv_sec: 30, tv_nsec: 0 };
            match epoll::wait(&self.epoll, &mut events[..], Some(&limit)) {
                Ok(0) => panic!("a wakeup was lost"),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => panic!("{errno}"),
            }
        }
        self.lane.wake();
    }

    pub fn request(&mut self, op: Op, flags: OpFlags, offset: u64, length: u64) -> Request {
        self.tag += 1;
        Request::new(op, flags, offset, length, self.lane.mailbox().clone(), self.tag)
    }

    /// Waits for `count` answers the way a shard does.
    pub fn wait(&mut self, count: usize) -> Vec<Done> {
        let mut done = Vec::new();
        self.lane.flush();
        loop {
            self.lane.drain(&mut done);
            if done.len() >= count {
                return done;
            }
            self.sleep();
        }
    }

    pub fn run(&mut self, volume: &dyn Volume, request: Request) -> Result<(), Errno> {
        volume.submit(&mut self.lane, request);
        let done = self.wait(1);
        assert_eq!(done.len(), 1);
        done[0].result
    }

    pub fn write(
        &mut self,
        volume: &dyn Volume,
        offset: u64,
        data: &[u8],
        flags: OpFlags,
    ) -> Result<(), Errno> {
        let mut memory = Memory::holding(data, 0);
        let mut request = self.request(Op::Write, flags, offset, data.len() as u64);
        request.segments = memory.segments(&[]);
        self.run(volume, request)
    }

    pub fn read(
        &mut self,
        volume: &dyn Volume,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, Errno> {
        let mut memory = Memory::new(length, 0);
        let mut request = self.request(Op::Read, OpFlags::NONE, offset, length as u64);
        request.segments = memory.segments(&[]);
        self.run(volume, request)?;
        Ok(memory.as_ref().to_vec())
    }

    pub fn plain(
        &mut self,
        volume: &dyn Volume,
        op: Op,
        flags: OpFlags,
        offset: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let request = self.request(op, flags, offset, length);
        self.run(volume, request)
    }

    pub fn flush(&mut self, volume: &dyn Volume) -> Result<(), Errno> {
        self.plain(volume, Op::Flush, OpFlags::NONE, 0, 0)
    }
}

/// A store that outlives "servers" of this process, and can be made to forget what comes after a
/// point: a server that died there.
#[derive(Default)]
pub struct TestStore {
    inner: NoStore,
    /// Calls that still have effect; `None` for all.
    pub budget: Mutex<Option<usize>>,
    pub log: Mutex<Vec<String>>,
}

impl TestStore {
    pub fn new() -> Arc<TestStore> {
        Arc::default()
    }

    fn spend(&self, what: String) -> bool {
        self.log.lock().unwrap().push(what);
        match &mut *self.budget.lock().unwrap() {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }
}

impl FdStore for TestStore {
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        if self.spend(format!("put {name}")) { self.inner.put(name, fd) } else { Ok(()) }
    }

    fn remove(&self, name: &str) -> std::io::Result<()> {
        if self.spend(format!("remove {name}")) { self.inner.remove(name) } else { Ok(()) }
    }

    fn barrier(&self) -> std::io::Result<()> {
        self.log.lock().unwrap().push("barrier".into());
        Ok(())
    }

    fn fetch(&self, name: &str) -> Option<OwnedFd> {
        self.inner.fetch(name)
    }

    fn names(&self, prefix: &str) -> Vec<String> {
        self.inner.names(prefix)
    }

    fn is_durable(&self) -> bool {
        true
    }
}

pub fn context(
    store: Arc<dyn FdStore>,
    previous_major: Option<u32>,
    generation: u32,
) -> OpenContext {
    OpenContext { previous_major, host_major: 1, generation: Generation(generation), store }
}

pub fn spec(name: &str, size: u64, block_size: u32) -> VolumeSpec {
    VolumeSpec { name: name.parse().unwrap(), size, block_size, path: None }
}

pub fn backend(dir: &Path, engine: FileEngineChoice) -> FileBackend {
    FileBackend::new(FileConfig { engine, ..FileConfig::new(dir) }).unwrap()
}

/// Skips with a reason on standard error; a test that cannot run here returns after it.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
}

pub fn raw(fd: &impl AsRawFd) -> i32 {
    fd.as_raw_fd()
}
