//! Volumes that are open, each once, however many sessions attach it.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nebd_abi::{Epoch, Fence, VolumeName};
use nebd_backend::{BackendError, Capabilities, Opened, Volume};

use crate::throttle::{Limits, Throttle};

/// A volume opened as its owner.
pub struct OpenVolume {
    /// Its name.
    pub name: VolumeName,
    /// 512 or 4096.
    pub block_size: u32,
    /// Under which it is served.
    pub epoch: Epoch,
    /// Identity of volatile contents, 0 where they are durable.
    pub incarnation: u64,
    /// At its backend.
    pub volume: Arc<dyn Volume>,
    /// What the backend can do.
    pub capabilities: Capabilities,
    volume_id: u64,
    sequence: Mutex<Sequence>,
    parked: Mutex<Option<String>>,
    /// Size as last told to sessions.
    pub size: AtomicU64,
    /// What its sessions together may have.
    pub throttle: Throttle,
}

impl OpenVolume {
    /// A volume just opened.
    pub fn new(
        name: VolumeName,
        block_size: u32,
        epoch: Epoch,
        opened: Opened,
        limits: &Limits,
    ) -> OpenVolume {
        OpenVolume {
            name,
            block_size,
            epoch,
            incarnation: opened.incarnation,
            capabilities: opened.volume.capabilities(),
            size: AtomicU64::new(opened.volume.size()),
            volume: opened.volume,
            volume_id: opened.volume_id,
            sequence: Mutex::default(),
            parked: Mutex::default(),
            throttle: Throttle::new(limits),
        }
    }

    /// The fence of an operation that is dispatched now.
    pub fn fence(&self) -> Fence {
        if !self.capabilities.fences {
            return Fence { epoch: self.epoch, ..Fence::default() };
        }
        let (seq, oldest) = lock(&self.sequence).begin();
        Fence { volume: self.volume_id, epoch: self.epoch, seq, oldest }
    }

    /// The operation with this fence is answered.
    pub fn answered(&self, fence: &Fence) {
        if self.capabilities.fences {
            lock(&self.sequence).end(fence.seq);
        }
    }

    /// Why the volume is parked, if it is.
    pub fn parked(&self) -> Option<String> {
        lock(&self.parked).clone()
    }

    /// Parks the volume, or lets it go on.
    pub fn set_parked(&self, reason: Option<String>) {
        *lock(&self.parked) = reason;
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The counter of a (volume, epoch): gives out `seq`, and with it, atomically, the oldest that is
/// still outstanding.
#[derive(Debug, Default)]
struct Sequence {
    last: u64,
    outstanding: BTreeSet<u64>,
}

impl Sequence {
    fn begin(&mut self) -> (u64, u64) {
        self.last += 1;
        self.outstanding.insert(self.last);
        (self.last, self.outstanding.first().copied().unwrap_or(self.last))
    }

    fn end(&mut self, seq: u64) {
        self.outstanding.remove(&seq);
    }
}

/// The open volumes of a server.
#[derive(Default)]
pub struct VolumeTable {
    entries: Mutex<HashMap<VolumeName, Entry>>,
    changed: Condvar,
}

enum Entry {
    /// Somebody opens, closes or deletes it right now.
    Busy,
    Open(Arc<OpenVolume>, usize),
}

impl VolumeTable {
    /// The open volume, opened by `open` if nobody has; counts one more user.
    pub fn acquire(
        &self,
        name: &VolumeName,
        open: impl FnOnce() -> Result<OpenVolume, BackendError>,
    ) -> Result<Arc<OpenVolume>, BackendError> {
        let mut entries = self.wait_idle(name);
        if let Some(Entry::Open(volume, users)) = entries.get_mut(name) {
            *users += 1;
            return Ok(volume.clone());
        }
        entries.insert(name.clone(), Entry::Busy);
        drop(entries);
        let opened = open().map(Arc::new);
        let mut entries = lock(&self.entries);
        match &opened {
            Ok(volume) => entries.insert(name.clone(), Entry::Open(volume.clone(), 1)),
            Err(_) => entries.remove(name),
        };
        drop(entries);
        self.changed.notify_all();
        opened
    }

    /// One user less; the last one closes the volume. May block.
    pub fn release(&self, name: &VolumeName) {
        let mut entries = self.wait_idle(name);
        let Some(Entry::Open(volume, users)) = entries.get_mut(name) else { return };
        *users -= 1;
        if *users > 0 {
            return;
        }
        let volume = volume.clone();
        entries.insert(name.clone(), Entry::Busy);
        drop(entries);
        volume.volume.close();
        self.finish(name);
    }

    /// Runs `action` while nobody has the volume open or can open it; `None` if somebody has.
    pub fn while_closed<T>(&self, name: &VolumeName, action: impl FnOnce() -> T) -> Option<T> {
        let mut entries = self.wait_idle(name);
        if entries.contains_key(name) {
            return None;
        }
        entries.insert(name.clone(), Entry::Busy);
        drop(entries);
        let result = action();
        self.finish(name);
        Some(result)
    }

    fn finish(&self, name: &VolumeName) {
        lock(&self.entries).remove(name);
        self.changed.notify_all();
    }

    fn wait_idle(&self, name: &VolumeName) -> MutexGuard<'_, HashMap<VolumeName, Entry>> {
        self.changed
            .wait_while(lock(&self.entries), |entries| {
                matches!(entries.get(name), Some(Entry::Busy))
            })
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The open volume of this name.
    pub fn open(&self, name: &VolumeName) -> Option<Arc<OpenVolume>> {
        match lock(&self.entries).get(name) {
            Some(Entry::Open(volume, _)) => Some(volume.clone()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_outstanding_is_told_with_each_seq() {
        let mut sequence = Sequence::default();
        assert_eq!(sequence.begin(), (1, 1));
        assert_eq!(sequence.begin(), (2, 1));
        sequence.end(2);
        assert_eq!(sequence.begin(), (3, 1));
        sequence.end(1);
        assert_eq!(sequence.begin(), (4, 3));
        sequence.end(3);
        sequence.end(4);
        assert_eq!(sequence.begin(), (5, 5));
        sequence.end(1);
        assert_eq!(sequence.begin(), (6, 5));
    }
}
