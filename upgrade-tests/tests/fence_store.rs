//! The fence, proven: owners replace each other without a word while their predecessors go on, old
//! operations are delivered again, and only the fence of the storage stands between them and the data.
//!
//! No server is needed: the `fence-test` backend is driven directly, and "servers" are opens of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::{Epoch, Errno, Fence, Generation, OpFlags};
use nebd_backend::{
    Backend, FenceTestBackend, Lane, LaneConfig, NoStore, OpenContext, Opened, Request, Segment,
    Segments, VolumeSpec,
};
use nebd_upgrade_tests::device::{Device, DeviceGone, Done, Geometry, Io, Op};
use nebd_upgrade_tests::fence_store::control;
use nebd_upgrade_tests::report::VolumeReport;
use nebd_upgrade_tests::stream::{Goal, Stream, StreamOptions};
use nebd_upgrade_tests::supervisor::FenceStore;
use nebd_upgrade_tests::timeline::Timeline;

const BYTES: u64 = 1 << 20;
const STORE: &str = env!("CARGO_BIN_EXE_fence-store");

/// A server in a few lines: dispatches with a fence, and re-issues what its predecessor left.
struct Owner {
    backend: FenceTestBackend,
    spec: VolumeSpec,
    opened: Opened,
    lane: Lane,
    generation: Generation,
    seq: u64,
    /// Tag and request, by seq.
    outstanding: BTreeMap<u64, (u64, Io)>,
    by_tag: BTreeMap<u64, (u64, Vec<Segment>)>,
    /// Of all owners so far: a predecessor may still use them.
    answers: Vec<nebd_backend::Done>,
}

impl Owner {
    fn new(store: &Path, name: &str) -> Owner {
        let backend = FenceTestBackend::new(store);
        let name = format!("fence-test:{name}").parse().unwrap();
        let spec = VolumeSpec { name, size: BYTES, block_size: 4096, path: None };
        backend.create(&spec).unwrap();
        let generation = Generation(1);
        Owner {
            opened: open(&backend, &spec, None, generation),
            backend,
            spec,
            lane: Lane::new(&LaneConfig::default()).unwrap(),
            generation,
            seq: 0,
            outstanding: BTreeMap::new(),
            by_tag: BTreeMap::new(),
            answers: Vec::new(),
        }
    }

    /// Another server takes over, and nobody has told the present one, which stays behind with
    /// everything it had on the way.
    fn replace(&mut self) {
        self.generation.0 += 1;
        let major = Some(self.opened.major);
        self.opened = open(&self.backend, &self.spec, major, self.generation);
        self.lane = Lane::new(&LaneConfig::default()).unwrap();
        self.seq = 0;
        self.by_tag.clear();
        for (_, (tag, io)) in std::mem::take(&mut self.outstanding) {
            self.dispatch(tag, io);
        }
    }

    fn dispatch(&mut self, tag: u64, io: Io) {
        self.seq += 1;
        let oldest = self.outstanding.keys().next().copied().unwrap_or(self.seq);
        let op = match io.op {
            Op::Read => nebd_abi::Op::Read,
            Op::Write => nebd_abi::Op::Write,
            Op::Flush => nebd_abi::Op::Flush,
            Op::Discard => nebd_abi::Op::Discard,
            Op::WriteZeroes => nebd_abi::Op::WriteZeroes,
        };
        let flags = if io.fua { OpFlags::FUA } else { OpFlags::NONE };
        let mailbox = self.lane.mailbox().clone();
        let mut request = Request::new(op, flags, io.offset, io.length, mailbox, self.seq);
        // Memory of its own for each dispatch, never freed: predecessors are still at it.
        let segments: Vec<Segment> = io
            .buffers
            .iter()
            .map(|buffer| {
                let memory: &'static mut [u8] = Box::leak(buffer.clone().into_boxed_slice());
                Segment { pointer: memory.as_mut_ptr(), length: memory.len() }
            })
            .collect();
        request.segments = Segments::Many(segments.clone().into());
        let epoch = Epoch::new(self.opened.major, self.generation);
        request.fence = Fence { volume: self.opened.volume_id, epoch, seq: self.seq, oldest };
        self.by_tag.insert(self.seq, (tag, segments));
        self.outstanding.insert(self.seq, (tag, io));
        self.opened.volume.submit(&mut self.lane, request);
    }
}

fn open(
    backend: &FenceTestBackend,
    spec: &VolumeSpec,
    previous_major: Option<u32>,
    generation: Generation,
) -> Opened {
    let store = Arc::new(NoStore::default());
    backend.open(spec, &OpenContext { previous_major, host_major: 1, generation, store }).unwrap()
}

impl Device for Owner {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: BYTES,
            block_bytes: 4096,
            depth: 32,
            iovecs_max: 8,
            transfer_bytes_max: 65536,
            can_discard: true,
            can_write_zeroes: true,
        }
    }

    fn submit(&mut self, tag: u64, io: Io) -> Result<(), DeviceGone> {
        self.dispatch(tag, io);
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        let mut answers = std::mem::take(&mut self.answers);
        self.lane.drain(&mut answers);
        for answer in answers.drain(..) {
            let Some((_, mut io)) = self.outstanding.remove(&answer.tag) else { continue };
            let Some((tag, segments)) = self.by_tag.remove(&answer.tag) else { continue };
            for (buffer, segment) in io.buffers.iter_mut().zip(&segments) {
                // SAFETY: leaked memory of this very length; the request it belonged to is done.
                unsafe { segment.pointer.copy_to(buffer.as_mut_ptr(), segment.length) };
            }
            let errno = answer.result.err().map_or(0, |Errno(errno)| errno);
            out.push(Done { tag, errno, buffers: io.buffers });
        }
        self.answers = answers;
        Ok(())
    }
}

fn stream(store: &FenceStore, name: &str, seed: u64, tracks_durability: bool) -> Stream<Owner> {
    let options = StreamOptions {
        seed,
        depth: 32,
        tracks_durability,
        stall_limit: Duration::from_secs(20),
        ..StreamOptions::default()
    };
    Stream::new(Owner::new(store.socket(), name), seed, options, Timeline::shared())
}

fn until_rest(stream: &mut Stream<Owner>, goal: Goal) {
    while !stream.is_at_rest(goal) {
        if !stream.pump(goal) {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

fn run_for(stream: &mut Stream<Owner>, requests: u64) {
    let goal = stream.report().requests + requests;
    while stream.report().requests < goal && !stream.is_at_rest(Goal::Run) {
        if !stream.pump(Goal::Run) {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

/// Sixty owners, one after the other, each with a full queue when it is replaced.
fn replace_owners(arguments: &[&str]) -> (VolumeReport, control::StoreStats) {
    let store = FenceStore::start(Path::new(STORE), arguments).unwrap();
    let mut stream = stream(&store, "replaced", 11, false);
    for takeover in 1..=60 {
        run_for(&mut stream, 250);
        stream.timeline().note(format!("takeover #{takeover}"));
        stream.device_mut().replace();
    }
    until_rest(&mut stream, Goal::Drain);
    until_rest(&mut stream, Goal::Sweep);
    (stream.report(), control::stats(store.socket()).unwrap())
}

#[test]
fn the_fence_alone_holds_while_predecessors_live_on() {
    let (report, stats) = replace_owners(&[]);
    assert!(report.is_clean(), "{:#?}\n{stats:#?}", report.problems);
    // The fence was needed: nothing of this was idle.
    assert!(stats.stale > 0 && stats.again > 0 && stats.redelivered > 100, "{stats:#?}");
    assert!(stats.delayed > 0 && stats.duplicated > 0 && stats.cut > 0, "{stats:#?}");
}

#[test]
fn without_the_fence_the_harness_finds_wrong_blocks() {
    let (report, stats) = replace_owners(&["--no-fence"]);
    assert!(report.mismatches > 0, "nothing was found: {stats:#?}");
}

#[test]
fn a_power_cut_takes_nothing_that_was_flushed_or_forced() {
    let store = FenceStore::start(Path::new(STORE), &["--volatile"]).unwrap();
    let mut stream = stream(&store, "volatile", 12, true);
    let mut lost = 0;
    for cut in 0..12 {
        run_for(&mut stream, 600);
        until_rest(&mut stream, Goal::Drain);
        // Copies on the way would be new writes after the cut.
        let answer = control::ask(store.socket(), &format!("power-cut {cut}")).unwrap();
        lost += answer.parse::<u64>().unwrap();
        stream.timeline().note(format!("power cut #{cut}"));
        stream.cut_power();
        until_rest(&mut stream, Goal::Sweep);
    }
    let report = stream.report();
    assert!(report.is_clean(), "{:#?}", report.problems);
    assert!(lost > 100 && report.flushes > 20 && report.fua > 20, "lost {lost}: {report:#?}");
}

#[test]
fn majors_grow_and_an_owner_that_was_replaced_is_told() {
    let store = FenceStore::start(Path::new(STORE), &[]).unwrap();
    let owner = Owner::new(store.socket(), "granted");
    let Owner { backend, spec, .. } = &owner;
    let majors: BTreeSet<u32> =
        (0..5).map(|_| open(backend, spec, None, Generation(1)).major).collect();
    assert_eq!(majors.len(), 5, "{majors:?}");
    let context = OpenContext {
        previous_major: Some(owner.opened.major),
        host_major: 1,
        generation: Generation(9),
        store: Arc::new(NoStore::default()),
    };
    let refused = backend.open(spec, &context).map(|opened| opened.major);
    assert!(matches!(refused, Err(nebd_backend::BackendError::Busy { .. })), "{refused:?}");
    assert_eq!(backend.observe(spec).unwrap(), BYTES);
    backend.delete(spec).unwrap();
    assert!(matches!(backend.observe(spec), Err(nebd_backend::BackendError::NotFound(_))));
}

/// The store serves many more operations than the campaigns ask for.
#[test]
fn the_store_keeps_up() {
    let store = FenceStore::start(Path::new(STORE), &[]).unwrap();
    let mut stream = stream(&store, "speed", 13, false);
    let begun = Instant::now();
    run_for(&mut stream, 20_000);
    println!("{:.0} requests/s", 20_000.0 / begun.elapsed().as_secs_f64());
    until_rest(&mut stream, Goal::Drain);
    assert!(stream.report().is_clean(), "{:#?}", stream.report().problems);
}
