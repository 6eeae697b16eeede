//! A server that lost its keeper finds the next one.
//!
//! ```text
//!   life: end of file ──► orphaned ──► notify.sock answers ──► REGISTER, descriptors, store, READY
//!                            ▲  │ inotify on the state            │ barrier answered
//!                            │  │ directory, and 1 s              ▼
//!                            └──┴──────────── no ◄──────────── registered: a new life pipe
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::inotify;
use rustix::net::SendFlags;
use rustix::pipe::PipeFlags;

use crate::names;
use crate::notify::{Notifier, timespec, wait};

/// How long an orphan waits between attempts if no file tells it earlier.
const RETRY: Duration = Duration::from_secs(1);
/// How long a keeper may take to work through a registration.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// What a server registers with a new keeper.
pub trait Holdings: Sync {
    /// Calls `send` with every descriptor that the keeper held: [`names::CLIENT`],
    /// [`names::ADMIN`], [`names::HOST`], [`names::PROBE`] and all of the store.
    ///
    /// Holds the lock of the server's own map of the store meanwhile, so that no change made by
    /// another thread is overtaken by what is sent here.
    fn each(&self, send: &mut dyn FnMut(&str, BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()>;
}

/// Why a server gave up watching its keeper.
#[derive(Debug, thiserror::Error)]
pub enum ReregisterError {
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Watches the life pipe, and registers with the next keeper when this one is gone.
#[derive(Debug)]
pub struct Reregister {
    notifier: Arc<Notifier>,
    life: OwnedFd,
}

impl Reregister {
    /// `life` is [`crate::inherit::Inherited::life`].
    pub fn new(notifier: Arc<Notifier>, life: OwnedFd) -> Reregister {
        Reregister { notifier, life }
    }

    /// For a thread of its own, once the server serves (it says so to the next keeper). Sleeps while a keeper lives, registers whenever one is lost.
    /// Returns once `stop` is readable or closed at its other end.
    pub fn run(
        mut self,
        stop: BorrowedFd<'_>,
        holdings: &dyn Holdings,
    ) -> Result<(), ReregisterError> {
        let failed = |action| move |source: io::Error| ReregisterError::System { action, source };
        loop {
            if wait_two(self.life.as_fd(), stop, None).map_err(failed("watch the keeper"))? {
                return Ok(());
            }
            tracing::warn!("the keeper is gone; serving on without it");
            loop {
                // Watched before the attempt, so that a keeper that comes in between is seen.
                let files = self.watch_directory();
                match self.register(holdings) {
                    Ok(life) => {
                        self.life = life;
                        tracing::info!("registered with a new keeper");
                        break;
                    }
                    Err(error) => tracing::debug!(%error, "no keeper yet"),
                }
                // Without inotify the retry is by time alone: this socket never becomes readable.
                let files = files.as_ref().map_or(self.notifier.socket_fd(), |f| f.as_fd());
                if wait_two(files, stop, Some(RETRY)).map_err(failed("wait for a keeper"))? {
                    return Ok(());
                }
            }
        }
    }

    fn watch_directory(&self) -> Option<OwnedFd> {
        let directory = self.notifier.directory()?;
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let files = inotify::init(flags).ok()?;
        let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&files, directory, events).ok()?;
        Some(files)
    }

    /// One attempt; returns the read end of the new life pipe.
    fn register(&self, holdings: &dyn Holdings) -> io::Result<OwnedFd> {
        let (life, held) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let send = |name: &str, fd: BorrowedFd<'_>| {
            let verb = if name.starts_with(names::RESERVED) { "REGISTER" } else { "FDSTORE" };
            let message = format!("{verb}=1\nFDPOLL=0\nFDNAME={name}");
            self.notifier.send(&message, Some(fd), SendFlags::empty())
        };
        // The first one tells whether a keeper is there; only then is the store looked at.
        send(names::LIFE, held.as_fd())?;
        drop(held);
        holdings.each(&mut |name, fd| send(name, fd))?;
        self.notifier.send("READY=1", None, SendFlags::empty())?;
        self.notifier.barrier(ANSWER_TIME_MAX)?;
        // A keeper that does not take us closes what we sent.
        if wait(&life, PollFlags::IN, Some(Duration::ZERO))? {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(life)
    }
}

/// Waits for either; true if it is `stop`.
fn wait_two(
    first: BorrowedFd<'_>,
    stop: BorrowedFd<'_>,
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let timeout = timeout.map(timespec);
    let mut fds = [PollFd::new(&first, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => return Ok(!fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
