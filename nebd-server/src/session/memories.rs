//! Registered memories, and how much of the server's address space each user may take up with them.
//!
//! A memfd costs its owner nothing while it is sparse, but a mapping of it takes address space, of
//! which a process has 128 TiB. Root is not limited.

use std::collections::HashMap;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nebd_abi::layout::MEMORIES_MAX;
use nebd_abi::region::{RegionError, SharedMemory};

/// Registered memories by id.
pub type Memories = Vec<Option<Arc<RegisteredMemory>>>;

/// Puts a memory into a table; ids beyond the limit are ignored (they were refused earlier).
pub fn set_memory(table: &mut Memories, id: u32, memory: Option<Arc<RegisteredMemory>>) {
    if id == 0 || id > MEMORIES_MAX {
        return;
    }
    if table.len() <= id as usize {
        table.resize(id as usize + 1, None);
    }
    table[id as usize] = memory;
}

/// A client's memory, mapped.
pub struct RegisteredMemory {
    memory: SharedMemory,
    _charge: Charge,
}

/// What a mapping takes of its user's quota, while it lasts.
pub struct Charge {
    uid: u32,
    bytes: u64,
    quota: Arc<MemoryQuota>,
}

impl Deref for RegisteredMemory {
    type Target = SharedMemory;

    fn deref(&self) -> &SharedMemory {
        &self.memory
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut used = self.quota.used();
        if let Some(bytes) = used.get_mut(&self.uid) {
            *bytes -= self.bytes;
            if *bytes == 0 {
                used.remove(&self.uid);
            }
        }
    }
}

/// Why a memory cannot be registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// It is no memory that can be shared, or the system is short of something.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The user has too much already.
    #[error(
        "user {uid} would have {bytes} bytes of memory registered, and {limit} are allowed \
         (access.memory_gib_max)"
    )]
    Quota {
        /// Who.
        uid: u32,
        /// With this one.
        bytes: u64,
        /// At most.
        limit: u64,
    },
}

/// Bytes that each user has registered.
pub struct MemoryQuota {
    limit: u64,
    used: Mutex<HashMap<u32, u64>>,
}

impl MemoryQuota {
    /// At most so many bytes for each user.
    pub fn new(limit: u64) -> MemoryQuota {
        MemoryQuota { limit, used: Mutex::default() }
    }

    fn used(&self) -> MutexGuard<'_, HashMap<u32, u64>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts so many bytes for this user, if it may have them.
    pub fn charge(self: &Arc<Self>, uid: u32, bytes: u64) -> Result<Charge, RegisterError> {
        let limit = if uid == 0 { u64::MAX } else { self.limit };
        let mut used = self.used();
        let total = used.get(&uid).copied().unwrap_or(0).saturating_add(bytes);
        if total > limit {
            return Err(RegisterError::Quota { uid, bytes: total, limit });
        }
        used.insert(uid, total);
        Ok(Charge { uid, bytes, quota: self.clone() })
    }

    /// Counts what a predecessor had accepted.
    pub fn charge_again(self: &Arc<Self>, uid: u32, bytes: u64) -> Charge {
        let mut used = self.used();
        let total = used.entry(uid).or_default();
        // Not more than is given back.
        let bytes = bytes.min(u64::MAX - *total);
        *total += bytes;
        Charge { uid, bytes, quota: self.clone() }
    }

    /// Maps a memory for this user, if it may have it.
    pub fn map(self: &Arc<Self>, fd: OwnedFd, uid: u32) -> Result<RegisteredMemory, RegisterError> {
        let memory = SharedMemory::map(fd, u64::MAX)?;
        let charge = self.charge(uid, memory.size())?;
        Ok(RegisteredMemory { memory, _charge: charge })
    }

    /// Maps what a predecessor had accepted.
    pub fn map_again(
        self: &Arc<Self>,
        fd: OwnedFd,
        uid: u32,
    ) -> Result<RegisteredMemory, RegionError> {
        let memory = SharedMemory::map(fd, u64::MAX)?;
        let charge = self.charge_again(uid, memory.size());
        Ok(RegisteredMemory { memory, _charge: charge })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(size: u64) -> OwnedFd {
        let memory = SharedMemory::create("test", size).unwrap();
        memory.fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn each_user_has_a_quota_and_root_has_none() {
        let quota = Arc::new(MemoryQuota::new(3 * 4096));
        let first = quota.map(memfd(2 * 4096), 7).unwrap();
        let refused = quota.map(memfd(2 * 4096), 7).err();
        assert!(matches!(refused, Some(RegisterError::Quota { uid: 7, bytes: 16384, .. })));
        let _others =
            [quota.map(memfd(3 * 4096), 8).unwrap(), quota.map(memfd(1 << 20), 0).unwrap()];
        // What a predecessor accepted is counted, not refused.
        let _again = quota.map_again(memfd(2 * 4096), 7).unwrap();
        assert!(quota.map(memfd(4096), 7).is_err());
        drop(first);
        quota.map(memfd(4096), 7).unwrap();
        assert_eq!(quota.used().get(&7), Some(&(2 * 4096)));
    }
}
