//! One volume under load: its script, its requests in flight, and what they must read.
//!
//! ```text
//!   Run ──► Drain ──► Sweep ──► Rest          pump() is called again and again with the goal;
//!    ▲        │                   │           each call polls, judges and submits, and never blocks
//!    └────────┴──── cut_power ◄───┘
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::device::{Device, Done, Geometry, Io, Op};
use crate::oracle::{ANYTHING, Moment, Oracle, Outcome, ZEROS};
use crate::report::{Problem, ProblemKind, VolumeReport, WrongBlock};
use crate::stamp::{Dice, Found, SECTOR_BYTES, Stamp};
use crate::timeline::Timeline;
use crate::workload::{Mix, Script, Step};

/// What a stream is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Go on with the script.
    Run,
    /// Wait for what is in flight.
    Drain,
    /// Wait, then read every block once.
    Sweep,
}

/// How a volume is put under load.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Seed of the script.
    pub seed: u64,
    /// What is mixed.
    pub mix: Mix,
    /// Requests in flight; at most what the device takes.
    pub depth: usize,
    /// Number of this run on the volume.
    pub incarnation: u32,
    /// Whether the volume is known to be all zeros.
    pub starts_zeroed: bool,
    /// Keep what a power cut may bring back.
    pub tracks_durability: bool,
    /// A read beside a change of the same block may find both within one sector: the device copies for
    /// several queues at once.
    pub tears: bool,
    /// Steps until the stream rests of itself.
    pub steps_max: Option<u64>,
    /// A request that takes longer is taken for lost.
    pub stall_limit: Duration,
}

impl Default for StreamOptions {
    fn default() -> StreamOptions {
        StreamOptions {
            seed: 1,
            mix: Mix::default(),
            depth: 16,
            incarnation: 1,
            starts_zeroed: true,
            tracks_durability: false,
            tears: false,
            steps_max: None,
            stall_limit: Duration::from_secs(30),
        }
    }
}

/// Figures that others read while the stream runs.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Writes in flight.
    pub writes: AtomicU64,
    /// Requests answered.
    pub completions: AtomicU64,
    /// Problems found.
    pub problems: AtomicU64,
    /// Longest gap between completions while requests waited, in nanoseconds; swapped to zero by
    /// whoever measures.
    pub gap_ns_max: AtomicU64,
}

struct InFlight {
    tag: u64,
    step: Step,
    submitted: Moment,
}

/// Steps that wait for a change to end; more would only blur the script's order.
const PARKED_MAX: usize = 32;

/// One volume under load.
pub struct Stream<D> {
    device: D,
    geometry: Geometry,
    volume: u64,
    options: StreamOptions,
    script: Script,
    oracle: Oracle,
    timeline: Arc<Timeline>,
    gauges: Arc<Gauges>,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    parked: VecDeque<Step>,
    rereads: VecDeque<Step>,
    dice: Dice,
    steps: u64,
    tags: u64,
    sweep_next: Option<u64>,
    settles: bool,
    waiting_since: Moment,
    now: Moment,
    buffers: Vec<Vec<u8>>,
    done: Vec<Done>,
    report: VolumeReport,
    is_dead: bool,
}

impl<D: Device> Stream<D> {
    /// A stream for volume number `volume` on this device.
    pub fn new(device: D, volume: u64, options: StreamOptions, timeline: Arc<Timeline>) -> Self {
        let geometry = device.geometry();
        let depth = options.depth.min(geometry.depth).max(1);
        let block_count = geometry.size_bytes / u64::from(geometry.block_bytes);
        let oracle = if options.starts_zeroed {
            Oracle::new(block_count, options.tracks_durability)
        } else {
            Oracle::of_unknown(block_count, options.tracks_durability)
        };
        Stream {
            script: Script::new(options.seed, options.mix.clone(), geometry),
            dice: Dice::new(!options.seed),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).collect(),
            gauges: Arc::default(),
            parked: VecDeque::new(),
            rereads: VecDeque::new(),
            buffers: Vec::new(),
            done: Vec::new(),
            report: VolumeReport::default(),
            steps: 0,
            tags: 0,
            sweep_next: None,
            settles: false,
            device,
            geometry,
            volume,
            options,
            oracle,
            timeline,
            waiting_since: 0,
            now: 0,
            is_dead: false,
        }
    }

    /// Figures that others may read while this runs.
    pub fn gauges(&self) -> Arc<Gauges> {
        self.gauges.clone()
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, to be changed from outside.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The clock and the events of the run.
    pub fn timeline(&self) -> Arc<Timeline> {
        self.timeline.clone()
    }

    /// Whether nothing is in flight, and with this goal nothing will be submitted.
    pub fn is_at_rest(&self, goal: Goal) -> bool {
        let idle = self.free.len() == self.slots.len();
        let script_over = self.options.steps_max.is_some_and(|most| self.steps >= most);
        let waiting = !self.rereads.is_empty() || !self.parked.is_empty();
        match goal {
            _ if self.is_dead => true,
            Goal::Run => idle && script_over && !waiting,
            Goal::Drain => idle && !waiting,
            Goal::Sweep => idle && !waiting && self.sweep_next == Some(self.oracle.block_count()),
        }
    }

    /// What happened so far.
    pub fn report(&self) -> VolumeReport {
        let mut report = self.report.clone();
        report.place(&self.timeline);
        report
    }

    /// The power was cut while nothing was in flight: unflushed writes may be gone. The next sweep
    /// finds out what each block holds, and judges it.
    pub fn cut_power(&mut self) {
        assert!(self.is_at_rest(Goal::Drain), "requests are in flight");
        self.oracle.cut_power();
        self.settles = true;
        self.sweep_next = None;
    }

    /// Polls, judges and submits. Returns whether anything happened.
    pub fn pump(&mut self, goal: Goal) -> bool {
        if self.is_dead {
            return false;
        }
        self.now = self.timeline.now().max(self.now + 1);
        if goal != Goal::Sweep {
            self.sweep_next = None;
        }
        if goal == Goal::Run {
            // What the last power cut left is known by now; from here on history counts again.
            self.settles = false;
        }
        let mut done = std::mem::take(&mut self.done);
        if let Err(error) = self.device.poll(&mut done) {
            self.give_up(ProblemKind::DeviceGone, error.to_string());
        }
        let mut moved = !done.is_empty();
        if moved {
            self.note_gap();
        }
        for completion in done.drain(..) {
            self.complete(completion);
        }
        self.done = done;
        while !self.is_dead && !self.free.is_empty() {
            let Some(step) = self.next_step(goal) else { break };
            self.submit(step);
            moved = true;
        }
        if !moved {
            self.check_stall();
        }
        moved
    }

    /// Something completed: the gap since the last time ends.
    fn note_gap(&mut self) {
        let gap = self.now.saturating_sub(self.waiting_since);
        self.waiting_since = self.now;
        self.gauges.gap_ns_max.fetch_max(gap, Relaxed);
        self.report.blackout_us_max = self.report.blackout_us_max.max(gap / 1000);
    }

    fn check_stall(&mut self) {
        let limit = self.options.stall_limit.as_nanos() as Moment;
        let oldest = self.slots.iter().flatten().min_by_key(|flight| flight.submitted);
        let Some(oldest) = oldest.filter(|oldest| self.now - oldest.submitted > limit) else {
            return;
        };
        let Step { op, block, count, number, .. } = oldest.step;
        let found = format!(
            "{op:?} of {count} blocks at {block} (step {number}), submitted at {}, {}, is not answered; {} in flight",
            crate::timeline::seconds(oldest.submitted),
            self.timeline.around(oldest.submitted),
            self.slots.len() - self.free.len(),
        );
        self.give_up(ProblemKind::Stall, found);
    }

    fn give_up(&mut self, kind: ProblemKind, found: String) {
        self.is_dead = true;
        self.gauges.writes.store(0, Relaxed);
        self.problem(kind, None, found);
    }

    fn problem(&mut self, kind: ProblemKind, block: Option<u64>, found: String) {
        let events = self.timeline.around(self.now);
        let (volume, at, expected) = (self.volume, self.now, Vec::new());
        self.gauges.problems.fetch_add(1, Relaxed);
        self.report.record(Problem { kind, volume, block, expected, found, at, events });
    }

    fn next_step(&mut self, goal: Goal) -> Option<Step> {
        if let Some(step) = self.rereads.pop_front() {
            return Some(step);
        }
        let free = (0..self.parked.len()).find(|at| self.may_start(&self.parked[*at], *at));
        if let Some(step) = free.and_then(|at| self.parked.remove(at)) {
            return Some(step);
        }
        if goal != Goal::Run {
            return (goal == Goal::Sweep && self.parked.is_empty()).then(|| self.sweep_step())?;
        }
        while self.parked.len() < PARKED_MAX {
            if self.options.steps_max.is_some_and(|most| self.steps >= most) {
                return None;
            }
            self.steps += 1;
            let step = self.script.step();
            if self.may_start(&step, self.parked.len()) {
                return Some(step);
            }
            self.parked.push_back(step);
        }
        None
    }

    /// Whether a step overlaps no change in flight and none of the first `parked` parked ones.
    fn may_start(&self, step: &Step, parked: usize) -> bool {
        let clear = !step.op.is_change() || step.blocks().all(|b| !self.oracle.is_changing(b));
        clear && !self.parked.iter().take(parked).any(|other| other.excludes(step))
    }

    fn sweep_step(&mut self) -> Option<Step> {
        // Not before all is quiet: the sweep is to see what stays.
        let at = match self.sweep_next {
            Some(at) => at,
            None if self.free.len() == self.slots.len() => 0,
            None => return None,
        };
        let most = (64 * 1024 / u64::from(self.geometry.block_bytes)).max(1);
        let most =
            most.min(self.geometry.transfer_bytes_max / u64::from(self.geometry.block_bytes));
        let count = most.min(self.oracle.block_count() - at);
        self.sweep_next = Some(at + count);
        let length = (count * u64::from(self.geometry.block_bytes)) as usize;
        let iovecs = vec![length];
        (count > 0).then_some(Step {
            number: 0,
            op: Op::Read,
            fua: false,
            block: at,
            count,
            iovecs,
        })
    }

    fn submit(&mut self, step: Step) {
        let Some(slot) = self.free.pop() else { return };
        // Each request has a moment of its own, so that "before" and "after" are never a tie.
        self.now += 1;
        let now = self.now;
        if self.free.len() + 1 == self.slots.len() {
            self.waiting_since = now;
        }
        match step.op {
            Op::Read => step.blocks().for_each(|block| self.oracle.begin_read(block)),
            Op::Flush => {}
            Op::Write => {
                self.gauges.writes.fetch_add(1, Relaxed);
                step.blocks().for_each(|block| self.oracle.begin_change(block, step.number, now));
            }
            Op::Discard | Op::WriteZeroes => {
                step.blocks().for_each(|block| self.oracle.begin_change(block, ZEROS, now));
            }
        }
        let io = Io {
            op: step.op,
            fua: step.fua,
            offset: step.block * u64::from(self.geometry.block_bytes),
            length: step.count * u64::from(self.geometry.block_bytes),
            buffers: self.fill(&step),
        };
        self.tags += 1;
        let tag = self.tags << 16 | slot as u64;
        self.slots[slot] = Some(InFlight { tag, step, submitted: now });
        if let Err(error) = self.device.submit(tag, io) {
            self.give_up(ProblemKind::DeviceGone, error.to_string());
        }
    }

    /// Buffers with the stamps of a write, or with something that no read may leave there.
    fn fill(&mut self, step: &Step) -> Vec<Vec<u8>> {
        let per_block = self.geometry.block_bytes as usize / SECTOR_BYTES;
        let mut at = 0;
        let mut buffers = Vec::with_capacity(step.iovecs.len());
        for length in &step.iovecs {
            let mut buffer = self.buffers.pop().unwrap_or_default();
            buffer.resize(*length, 0);
            for sector in buffer.chunks_exact_mut(SECTOR_BYTES) {
                if step.op == Op::Write {
                    let block = step.block + (at / per_block) as u64;
                    self.stamp(block, step.number).fill_sector((at % per_block) as u32, sector);
                } else {
                    sector[..16].copy_from_slice(b"never filled in\0");
                }
                at += 1;
            }
            buffers.push(buffer);
        }
        buffers
    }

    fn stamp(&self, block: u64, write: u64) -> Stamp {
        Stamp { volume: self.volume, block, write, incarnation: self.options.incarnation }
    }

    fn complete(&mut self, done: Done) {
        let slot = (done.tag & 0xFFFF) as usize;
        let flight = self.slots.get_mut(slot).and_then(|s| s.take_if(|f| f.tag == done.tag));
        let Some(InFlight { step, submitted, .. }) = flight else {
            let found = format!("a completion with tag {:#x}, which is not in flight", done.tag);
            return self.problem(ProblemKind::StrayCompletion, None, found);
        };
        self.free.push(slot);
        self.now += 1;
        self.gauges.completions.fetch_add(1, Relaxed);
        self.count(&step, submitted);
        if step.op == Op::Write {
            self.gauges.writes.fetch_sub(1, Relaxed);
            self.timeline.kill.reaped(submitted);
        }
        if done.errno != 0 {
            let error = std::io::Error::from_raw_os_error(done.errno);
            let Step { op, count, number, .. } = step;
            let found = format!("{op:?} of {count} blocks (step {number}): {error}");
            self.problem(ProblemKind::Error, Some(step.block), found);
        }
        self.settle(&step, submitted, &done);
        self.buffers.extend(done.buffers);
    }

    fn count(&mut self, step: &Step, submitted: Moment) {
        let latency_us = (self.now - submitted) / 1000;
        self.report.latency_us_max = self.report.latency_us_max.max(latency_us);
        self.report.latency_us_sum += latency_us;
        self.report.requests += 1;
        self.report.writes += u64::from(step.op == Op::Write);
        self.report.flushes += u64::from(step.op == Op::Flush);
        self.report.fua += u64::from(step.fua);
    }

    /// Tells the oracle how a request ended, or asks it about what was read.
    fn settle(&mut self, step: &Step, submitted: Moment, done: &Done) {
        let is_ok = done.errno == 0;
        let outcome = match step.op {
            Op::Read => {
                if is_ok {
                    self.judge(step, submitted, &done.buffers);
                }
                return step.blocks().for_each(|block| self.oracle.end_read(block));
            }
            Op::Flush if is_ok => return self.oracle.flushed(submitted),
            Op::Flush => return,
            _ if !is_ok => Outcome::Failed,
            Op::Discard => Outcome::Maybe,
            Op::Write | Op::WriteZeroes if step.fua => Outcome::Durable,
            Op::Write | Op::WriteZeroes => Outcome::Done,
        };
        step.blocks().for_each(|block| self.oracle.end_change(block, outcome, self.now));
        if self.dice.percent(self.options.mix.reread) {
            self.rereads.push_back(Script::reread(step, self.geometry.block_bytes));
        }
    }

    fn judge(&mut self, step: &Step, submitted: Moment, buffers: &[Vec<u8>]) {
        let per_block = self.geometry.block_bytes as usize / SECTOR_BYTES;
        let sectors = buffers.iter().flat_map(|buffer| buffer.chunks_exact(SECTOR_BYTES));
        let mut seen = Some(ANYTHING);
        let mut is_wrong = false;
        for (at, bytes) in sectors.enumerate() {
            let (block, sector) = (step.block + (at / per_block) as u64, (at % per_block) as u32);
            let found = Found::decode(bytes);
            let value = match found {
                Found::Zeros => Some(ZEROS),
                Found::Stamp(stamp, at) if at == sector => {
                    (stamp == self.stamp(block, stamp.write)).then_some(stamp.write)
                }
                _ => None,
            };
            if sector == 0 {
                (seen, is_wrong) = (value, false);
            } else if seen != value {
                seen = None;
            }
            let is_torn = self.options.tears
                && matches!(found, Found::Damaged(_) | Found::Alien(_))
                && self.oracle.was_contested(block, submitted);
            if !is_wrong && !is_torn && !self.oracle.allows(block, value, submitted) {
                is_wrong = true; // One report a block.
                self.wrong(block, sector, found, submitted);
            }
            if sector as usize + 1 == per_block {
                self.report.blocks_checked += 1;
                if let (true, Some(value), false) = (self.settles, seen, is_wrong) {
                    self.oracle.settle(block, value, self.now);
                }
            }
        }
    }

    fn wrong(&mut self, block: u64, sector: u32, found: Found, submitted: Moment) {
        let allowed = &self.oracle.allowed(block, submitted);
        let (volume, completed) = (self.volume, self.now);
        let wrong = WrongBlock { volume, block, sector, found, allowed, submitted, completed };
        self.gauges.problems.fetch_add(1, Relaxed);
        self.report.record(wrong.describe(&self.timeline));
    }
}
