//! The ledger: what a session's servers remember of it, in memory that the client cannot touch.
//!
//! A memfd of the server's own, kept in the descriptor store beside the region. It tells a
//! successor under which major epoch the volume is open, and which requests a dead server had
//! given to its backend, so that one that kills servers is found out:
//!
//! ```text
//!   dispatch(seq)     deaths = 0, seq, dispatched = generation     (a new request)
//!   … the server crashes …
//!   count_deaths      dispatched == dead generation  ⇒  deaths + 1
//!   re-issue          dispatched = new generation, deaths stay
//!   done              dispatched = 0
//! ```
//!
//! And it holds the session's counters, so that they go on where a dead server's stopped.

use std::mem::{offset_of, size_of};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use nebd_abi::Generation;
use nebd_abi::layout::LayoutError;
use nebd_abi::region::{RegionError, SharedMemory};

use crate::metrics::Counters;

/// `NEBDLDG1`, little-endian.
pub const LEDGER_MAGIC: u64 = u64::from_le_bytes(*b"NEBDLDG1");

/// First page of the ledger.
#[repr(C, align(4096))]
struct LedgerHeader {
    magic: AtomicU64,
    version: AtomicU32,
    slots_total: AtomicU32,
    /// Major epoch under which this host has the volume open.
    major: AtomicU32,
    /// [`nebd_abi::control::AttachFlags`] of the attach.
    attach_flags: AtomicU32,
    client_uid: AtomicU32,
    client_gid: AtomicU32,
    client_pid: AtomicU32,
    reserved0: AtomicU32,
    /// See [`nebd_abi::control::VolumeInfo::incarnation`].
    incarnation: AtomicU64,
    reserved1: [AtomicU64; 2],
    counters: Counters,
    reserved2: [AtomicU64; 273],
}

/// One slot's record.
#[repr(C)]
struct LedgerSlot {
    /// The request that `state` speaks of.
    seq: AtomicU64,
    /// Deaths in the high half; in the low half the generation that dispatched it, 0 once done.
    state: AtomicU64,
}

const _: () = {
    assert!(size_of::<LedgerHeader>() == 4096);
    assert!(offset_of!(LedgerHeader, incarnation) == 40);
    assert!(offset_of!(LedgerHeader, counters) == 64);
    assert!(size_of::<LedgerSlot>() == 16);
};

/// Who attached a session, and how: what a successor cannot ask a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Major epoch of the volume.
    pub major: u32,
    /// Flags of the attach.
    pub attach_flags: u32,
    /// The client's user.
    pub client_uid: u32,
    /// The client's group.
    pub client_gid: u32,
    /// The client's process.
    pub client_pid: u32,
    /// Identity of volatile contents.
    pub incarnation: u64,
}

/// A session's ledger, mapped. A clone shares the mapping.
#[derive(Clone, Debug)]
pub struct Ledger {
    memory: Arc<SharedMemory>,
    slots_total: u32,
    is_inherited: bool,
}

impl Ledger {
    /// A new ledger.
    pub fn create(slots_total: u32, attachment: &Attachment) -> Result<Ledger, RegionError> {
        let size = (4096 + u64::from(slots_total) * 16).next_multiple_of(4096);
        let memory = Arc::new(SharedMemory::create("nebd-ledger", size)?);
        let ledger = Ledger { memory, slots_total, is_inherited: false };
        let header = ledger.header();
        header.version.store(1, Relaxed);
        header.slots_total.store(slots_total, Relaxed);
        header.major.store(attachment.major, Relaxed);
        header.attach_flags.store(attachment.attach_flags, Relaxed);
        header.client_uid.store(attachment.client_uid, Relaxed);
        header.client_gid.store(attachment.client_gid, Relaxed);
        header.client_pid.store(attachment.client_pid, Relaxed);
        header.incarnation.store(attachment.incarnation, Relaxed);
        header.magic.store(LEDGER_MAGIC, Release);
        Ok(ledger)
    }

    /// Maps a predecessor's ledger.
    pub fn open(fd: OwnedFd) -> Result<Ledger, RegionError> {
        let memory = Arc::new(SharedMemory::map(fd, 1 << 30)?);
        let mut ledger = Ledger { memory, slots_total: 0, is_inherited: true };
        let header = ledger.header();
        if header.magic.load(Acquire) != LEDGER_MAGIC {
            return Err(LayoutError::Magic.into());
        }
        if header.version.load(Relaxed) != 1 {
            return Err(LayoutError::Version(header.version.load(Relaxed)).into());
        }
        let slots_total = header.slots_total.load(Relaxed);
        if 4096 + u64::from(slots_total) * 16 > ledger.memory.size() {
            return Err(RegionError::Size(ledger.memory.size()));
        }
        ledger.slots_total = slots_total;
        Ok(ledger)
    }

    fn header(&self) -> &LedgerHeader {
        // SAFETY: LedgerHeader consists of atomics alone, and a mapping is at least a page.
        unsafe { &*self.memory.as_ptr().cast::<LedgerHeader>() }
    }

    fn slot(&self, slot: u32) -> Option<&LedgerSlot> {
        if slot >= self.slots_total {
            return None;
        }
        // SAFETY: LedgerSlot consists of atomics alone.
        unsafe { self.memory.atomics(4096 + u64::from(slot) * 16) }
    }

    /// The memfd, for the descriptor store.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Slots it has records for.
    pub fn slots_total(&self) -> u32 {
        self.slots_total
    }

    /// Whether a predecessor made it.
    pub fn is_inherited(&self) -> bool {
        self.is_inherited
    }

    /// Maps its pages at once.
    pub fn populate(&self) -> std::io::Result<()> {
        self.memory.populate(self.memory.size())
    }

    /// What is counted of the session.
    pub fn counters(&self) -> &Counters {
        &self.header().counters
    }

    /// Who attached, and how.
    pub fn attachment(&self) -> Attachment {
        let header = self.header();
        Attachment {
            major: header.major.load(Relaxed),
            attach_flags: header.attach_flags.load(Relaxed),
            client_uid: header.client_uid.load(Relaxed),
            client_gid: header.client_gid.load(Relaxed),
            client_pid: header.client_pid.load(Relaxed),
            incarnation: header.incarnation.load(Relaxed),
        }
    }

    /// The volume was opened anew, under another major epoch.
    pub fn set_major(&self, major: u32) {
        self.header().major.store(major, Relaxed);
    }

    /// Request `seq` of `slot` goes to the backend now. Deaths of the same request stay counted.
    pub fn dispatch(&self, slot: u32, seq: u64, generation: Generation) {
        let Some(record) = self.slot(slot) else { return };
        let deaths = if record.seq.load(Relaxed) == seq {
            record.state.load(Relaxed) & !u64::from(u32::MAX)
        } else {
            // Whoever dies between these stores leaves a record of no deaths and no dispatch.
            record.state.store(0, Release);
            record.seq.store(seq, Release);
            0
        };
        record.state.store(deaths | u64::from(generation.0), Release);
    }

    /// The request of `slot` that was dispatched last, or is dispatched.
    pub fn last_seq(&self, slot: u32) -> u64 {
        self.slot(slot).map_or(0, |record| record.seq.load(Relaxed))
    }

    /// The request of `slot` is answered.
    pub fn done(&self, slot: u32) {
        if let Some(record) = self.slot(slot) {
            record.state.store(0, Release);
        }
    }

    /// Deaths that request `seq` of `slot` has been part of.
    pub fn deaths(&self, slot: u32, seq: u64) -> u32 {
        self.slot(slot)
            .filter(|record| record.seq.load(Relaxed) == seq)
            .map_or(0, |record| (record.state.load(Relaxed) >> 32) as u32)
    }

    /// The server of `dead` crashed: whatever it had dispatched of `slot` was part of it. Counts
    /// once, however often it is called.
    pub fn count_death(&self, slot: u32, dead: Generation) {
        let Some(record) = self.slot(slot) else { return };
        let state = record.state.load(Relaxed);
        if dead.0 != 0 && state as u32 == dead.0 {
            let deaths = (state >> 32) as u32;
            record.state.store(u64::from(deaths.saturating_add(1)) << 32, Release);
        }
    }

    /// The operator gives the request of `slot` another chance: the last one, and alone. Were it
    /// issued with the rest, its next crash would be counted against them too.
    pub fn forgive(&self, slot: u32, deaths: u32) {
        if let Some(record) = self.slot(slot) {
            record.state.store(u64::from(deaths) << 32, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACHMENT: Attachment = Attachment {
        major: 7,
        attach_flags: 1,
        client_uid: 2,
        client_gid: 3,
        client_pid: 4,
        incarnation: 5,
    };

    #[test]
    fn a_successor_reads_what_was_written() {
        let ledger = Ledger::create(8, &ATTACHMENT).unwrap();
        ledger.dispatch(3, 11, Generation(1));
        let successor = Ledger::open(ledger.fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((successor.attachment(), successor.slots_total()), (ATTACHMENT, 8));
        successor.count_death(3, Generation(1));
        successor.count_death(3, Generation(1));
        assert_eq!(successor.deaths(3, 11), 1);
        assert_eq!(successor.deaths(3, 12), 0, "another request of the slot is innocent");
    }

    #[test]
    fn deaths_add_up_over_reissues_and_end_with_an_answer() {
        let ledger = Ledger::create(1, &ATTACHMENT).unwrap();
        for generation in 1..=3 {
            ledger.dispatch(0, 5, Generation(generation));
            ledger.count_death(0, Generation(generation));
        }
        assert_eq!(ledger.deaths(0, 5), 3);
        ledger.dispatch(0, 5, Generation(4));
        ledger.count_death(0, Generation(3));
        assert_eq!(ledger.deaths(0, 5), 3, "only the dead generation's dispatches count");
        ledger.done(0);
        assert_eq!(ledger.deaths(0, 5), 0);
    }
}
