//! An attachment: a volume that is served at a socket.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::VolumeName;

use super::{AttachmentKind, AttachmentRecord};

/// See the module's documentation.
#[derive(Debug)]
pub struct Attachment {
    /// Which volume.
    pub volume: VolumeName,
    /// How.
    pub record: AttachmentRecord,
    is_ending: AtomicBool,
    connections: Mutex<u32>,
    changed: Condvar,
}

/// A connection of an attachment; dropped when its session is over.
#[derive(Debug)]
pub struct Connected(Arc<Attachment>);

impl Attachment {
    /// One that nobody is connected to.
    pub fn new(volume: VolumeName, record: AttachmentRecord) -> Attachment {
        Attachment {
            volume,
            record,
            is_ending: AtomicBool::new(false),
            connections: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// What it speaks.
    pub fn kind(&self) -> AttachmentKind {
        self.record.kind
    }

    fn connections(&self) -> MutexGuard<'_, u32> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections it has.
    pub fn connected(&self) -> u32 {
        *self.connections()
    }

    /// Counts a connection, until what is returned is dropped; `None` if it is being detached.
    pub fn connect(self: &Arc<Self>) -> Option<Connected> {
        let mut connections = self.connections();
        if self.is_ending() {
            return None;
        }
        *connections += 1;
        Some(Connected(self.clone()))
    }

    /// Whether it is being detached: no connection begins any more.
    pub fn is_ending(&self) -> bool {
        self.is_ending.load(SeqCst)
    }

    /// From now on no connection begins.
    pub(super) fn start_ending(&self) {
        let _connections = self.connections();
        self.is_ending.store(true, SeqCst);
    }

    /// Whether its last connection ends within this time.
    pub(super) fn ends_within(&self, time: Duration) -> bool {
        let left = self
            .changed
            .wait_timeout_while(self.connections(), time, |connections| *connections > 0)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        *left == 0
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        *self.0.connections() -= 1;
        self.0.changed.notify_all();
    }
}
