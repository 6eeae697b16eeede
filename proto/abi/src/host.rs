//! The host page: what the keeper and the servers of one host share.
//!
//! A sealed memfd of one page, made by the keeper (or found in the service manager's store) and
//! handed to each server. Its generation word decides, by one compare-and-swap, which process
//! owns the host's volumes: a standby, a restart and a candidate may race; one wins, the losers exit.

use std::mem::{offset_of, size_of};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::epoch::Generation;
use crate::region::{RegionError, SharedMemory};

/// `NEBDHST1`, little-endian.
pub const HOST_MAGIC: u64 = u64::from_le_bytes(*b"NEBDHST1");
/// Threads of a server that can be probed.
pub const PROBES_MAX: usize = 128;

/// The bytes of the page; see `docs/formats.md`.
#[repr(C, align(4096))]
struct HostLayout {
    magic: AtomicU64,
    version: AtomicU32,
    reserved0: AtomicU32,
    /// The word: the present owner's generation.
    generation: AtomicU32,
    /// The owner's process id, for people.
    owner_pid: AtomicU32,
    /// Generation whose death is described below.
    death_generation: AtomicU32,
    /// [`DeathCause`].
    death_cause: AtomicU32,
    /// [`NO_WORK`], [`WORK`] or [`NO_WORK_SINCE`].
    work: AtomicU32,
    reserved1: AtomicU32,
    reserved2: [AtomicU64; 3],
    /// Raised by the keeper when it wants a sign of life.
    ping: AtomicU64,
    /// How many of `pongs` the present server answers.
    pong_count: AtomicU64,
    pongs: [AtomicU64; PROBES_MAX],
    reserved3: [AtomicU64; 374],
}

const _: () = {
    assert!(size_of::<HostLayout>() == 4096);
    assert!(offset_of!(HostLayout, generation) == 16);
    assert!(offset_of!(HostLayout, work) == 32);
    assert!(offset_of!(HostLayout, ping) == 64);
    assert!(offset_of!(HostLayout, pongs) == 80);
};

/// The keeper does not look: the next to take up work wakes it.
const NO_WORK: u32 = 0;
/// Somebody took up work since the keeper looked.
const WORK: u32 = 1;
/// Nobody did.
const NO_WORK_SINCE: u32 = 2;

/// How a server ended. Only some causes count against the requests it was serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeathCause {
    /// Not known (no keeper saw it).
    Unknown = 0,
    /// It exited by itself.
    Exit = 1,
    /// Killed from outside: SIGKILL, SIGTERM and the like.
    Killed = 2,
    /// SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE: its own doing.
    Crash = 3,
    /// It hung, and the keeper killed it.
    Watchdog = 4,
}

impl DeathCause {
    /// The cause with this number.
    pub fn from_bits(bits: u32) -> DeathCause {
        match bits {
            1 => DeathCause::Exit,
            2 => DeathCause::Killed,
            3 => DeathCause::Crash,
            4 => DeathCause::Watchdog,
            _ => DeathCause::Unknown,
        }
    }

    /// Whether a request in flight may have caused it.
    pub fn counts_against_requests(self) -> bool {
        matches!(self, DeathCause::Crash | DeathCause::Watchdog)
    }
}

/// What the keeper sees of a server's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// None for long: the next will wake the keeper.
    None,
    /// Some was taken up since the last look.
    Some,
    /// None was.
    NoneSince,
}

/// The mapped host page.
#[derive(Debug)]
pub struct HostPage {
    memory: SharedMemory,
}

impl HostPage {
    /// A new page, of generation 0.
    pub fn create() -> Result<HostPage, RegionError> {
        let page = HostPage { memory: SharedMemory::create("nebd-host", 4096)? };
        page.layout().version.store(1, Relaxed);
        page.layout().magic.store(HOST_MAGIC, Relaxed);
        Ok(page)
    }

    /// Maps a page made by the keeper.
    pub fn open(fd: OwnedFd) -> Result<HostPage, RegionError> {
        let page = HostPage { memory: SharedMemory::map(fd, 4096)? };
        match (page.layout().magic.load(Relaxed), page.layout().version.load(Relaxed)) {
            (HOST_MAGIC, 1) => Ok(page),
            (HOST_MAGIC, version) => Err(crate::layout::LayoutError::Version(version).into()),
            _ => Err(crate::layout::LayoutError::Magic.into()),
        }
    }

    fn layout(&self) -> &HostLayout {
        // SAFETY: HostLayout consists of atomics alone; both constructors checked the size.
        unsafe { &*self.memory.as_ptr().cast::<HostLayout>() }
    }

    /// The memfd, to be passed to servers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// The present owner's generation.
    pub fn generation(&self) -> Generation {
        Generation(self.layout().generation.load(Acquire))
    }

    /// Becomes the owner, if `seen` is still the present generation. The point of no return.
    ///
    /// The caller has made sure that the owner of `seen` is dead or has relinquished.
    pub fn claim(&self, seen: Generation) -> Option<Generation> {
        let next = Generation(seen.0.checked_add(1)?);
        self.layout().generation.compare_exchange(seen.0, next.0, AcqRel, Acquire).ok()?;
        self.layout().owner_pid.store(std::process::id(), Relaxed);
        self.layout().pong_count.store(0, Release);
        Some(next)
    }

    /// Process id of the owner, for people.
    pub fn owner_pid(&self) -> u32 {
        self.layout().owner_pid.load(Relaxed)
    }

    /// Keeper: says how the owner of the present generation ended.
    pub fn record_death(&self, cause: DeathCause) {
        self.layout().death_cause.store(cause as u32, Relaxed);
        self.layout().death_generation.store(self.generation().0, Release);
    }

    /// How the server of `generation` ended; unknown if nobody saw it.
    pub fn death_of(&self, generation: Generation) -> DeathCause {
        if self.layout().death_generation.load(Acquire) != generation.0 {
            return DeathCause::Unknown;
        }
        DeathCause::from_bits(self.layout().death_cause.load(Relaxed))
    }

    /// Keeper: asks every thread of the server for a sign of life; returns what they must answer.
    pub fn ping(&self) -> u64 {
        self.layout().ping.fetch_add(1, AcqRel) + 1
    }

    /// Server: says how many threads answer pings. Until then a server counts as starting.
    pub fn announce_probes(&self, count: usize) {
        let ping = self.layout().ping.load(Acquire);
        for pong in &self.layout().pongs[..count.min(PROBES_MAX)] {
            pong.store(ping, Relaxed);
        }
        self.layout().pong_count.store(count.min(PROBES_MAX) as u64, Release);
    }

    /// Server: a thread takes up work, or has some in hand when it answers a ping; true if the keeper
    /// is to be woken. Costs a load, but for the first time after the keeper looked.
    pub fn take_up_work(&self) -> bool {
        // Whoever answered a ping has seen what the keeper wrote before it, so that an old value
        // hides no work that came after.
        let word = &self.layout().work;
        word.load(Relaxed) != WORK && word.swap(WORK, AcqRel) == NO_WORK
    }

    /// Keeper: whether it is to look after the server at all. Followed by a ping.
    pub fn look_at_work(&self) -> Work {
        let word = &self.layout().work;
        match word.compare_exchange(WORK, NO_WORK_SINCE, AcqRel, Acquire) {
            Ok(_) => Work::Some,
            Err(NO_WORK) => Work::None,
            Err(_) => Work::NoneSince,
        }
    }

    /// Keeper: nothing more is to be looked after, if nobody has taken up work by now.
    pub fn look_away(&self) {
        let word = &self.layout().work;
        let _somebody_did = word.compare_exchange(NO_WORK_SINCE, NO_WORK, AcqRel, Acquire);
    }

    /// Server: thread `probe` is alive.
    pub fn pong(&self, probe: usize) {
        if let Some(pong) = self.layout().pongs.get(probe) {
            pong.store(self.layout().ping.load(Acquire), Release);
        }
    }

    /// Keeper: how many threads have not answered `ping` yet; `None` while the server starts.
    pub fn silent_probes(&self, ping: u64) -> Option<usize> {
        let count = (self.layout().pong_count.load(Acquire) as usize).min(PROBES_MAX);
        if count == 0 {
            return None;
        }
        Some(self.layout().pongs[..count].iter().filter(|p| p.load(Acquire) < ping).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_two_claims_wins() {
        let ours = HostPage::create().unwrap();
        let theirs = HostPage::open(ours.fd().try_clone_to_owned().unwrap()).unwrap();
        let seen = ours.generation();
        assert_eq!(theirs.generation(), seen);
        assert_eq!(ours.claim(seen), Some(Generation(1)));
        assert_eq!(theirs.claim(seen), None);
    }

    #[test]
    fn a_death_is_told_for_its_generation_alone() {
        let page = HostPage::create().unwrap();
        let first = page.claim(page.generation()).unwrap();
        page.record_death(DeathCause::Crash);
        let second = page.claim(first).unwrap();
        assert_eq!(page.death_of(first), DeathCause::Crash);
        assert_eq!(page.death_of(second), DeathCause::Unknown);
    }

    #[test]
    fn work_wakes_the_keeper_once_until_it_looks_away() {
        let page = HostPage::create().unwrap();
        assert_eq!(page.look_at_work(), Work::None);
        assert!(page.take_up_work(), "nobody looks");
        assert!(!page.take_up_work());
        assert_eq!(page.look_at_work(), Work::Some);
        assert!(!page.take_up_work(), "it looks already");
        assert_eq!(page.look_at_work(), Work::Some);
        assert_eq!(page.look_at_work(), Work::NoneSince);
        assert!(!page.take_up_work());
        page.look_away();
        assert_eq!(page.look_at_work(), Work::Some, "it was taken up before the look away");
        page.look_away();
        assert_eq!(page.look_at_work(), Work::None);
        assert!(page.take_up_work());
    }

    #[test]
    fn silence_is_noticed() {
        let page = HostPage::create().unwrap();
        let ping = page.ping();
        assert_eq!(page.silent_probes(ping), None);
        page.announce_probes(2);
        let ping = page.ping();
        page.pong(1);
        assert_eq!(page.silent_probes(ping), Some(1));
        page.pong(0);
        assert_eq!(page.silent_probes(ping), Some(0));
    }
}
