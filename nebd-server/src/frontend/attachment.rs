//! An attachment: a volume that is served at a socket.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nebd_abi::VolumeName;

use super::{AttachmentKind, AttachmentRecord};

/// How often the same refusal is logged: a hypervisor may come back ten times a second.
const REFUSAL_TOLD_EVERY: Duration = Duration::from_secs(60);

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
    refusal: Mutex<Option<Refusal>>,
}

/// Why the last that connected was turned away.
#[derive(Debug)]
struct Refusal {
    reason: String,
    told: Instant,
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
            refusal: Mutex::default(),
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

    fn refusal(&self) -> MutexGuard<'_, Option<Refusal>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever connected is turned away for this reason; whether that is to be logged.
    pub fn refuse(&self, reason: String, now: Instant) -> bool {
        let mut refusal = self.refusal();
        let is_news = refusal.as_ref().is_none_or(|last| {
            last.reason != reason || now.duration_since(last.told) >= REFUSAL_TOLD_EVERY
        });
        if is_news {
            *refusal = Some(Refusal { reason, told: now });
        }
        is_news
    }

    /// Whoever was connected has left by itself: what was refused before is of no interest any more.
    pub fn forget_refusal(&self) {
        *self.refusal() = None;
    }

    /// Why nobody is connected, if the last that tried was turned away.
    pub fn last_refusal(&self) -> Option<String> {
        self.refusal().as_ref().map(|refusal| refusal.reason.clone())
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

impl Connected {
    /// Of which attachment.
    pub fn attachment(&self) -> &Attachment {
        &self.0
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        *self.0.connections() -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use nebd_backend::VolumeSpec;

    use super::*;
    use crate::registry::Record;

    #[test]
    fn the_same_refusal_is_logged_once_a_minute() {
        let volume: VolumeName = "null:a".parse().unwrap();
        let spec = VolumeSpec { name: volume.clone(), size: 4096, block_size: 4096, path: None };
        let key = (volume.clone(), AttachmentKind::VhostUser);
        let record =
            AttachmentRecord::new(&key, &Record::new(&spec, 0, 0, 0o600), b"", "/s".into());
        let attachment = Attachment::new(volume, record);
        let start = Instant::now();
        let refuse = |reason: &str, at_s| {
            attachment.refuse(reason.to_owned(), start + Duration::from_secs(at_s))
        };
        assert_eq!(attachment.last_refusal(), None);
        assert!(refuse("unsealed", 0));
        assert!(!refuse("unsealed", 1) && !refuse("unsealed", 59));
        assert!(refuse("unsealed", 60));
        assert!(!refuse("unsealed", 61));
        assert!(refuse("another", 62), "another reason is news at once");
        assert_eq!(attachment.last_refusal().as_deref(), Some("another"));
        attachment.forget_refusal();
        assert_eq!(attachment.last_refusal(), None);
        assert!(refuse("another", 63));
    }
}
