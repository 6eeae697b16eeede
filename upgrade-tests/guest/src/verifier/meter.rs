//! Counts a disk's requests, and measures the gaps between their completions.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nebd_guest::board::{Board, Common, OfDisk};

use crate::memory::Mapping;

/// Gaps that are told of on the console, in microseconds.
const LONG_US: u64 = 200_000;

/// A disk's meter.
pub struct Meter {
    board: Board<Mapping>,
    disk: usize,
    start: Instant,
    flow: Mutex<Flow>,
    /// Number of the next write; its upper half is that of the boot, for a write that an earlier boot
    /// began must not be taken for one of ours.
    next_write: AtomicU64,
}

struct Flow {
    in_flight: u64,
    /// When the last request ended; or when the first one began, if none was in flight.
    since_us: u64,
}

impl Meter {
    /// The meter of this disk.
    pub fn new(board: Board<Mapping>, disk: usize, start: Instant) -> Meter {
        let next_write = AtomicU64::new((board.get(Common::Boots) << 32) + 1);
        board.set_of_disk(disk, OfDisk::InFlight, 0);
        let flow = Mutex::new(Flow { in_flight: 0, since_us: 0 });
        Meter { board, disk, start, flow, next_write }
    }

    /// The number of a new write.
    pub fn number(&self) -> u64 {
        self.next_write.fetch_add(1, SeqCst)
    }

    /// Carries out a request.
    pub fn measure<T>(&self, request: impl FnOnce() -> T) -> T {
        self.begin();
        let result = request();
        self.end();
        result
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    fn begin(&self) {
        let mut flow = self.flow.lock().unwrap_or_else(PoisonError::into_inner);
        if flow.in_flight == 0 {
            flow.since_us = self.now_us();
        }
        flow.in_flight += 1;
        self.board.set_of_disk(self.disk, OfDisk::InFlight, flow.in_flight);
    }

    fn end(&self) {
        let mut flow = self.flow.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now_us();
        let gap = now.saturating_sub(flow.since_us);
        flow.since_us = now;
        flow.in_flight -= 1;
        self.board.set_of_disk(self.disk, OfDisk::InFlight, flow.in_flight);
        self.add_locked(OfDisk::Requests, 1);
        let epoch = self.board.get(Common::Epoch);
        if gap > self.board.gap(self.disk, epoch) {
            self.board.set_gap(self.disk, epoch, gap);
        }
        if gap > self.board.of_disk(self.disk, OfDisk::GapMax) {
            self.board.set_of_disk(self.disk, OfDisk::GapMax, gap);
        }
        if gap > LONG_US {
            let (disk, at) = (self.disk, now as f64 / 1e6);
            println!(
                "GUEST gap disk={disk} ms={:.1} until={at:.3} epoch={epoch}",
                gap as f64 / 1e3
            );
        }
    }

    /// Adds to a count of the board.
    pub fn add(&self, field: OfDisk, count: u64) {
        let _flow = self.flow.lock().unwrap_or_else(PoisonError::into_inner);
        self.add_locked(field, count);
    }

    fn add_locked(&self, field: OfDisk, count: u64) {
        let sum = self.board.of_disk(self.disk, field) + count;
        self.board.set_of_disk(self.disk, field, sum);
    }

    /// A request failed.
    pub fn error(&self, what: &str, error: &dyn std::fmt::Display) {
        self.add(OfDisk::Errors, 1);
        println!("GUEST-FAILED disk {}: {what}: {error}", self.disk);
    }

    /// A block or file holds what it must not.
    pub fn mismatch(&self, what: &str) {
        self.add(OfDisk::Mismatches, 1);
        println!("GUEST-WRONG disk {}: {what}", self.disk);
    }
}
