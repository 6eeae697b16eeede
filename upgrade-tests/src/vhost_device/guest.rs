//! The guest's half: requests in rings. It knows nothing of messages, as a guest does not.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::memory::Memory;
use super::ring::{Kind, Piece, Place, Ring, Violation, place};
use super::shared::Shared;
use crate::stamp::Dice;

/// Most bytes of data in a request.
pub const TRANSFER_BYTES_MAX: usize = 64 * 1024;
/// Most pieces of data in a request.
pub const PIECES_MAX: usize = 8;

const SECTOR: u64 = 512;
const HEADER_BYTES: u32 = 16;
const STATUS: u64 = 16;
const RANGE: u64 = 32;
const RANGE_BYTES: u32 = 16;
const TABLE: u64 = 64;
/// Of each request: header, status, range, table.
const REQUEST_BYTES: u64 = 512;
/// What a status is before it is written.
const NO_STATUS: u8 = 0xee;

/// What a request asks for, as virtio-blk numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the specification")]
pub enum RequestKind {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
    WriteZeroes = 13,
}

/// Where everything lies in the driver's memory.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) rings: Vec<Place>,
    requests: u64,
    data: u64,
    pub(super) bytes: u64,
    /// Where a region ends and the next begins.
    pub(super) split: u64,
    pub(super) slots: usize,
}

impl Plan {
    /// With `straddles`, a region ends in the middle of some request's data.
    pub(super) fn new(queues: usize, ring_size: u16, slots: usize, straddles: bool) -> Plan {
        let mut end = 0;
        let rings = (0..queues)
            .map(|_| {
                let (place, next) = place(end, ring_size);
                end = next;
                place
            })
            .collect();
        let requests = end.next_multiple_of(4096);
        let data = (requests + REQUEST_BYTES * slots as u64).next_multiple_of(4096);
        let bytes = data + (slots * TRANSFER_BYTES_MAX) as u64;
        let split =
            data + (slots / 2 * TRANSFER_BYTES_MAX) as u64 + if straddles { 4096 } else { 0 };
        Plan { rings, requests, data, bytes, split, slots }
    }

    fn request(&self, slot: usize) -> u64 {
        self.requests + REQUEST_BYTES * slot as u64
    }

    /// Where a slot's data lies.
    pub(super) fn data(&self, slot: usize) -> u64 {
        self.data + (slot * TRANSFER_BYTES_MAX) as u64
    }
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whose.
    pub slot: usize,
    /// Zero, or an errno.
    pub errno: i32,
}

struct InFlight {
    /// Bytes that the device must say it wrote, if all is well.
    expected: u32,
}

/// A request that waits for room in its ring.
struct Waiting {
    slot: usize,
    pieces: Vec<Piece>,
}

/// The rings and requests of a device. One thread drives it.
pub struct Guest {
    memory: Arc<Memory>,
    plan: Plan,
    rings: Vec<Ring>,
    waiting: Vec<VecDeque<Waiting>>,
    in_flight: Vec<Option<InFlight>>,
    shared: Arc<Shared>,
}

impl Guest {
    pub(super) fn new(memory: Arc<Memory>, plan: Plan, kind: Kind, shared: Arc<Shared>) -> Guest {
        let rings = plan.rings.iter().enumerate();
        let rings: Vec<Ring> =
            rings.map(|(index, place)| Ring::new(index, memory.clone(), *place, kind)).collect();
        let waiting = rings.iter().map(|_| VecDeque::new()).collect();
        let in_flight = (0..plan.slots).map(|_| None).collect();
        Guest { memory, plan, rings, waiting, in_flight, shared }
    }

    /// Requests in flight at most.
    pub fn slots(&self) -> usize {
        self.plan.slots
    }

    /// Copies bytes to where a request finds its data.
    pub fn write_data(&self, slot: usize, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= TRANSFER_BYTES_MAX, "a slot has no room for that");
        self.memory.write(self.plan.data(slot) + at as u64, bytes);
    }

    /// Copies bytes from there.
    pub fn read_data(&self, slot: usize, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= TRANSFER_BYTES_MAX, "a slot has no room for that");
        self.memory.read(self.plan.data(slot) + at as u64, bytes);
    }

    /// Starts a request whose data is the first bytes of its slot's, in pieces of these lengths.
    pub fn submit(&mut self, slot: usize, kind: RequestKind, offset: u64, lengths: &[usize]) {
        let at = self.plan.request(slot);
        self.begin(slot, kind, offset);
        let mut pieces = Vec::with_capacity(lengths.len() + 2);
        pieces.push(Piece { at, length: HEADER_BYTES, is_writable: false });
        let mut data = self.plan.data(slot);
        let is_writable = matches!(kind, RequestKind::Read | RequestKind::GetId);
        for length in lengths {
            pieces.push(Piece { at: data, length: *length as u32, is_writable });
            data += *length as u64;
        }
        let bytes: usize = lengths.iter().sum();
        let expected = if is_writable { bytes as u32 + 1 } else { 1 };
        self.end(slot, pieces, expected);
    }

    /// Starts a request about a range.
    pub fn submit_range(&mut self, slot: usize, kind: RequestKind, offset: u64, length: u64) {
        let at = self.plan.request(slot);
        self.begin(slot, kind, 0);
        // Space may be given back by either; a flag says so only to write-zeroes.
        let flags = u32::from(kind == RequestKind::WriteZeroes && slot.is_multiple_of(2));
        self.memory.store_u64(at + RANGE, offset / SECTOR, Relaxed);
        self.memory.store_u32(at + RANGE + 8, (length / SECTOR) as u32, Relaxed);
        self.memory.store_u32(at + RANGE + 12, flags, Relaxed);
        let pieces = vec![
            Piece { at, length: HEADER_BYTES, is_writable: false },
            Piece { at: at + RANGE, length: RANGE_BYTES, is_writable: false },
        ];
        self.end(slot, pieces, 1);
    }

    fn begin(&mut self, slot: usize, kind: RequestKind, offset: u64) {
        let at = self.plan.request(slot);
        self.memory.store_u64(at, kind as u64, Relaxed);
        self.memory.store_u64(at + 8, offset / SECTOR, Relaxed);
        self.memory.store_u8(at + STATUS, NO_STATUS, Relaxed);
    }

    fn end(&mut self, slot: usize, mut pieces: Vec<Piece>, expected: u32) {
        let at = self.plan.request(slot);
        pieces.push(Piece { at: at + STATUS, length: 1, is_writable: true });
        self.in_flight[slot] = Some(InFlight { expected });
        let queue = slot % self.rings.len();
        let is_first = self.waiting[queue].is_empty();
        if !is_first || !self.rings[queue].push(&pieces, at + TABLE, slot) {
            self.waiting[queue].push_back(Waiting { slot, pieces });
        }
    }

    /// Writes nonsense over rings, requests and tables, and kicks: what a hostile guest may do. Half of it
    /// looks like descriptors and indices, so that it is not refused at the first look.
    pub fn scramble(&mut self, dice: &mut Dice) {
        for at in (0..self.plan.data(0)).step_by(2) {
            let value = match dice.below(8) {
                0..=3 => continue,
                4 => dice.below(4),
                5 => dice.below(256),
                _ => dice.below(1 << 16),
            };
            self.memory.store_u16(at, value as u16, Relaxed);
        }
        (0..self.rings.len()).for_each(|queue| self.shared.kick(queue));
    }

    /// Tells the device of what was submitted.
    pub fn kick(&mut self) {
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            if ring.is_kick_needed() {
                self.shared.kick(queue);
            }
        }
    }

    /// Hands over what was answered; returns how much it was.
    pub fn reap(&mut self, mut each: impl FnMut(Answer)) -> Result<usize, Violation> {
        let mut count = 0;
        for queue in 0..self.rings.len() {
            self.rings[queue].want_no_calls();
            while let Some((slot, written)) = self.rings[queue].pop()? {
                each(self.answer(queue, slot, written)?);
                count += 1;
            }
            while let Some(next) = self.waiting[queue].pop_front() {
                let table = self.plan.request(next.slot) + TABLE;
                if !self.rings[queue].push(&next.pieces, table, next.slot) {
                    self.waiting[queue].push_front(next);
                    break;
                }
            }
        }
        Ok(count)
    }

    fn answer(&mut self, ring: usize, slot: usize, written: u32) -> Result<Answer, Violation> {
        let at = self.plan.request(slot);
        let status = self.memory.load_u8(at + STATUS, Relaxed);
        let violation = |what: String| Violation { ring, what };
        let flight = self.in_flight[slot].take();
        let Some(InFlight { expected }) = flight else {
            return Err(violation(format!("slot {slot} is answered and not in flight")));
        };
        let errno = match status {
            0 if written == expected => 0,
            0 => {
                let what = format!("slot {slot}: {written} bytes written, not {expected}");
                return Err(violation(what));
            }
            1 => rustix::io::Errno::IO.raw_os_error(),
            2 => rustix::io::Errno::OPNOTSUPP.raw_os_error(),
            status => return Err(violation(format!("slot {slot} has the status {status:#x}"))),
        };
        // Nobody may look at the request any more: whoever does finds an operation that there is not.
        self.memory.store_u64(at, u64::MAX, Relaxed);
        self.memory.store_u64(at + 8, u64::MAX, Relaxed);
        Ok(Answer { slot, errno })
    }

    /// Asks to be called for the next answer; false if one is there already.
    pub fn arm(&mut self) -> bool {
        self.shared.drain_calls();
        let mut is_quiet = true;
        for ring in &mut self.rings {
            // Every ring is armed, whatever the others say.
            is_quiet &= ring.want_calls();
        }
        is_quiet
    }
}
