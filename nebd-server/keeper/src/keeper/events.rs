//! Epoll and signals: where the keeper sleeps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::config::KeeperError;
use super::process::Process;
use super::stream::Stream;
use crate::notify::timespec;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A signal is pending.
    Signals,
    /// A datagram has come.
    Mailbox,
    /// Somebody connects to the client socket.
    Knock,
    /// A standby has room for more.
    Stream,
    /// A process has ended.
    Process(i32),
}

impl Token {
    fn data(self) -> EventData {
        EventData::new_u64(match self {
            Token::Signals => 0,
            Token::Mailbox => 1,
            Token::Knock => 2,
            Token::Stream => 3,
            Token::Process(pid) => 1 << 32 | u64::from(pid.cast_unsigned()),
        })
    }

    fn from_data(data: EventData) -> Token {
        match data.u64() {
            0 => Token::Signals,
            1 => Token::Mailbox,
            2 => Token::Knock,
            3 => Token::Stream,
            process => Token::Process((process as u32).cast_signed()),
        }
    }
}

/// The one place where the keeper waits.
pub(super) struct Events {
    epoll: OwnedFd,
    signals: SignalFd,
}

impl Events {
    /// Blocks the signals that the keeper reads instead.
    pub(super) fn new() -> Result<Events, KeeperError> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
            set.add(signal);
        }
        set.thread_block().map_err(KeeperError::system("block signals"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals =
            SignalFd::with_flags(&set, flags).map_err(KeeperError::system("read signals"))?;
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(KeeperError::system("create an epoll"))?;
        let events = Events { epoll, signals };
        events.add(&events.signals, Token::Signals, EventFlags::IN)?;
        Ok(events)
    }

    fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> Result<(), KeeperError> {
        epoll::add(&self.epoll, fd, token.data(), flags)
            .map_err(KeeperError::system("watch a descriptor"))
    }

    pub(super) fn add_mailbox(&self, fd: impl AsFd) -> Result<(), KeeperError> {
        self.add(fd, Token::Mailbox, EventFlags::IN)
    }

    /// Edge-triggered: each connect tells once, whoever accepts it.
    pub(super) fn add_listener(&self, fd: impl AsFd) -> Result<(), KeeperError> {
        self.add(fd, Token::Knock, EventFlags::IN | EventFlags::ET)
    }

    pub(super) fn add_process(&self, process: &Process) -> Result<(), KeeperError> {
        self.add(&process.pidfd, Token::Process(process.pid), EventFlags::IN)
    }

    /// To be called before a descriptor is closed: as long as a child holds a duplicate, epoll
    /// would go on to tell of it.
    pub(super) fn remove(&self, fd: impl AsFd) {
        match epoll::delete(&self.epoll, fd) {
            // A stream is watched only while it is full.
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => tracing::error!(%errno, "a descriptor is still watched"),
        }
    }

    /// Sends what there is room for, and asks to be told when there is more.
    pub(super) fn flush(&self, stream: &mut Stream) -> io::Result<()> {
        stream.flush()?;
        let armed = !stream.is_empty();
        if armed && !stream.armed {
            epoll::add(&self.epoll, &*stream, Token::Stream.data(), EventFlags::OUT)?;
        } else if !armed && stream.armed {
            epoll::delete(&self.epoll, &*stream)?;
        }
        stream.armed = armed;
        Ok(())
    }

    /// Signals that have come.
    pub(super) fn signals(&self) -> Vec<i32> {
        let next = || self.signals.read_signal().ok().flatten();
        std::iter::from_fn(next).map(|info| info.ssi_signo as i32).collect()
    }

    /// Sleeps until something happens, or for `timeout`.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> Result<Vec<Token>, KeeperError> {
        let timeout = timeout.map(timespec);
        let mut events = Vec::with_capacity(16);
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) => Ok(events.iter().map(|e| Token::from_data(e.data)).collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(KeeperError::system("wait for events")(errno)),
        }
    }
}
