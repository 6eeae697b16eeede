//! Clients that send descriptors whose close waits for ever.

mod common;

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use common::{Client, Server, ask, hello, until};
use fuser::{
    Config, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, ReplyAttr,
    ReplyEmpty, ReplyEntry, Request, Session,
};
use nebd_abi::control::{AttachFlags, Message};
use nebd_abi::{Errno, Op, socket};

/// One file, whose flushes are not answered for now.
#[derive(Clone, Default)]
struct Unanswered(Arc<Mutex<Vec<ReplyEmpty>>>);

impl Unanswered {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Answers them all, from the moment when `end` says so; if this test fails to, from half a
    /// minute on: a process that waits for its own file system cannot even be killed.
    fn answer_after(&self, end: Receiver<()>) -> JoinHandle<()> {
        let flushes = self.clone();
        std::thread::spawn(move || {
            let _ = end.recv_timeout(Duration::from_secs(30));
            for _ in 0..5000 {
                std::mem::take(&mut *flushes.0.lock().unwrap())
                    .into_iter()
                    .for_each(ReplyEmpty::ok);
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    }
}

fn attributes(ino: INodeNo) -> FileAttr {
    let is_root = ino == INodeNo::ROOT;
    FileAttr {
        ino,
        size: 0,
        blocks: 0,
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

impl Filesystem for Unanswered {
    fn lookup(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.entry(&Duration::from_secs(60), &attributes(INodeNo(2)), Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::from_secs(60), &attributes(ino));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.0.lock().unwrap().push(reply);
    }
}

#[test]
fn a_descriptor_whose_close_waits_holds_up_nobody() {
    // First, so that no process that is started here inherits the file: it would wait in `exec`.
    let server = Server::start("run");
    server.create("null:a");
    let mut honest = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let flushes = Unanswered::default();
    let mounted = Session::new(flushes.clone(), dir.path(), &Config::default());
    let session = match mounted.and_then(Session::spawn) {
        Ok(session) => session,
        Err(error) => return eprintln!("skipped: cannot mount a FUSE file system: {error}"),
    };
    let (end, ended) = mpsc::channel();
    let answers = flushes.answer_after(ended);
    let file = File::open(dir.path().join("slow")).unwrap();
    let hostile = hello(&server.socket());
    let file_fd = file.as_fd().try_clone_to_owned().unwrap();
    for message in [Message::Ping, Message::RegisterMemory { memory: 1 }] {
        let refused = ask(&hostile, &message, &[&file_fd]);
        assert!(matches!(refused, Message::Failed { errno: Errno::INVAL, .. }), "{refused:?}");
        assert_eq!(ask(&honest.socket, &Message::Ping, &[]), Message::Done);
        assert_eq!(honest.io(Op::Write, 0, 4096), Ok(()));
    }
    until(|| (flushes.count() > 0).then_some(()));
    // One after the other is patience; without end it is not.
    for _ in 0..100 {
        let ping = Message::Ping.encode(2);
        if socket::send(&hostile, &ping, &[file_fd.as_fd()]).is_err() {
            break;
        }
    }
    until(|| match socket::receive(&hostile) {
        Ok(Some(_)) => None,
        Ok(None) | Err(_) => Some(()),
    });
    assert_eq!(honest.io(Op::Write, 0, 4096), Ok(()));
    end.send(()).unwrap();
    drop((file, file_fd));
    answers.join().unwrap();
    drop(server);
    drop(session);
}
