//! The bytes of a region. `docs/formats.md` draws them; the assertions below hold them in place.
//!
//! ```text
//!  0        4096                 queues_offset + queue_count × queue_stride      region_size
//!  ├─────────┼──────────┬──────────┬─── ─ ─ ───┼──────────────────────────────────────┤
//!  │ header  │ queue 0  │ queue 1  │           │ arena: data of requests              │
//!  └─────────┴──────────┴──────────┴─── ─ ─ ───┴──────────────────────────────────────┘
//!   queue:  header 256 │ SQ 2N × 16 │ CQ 2N × 32 │ slots N × 64 │ iovecs N × I × 16
//! ```
//!
//! Every shared word is an atomic: the other side may change it at any time, and a plain
//! reference over such memory would be undefined behaviour.

use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicU32 as StdU32, AtomicU64 as StdU64, Ordering::Relaxed};

use crate::name::{NAME_BYTES_MAX, VolumeName};
use crate::sync::{AtomicU32, AtomicU64};

/// `NEBDREG1`, little-endian, at offset 0 of each region.
pub const REGION_MAGIC: u64 = u64::from_le_bytes(*b"NEBDREG1");
/// Alignment of queues and arena, and size of the header.
pub const PAGE: u64 = 4096;
/// Most queues in a region.
pub const QUEUES_MAX: u32 = 64;
/// Most slots in a queue.
pub const DEPTH_MAX: u32 = 4096;
/// Most iovecs in a request.
pub const IOVECS_MAX: u32 = 1024;
/// Most external memory regions registered beside the arena (their ids run from 1 to this).
pub const MEMORIES_MAX: u32 = 64;
/// Most slots in a region.
pub const SLOTS_TOTAL_MAX: u32 = 65_536;
/// Most iovecs in the tables of a region: what a successor may have to copy at once.
pub const IOVECS_TOTAL_MAX: u64 = 1 << 20;
/// Largest region.
pub const REGION_BYTES_MAX: u64 = 1 << 40;
/// Most bytes a read or write may move.
pub const TRANSFER_BYTES_MAX: u64 = 64 << 20;
/// Length of the client's version text.
pub const CLIENT_VERSION_BYTES: usize = 32;

/// Layouts ever released. What each changed is said at its variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LayoutVersion {
    /// The first: one header page, up to 64 queues, inline or table iovecs, one arena.
    V1 = 1,
}

impl LayoutVersion {
    /// The newest layout; what this crate's client creates.
    pub const CURRENT: LayoutVersion = LayoutVersion::V1;

    /// The layout with this number, if it was ever released.
    pub fn from_bits(bits: u32) -> Option<LayoutVersion> {
        (bits == 1).then_some(LayoutVersion::V1)
    }
}

/// Bits of `features_required` and `features_optional` in the region's header.
pub mod features {
    /// Required: a server made the region for a client that has none of its own, and uses its header
    /// alone. What else belongs to the session is in the descriptor store.
    pub const OWN_REGION: u64 = 1 << 0;
    /// Required features that this build understands.
    pub const REQUIRED_KNOWN: u64 = OWN_REGION;
}

/// Identity of a session: random, chosen by the client, unchanged across servers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; 16]);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for SessionId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut id = [0; 16];
        if text.len() != 32 || !text.is_ascii() {
            return Err(());
        }
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| ())?;
        }
        Ok(SessionId(id))
    }
}

/// The region's first page. Grouped by writer, one writer a cache line.
#[repr(C, align(4096))]
pub struct RegionHeader {
    // Written once by the client, before the region is shown to a server.
    /// [`REGION_MAGIC`].
    pub magic: StdU64,
    /// [`LayoutVersion`].
    pub layout_version: StdU32,
    /// Size of this header in bytes.
    pub header_size: StdU32,
    /// Size of the whole region in bytes; equals the memfd's.
    pub region_size: StdU64,
    /// [`SessionId`], as two little-endian words.
    pub session: [StdU64; 2],
    /// Features without which the region cannot be served.
    pub features_required: StdU64,
    /// Features that a server may use if it knows them.
    pub features_optional: StdU64,
    /// Queues in the region.
    pub queue_count: StdU32,
    /// Slots in each queue, a power of two.
    pub queue_depth: StdU32,
    /// Iovecs for each slot in the queue's table.
    pub iovecs_per_slot: StdU32,
    /// Zero.
    pub reserved0: StdU32,
    /// Offset of queue 0.
    pub queues_offset: StdU64,
    /// Distance between queues.
    pub queue_stride: StdU64,
    /// Offset of the arena.
    pub arena_offset: StdU64,
    /// Size of the arena.
    pub arena_size: StdU64,
    /// Process id of the client, for people.
    pub client_pid: StdU32,
    /// Zero.
    pub reserved1: StdU32,
    /// Version of the client library, ASCII, padded with zeros.
    pub client_version: [StdU64; CLIENT_VERSION_BYTES / 8],
    /// Zero.
    pub reserved2: [StdU64; 14],
    /// The volume's name, padded with zeros.
    pub volume: [StdU64; NAME_BYTES_MAX / 8],
    /// Zero.
    pub reserved3: [StdU64; 8],

    // Written by the client while it lives, for `nebdctl status`.
    /// Servers this client has seen take over.
    pub takeovers: StdU64,
    /// Blackout of the last takeover, in microseconds.
    pub blackout_last_us: StdU64,
    /// Worst blackout of any takeover, in microseconds.
    pub blackout_worst_us: StdU64,
    /// Generation of the server that ended the last blackout; zero from clients before 0.1.
    pub blackout_generation: StdU32,
    /// Zero.
    pub reserved8: StdU32,
    /// Zero.
    pub reserved4: [StdU64; 4],

    // Written by the server.
    /// [`crate::Epoch`] under which the volume is served; zero before the first server.
    pub epoch: StdU64,
    /// Raised by the server at least twice a second while requests are in flight.
    pub heartbeat: StdU64,
    /// Set by a dying server's fatal handler: a hint, never a proof.
    pub death: StdU32,
    /// [`ServerState`].
    pub server_state: StdU32,
    /// Size of the volume in bytes.
    pub volume_size: StdU64,
    /// Process id of the server, for people.
    pub server_pid: StdU32,
    /// Zero.
    pub reserved5: StdU32,
    /// Zero.
    pub reserved6: [StdU64; 3],
    /// Zero.
    pub reserved7: [StdU64; 432],
}

const _: () = {
    assert!(size_of::<RegionHeader>() == PAGE as usize);
    assert!(offset_of!(RegionHeader, session) == 24);
    assert!(offset_of!(RegionHeader, queue_count) == 56);
    assert!(offset_of!(RegionHeader, arena_size) == 96);
    assert!(offset_of!(RegionHeader, client_version) == 112);
    assert!(offset_of!(RegionHeader, volume) == 256);
    assert!(offset_of!(RegionHeader, takeovers) == 512);
    assert!(offset_of!(RegionHeader, epoch) == 576);
    assert!(offset_of!(RegionHeader, volume_size) == 600);
    assert!(offset_of!(RegionHeader, reserved7) == 640);
};

/// What the server last said of a session, in `server_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ServerState {
    /// No server has served this region yet, or none does now.
    Absent = 0,
    /// Requests are served.
    Serving = 1,
    /// A request killed servers; the volume waits for `nebdctl volume unpark` or `abort`.
    Parked = 2,
    /// The server has detached the session for good: the region breaks a rule.
    Detached = 3,
}

impl ServerState {
    /// The state with this number; unknown ones count as [`ServerState::Absent`].
    pub fn from_bits(bits: u32) -> ServerState {
        match bits {
            1 => ServerState::Serving,
            2 => ServerState::Parked,
            3 => ServerState::Detached,
            _ => ServerState::Absent,
        }
    }
}

/// Heads, tails and sleep flags of a queue; each index runs freely and wraps at 2³².
#[repr(C, align(64))]
pub struct QueueHeader {
    /// Client: next submission entry to be written.
    pub sq_tail: CacheLine,
    /// Server: in `word`, 1 if it sleeps and wants the kick doorbell.
    pub sq_need_wakeup: CacheLine,
    /// Server: next completion entry to be written.
    pub cq_tail: CacheLine,
    /// Client: in `word` the next completion entry to be read, in `flag` 1 if it wants the call doorbell.
    pub cq_head: CacheLine,
}

/// One writer's words, alone on their cache line.
#[repr(C, align(64))]
pub struct CacheLine {
    /// The index, or the only word.
    pub word: AtomicU32,
    /// A flag that belongs to the same writer.
    pub flag: AtomicU32,
    #[cfg(not(loom))]
    reserved: [AtomicU64; 7],
}

/// "Slot `slot` now holds request `seq`."
#[repr(C)]
pub struct SqEntry {
    /// The request's sequence number.
    pub seq: AtomicU64,
    /// The slot in the low half; the high half is zero.
    pub slot: AtomicU64,
}

/// "Request `seq` of slot `slot` is done with `result`, under `epoch`."
#[repr(C)]
pub struct CqEntry {
    /// The request's sequence number; zero if the entry was never written.
    pub seq: AtomicU64,
    /// The slot in the low half, the result in the high half (0, or an errno negated, as `i32`).
    pub slot_result: AtomicU64,
    /// The server's [`crate::Epoch`].
    pub epoch: AtomicU64,
    /// Zero.
    pub reserved: AtomicU64,
}

/// One request: the only record that it is in flight.
#[repr(C, align(64))]
pub struct Slot {
    /// Sequence number while in flight, zero while free. Written last at submit (release).
    pub seq: AtomicU64,
    /// Bits 0..8 [`crate::Op`], 8..16 [`crate::OpFlags`], 16..32 iovec count, 32..64 zero.
    pub op: AtomicU64,
    /// Offset in the volume, in bytes.
    pub offset: AtomicU64,
    /// Length in bytes.
    pub length: AtomicU64,
    /// If the iovec count is 1, the iovec; otherwise zero, and the queue's table holds them.
    pub iovec: Iovec,
    /// Zero.
    pub reserved: [AtomicU64; 2],
}

/// One buffer of a request.
#[repr(C)]
pub struct Iovec {
    /// Memory id in the low half (0 is the arena), length in bytes in the high half.
    pub memory_length: AtomicU64,
    /// Offset in that memory, in bytes.
    pub offset: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<CacheLine>() == 64);
    assert!(size_of::<QueueHeader>() == 256);
    assert!(offset_of!(QueueHeader, sq_need_wakeup) == 64);
    assert!(offset_of!(QueueHeader, cq_tail) == 128);
    assert!(offset_of!(QueueHeader, cq_head) == 192);
    assert!(size_of::<SqEntry>() == 16);
    assert!(size_of::<CqEntry>() == 32);
    assert!(size_of::<Slot>() == 64 && align_of::<Slot>() == 64);
    assert!(offset_of!(Slot, length) == 24);
    assert!(offset_of!(Slot, iovec) == 32);
    assert!(size_of::<Iovec>() == 16);
};

/// Why a region cannot be served. The numbers are the client's; nothing has been mapped beyond the header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not a region at all.
    #[error("the region does not start with NEBDREG1")]
    Magic,
    /// A layout this build does not know.
    #[error("region layout {0} is not known here")]
    Version(u32),
    /// Required features this build does not know.
    #[error("the region requires unknown features {0:#x}")]
    Features(u64),
    /// A field is out of its bounds.
    #[error("region field {field} has the impossible value {value}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The volume name is not one.
    #[error("the region's volume name is malformed")]
    Name,
}

/// Sizes and offsets of a region: computed by the client, checked by the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Queues.
    pub queue_count: u32,
    /// Slots a queue, a power of two.
    pub queue_depth: u32,
    /// Table iovecs a slot.
    pub iovecs_per_slot: u32,
    /// Bytes of data arena, a multiple of [`PAGE`].
    pub arena_size: u64,
}

impl Geometry {
    /// Checks the bounds of each number.
    pub fn validate(self) -> Result<Geometry, LayoutError> {
        let field = |field, value| Err(LayoutError::Field { field, value });
        if self.queue_count == 0 || self.queue_count > QUEUES_MAX {
            return field("queue_count", self.queue_count.into());
        }
        if !self.queue_depth.is_power_of_two() || self.queue_depth > DEPTH_MAX {
            return field("queue_depth", self.queue_depth.into());
        }
        if self.iovecs_per_slot == 0 || self.iovecs_per_slot > IOVECS_MAX {
            return field("iovecs_per_slot", self.iovecs_per_slot.into());
        }
        // In range as checked, so nothing overflows.
        let slots = self.slots_total();
        if slots > SLOTS_TOTAL_MAX {
            return field("queue_count * queue_depth", slots.into());
        }
        let iovecs = u64::from(slots) * u64::from(self.iovecs_per_slot);
        if iovecs > IOVECS_TOTAL_MAX {
            return field("queue_count * queue_depth * iovecs_per_slot", iovecs);
        }
        if !self.arena_size.is_multiple_of(PAGE) || self.arena_size > REGION_BYTES_MAX / 2 {
            return field("arena_size", self.arena_size);
        }
        Ok(self)
    }

    /// Entries in the submission ring and in the completion ring: twice the slots, so that a
    /// successor can tell published entries from the one a dying server was writing.
    pub fn ring_entries(&self) -> u32 {
        self.queue_depth * 2
    }

    /// Offset of the submission ring in its queue.
    pub fn sq_offset(&self) -> u64 {
        256
    }

    /// Offset of the completion ring in its queue.
    pub fn cq_offset(&self) -> u64 {
        self.sq_offset() + u64::from(self.ring_entries()) * 16
    }

    /// Offset of the slots in their queue.
    pub fn slots_offset(&self) -> u64 {
        self.cq_offset() + u64::from(self.ring_entries()) * 32
    }

    /// Offset of the iovec table in its queue.
    pub fn iovecs_offset(&self) -> u64 {
        self.slots_offset() + u64::from(self.queue_depth) * 64
    }

    /// Distance between queues.
    pub fn queue_stride(&self) -> u64 {
        let end = self.iovecs_offset()
            + u64::from(self.queue_depth) * u64::from(self.iovecs_per_slot) * 16;
        end.next_multiple_of(PAGE)
    }

    /// Offset of queue 0.
    pub fn queues_offset(&self) -> u64 {
        PAGE
    }

    /// Offset of the arena.
    pub fn arena_offset(&self) -> u64 {
        self.queues_offset() + u64::from(self.queue_count) * self.queue_stride()
    }

    /// Size of the whole region.
    pub fn region_size(&self) -> u64 {
        self.arena_offset() + self.arena_size
    }

    /// Slots of all queues.
    pub fn slots_total(&self) -> u32 {
        self.queue_count * self.queue_depth
    }
}

/// What the client says in the header, copied once and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionParams {
    /// Layout of the region.
    pub version: LayoutVersion,
    /// Identity of the session.
    pub session: SessionId,
    /// Sizes and offsets.
    pub geometry: Geometry,
    /// The volume it attaches.
    pub volume: VolumeName,
    /// Process id, for people.
    pub client_pid: u32,
    /// Version of the client library, for people; printable ASCII.
    pub client_version: String,
}

impl RegionHeader {
    /// Client: fills the header of a new region.
    pub fn init(&self, params: &RegionParams) {
        let geometry = &params.geometry;
        self.layout_version.store(params.version as u32, Relaxed);
        self.header_size.store(PAGE as u32, Relaxed);
        self.region_size.store(geometry.region_size(), Relaxed);
        store_bytes(&self.session, &params.session.0);
        self.queue_count.store(geometry.queue_count, Relaxed);
        self.queue_depth.store(geometry.queue_depth, Relaxed);
        self.iovecs_per_slot.store(geometry.iovecs_per_slot, Relaxed);
        self.queues_offset.store(geometry.queues_offset(), Relaxed);
        self.queue_stride.store(geometry.queue_stride(), Relaxed);
        self.arena_offset.store(geometry.arena_offset(), Relaxed);
        self.arena_size.store(geometry.arena_size, Relaxed);
        self.client_pid.store(params.client_pid, Relaxed);
        store_bytes(&self.client_version, params.client_version.as_bytes());
        store_bytes(&self.volume, params.volume.as_str().as_bytes());
        self.magic.store(REGION_MAGIC, Relaxed);
    }

    /// Server: copies the client's fields once and checks them against the size of the memfd.
    pub fn params(&self, memfd_size: u64) -> Result<RegionParams, LayoutError> {
        if self.magic.load(Relaxed) != REGION_MAGIC {
            return Err(LayoutError::Magic);
        }
        let version = self.layout_version.load(Relaxed);
        let version = LayoutVersion::from_bits(version).ok_or(LayoutError::Version(version))?;
        let required = self.features_required.load(Relaxed);
        if required & !features::REQUIRED_KNOWN != 0 {
            return Err(LayoutError::Features(required & !features::REQUIRED_KNOWN));
        }
        let geometry = Geometry {
            queue_count: self.queue_count.load(Relaxed),
            queue_depth: self.queue_depth.load(Relaxed),
            iovecs_per_slot: self.iovecs_per_slot.load(Relaxed),
            arena_size: self.arena_size.load(Relaxed),
        }
        .validate()?;
        // The offsets follow from the numbers; a client that disagrees has another layout in mind.
        for (field, claimed, computed) in [
            ("header_size", u64::from(self.header_size.load(Relaxed)), PAGE),
            ("region_size", self.region_size.load(Relaxed), geometry.region_size()),
            ("queues_offset", self.queues_offset.load(Relaxed), geometry.queues_offset()),
            ("queue_stride", self.queue_stride.load(Relaxed), geometry.queue_stride()),
            ("arena_offset", self.arena_offset.load(Relaxed), geometry.arena_offset()),
            ("memfd size", memfd_size, geometry.region_size()),
        ] {
            if claimed != computed {
                return Err(LayoutError::Field { field, value: claimed });
            }
        }
        let volume = text(&load_bytes::<NAME_BYTES_MAX>(&self.volume));
        let volume = volume.parse().map_err(|_| LayoutError::Name)?;
        let client_version = text(&load_bytes::<CLIENT_VERSION_BYTES>(&self.client_version));
        Ok(RegionParams {
            version,
            session: SessionId(load_bytes(&self.session)),
            geometry,
            volume,
            client_pid: self.client_pid.load(Relaxed),
            client_version: client_version
                .chars()
                .map(|c| if c.is_ascii_graphic() { c } else { '?' })
                .collect(),
        })
    }
}

/// Stores bytes, padded with zeros, as little-endian words; what does not fit is cut.
fn store_bytes(words: &[StdU64], bytes: &[u8]) {
    let mut chunks = bytes.chunks(8);
    for word in words {
        let mut buffer = [0; 8];
        let chunk = chunks.next().unwrap_or_default();
        buffer[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_le_bytes(buffer), Relaxed);
    }
}

fn load_bytes<const N: usize>(words: &[StdU64]) -> [u8; N] {
    let mut bytes = [0; N];
    for (chunk, word) in bytes.chunks_mut(8).zip(words) {
        chunk.copy_from_slice(&word.load(Relaxed).to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// The text before the first zero byte; other than UTF-8 is replaced.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(loom)]
impl QueueHeader {
    /// A zeroed header in loom's memory.
    pub fn for_model() -> QueueHeader {
        let line = || CacheLine { word: AtomicU32::new(0), flag: AtomicU32::new(0) };
        QueueHeader { sq_tail: line(), sq_need_wakeup: line(), cq_tail: line(), cq_head: line() }
    }
}
