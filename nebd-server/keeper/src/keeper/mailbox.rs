//! The notification socket: datagrams in, what they mean out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use crate::{is_store_name, names, sys};

/// What is to become of the descriptor, or of a name.
#[derive(Debug)]
pub(crate) enum Change {
    /// Keep it under this name.
    Store(String, OwnedFd),
    /// Forget this name.
    Remove(String),
    /// A server that outlived another keeper hands over what that one held.
    Register(String, OwnedFd),
}

/// A datagram, parsed.
#[derive(Debug, Default)]
pub(crate) struct Notification {
    /// Who sent it, as the kernel says.
    pub(crate) pid: i32,
    pub(crate) ready: bool,
    pub(crate) stopping: bool,
    pub(crate) status: Option<String>,
    pub(crate) main_pid: Option<i32>,
    /// A process that may become the server; 0: it may no longer.
    pub(crate) candidate: Option<i32>,
    /// The program of later servers.
    pub(crate) binary: Option<PathBuf>,
    pub(crate) change: Option<Change>,
    /// To be answered once everything before it is done.
    pub(crate) barrier: Option<OwnedFd>,
}

/// The keeper's end of the notification socket.
#[derive(Debug)]
pub(crate) struct Mailbox {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Mailbox {
    pub(crate) fn new(socket: OwnedFd) -> Mailbox {
        Mailbox { socket, buffer: vec![0; 4096] }
    }

    /// The next datagram, if there is one. One that makes no sense has no effect, but is returned
    /// all the same.
    pub(crate) fn receive(&mut self) -> io::Result<Option<Notification>> {
        loop {
            match sys::receive(self.socket.as_fd(), &mut self.buffer) {
                Ok(datagram) => {
                    let bytes = &self.buffer[..datagram.length];
                    let mut text = str::from_utf8(bytes).unwrap_or("");
                    if datagram.truncated {
                        tracing::error!(pid = datagram.pid, "a notification was cut off; refused");
                        text = "";
                    }
                    return Ok(Some(parse(datagram.pid, text, datagram.fds)));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Answers a barrier: a byte for servers of ours, the close for everybody.
pub(crate) fn answer(barrier: OwnedFd) {
    // A sender that does not read is no reason to wait.
    let _not_a_pipe_of_ours = rustix::io::ioctl_fionbio(&barrier, true)
        .and_then(|()| rustix::io::write(&barrier, b"1").map(drop));
}

fn parse(pid: i32, text: &str, fds: Vec<OwnedFd>) -> Notification {
    let mut notification = Notification { pid, ..Notification::default() };
    let (mut name, mut verb) = (None, None);
    for line in text.lines() {
        match line.split_once('=') {
            Some(("READY", "1")) => notification.ready = true,
            Some(("STOPPING", "1")) => notification.stopping = true,
            Some(("STATUS", status)) => notification.status = Some(status.to_owned()),
            Some(("MAINPID", pid)) => notification.main_pid = pid.parse().ok().filter(|p| *p > 0),
            Some(("X_NEBD_CANDIDATE", pid)) => {
                notification.candidate = pid.parse().ok().filter(|p| *p >= 0);
            }
            Some(("X_NEBD_BINARY", path)) => notification.binary = Some(path.into()),
            Some(("FDNAME", value)) => name = Some(value.to_owned()),
            Some((word @ ("FDSTORE" | "FDSTOREREMOVE" | "REGISTER" | "BARRIER"), "1")) => {
                verb = Some(word);
            }
            _ => {}
        }
    }
    // More than one descriptor under one name is nothing that a server of ours sends.
    let fd = match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Some(fd),
        Err(_) => None,
    };
    notification.change = match (verb, name, fd) {
        (Some("BARRIER"), _, fd) => {
            notification.barrier = fd;
            None
        }
        (Some("FDSTOREREMOVE"), Some(name), _) => Some(Change::Remove(name)),
        (Some("FDSTORE"), Some(name), Some(fd)) if is_store_name(&name) => {
            Some(Change::Store(name, fd))
        }
        (Some("REGISTER"), Some(name), Some(fd)) if name.starts_with(names::RESERVED) => {
            Some(Change::Register(name, fd))
        }
        (Some(verb), name, fd) => {
            tracing::warn!(pid, verb, name, fd = fd.is_some(), "a notification is refused");
            None
        }
        (None, ..) => None,
    };
    notification
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> Vec<OwnedFd> {
        vec![std::fs::File::open("/dev/null").unwrap().into()]
    }

    #[test]
    fn notifications_are_parsed() {
        let n = parse(1, "READY=1\nSTATUS=all=well\nMAINPID=12", Vec::new());
        assert!(n.ready && !n.stopping && n.change.is_none());
        assert_eq!((n.status.as_deref(), n.main_pid), (Some("all=well"), Some(12)));
        let n = parse(1, "FDSTORE=1\nFDPOLL=0\nFDNAME=m.a", null());
        assert!(matches!(n.change, Some(Change::Store(name, _)) if name == "m.a"));
        let n = parse(1, "FDNAME=m.a\nFDSTOREREMOVE=1", Vec::new());
        assert!(matches!(n.change, Some(Change::Remove(name)) if name == "m.a"));
        assert!(parse(1, "BARRIER=1", null()).barrier.is_some());
        let n = parse(1, "X_NEBD_CANDIDATE=17\nBARRIER=1", null());
        assert!(n.candidate == Some(17) && n.barrier.is_some());
        assert_eq!(parse(1, "X_NEBD_CANDIDATE=0", Vec::new()).candidate, Some(0));
        let n = parse(1, "X_NEBD_BINARY=/opt/a=b", Vec::new());
        assert_eq!(n.binary.as_deref(), Some("/opt/a=b".as_ref()));
    }

    #[test]
    fn nonsense_has_no_effect() {
        for (text, fds) in [
            ("FDSTORE=1\nFDNAME=a:b", null()),
            ("FDSTORE=1\nFDNAME=nebd.host", null()),
            ("FDSTORE=1\nFDNAME=ok", [null(), null()].concat_fds()),
            ("FDSTORE=1\nFDNAME=ok", Vec::new()),
            ("REGISTER=1\nFDNAME=m.a", null()),
            ("MAINPID=-4", Vec::new()),
            ("X_NEBD_CANDIDATE=-4", Vec::new()),
            ("X_NEBD_CANDIDATE=4x", Vec::new()),
            ("\0\0", null()),
        ] {
            let n = parse(1, text, fds);
            assert!(n.change.is_none() && n.barrier.is_none() && n.main_pid.is_none(), "{text}");
            assert!(n.candidate.is_none(), "{text}");
        }
    }

    trait ConcatFds {
        fn concat_fds(self) -> Vec<OwnedFd>;
    }

    impl ConcatFds for [Vec<OwnedFd>; 2] {
        fn concat_fds(self) -> Vec<OwnedFd> {
            self.into_iter().flatten().collect()
        }
    }
}
