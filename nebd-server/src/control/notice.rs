//! What worker threads tell the control thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, unbounded};
use nebd_abi::layout::SessionId;
use rustix::event::EventfdFlags;

use crate::frontend::Attachment;
use crate::session::Session;
use crate::vhost::Hypervisor;

/// Something that happened on a worker thread.
pub enum Notice {
    /// A session is served; its client's process is to be watched.
    Live(Arc<Session>),
    /// A connection speaks for a session now.
    Attached {
        /// The connection.
        connection: u64,
        /// The session.
        session: SessionId,
    },
    /// A connection's attach was refused.
    Refused {
        /// The connection.
        connection: u64,
    },
    /// A hypervisor's session is served.
    Hypervisor(Box<Hypervisor>, Arc<Session>),
    /// An attachment is being detached: its connections are to be ended.
    Detached(Arc<Attachment>),
    /// A session's volume was parked, or goes on.
    Parked(SessionId, bool),
    /// A session's volume has a new size.
    Resized(SessionId, u64),
    /// A session is gone.
    Ended(SessionId),
}

/// Where notices go.
#[derive(Clone)]
pub struct NoticeSink {
    sender: Sender<Notice>,
    doorbell: Arc<OwnedFd>,
}

impl NoticeSink {
    /// A sink, and where its notices come out; `doorbell` is rung for each.
    pub fn new(doorbell: Arc<OwnedFd>) -> (NoticeSink, Receiver<Notice>) {
        let (sender, receiver) = unbounded();
        (NoticeSink { sender, doorbell }, receiver)
    }

    /// Sends a notice.
    pub fn send(&self, notice: Notice) {
        if self.sender.send(notice).is_ok() {
            let _ = rustix::io::write(&*self.doorbell, &1u64.to_ne_bytes());
        }
    }
}

/// An eventfd for the control thread.
pub fn doorbell() -> std::io::Result<Arc<OwnedFd>> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Ok(Arc::new(rustix::event::eventfd(0, flags)?))
}
