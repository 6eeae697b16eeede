//! The file system's volume under load: its own blocks, written again and again.
//!
//! ```text
//!   import: each chunk of the image is written once
//!   churn:  a chunk ── compare ─► write inverted ─► write as it was ─► compare    (many at a time)
//!   export: each chunk is read, compared, and written to a file
//! ```
//!
//! Between two cycles every chunk holds what the image holds, so at the end the file system must be
//! whole; a write that is lost or carried out late leaves an inverted chunk behind.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nebd_upgrade_tests::device::{Device, Done, Io, Op};
use nebd_upgrade_tests::oracle::Moment;
use nebd_upgrade_tests::stamp::Dice;
use nebd_upgrade_tests::stream::Gauges;
use nebd_upgrade_tests::timeline::Timeline;

/// Bytes of a chunk.
const CHUNK_BYTES: u64 = 16 << 10;
/// Chunks in work at a time.
const DEPTH: usize = 16;
/// A request that takes longer is taken for lost.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// What the disk is to do now.
#[derive(Debug)]
pub enum Goal {
    /// Write the image.
    Import,
    /// Rewrite chunks at random.
    Churn,
    /// Let the cycles in work end.
    Drain,
    /// Read everything into a file.
    Export,
}

/// What happened.
#[derive(Clone, Debug, Default)]
pub struct DiskReport {
    /// Requests answered.
    pub requests: u64,
    /// Of these, with an error, or lost.
    pub errors: u64,
    /// Chunks that did not hold what the image holds.
    pub mismatches: u64,
    /// The first problem.
    pub first_problem: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Import,
    /// What earlier servers left there.
    Before,
    Invert,
    Restore,
    After,
    Export,
}

#[derive(Debug)]
struct Flight {
    step: Step,
    submitted: Moment,
}

/// A volume that holds an image.
pub struct Disk<D> {
    device: D,
    image: File,
    export: Option<File>,
    chunks: u64,
    size_bytes: u64,
    in_flight: HashMap<u64, Flight>,
    next: u64,
    dice: Dice,
    timeline: Arc<Timeline>,
    gauges: Arc<Gauges>,
    waiting_since: Moment,
    report: DiskReport,
    is_dead: bool,
}

impl<D: Device> Disk<D> {
    /// A disk for this image on a device of at least its size.
    pub fn new(device: D, image: File, timeline: Arc<Timeline>) -> Disk<D> {
        let size_bytes = device.geometry().size_bytes;
        Disk {
            device,
            image,
            export: None,
            chunks: size_bytes.div_ceil(CHUNK_BYTES),
            size_bytes,
            in_flight: HashMap::new(),
            next: 0,
            dice: Dice::new(0xD15C),
            waiting_since: timeline.now(),
            timeline,
            gauges: Arc::default(),
            report: DiskReport::default(),
            is_dead: false,
        }
    }

    /// Figures that others may read while this runs.
    pub fn gauges(&self) -> Arc<Gauges> {
        self.gauges.clone()
    }

    /// The device, to wait on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What happened so far.
    pub fn report(&self) -> DiskReport {
        self.report.clone()
    }

    /// Prepares for [`Goal::Import`].
    pub fn begin_import(&mut self) {
        self.next = 0;
    }

    /// Prepares for [`Goal::Export`] into this file.
    pub fn begin_export(&mut self, file: File) {
        self.next = 0;
        self.export = Some(file);
    }

    /// Whether nothing is in flight, and nothing more will be.
    pub fn is_at_rest(&self, goal: &Goal) -> bool {
        let is_idle = self.is_dead || self.in_flight.is_empty();
        match goal {
            Goal::Churn => self.is_dead,
            Goal::Drain => is_idle,
            Goal::Import | Goal::Export => is_idle && (self.is_dead || self.next == self.chunks),
        }
    }

    /// Polls, judges and submits; returns whether anything happened.
    pub fn pump(&mut self, goal: &Goal) -> io::Result<bool> {
        if self.is_dead {
            return Ok(false);
        }
        let mut done = Vec::new();
        if let Err(error) = self.device.poll(&mut done) {
            self.give_up(error.to_string());
        }
        let mut moved = !done.is_empty();
        if moved {
            let now = self.timeline.now();
            let gap = now.saturating_sub(std::mem::replace(&mut self.waiting_since, now));
            self.gauges.gap_ns_max.fetch_max(gap, Relaxed);
        }
        for done in done {
            self.complete(done)?;
        }
        while !self.is_dead && self.in_flight.len() < DEPTH {
            let Some((chunk, step)) = self.next_step(goal) else { break };
            self.submit(chunk, step)?;
            moved = true;
        }
        if !moved {
            self.check_stall();
        }
        Ok(moved)
    }

    fn check_stall(&mut self) {
        let limit = STALL_LIMIT.as_nanos() as Moment;
        let now = self.timeline.now();
        let is_late = |flight: &Flight| now.saturating_sub(flight.submitted) > limit;
        if self.in_flight.values().any(is_late) {
            self.give_up(format!("no answer within {} s", STALL_LIMIT.as_secs()));
        }
    }

    fn give_up(&mut self, why: String) {
        self.is_dead = true;
        self.gauges.writes.store(0, Relaxed);
        self.problem(why);
        self.report.errors += 1;
    }

    fn problem(&mut self, what: String) {
        self.gauges.problems.fetch_add(1, Relaxed);
        let events = self.timeline.around(self.timeline.now());
        self.report.first_problem.get_or_insert(format!("{what} ({events})"));
    }

    fn next_step(&mut self, goal: &Goal) -> Option<(u64, Step)> {
        let step = match goal {
            Goal::Drain => return None,
            Goal::Churn => {
                let chunk = self.dice.below(self.chunks);
                return (!self.in_flight.contains_key(&chunk)).then_some((chunk, Step::Before));
            }
            Goal::Import => Step::Import,
            Goal::Export => Step::Export,
        };
        let chunk = self.next;
        (chunk < self.chunks).then(|| {
            self.next += 1;
            (chunk, step)
        })
    }

    /// What the image holds; zeros beyond its end.
    fn original(&self, chunk: u64) -> io::Result<Vec<u8>> {
        let offset = chunk * CHUNK_BYTES;
        let mut bytes = vec![0; CHUNK_BYTES.min(self.size_bytes - offset) as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match self.image.read_at(&mut bytes[filled..], offset + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(bytes)
    }

    fn submit(&mut self, chunk: u64, step: Step) -> io::Result<()> {
        let mut bytes = self.original(chunk)?;
        let op = match step {
            Step::Before | Step::After | Step::Export => Op::Read,
            Step::Import | Step::Invert | Step::Restore => Op::Write,
        };
        if step == Step::Invert || op == Op::Read {
            // For a read: something that is surely wrong unless it is overwritten.
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
        }
        let submitted = self.timeline.now();
        if op == Op::Write {
            self.gauges.writes.fetch_add(1, Relaxed);
        }
        if self.in_flight.is_empty() {
            self.waiting_since = submitted;
        }
        self.in_flight.insert(chunk, Flight { step, submitted });
        let (offset, length) = (chunk * CHUNK_BYTES, bytes.len() as u64);
        let io = Io { op, fua: false, offset, length, buffers: vec![bytes] };
        if let Err(error) = self.device.submit(chunk, io) {
            self.give_up(error.to_string());
        }
        Ok(())
    }

    fn complete(&mut self, done: Done) -> io::Result<()> {
        let chunk = done.tag;
        let Some(Flight { step, submitted }) = self.in_flight.remove(&chunk) else {
            self.report.errors += 1;
            self.problem(format!("a completion for chunk {chunk}, which is not in flight"));
            return Ok(());
        };
        self.report.requests += 1;
        self.gauges.completions.fetch_add(1, Relaxed);
        if matches!(step, Step::Import | Step::Invert | Step::Restore) {
            self.gauges.writes.fetch_sub(1, Relaxed);
            self.timeline.kill.reaped(submitted);
        }
        if done.errno != 0 {
            self.report.errors += 1;
            let error = io::Error::from_raw_os_error(done.errno);
            self.problem(format!("{step:?} at byte {}: {error}", chunk * CHUNK_BYTES));
            return Ok(());
        }
        match step {
            Step::Import => Ok(()),
            Step::Invert => self.submit(chunk, Step::Restore),
            Step::Restore => self.submit(chunk, Step::After),
            Step::After | Step::Export => self.judge(chunk, step, &done.buffers.concat()),
            Step::Before => {
                self.judge(chunk, step, &done.buffers.concat())?;
                self.submit(chunk, Step::Invert)
            }
        }
    }

    fn judge(&mut self, chunk: u64, step: Step, found: &[u8]) -> io::Result<()> {
        let offset = chunk * CHUNK_BYTES;
        let expected = self.original(chunk)?;
        if let Some(at) = expected.iter().zip(found).position(|(want, have)| want != have) {
            self.report.mismatches += 1;
            let is_inverted = expected.iter().zip(found).all(|(want, have)| *want == !*have);
            let what = if is_inverted { "a stale chunk" } else { "wrong bytes" };
            self.problem(format!("{what} at byte {}", offset + at as u64));
        }
        match &self.export {
            Some(file) if step == Step::Export => file.write_all_at(found, offset),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Carries requests out at once; forgets the write numbered `lost`.
    struct Ram {
        bytes: Vec<u8>,
        done: Vec<Done>,
        writes: u64,
        lost: u64,
    }

    impl Device for Ram {
        fn geometry(&self) -> nebd_upgrade_tests::device::Geometry {
            nebd_upgrade_tests::device::Geometry {
                size_bytes: self.bytes.len() as u64,
                block_bytes: 4096,
                depth: 32,
                iovecs_max: 1,
                transfer_bytes_max: 1 << 20,
                can_discard: false,
                can_write_zeroes: false,
            }
        }

        fn submit(
            &mut self,
            tag: u64,
            mut io: Io,
        ) -> Result<(), nebd_upgrade_tests::device::DeviceGone> {
            let range = io.offset as usize..(io.offset + io.length) as usize;
            match io.op {
                Op::Read => io.buffers[0].copy_from_slice(&self.bytes[range]),
                Op::Write => {
                    self.writes += 1;
                    if self.writes != self.lost {
                        self.bytes[range].copy_from_slice(&io.buffers[0]);
                    }
                }
                _ => {}
            }
            self.done.push(Done { tag, errno: 0, buffers: io.buffers });
            Ok(())
        }

        fn poll(
            &mut self,
            out: &mut Vec<Done>,
        ) -> Result<(), nebd_upgrade_tests::device::DeviceGone> {
            out.append(&mut self.done);
            Ok(())
        }
    }

    fn run(lost: u64) -> (DiskReport, Vec<u8>, Vec<u8>) {
        let size = 10 * CHUNK_BYTES as usize + 4096;
        let image: Vec<u8> = (0..size - 1000).map(|at| (at / 7) as u8).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&image, 0).unwrap();
        let ram = Ram { bytes: vec![9; size], done: Vec::new(), writes: 0, lost };
        let mut disk = Disk::new(ram, file, Arc::default());
        disk.begin_import();
        while !disk.is_at_rest(&Goal::Import) {
            disk.pump(&Goal::Import).unwrap();
        }
        for _ in 0..100 {
            disk.pump(&Goal::Churn).unwrap();
        }
        while !disk.is_at_rest(&Goal::Drain) {
            disk.pump(&Goal::Drain).unwrap();
        }
        let exported = tempfile::tempfile().unwrap();
        disk.begin_export(exported.try_clone().unwrap());
        while !disk.is_at_rest(&Goal::Export) {
            disk.pump(&Goal::Export).unwrap();
        }
        let mut copy = vec![0; size];
        exported.read_exact_at(&mut copy, 0).unwrap();
        let mut expected = image;
        expected.resize(size, 0);
        (disk.report(), copy, expected)
    }

    #[test]
    fn the_image_comes_back_whole() {
        let (report, copy, expected) = run(0);
        assert_eq!((report.errors, report.mismatches), (0, 0));
        assert!(report.requests > 100);
        assert!(copy == expected);
    }

    #[test]
    fn a_lost_write_is_noticed() {
        // The first writes import the image; then some cycle loses one of its writes.
        let lost = (12..40).map(|lost| run(lost).0.mismatches).filter(|count| *count > 0).count();
        assert!(lost > 0);
    }
}
