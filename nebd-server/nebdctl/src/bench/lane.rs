//! One queue under load: a closed loop that keeps a number of requests in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use nebd_client::{Buffer, Errno, Io, Queue, SubmitError};
use nebd_upgrade_tests::stamp::Dice;

use crate::bench::histogram::Histogram;
use crate::bench::verify::Checker;

/// The longest gap between completions of one volume. Requests always wait, so every gap counts.
#[derive(Debug)]
pub struct GapMeter {
    start: Instant,
    last_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl GapMeter {
    /// Starts now.
    pub fn new(start: Instant) -> GapMeter {
        let now = start.elapsed().as_nanos() as u64;
        GapMeter { start, last_ns: AtomicU64::new(now), max_ns: AtomicU64::new(0) }
    }

    /// Nanoseconds since the start.
    pub fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Something was completed.
    pub fn completed(&self, now_ns: u64) {
        let gap = now_ns.saturating_sub(self.last_ns.swap(now_ns, Relaxed));
        self.max_ns.fetch_max(gap, Relaxed);
    }

    /// The longest gap so far.
    pub fn max_ns(&self) -> u64 {
        self.max_ns.load(Relaxed)
    }
}

/// What one lane is to do.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Whether it writes.
    pub writes: bool,
    /// Whether offsets are drawn at random.
    pub random: bool,
    /// Bytes of each request.
    pub unit_bytes: u64,
    /// First unit of the lane's part of the volume.
    pub unit_first: u64,
    /// Units of the lane's part.
    pub unit_count: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Tally {
    /// Completed in time.
    pub requests: u64,
    /// Answered with an error, or not at all.
    pub errors: u64,
    /// Read back wrong.
    pub mismatches: u64,
    /// From submission to completion.
    pub latency: Histogram,
    /// What the first error and the first mismatch were.
    pub first_problem: Option<String>,
}

impl Tally {
    fn new() -> Tally {
        let (requests, errors, mismatches) = (0, 0, 0);
        Tally { requests, errors, mismatches, latency: Histogram::new(), first_problem: None }
    }

    /// Adds what came of another lane.
    pub fn add(&mut self, other: Tally) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.latency.add(&other.latency);
        self.first_problem = self.first_problem.take().or(other.first_problem);
    }
}

impl Default for Tally {
    fn default() -> Tally {
        Tally::new()
    }
}

struct Slot {
    buffer: Buffer,
    unit: u64,
    write: u64,
    is_write: bool,
    submitted_ns: u64,
}

/// What a lane does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Measure.
    Run,
    /// Submit nothing more.
    Drain,
    /// Read again what was written.
    Sweep,
}

/// One queue and its requests.
pub struct Lane {
    queue: Queue,
    slots: Vec<Slot>,
    free: Vec<usize>,
    work: Work,
    checker: Option<Checker>,
    scratch: Vec<u8>,
    dice: Dice,
    next: u64,
    sweep: std::vec::IntoIter<u64>,
    meter: Arc<GapMeter>,
    done: Vec<(u64, Result<(), Errno>)>,
    /// What came of it so far.
    pub tally: Tally,
}

impl Lane {
    /// A lane with one buffer for each request in flight.
    pub fn new(
        queue: Queue,
        buffers: Vec<Buffer>,
        work: Work,
        checker: Option<Checker>,
        meter: Arc<GapMeter>,
        seed: u64,
    ) -> Lane {
        let slot = |buffer| Slot { buffer, unit: 0, write: 0, is_write: false, submitted_ns: 0 };
        let slots: Vec<Slot> = buffers.into_iter().map(slot).collect();
        let mut lane = Lane {
            free: (0..slots.len()).collect(),
            queue,
            slots,
            work,
            checker,
            scratch: vec![0; work.unit_bytes as usize],
            dice: Dice::new(seed),
            next: 0,
            sweep: Vec::new().into_iter(),
            meter,
            done: Vec::new(),
            tally: Tally::new(),
        };
        lane.fill_buffers();
        lane
    }

    /// Random bytes, so that no layer below finds them easy.
    fn fill_buffers(&mut self) {
        for slot in &mut self.slots {
            for word in self.scratch.chunks_exact_mut(8) {
                word.copy_from_slice(&self.dice.bits().to_le_bytes());
            }
            let is_filled = slot.buffer.write(0, &self.scratch);
            debug_assert!(is_filled, "a buffer is as long as the scratch");
        }
    }

    /// The queue, to wait on.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Prepares for [`Phase::Sweep`].
    pub fn begin_sweep(&mut self) {
        let units = self.checker.as_ref().map(Checker::written_units).unwrap_or_default();
        self.sweep = units.into_iter();
    }

    /// Whether the sweep has read everything.
    pub fn has_swept(&self) -> bool {
        self.is_idle() && self.sweep.as_slice().is_empty()
    }

    /// Reaps and submits; returns whether anything was reaped.
    pub fn pump(&mut self, phase: Phase) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.queue.reap(|user_data, result| done.push((user_data, result)));
        let reaped = !done.is_empty();
        if reaped {
            let now_ns = self.meter.now_ns();
            if phase != Phase::Sweep {
                self.meter.completed(now_ns);
            }
            for (slot, result) in done.drain(..) {
                self.complete(slot as usize, result, now_ns, phase);
            }
        }
        self.done = done;
        self.refill(phase);
        reaped
    }

    fn refill(&mut self, phase: Phase) {
        if phase == Phase::Drain || self.free.is_empty() {
            return;
        }
        let now_ns = self.meter.now_ns();
        let mut submitted = false;
        while let Some(slot) = self.free.pop() {
            let unit = match phase {
                Phase::Sweep => self.sweep.next(),
                _ => self.next_unit(),
            };
            let is_write = phase == Phase::Run && self.work.writes;
            let Some(unit) = unit else {
                self.free.push(slot);
                break;
            };
            match self.submit(slot, unit, is_write, now_ns) {
                Ok(()) => submitted = true,
                Err(SubmitError::WouldBlock) => {
                    self.free.push(slot);
                    break;
                }
                Err(error @ SubmitError::Errno(_)) => {
                    self.free.push(slot);
                    self.problem(format!("byte {}: {error}", unit * self.work.unit_bytes));
                    self.tally.errors += 1;
                    break;
                }
            }
        }
        if submitted {
            self.queue.kick();
        }
    }

    /// The next unit to be asked for; when verifying, none that a write is in flight for.
    fn next_unit(&mut self) -> Option<u64> {
        let Work { random, unit_first, unit_count, writes, .. } = self.work;
        for _ in 0..16 {
            let unit = unit_first
                + match random {
                    true => self.dice.below(unit_count),
                    false => self.next % unit_count,
                };
            self.next += 1;
            if self.checker.is_none() || !writes || !self.is_in_flight(unit) {
                return Some(unit);
            }
        }
        None
    }

    fn is_in_flight(&self, unit: u64) -> bool {
        self.slots.iter().any(|slot| slot.submitted_ns != 0 && slot.unit == unit)
    }

    fn submit(
        &mut self,
        index: usize,
        unit: u64,
        is_write: bool,
        now_ns: u64,
    ) -> Result<(), SubmitError> {
        let offset = unit * self.work.unit_bytes;
        let slot = &mut self.slots[index];
        if let Some(checker) = &mut self.checker {
            let is_filled = if is_write {
                slot.write = checker.stamp(unit, &mut self.scratch);
                slot.buffer.write(0, &self.scratch)
            } else {
                // What no read may leave there.
                slot.buffer.write(0, b"never filled in\0")
            };
            if !is_filled {
                return Err(SubmitError::Errno(Errno::INVAL));
            }
        }
        let io = match is_write {
            true => Io::write(offset, &slot.buffer),
            false => Io::read(offset, &slot.buffer),
        };
        self.queue.submit(io, index as u64)?;
        // Zero means "not in flight".
        (slot.unit, slot.is_write, slot.submitted_ns) = (unit, is_write, now_ns.max(1));
        Ok(())
    }

    fn complete(&mut self, index: usize, result: Result<(), Errno>, now_ns: u64, phase: Phase) {
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.submitted_ns != 0) else {
            self.tally.errors += 1;
            return self.problem(format!("a completion for slot {index}, which is not in flight"));
        };
        let submitted_ns = std::mem::take(&mut slot.submitted_ns);
        let (unit, write, is_write) = (slot.unit, slot.write, slot.is_write);
        self.free.push(index);
        if phase == Phase::Run {
            self.tally.requests += 1;
            self.tally.latency.record(now_ns.saturating_sub(submitted_ns));
        }
        if let Err(errno) = result {
            let what = if is_write { "write" } else { "read" };
            self.tally.errors += 1;
            self.problem(format!("{what} at byte {}: {errno}", unit * self.work.unit_bytes));
        }
        let Some(checker) = &mut self.checker else { return };
        if is_write {
            return checker.written(unit, write, result.is_ok());
        }
        if result.is_ok() {
            let is_copied = self.slots[index].buffer.read(0, &mut self.scratch);
            debug_assert!(is_copied, "a buffer is as long as the scratch");
            if let Err(wrong) = checker.check(unit, &self.scratch) {
                self.tally.mismatches += 1;
                self.problem(wrong);
            }
        }
    }

    /// What is in flight now will never be answered.
    pub fn give_up(&mut self) {
        let unanswered = self.slots.len() - self.free.len();
        self.tally.errors += unanswered as u64;
        self.problem(format!("{unanswered} requests were not answered"));
    }

    fn problem(&mut self, what: String) {
        self.tally.first_problem.get_or_insert(what);
    }
}
