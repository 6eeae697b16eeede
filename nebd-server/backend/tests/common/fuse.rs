//! A file system for tests: one file, `v.img`, that counts what reaches it and fails on demand.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};

#[derive(Default)]
pub struct State {
    pub data: Vec<u8>,
    pub fsyncs: u64,
    pub writes: u64,
    /// Answers to each, if not success.
    pub fsync_error: Option<i32>,
    pub write_error: Option<i32>,
    pub read_error: Option<i32>,
    /// Most bytes that one write takes.
    pub bytes_max: Option<usize>,
    /// Writes are not answered for now.
    pub holds_writes: bool,
    pub held: Vec<(ReplyWrite, u32)>,
}

#[derive(Default)]
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn fsyncs(&self) -> u64 {
        self.state().fsyncs
    }

    pub fn wait_until(&self, condition: impl Fn(&State) -> bool) {
        drop(self.changed.wait_while(self.state(), |state| !condition(state)).unwrap());
    }

    /// Answers the writes that were held, and holds no more.
    pub fn release(&self) {
        let mut state = self.state();
        state.holds_writes = false;
        let held = std::mem::take(&mut state.held);
        drop(state);
        for (reply, bytes) in held {
            reply.written(bytes);
        }
    }
}

pub struct Mount {
    pub control: Arc<Control>,
    session: Option<BackgroundSession>,
    dir: tempfile::TempDir,
}

impl Mount {
    /// With or without the page cache taking writes (needed for errors that come late). `None`,
    /// with a printed reason, where FUSE is not to be had.
    pub fn new(bytes: usize, write_back: bool) -> Option<Mount> {
        let cache = if write_back { InitFlags::FUSE_WRITEBACK_CACHE } else { InitFlags::empty() };
        Mount::with(bytes, cache | InitFlags::FUSE_ASYNC_DIO)
    }

    /// One that may say that a write was short; of an asynchronous one the kernel makes an error.
    pub fn that_may_be_short(bytes: usize) -> Option<Mount> {
        Mount::with(bytes, InitFlags::empty())
    }

    fn with(bytes: usize, flags: InitFlags) -> Option<Mount> {
        let control = Arc::new(Control::default());
        control.state().data = vec![0; bytes];
        let dir = tempfile::tempdir().unwrap();
        let fs = TestFs { control: control.clone(), flags };
        let session = Session::new(fs, dir.path(), &Config::default()).and_then(Session::spawn);
        match session {
            Ok(session) => Some(Mount { control, session: Some(session), dir }),
            Err(error) => {
                super::skip(&format!("cannot mount a FUSE file system: {error}"));
                None
            }
        }
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("v.img")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.control.release();
        // A file that is still being closed elsewhere must not keep it: the kernel ends the session
        // when the last one is.
        let flags = nix::mount::MntFlags::MNT_DETACH;
        if let Err(error) = nix::mount::umount2(self.dir.path(), flags) {
            eprintln!("cannot unmount {}: {error}", self.dir.path().display());
        }
        drop(self.session.take());
    }
}

struct TestFs {
    control: Arc<Control>,
    flags: InitFlags,
}

const TTL: Duration = Duration::from_secs(1);

impl TestFs {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let is_root = ino == INodeNo::ROOT;
        let size = if is_root { 0 } else { self.control.state().data.len() as u64 };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_root { FileType::Directory } else { FileType::RegularFile },
            perm: 0o700,
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for TestFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config.add_capabilities(self.flags).map_err(|_| io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "v.img" {
            reply.entry(&TTL, &self.attributes(INodeNo(2)), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.control.state().data.resize(size as usize, 0);
        }
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // So that the kernel never asks again: a process that serves a file system and is killed
        // with files of it open would wait for itself.
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.control.state();
        if let Some(errno) = state.read_error {
            return reply.error(Errno::from_i32(errno));
        }
        let start = (offset as usize).min(state.data.len());
        let end = (start + size as usize).min(state.data.len());
        reply.data(&state.data[start..end]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.control.state();
        state.writes += 1;
        if let Some(errno) = state.write_error {
            return reply.error(Errno::from_i32(errno));
        }
        let data = &data[..data.len().min(state.bytes_max.unwrap_or(usize::MAX))];
        let end = offset as usize + data.len();
        if state.data.len() < end {
            state.data.resize(end, 0);
        }
        state.data[offset as usize..end].copy_from_slice(data);
        if state.holds_writes {
            state.held.push((reply, data.len() as u32));
        } else {
            drop(state);
            reply.written(data.len() as u32);
        }
        self.control.changed.notify_all();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.control.state();
        state.fsyncs += 1;
        match state.fsync_error {
            Some(errno) => reply.error(Errno::from_i32(errno)),
            None => reply.ok(),
        }
    }
}
