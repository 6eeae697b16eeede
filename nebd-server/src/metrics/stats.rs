//! The statistics: what a host's servers have counted together, in memory that outlives each.
//!
//! A memfd kept in the descriptor store, drawn in `docs/formats.md`. It holds how often servers took
//! over from each other and how long that took, and for each volume what its sessions had counted
//! when they ended; what sessions that live have counted is in their ledgers. Pages of the table
//! of volumes that were never used take no memory.

use std::mem::offset_of;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use nebd_abi::layout::LayoutError;
use nebd_abi::region::{RegionError, SharedMemory};
use nebd_abi::{Generation, VolumeName};

use super::counters::{Counters, Histogram, Times, Totals};

/// `NEBDSTS1`, little-endian.
pub const STATS_MAGIC: u64 = u64::from_le_bytes(*b"NEBDSTS1");
/// Volumes that a new table has room for.
pub const VOLUMES_MAX: u32 = 4096;
/// Volumes that a table may have room for.
const VOLUMES_LIMIT: u32 = 1 << 20;
/// Phases that are told apart.
pub const PHASES_MAX: usize = 16;
const PHASE_NAME_WORDS: usize = 4;
const VOLUME_NAME_WORDS: usize = 24;
const TABLE_OFFSET: u64 = 8192;

/// How a server came to take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TakeoverKind {
    /// Nobody saw the predecessor's end.
    Unknown = 0,
    /// The predecessor exited by itself.
    Exit = 1,
    /// The predecessor was killed from outside.
    Killed = 2,
    /// The predecessor crashed.
    Crash = 3,
    /// The predecessor hung and was killed for it.
    Watchdog = 4,
    /// The predecessor handed over.
    Planned = 5,
}

impl TakeoverKind {
    /// Every kind, in the order of its number.
    pub const ALL: [TakeoverKind; 6] = [
        TakeoverKind::Unknown,
        TakeoverKind::Exit,
        TakeoverKind::Killed,
        TakeoverKind::Crash,
        TakeoverKind::Watchdog,
        TakeoverKind::Planned,
    ];

    /// As metrics label it.
    pub fn name(self) -> &'static str {
        match self {
            TakeoverKind::Unknown => "unknown",
            TakeoverKind::Exit => "exit",
            TakeoverKind::Killed => "killed",
            TakeoverKind::Crash => "crash",
            TakeoverKind::Watchdog => "watchdog",
            TakeoverKind::Planned => "planned",
        }
    }

    fn from_bits(bits: u32) -> TakeoverKind {
        let known = TakeoverKind::ALL.into_iter().find(|kind| *kind as u32 == bits);
        known.unwrap_or(TakeoverKind::Unknown)
    }
}

#[repr(C)]
struct PhaseRecord {
    /// Padded with zeros; a record without a name is free.
    name: [AtomicU64; PHASE_NAME_WORDS],
    count: AtomicU64,
    sum_ns: AtomicU64,
    last_ns: AtomicU64,
    reserved: AtomicU64,
}

/// Two pages.
#[repr(C, align(4096))]
struct StatsHeader {
    magic: AtomicU64,
    version: AtomicU32,
    volumes_max: AtomicU32,
    /// Records of the table that were ever used; the rest is not looked at.
    volumes_used: AtomicU32,
    last_kind: AtomicU32,
    last_unix_ms: AtomicU64,
    /// The longest of the last takeover.
    last_blackout_ns: AtomicU64,
    last_generation: AtomicU32,
    reserved0: AtomicU32,
    reserved1: [AtomicU64; 2],
    takeovers: [AtomicU64; 8],
    phases: [PhaseRecord; PHASES_MAX],
    reserved2: [AtomicU64; 112],
    /// Of unplanned takeovers, of planned ones.
    blackouts: [Histogram; 2],
    reserved3: [AtomicU64; 350],
}

/// What the sessions of a volume that have ended had counted.
#[repr(C)]
struct VolumeRecord {
    /// Padded with zeros; a record without a name is free.
    name: [AtomicU64; VOLUME_NAME_WORDS],
    counters: Counters,
    reserved: AtomicU64,
}

const _: () = {
    assert!(size_of::<StatsHeader>() as u64 == TABLE_OFFSET);
    assert!(offset_of!(StatsHeader, takeovers) == 64);
    assert!(offset_of!(StatsHeader, phases) == 128);
    assert!(offset_of!(StatsHeader, blackouts) == 2048);
    assert!(size_of::<PhaseRecord>() == 64);
    assert!(size_of::<VolumeRecord>() == 2048);
    assert!(offset_of!(VolumeRecord, counters) == 192);
};

/// The last takeover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastTakeover {
    /// How it came to pass.
    pub kind: TakeoverKind,
    /// Who serves since then.
    pub generation: Generation,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The longest blackout of a volume that is known of; 0 if nothing waited.
    pub blackout: Duration,
}

/// How long a phase of takeovers took.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they say it")]
pub struct Phase {
    pub name: String,
    pub count: u64,
    pub sum_ns: u64,
    pub last_ns: u64,
}

/// The statistics, mapped.
#[derive(Debug)]
pub struct Stats {
    memory: SharedMemory,
    volumes_max: u32,
}

impl Stats {
    /// New ones, all zero.
    pub fn create() -> Result<Stats, RegionError> {
        let size = TABLE_OFFSET + u64::from(VOLUMES_MAX) * size_of::<VolumeRecord>() as u64;
        let memory = SharedMemory::create("nebd-stats", size)?;
        let stats = Stats { memory, volumes_max: VOLUMES_MAX };
        let header = stats.header();
        header.version.store(1, Relaxed);
        header.volumes_max.store(VOLUMES_MAX, Relaxed);
        header.magic.store(STATS_MAGIC, Release);
        Ok(stats)
    }

    /// Maps those of a predecessor.
    pub fn open(fd: OwnedFd) -> Result<Stats, RegionError> {
        let record = size_of::<VolumeRecord>() as u64;
        let memory = SharedMemory::map(fd, TABLE_OFFSET + u64::from(VOLUMES_LIMIT) * record)?;
        if memory.size() < TABLE_OFFSET {
            return Err(RegionError::Size(memory.size()));
        }
        let mut stats = Stats { memory, volumes_max: 0 };
        let header = stats.header();
        if header.magic.load(Acquire) != STATS_MAGIC {
            return Err(LayoutError::Magic.into());
        }
        if header.version.load(Relaxed) != 1 {
            return Err(LayoutError::Version(header.version.load(Relaxed)).into());
        }
        let volumes_max = header.volumes_max.load(Relaxed);
        if TABLE_OFFSET + u64::from(volumes_max) * record > stats.memory.size() {
            return Err(RegionError::Size(stats.memory.size()));
        }
        stats.volumes_max = volumes_max;
        Ok(stats)
    }

    fn header(&self) -> &StatsHeader {
        // SAFETY: StatsHeader consists of atomics alone; both constructors checked the size.
        unsafe { &*self.memory.as_ptr().cast::<StatsHeader>() }
    }

    fn record(&self, index: u32) -> Option<&VolumeRecord> {
        if index >= self.volumes_max {
            return None;
        }
        let offset = TABLE_OFFSET + u64::from(index) * size_of::<VolumeRecord>() as u64;
        // SAFETY: VolumeRecord consists of atomics alone.
        unsafe { self.memory.atomics(offset) }
    }

    fn records(&self) -> impl Iterator<Item = &VolumeRecord> {
        let used = self.header().volumes_used.load(Acquire);
        (0..used.min(self.volumes_max)).filter_map(|index| self.record(index))
    }

    /// The memfd, for the descriptor store.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// The server of `generation` has taken over.
    pub fn note_takeover(&self, kind: TakeoverKind, generation: Generation, unix_ms: u64) {
        let header = self.header();
        header.takeovers[kind as usize].fetch_add(1, Relaxed);
        header.last_kind.store(kind as u32, Relaxed);
        header.last_unix_ms.store(unix_ms, Relaxed);
        header.last_blackout_ns.store(0, Relaxed);
        header.last_generation.store(generation.0, Release);
    }

    /// How often servers took over in this way.
    pub fn takeovers(&self, kind: TakeoverKind) -> u64 {
        self.header().takeovers[kind as usize].load(Relaxed)
    }

    /// The last takeover, if there was one.
    pub fn last_takeover(&self) -> Option<LastTakeover> {
        let header = self.header();
        let generation = Generation(header.last_generation.load(Acquire));
        (generation.0 > 0).then(|| LastTakeover {
            kind: TakeoverKind::from_bits(header.last_kind.load(Relaxed)),
            generation,
            unix_ms: header.last_unix_ms.load(Relaxed),
            blackout: Duration::from_nanos(header.last_blackout_ns.load(Relaxed)),
        })
    }

    /// A volume had this blackout in a takeover, the last one.
    pub fn note_blackout(&self, kind: TakeoverKind, blackout: Duration) {
        let ns = u64::try_from(blackout.as_nanos()).unwrap_or(u64::MAX);
        self.header().last_blackout_ns.fetch_max(ns, Relaxed);
        self.histogram(kind == TakeoverKind::Planned).record(ns);
    }

    fn histogram(&self, planned: bool) -> &Histogram {
        &self.header().blackouts[usize::from(planned)]
    }

    /// Blackouts of volumes, of planned takeovers or of the others.
    pub fn blackouts(&self, planned: bool) -> Times {
        let mut times = Times::default();
        times.add(self.histogram(planned));
        times
    }

    /// A phase of a takeover took so long. Of a name only the first 32 bytes count.
    pub fn note_phase(&self, name: &str, took: Duration) {
        let Some(record) = Some(name).filter(|n| !n.is_empty()).and_then(|n| self.phase(n)) else {
            return;
        };
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        record.last_ns.store(ns, Relaxed);
        record.sum_ns.fetch_add(ns, Relaxed);
        record.count.fetch_add(1, Relaxed);
    }

    /// The record of a phase, taken up if there is none yet; `None` if there is no room.
    fn phase(&self, name: &str) -> Option<&PhaseRecord> {
        let words = words_of::<PHASE_NAME_WORDS>(name);
        self.header().phases.iter().find(|record| {
            // Predecessor and successor may both be looking; the first word decides.
            let first = &record.name[0];
            match first.compare_exchange(0, words[0], Relaxed, Relaxed) {
                Ok(_) => {
                    set_name(&record.name, &words);
                    true
                }
                Err(_) => has_name(&record.name, &words),
            }
        })
    }

    /// Every phase that was noted, by name.
    pub fn phases(&self) -> Vec<Phase> {
        let named = self.header().phases.iter().filter_map(|record| {
            let name = name_of(&record.name)?;
            let load = |word: &AtomicU64| word.load(Relaxed);
            let (count, sum_ns) = (load(&record.count), load(&record.sum_ns));
            Some(Phase { name, count, sum_ns, last_ns: load(&record.last_ns) })
        });
        let mut phases: Vec<Phase> = named.collect();
        // Two that took up a record at once for the same name.
        phases.sort_by(|a, b| a.name.cmp(&b.name));
        phases.dedup_by(|later, first| {
            let same = later.name == first.name;
            if same {
                first.count += later.count;
                first.sum_ns += later.sum_ns;
            }
            same
        });
        phases
    }

    /// A session of this volume has ended: its counters are moved here. False if there is no room.
    /// One thread of one server at a time.
    pub fn retire(&self, volume: &VolumeName, counters: &Counters) -> bool {
        let words = words_of::<VOLUME_NAME_WORDS>(volume.as_str());
        let known = self.records().find(|record| has_name(&record.name, &words));
        let Some(record) = known.or_else(|| self.take_up(&words)) else { return false };
        counters.move_to(&record.counters);
        true
    }

    fn take_up(&self, words: &[u64; VOLUME_NAME_WORDS]) -> Option<&VolumeRecord> {
        let free = self.records().find(|record| record.name[0].load(Relaxed) == 0);
        let record = free.or_else(|| {
            let used = self.header().volumes_used.load(Relaxed);
            let record = self.record(used)?;
            self.header().volumes_used.store(used + 1, Release);
            Some(record)
        })?;
        record.counters.clear();
        set_name(&record.name, words);
        Some(record)
    }

    /// The volume is deleted; a new one of its name starts from zero.
    pub fn forget(&self, volume: &VolumeName) {
        let words = words_of::<VOLUME_NAME_WORDS>(volume.as_str());
        for record in self.records().filter(|record| has_name(&record.name, &words)) {
            record.name[0].store(0, Release);
            record.counters.clear();
        }
    }

    /// Every volume that has a record, with what its ended sessions had counted.
    pub fn retired(&self) -> Vec<(VolumeName, Totals)> {
        let named = self.records().filter_map(|record| {
            let name = name_of(&record.name)?.parse().ok()?;
            let mut totals = Totals::default();
            totals.add(&record.counters);
            Some((name, totals))
        });
        named.collect()
    }
}

/// A name as words, cut off where it is too long.
fn words_of<const WORDS: usize>(name: &str) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, chunk) in words.iter_mut().zip(name.as_bytes().chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_le_bytes(bytes);
    }
    words
}

fn has_name(name: &[AtomicU64], words: &[u64]) -> bool {
    name.iter().zip(words).all(|(mine, theirs)| mine.load(Acquire) == *theirs)
}

/// The first word comes last: a name is there when it is complete.
fn set_name(name: &[AtomicU64], words: &[u64]) {
    for (mine, theirs) in name.iter().zip(words).rev() {
        mine.store(*theirs, Release);
    }
}

fn name_of(name: &[AtomicU64]) -> Option<String> {
    let bytes: Vec<u8> = name.iter().flat_map(|word| word.load(Acquire).to_le_bytes()).collect();
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let name = std::str::from_utf8(&bytes[..length]).ok()?;
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(stats: &Stats) -> Stats {
        Stats::open(stats.fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn a_successor_goes_on_counting() {
        let stats = Stats::create().unwrap();
        assert_eq!(stats.last_takeover(), None);
        stats.note_takeover(TakeoverKind::Crash, Generation(2), 1000);
        stats.note_blackout(TakeoverKind::Crash, Duration::from_millis(7));
        let stats = again(&stats);
        stats.note_takeover(TakeoverKind::Planned, Generation(3), 2000);
        stats.note_blackout(TakeoverKind::Planned, Duration::from_millis(3));
        stats.note_blackout(TakeoverKind::Planned, Duration::from_millis(2));
        let last = again(&stats).last_takeover().unwrap();
        assert_eq!((last.kind, last.generation), (TakeoverKind::Planned, Generation(3)));
        assert_eq!((last.unix_ms, last.blackout), (2000, Duration::from_millis(3)));
        assert_eq!(stats.takeovers(TakeoverKind::Crash), 1);
        assert_eq!((stats.blackouts(false).count(), stats.blackouts(true).count()), (1, 2));
    }

    #[test]
    fn phases_are_kept_by_name_as_long_as_there_is_room() {
        let stats = Stats::create().unwrap();
        stats.note_phase("PREPARE", Duration::from_millis(5));
        again(&stats).note_phase("PREPARE", Duration::from_millis(7));
        let phase = |name: String, count, sum_ns, last_ns| Phase { name, count, sum_ns, last_ns };
        assert_eq!(stats.phases(), [phase("PREPARE".into(), 2, 12_000_000, 7_000_000)]);
        for k in 0..2 * PHASES_MAX {
            stats.note_phase(&format!("a-phase-with-a-long-name-{k:02}"), Duration::from_nanos(1));
        }
        stats.note_phase(&"x".repeat(100), Duration::ZERO);
        assert_eq!(stats.phases().len(), PHASES_MAX);
        stats.note_phase("", Duration::ZERO);
        assert_eq!(stats.phases().len(), PHASES_MAX);
    }

    #[test]
    fn volumes_keep_what_their_sessions_counted() {
        let stats = Stats::create().unwrap();
        let session = Stats::create().unwrap();
        let counters = &session.record(0).unwrap().counters;
        let volume = |k: u32| -> VolumeName { format!("file:disk{k}").parse().unwrap() };
        for round in 1..=2 {
            for k in 0..100 {
                counters.stalls.store(u64::from(k), Relaxed);
                assert!(again(&stats).retire(&volume(k), counters));
            }
            let retired = stats.retired();
            assert_eq!(retired.len(), 100);
            assert!(retired.iter().any(|(name, t)| *name == volume(9) && t.stalls == 9 * round));
        }
        stats.forget(&volume(9));
        assert_eq!(stats.retired().len(), 99);
        assert!(stats.retire(&volume(1000), counters));
        assert_eq!(stats.header().volumes_used.load(Relaxed), 100, "a free record is used again");
        for k in 0..VOLUMES_MAX {
            stats.retire(&volume(10_000 + k), counters);
        }
        assert!(!stats.retire(&volume(1), counters) || stats.retired().len() == 4096);
        assert!(!stats.retire(&volume(99_999), counters), "the table is full");
    }

    #[test]
    fn what_is_no_statistics_is_refused() {
        let open = |memory: &SharedMemory| Stats::open(memory.fd().try_clone_to_owned().unwrap());
        let small = SharedMemory::create("test", 4096).unwrap();
        assert!(matches!(open(&small), Err(RegionError::Size(4096))));
        let blank = SharedMemory::create("test", 1 << 20).unwrap();
        assert!(matches!(open(&blank), Err(RegionError::Layout(LayoutError::Magic))));
        let stats = Stats::create().unwrap();
        stats.header().volumes_max.store(u32::MAX, Relaxed);
        assert!(matches!(open(&stats.memory), Err(RegionError::Size(_))));
        stats.header().version.store(2, Relaxed);
        assert!(matches!(open(&stats.memory), Err(RegionError::Layout(LayoutError::Version(2)))));
    }
}
