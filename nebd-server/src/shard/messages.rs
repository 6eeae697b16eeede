//! What shards are told, and what they tell.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, unbounded};
use nebd_abi::layout::SessionId;
use nebd_abi::ring::{Request as RingRequest, RingViolation};

use super::{Freeze, Front, Hold, VirtCommand, VirtEvent};
use crate::session::Session;

/// A queue to be served.
pub struct QueueSetup {
    /// Its session.
    pub session: Arc<Session>,
    /// Which of the session's queues.
    pub index: u32,
    /// Its other side.
    pub front: Front,
    /// Requests in flight under a predecessor, to be issued again.
    pub reissue: Vec<RingRequest>,
    /// Whether its volume is parked.
    pub parked: bool,
}

/// What a shard is told.
pub enum Command {
    /// Serve a queue.
    Serve(Box<QueueSetup>),
    /// Issue one suspect, and tell when it is answered.
    Suspect {
        /// Its session.
        session: SessionId,
        /// Its queue.
        queue: u32,
        /// The request.
        request: RingRequest,
    },
    /// Answer a request that was never dispatched with `EIO`.
    Abort {
        /// Its session.
        session: SessionId,
        /// Its queue.
        queue: u32,
        /// The request.
        request: RingRequest,
    },
    /// A hypervisor wants something of a queue.
    Virt(SessionId, u32, VirtCommand),
    /// Hold the session's requests back, or let them go on.
    Park(SessionId, bool),
    /// Take no more requests; tell when the last is answered.
    Drain(SessionId),
    /// A volume has other limits.
    LimitsChanged,
    /// Show a sign of life.
    Probe,
    /// Wait for a while: more sessions are about to come.
    Hold(Arc<Hold>),
    /// Give the queues up to a successor.
    Freeze(Freeze),
    /// There is no successor: serve on.
    Thaw,
}

/// What a shard tells the control thread.
#[derive(Debug)]
pub enum ShardEvent {
    /// A client broke the rules of the ring.
    Violation(SessionId, RingViolation),
    /// A draining queue has nothing at the backend any more and is served no longer.
    Drained(SessionId),
    /// A suspect was answered.
    SuspectAnswered(SessionId),
    /// A hypervisor's queue has something to tell.
    Virt(VirtEvent),
}

/// Where shards put their events.
#[derive(Clone)]
pub struct EventSink {
    sender: Sender<ShardEvent>,
    doorbell: Arc<OwnedFd>,
}

impl EventSink {
    /// A sink, and where its events come out; `doorbell` is rung for each.
    pub fn new(doorbell: Arc<OwnedFd>) -> (EventSink, Receiver<ShardEvent>) {
        let (sender, receiver) = unbounded();
        (EventSink { sender, doorbell }, receiver)
    }

    pub(super) fn send(&self, event: ShardEvent) {
        if self.sender.send(event).is_ok() {
            let _ = rustix::io::write(&*self.doorbell, &1u64.to_ne_bytes());
        }
    }
}
