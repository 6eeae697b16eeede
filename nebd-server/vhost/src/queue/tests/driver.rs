//! A model of a driver: both layouts, event indices, indirect descriptors; after the specification and
//! the rules that Linux follows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use crate::access::{Window, hooks::unharmed};
use crate::inflight::Layout;
use crate::memory::{GuestMemory, RegionSpec, sealed_memory};
use crate::queue::{F_RING_EVENT_IDX, F_RING_INDIRECT, F_RING_PACKED, QueueSetup, has_passed};

const GUEST: u64 = 0x4_0000_0000;
const USER: u64 = 0x7f12_3400_0000;
const RING: u64 = 0;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// For each id: header 16, status 1, and a table of 4 descriptors at 64.
const REQUESTS: u64 = 0x8000;
const REQUEST_BYTES: u64 = 128;
const DATA: u64 = 0x20000;
const DATA_BYTES: u64 = 512;
const BYTES: u64 = DATA + 256 * DATA_BYTES;
/// What a status byte is before it is written.
const NO_STATUS: u8 = 0xee;

/// What a queue is like.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub layout: Layout,
    pub size: u16,
    pub event_idx: bool,
    pub indirect: bool,
    /// Chains that were answered before the test began.
    pub past: u16,
}

impl Kind {
    pub fn setup(&self) -> QueueSetup {
        let optional = [
            (self.layout == Layout::Packed, F_RING_PACKED),
            (self.event_idx, F_RING_EVENT_IDX),
            (self.indirect, F_RING_INDIRECT),
        ];
        let base = match self.layout {
            Layout::Split => u32::from(self.past),
            Layout::Packed => u32::from(self.past % self.size) | 0x8000,
        };
        QueueSetup {
            size: self.size,
            descriptors: USER + RING,
            available: USER + AVAILABLE,
            used: USER + USED,
            base,
            features: optional.iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Request {
    number: u64,
    /// Descriptors in the ring or table.
    count: u16,
}

pub struct Driver {
    pub kind: Kind,
    pub memory: Arc<GuestMemory>,
    window: Window,
    /// By id: the chain's head, or the buffer id.
    outstanding: BTreeMap<u16, Request>,
    free: Vec<u16>,
    next_number: u64,
    next_available: u16,
    available_wrap: bool,
    next_used: u16,
    used_wrap: bool,
    /// Waits to be called.
    pub asleep: bool,
}

impl Driver {
    pub fn new(kind: Kind) -> Driver {
        let spec =
            RegionSpec { guest_address: GUEST, size: BYTES, user_address: USER, mmap_offset: 0 };
        let memory = GuestMemory::new(vec![sealed_memory(spec).unwrap()]).unwrap();
        let window = memory.user_window(USER, BYTES).unwrap();
        let start = match kind.layout {
            Layout::Split => kind.past,
            Layout::Packed => kind.past % kind.size,
        };
        if kind.layout == Layout::Split {
            unharmed(|| {
                window.store_u16(AVAILABLE as usize + 2, start, SeqCst);
                window.store_u16(USED as usize + 2, start, SeqCst);
            });
        }
        if kind.layout == Layout::Packed {
            // What the laps before left there.
            for place in 0..usize::from(start) {
                unharmed(|| window.store_u16(16 * place + 14, 1 << 7 | 1 << 15, SeqCst));
            }
        }
        Driver {
            kind,
            memory,
            window,
            outstanding: BTreeMap::new(),
            free: (0..kind.size).rev().collect(),
            next_number: 1,
            next_available: start,
            available_wrap: true,
            next_used: start,
            used_wrap: true,
            asleep: false,
        }
    }

    pub fn is_outstanding(&self, number: u64) -> bool {
        self.outstanding.values().any(|request| request.number == number)
    }

    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Makes a request of so many descriptors available; `None` if there is no room, else whether the
    /// device must be kicked.
    pub fn submit(&mut self, count: u16) -> Option<bool> {
        let places = if self.kind.indirect { 1 } else { count };
        if self.free.len() < usize::from(places) {
            return None;
        }
        let number = self.next_number;
        self.next_number += 1;
        unharmed(|| match self.kind.layout {
            Layout::Split => self.submit_split(number, count, places),
            Layout::Packed => self.submit_packed(number, count, places),
        });
        Some(unharmed(|| self.is_kick_needed(places)))
    }

    /// Header and data of a request, as descriptors: address, length, flags.
    fn write_request(&self, id: u16, number: u64, count: u16) -> Vec<(u64, u32, u16)> {
        let at = REQUESTS + u64::from(id) * REQUEST_BYTES;
        let kind = if count == 2 { 4u32 } else { 0 };
        self.window.write(at as usize, &kind.to_le_bytes());
        self.window.write(at as usize + 8, &number.to_le_bytes());
        self.window.write(at as usize + 16, &[NO_STATUS]);
        let data = GUEST + DATA + u64::from(id) * DATA_BYTES;
        let mut descriptors = vec![(GUEST + at, 16, 0)];
        for part in 0..u64::from(count - 2) {
            descriptors.push((data + part * 128, 128, 2));
        }
        descriptors.push((GUEST + at + 16, 1, 2));
        descriptors
    }

    fn write_table(&self, id: u16, descriptors: &[(u64, u32, u16)]) -> (u64, u32, u16) {
        let at = REQUESTS + u64::from(id) * REQUEST_BYTES + 64;
        for (index, (address, length, flags)) in descriptors.iter().enumerate() {
            let entry = at as usize + 16 * index;
            let next = u16::from(index + 1 < descriptors.len());
            let (third, fourth) = match self.kind.layout {
                Layout::Split => (flags | next, index as u16 + 1),
                Layout::Packed => (0xabcd, *flags),
            };
            self.write_descriptor(entry, *address, *length, third, fourth);
        }
        (GUEST + at, 16 * descriptors.len() as u32, 4)
    }

    fn write_descriptor(&self, at: usize, address: u64, length: u32, third: u16, fourth: u16) {
        self.window.store_u64(at, address, Relaxed);
        self.window.store_u32(at + 8, length, Relaxed);
        self.window.store_u16(at + 12, third, Relaxed);
        self.window.store_u16(at + 14, fourth, SeqCst);
    }

    fn submit_split(&mut self, number: u64, count: u16, places: u16) {
        let taken: Vec<u16> = (0..places).filter_map(|_| self.free.pop()).collect();
        let head = taken[0];
        let mut descriptors = self.write_request(head, number, count);
        if self.kind.indirect {
            descriptors = vec![self.write_table(head, &descriptors)];
        }
        for (index, (address, length, flags)) in descriptors.iter().enumerate() {
            let (flags, next) = match taken.get(index + 1) {
                Some(next) => (flags | 1, *next),
                None => (*flags, 0),
            };
            let at = RING as usize + 16 * usize::from(taken[index]);
            self.write_descriptor(at, *address, *length, flags, next);
        }
        let at = AVAILABLE as usize + 4 + 2 * usize::from(self.next_available % self.kind.size);
        self.window.store_u16(at, head, Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.window.store_u16(AVAILABLE as usize + 2, self.next_available, SeqCst);
        self.outstanding.insert(head, Request { number, count });
    }

    fn submit_packed(&mut self, number: u64, count: u16, places: u16) {
        // An id is a matter of the driver's; places are consecutive.
        let ids: Vec<u16> = (0..places).filter_map(|_| self.free.pop()).collect();
        let id = ids[0];
        let mut descriptors = self.write_request(id, number, count);
        if self.kind.indirect {
            descriptors = vec![self.write_table(id, &descriptors)];
        }
        let first = (self.next_available, self.available_wrap);
        let mut head_flags = 0;
        for (index, (address, length, flags)) in descriptors.iter().enumerate() {
            let next = u16::from(index + 1 < descriptors.len());
            let own = if self.available_wrap { 1 << 7 } else { 1 << 15 };
            let at = RING as usize + 16 * usize::from(self.next_available);
            let flags = flags | next | own;
            self.window.store_u64(at, *address, Relaxed);
            self.window.store_u32(at + 8, *length, Relaxed);
            self.window.store_u16(at + 12, id, Relaxed);
            if index == 0 {
                head_flags = flags;
            } else {
                self.window.store_u16(at + 14, flags, Relaxed);
            }
            self.next_available += 1;
            if self.next_available == self.kind.size {
                self.next_available = 0;
                self.available_wrap = !self.available_wrap;
            }
        }
        self.window.store_u16(RING as usize + 16 * usize::from(first.0) + 14, head_flags, SeqCst);
        self.outstanding.insert(id, Request { number, count });
    }

    fn is_kick_needed(&self, places: u16) -> bool {
        let used = USED as usize;
        match self.kind.layout {
            Layout::Split if self.kind.event_idx => {
                let event =
                    self.window.load_u16(used + 4 + 8 * usize::from(self.kind.size), SeqCst);
                has_passed(event, self.next_available, self.next_available.wrapping_sub(1))
            }
            Layout::Split => self.window.load_u16(used, SeqCst) & 1 == 0,
            Layout::Packed => {
                let word = self.window.load_u32(used, SeqCst);
                let (off_wrap, flags) = (word as u16, word >> 16);
                if flags != 2 {
                    return flags != 1;
                }
                let mut event = off_wrap & 0x7fff;
                if self.available_wrap != (off_wrap >> 15 != 0) {
                    event = event.wrapping_sub(self.kind.size);
                }
                let new = self.next_available;
                has_passed(event, new, new.wrapping_sub(places))
            }
        }
    }

    /// Takes what is used; returns the numbers. Panics over an answer to nothing, or without a status.
    pub fn reap(&mut self) -> Vec<u64> {
        let mut numbers = Vec::new();
        while let Some(number) = unharmed(|| self.reap_one()) {
            numbers.push(number);
        }
        numbers
    }

    fn reap_one(&mut self) -> Option<u64> {
        let (id, length) = match self.kind.layout {
            Layout::Split => {
                if self.window.load_u16(USED as usize + 2, SeqCst) == self.next_used {
                    return None;
                }
                let at = USED as usize + 4 + 8 * usize::from(self.next_used % self.kind.size);
                self.next_used = self.next_used.wrapping_add(1);
                let id = self.window.load_u32(at, Relaxed);
                (u16::try_from(id).unwrap(), self.window.load_u32(at + 4, Relaxed))
            }
            Layout::Packed => {
                let at = RING as usize + 16 * usize::from(self.next_used);
                let flags = self.window.load_u16(at + 14, SeqCst);
                let bits = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
                if bits != (self.used_wrap, self.used_wrap) {
                    return None;
                }
                (self.window.load_u16(at + 12, Relaxed), self.window.load_u32(at + 8, Relaxed))
            }
        };
        let request = self.outstanding.remove(&id).expect("an answer to nothing");
        assert_eq!(length, u32::from(request.count - 2) * 128 + 1, "bytes written");
        self.retire(id, request);
        Some(request.number)
    }

    /// Frees a request's memory, and fills it with nonsense: nobody may look at it any more.
    fn retire(&mut self, id: u16, request: Request) {
        let at = (REQUESTS + u64::from(id) * REQUEST_BYTES) as usize;
        assert_eq!(self.window.load_u8(at + 16, Relaxed), 0, "the status of {request:?}");
        self.window.write(at, &[0xff; REQUEST_BYTES as usize]);
        let places = if self.kind.indirect { 1 } else { request.count };
        match self.kind.layout {
            Layout::Split => {
                let mut descriptor = id;
                for _ in 0..places {
                    let at = RING as usize + 16 * usize::from(descriptor);
                    let next = self.window.load_u16(at + 14, Relaxed);
                    self.write_descriptor(at, u64::MAX - 7, u32::MAX, 0xffff, 0xffff);
                    self.free.push(descriptor);
                    descriptor = next;
                }
            }
            Layout::Packed => {
                self.next_used += places;
                if self.next_used >= self.kind.size {
                    self.next_used -= self.kind.size;
                    self.used_wrap = !self.used_wrap;
                }
                // Ids of a chain that are not its first: any of those not outstanding.
                let size = self.kind.size;
                self.free.push(id);
                let spare = (0..size)
                    .filter(|id| !self.outstanding.contains_key(id) && !self.free.contains(id));
                let spare: Vec<u16> = spare.take(usize::from(places) - 1).collect();
                assert_eq!(spare.len(), usize::from(places) - 1);
                self.free.extend(spare);
            }
        }
    }

    /// Asks to be called; true if nothing came meanwhile.
    pub fn sleep(&mut self) -> bool {
        unharmed(|| {
            let available = AVAILABLE as usize;
            match self.kind.layout {
                Layout::Split if self.kind.event_idx => {
                    let at = available + 4 + 2 * usize::from(self.kind.size);
                    self.window.store_u16(at, self.next_used, SeqCst);
                }
                Layout::Split => self.window.store_u16(available, 0, SeqCst),
                Layout::Packed => {
                    let off_wrap = u32::from(self.next_used) | u32::from(self.used_wrap) << 15;
                    let flags = if self.kind.event_idx { 2 } else { 0 };
                    self.window.store_u32(available, off_wrap | flags << 16, SeqCst);
                }
            }
        });
        self.asleep = unharmed(|| !self.has_used());
        self.asleep
    }

    fn has_used(&self) -> bool {
        match self.kind.layout {
            Layout::Split => self.window.load_u16(USED as usize + 2, SeqCst) != self.next_used,
            Layout::Packed => {
                let at = RING as usize + 16 * usize::from(self.next_used) + 14;
                let flags = self.window.load_u16(at, SeqCst);
                (flags & 1 << 7 != 0, flags & 1 << 15 != 0) == (self.used_wrap, self.used_wrap)
            }
        }
    }

    /// Wants no calls.
    pub fn wake(&mut self) {
        self.asleep = false;
        unharmed(|| match self.kind.layout {
            Layout::Split if self.kind.event_idx => {}
            Layout::Split => self.window.store_u16(AVAILABLE as usize, 1, SeqCst),
            Layout::Packed => self.window.store_u32(AVAILABLE as usize, 1 << 16, SeqCst),
        });
    }

    /// The rings and requests, for tests that write nonsense into them.
    pub fn window(&self) -> &Window {
        &self.window
    }
}
