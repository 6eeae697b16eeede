//! Verified IO against a server that may be killed at any time.
//!
//! ```text
//! verified_io VOLUME SECONDS          e.g. NEBD_SOCKET=/run/nebd/nebd.sock verified_io file:disk1 10
//! ```
//!
//! Four workers, each with blocks of its own, one for each way to use the library: blocking calls,
//! callbacks, futures, and a queue driven by hand. Each remembers what it was told is on its
//! blocks, and reads again and again. Prints one line; exits with 1 if a byte was wrong or a
//! request failed, with 2 if it could not run at all. Overwrites the volume.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use nebd_client::{
    Buffer, CompletionMode, Errno, Event, Io, OpFlags, Options, Session, SubmitError,
};

/// Requests of a worker under way at a time.
const DEPTH: usize = 16;
/// Blocks of a worker, at most.
const BLOCKS_MAX: u64 = 256;

/// Why the run ended early.
enum Failure {
    /// It could not begin.
    Setup(Box<dyn std::error::Error + Send + Sync>),
    /// A request failed.
    Request { what: &'static str, block: u64, errno: Errno },
    /// A block held something else than what was written last.
    Mismatch { block: u64, expected: u64, found: Option<u64> },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Setup(error) => write!(f, "cannot begin: {error}"),
            Failure::Request { what, block, errno } => {
                write!(f, "{what} of block {block}: {errno}")
            }
            Failure::Mismatch { block, expected, found: Some(found) } => {
                write!(f, "block {block}: expected version {expected}, found version {found}")
            }
            Failure::Mismatch { block, expected, found: None } => {
                write!(
                    f,
                    "block {block}: expected version {expected}, found no stamp of this block"
                )
            }
        }
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Setup(error.into())
    }
}

/// What all workers share.
struct Run {
    block_size: usize,
    blocks: u64,
    until: Instant,
    requests: AtomicU64,
    has_failed: AtomicBool,
}

impl Run {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until && !self.has_failed.load(Relaxed)
    }
}

/// The blocks of one worker, and the version that each is known to hold: 0 is all zeros.
struct Blocks<'a> {
    run: &'a Run,
    first: u64,
    versions: Vec<u64>,
    next: u64,
    random: u64,
}

/// What a worker does next, and to which of its blocks.
#[derive(Clone, Copy)]
enum Step {
    Write { index: u64, version: u64, flags: OpFlags },
    Zero { index: u64 },
    Read { index: u64 },
    Flush,
}

impl<'a> Blocks<'a> {
    fn new(run: &'a Run, worker: u64) -> Blocks<'a> {
        let random = 0x9e37_79b9_7f4a_7c15 ^ (worker + 1);
        let versions = vec![0; run.blocks as usize];
        Blocks { run, first: worker * run.blocks, versions, next: 0, random }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The next step for a lane that owns the blocks `lane`, `lane + DEPTH` and so on.
    fn step(&mut self, lane: u64) -> Step {
        let random = self.random();
        let lanes = self.run.blocks / DEPTH as u64;
        let index = lane + (random >> 32) % lanes * DEPTH as u64;
        match random % 32 {
            0 => Step::Flush,
            1 => Step::Zero { index },
            kind @ 2..=14 => {
                self.next += 1;
                let flags = if kind == 2 { OpFlags::FUA } else { OpFlags::NONE };
                Step::Write { index, version: self.next, flags }
            }
            _ => Step::Read { index },
        }
    }

    fn offset(&self, index: u64) -> u64 {
        (self.first + index) * self.run.block_size as u64
    }

    fn fill(&self, index: u64, version: u64, bytes: &mut [u8]) {
        let block = self.first + index;
        for (place, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&stamp(block, version, place as u64).to_le_bytes());
        }
    }

    /// Takes the result of a step; `bytes` is what a read found.
    fn done(&mut self, step: Step, result: Result<(), Errno>, bytes: &[u8]) -> Result<(), Failure> {
        self.run.requests.fetch_add(1, Relaxed);
        let (what, index) = match step {
            Step::Write { index, .. } => ("write", index),
            Step::Zero { index } => ("write-zeroes", index),
            Step::Read { index } => ("read", index),
            Step::Flush => ("flush", 0),
        };
        let block = self.first + index;
        result.map_err(|errno| Failure::Request { what, block, errno })?;
        match step {
            Step::Write { index, version, .. } => self.versions[index as usize] = version,
            Step::Zero { index } => self.versions[index as usize] = 0,
            Step::Read { index } => {
                let expected = self.versions[index as usize];
                let found = read_stamp(block, bytes);
                if found != Some(expected) {
                    return Err(Failure::Mismatch { block, expected, found });
                }
            }
            Step::Flush => {}
        }
        Ok(())
    }
}

/// The word at `place` of a block.
fn stamp(block: u64, version: u64, place: u64) -> u64 {
    let mixed = (block << 40 ^ place).wrapping_mul(0xd6e8_feb8_6659_fd93);
    // The first word tells the version, the others prove it.
    if place == 0 { version } else { version.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mixed }
}

/// The version that a block holds, if each word of it agrees.
fn read_stamp(block: u64, bytes: &[u8]) -> Option<u64> {
    let word = |chunk: &[u8]| chunk.try_into().map_or(0, u64::from_le_bytes);
    let version = word(bytes.get(..8)?);
    if version == 0 {
        return bytes.iter().all(|byte| *byte == 0).then_some(0);
    }
    let mut words = bytes.chunks_exact(8).zip(0..);
    words.all(|(chunk, place)| word(chunk) == stamp(block, version, place)).then_some(version)
}

/// The request of a step, with the lane's buffer.
fn request<'a>(blocks: &Blocks<'_>, step: Step, buffer: &'a mut Buffer) -> Io<'a> {
    let size = blocks.run.block_size;
    match step {
        Step::Write { index, version, flags } => {
            let mut bytes = vec![0; size];
            blocks.fill(index, version, &mut bytes);
            assert!(buffer.write(0, &bytes), "a buffer holds a block");
            Io::write(blocks.offset(index), &*buffer).with_flags(flags)
        }
        Step::Zero { index } => Io::write_zeroes(blocks.offset(index), size as u64),
        Step::Read { index } => Io::read(blocks.offset(index), &*buffer),
        Step::Flush => Io::flush(),
    }
}

fn contents(blocks: &Blocks<'_>, buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; blocks.run.block_size];
    assert!(buffer.read(0, &mut bytes), "a buffer holds a block");
    bytes
}

/// Blocking calls on ordinary memory.
fn blocking(session: &Session, blocks: &mut Blocks<'_>) -> Result<(), Failure> {
    let size = blocks.run.block_size;
    let mut bytes = vec![0; size];
    let mut lane = 0;
    while blocks.run.goes_on() {
        lane = (lane + 1) % DEPTH as u64;
        let step = blocks.step(lane);
        let result = match step {
            Step::Write { index, version, flags } => {
                blocks.fill(index, version, &mut bytes);
                session.write_at(&bytes, blocks.offset(index), flags)
            }
            Step::Zero { index } => {
                session.write_zeroes(blocks.offset(index), size as u64, OpFlags::NONE)
            }
            Step::Read { index } => session.read_at(&mut bytes, blocks.offset(index)),
            Step::Flush => session.flush(),
        };
        blocks.done(step, result, &bytes)?;
    }
    Ok(())
}

/// Callbacks, several requests at a time.
fn callbacks(session: &Session, blocks: &mut Blocks<'_>) -> Result<(), Failure> {
    let (tell, told) = mpsc::channel();
    let mut lanes = lanes(session, blocks.run)?;
    let mut steps = [Step::Flush; DEPTH];
    let mut under_way = 0;
    let begin = |lane: usize, blocks: &mut Blocks<'_>, lanes: &mut [Buffer]| {
        let step = blocks.step(lane as u64);
        let tell = tell.clone();
        let done = Box::new(move |result| {
            // The receiver is gone only after a failure that was reported already.
            let _ = tell.send((lane, step, result));
        });
        session.submit(request(blocks, step, &mut lanes[lane]), done).map(|()| step)
    };
    for (lane, place) in steps.iter_mut().enumerate() {
        *place = begin(lane, blocks, &mut lanes)?;
        under_way += 1;
    }
    while under_way > 0 {
        let (lane, step, result) = told.recv()?;
        under_way -= 1;
        let bytes = contents(blocks, &lanes[lane]);
        blocks.done(step, result, &bytes)?;
        if blocks.run.goes_on() {
            steps[lane] = begin(lane, blocks, &mut lanes)?;
            under_way += 1;
        }
    }
    Ok(())
}

/// Wakes a thread: the smallest executor there is.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Futures, one after the other.
fn futures(session: &Session, blocks: &mut Blocks<'_>) -> Result<(), Failure> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut buffer = session.alloc(blocks.run.block_size)?;
    let mut lane = 0;
    while blocks.run.goes_on() {
        lane = (lane + 1) % DEPTH as u64;
        let step = blocks.step(lane);
        let mut future = pin!(session.start(request(blocks, step, &mut buffer)));
        let result = loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(result) => break result,
                Poll::Pending => std::thread::park(),
            }
        };
        let bytes = contents(blocks, &buffer);
        blocks.done(step, result, &bytes)?;
    }
    Ok(())
}

/// A queue driven by this thread.
fn by_hand(session: &Session, blocks: &mut Blocks<'_>) -> Result<(), Failure> {
    let queue = session.queue(0).ok_or_else(|| std::io::Error::other("no queue"))?;
    let mut lanes = lanes(session, blocks.run)?;
    let mut steps = [Step::Flush; DEPTH];
    let mut free: Vec<usize> = (0..DEPTH).collect();
    while blocks.run.goes_on() || free.len() < DEPTH {
        while let Some(lane) = free.pop_if(|_| blocks.run.goes_on()) {
            steps[lane] = blocks.step(lane as u64);
            match queue.submit(request(blocks, steps[lane], &mut lanes[lane]), lane as u64) {
                Ok(()) => {}
                Err(SubmitError::WouldBlock) => {
                    free.push(lane);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        queue.kick();
        queue.wait(Some(Duration::from_millis(100)));
        let mut completed = Vec::new();
        queue.reap(|lane, result| completed.push((lane as usize, result)));
        for (lane, result) in completed {
            let bytes = contents(blocks, &lanes[lane]);
            blocks.done(steps[lane], result, &bytes)?;
            free.push(lane);
        }
    }
    Ok(())
}

fn lanes(session: &Session, run: &Run) -> Result<Vec<Buffer>, Errno> {
    (0..DEPTH).map(|_| session.alloc(run.block_size)).collect()
}

fn run(volume: &str, duration: Duration) -> Result<String, Failure> {
    let servers = Arc::new(AtomicU64::new(0));
    let seen = servers.clone();
    let options = Options::new().queues(2).on_event(move |event| {
        if matches!(event, Event::ServerChanged { .. }) {
            seen.fetch_add(1, Relaxed);
        }
    });
    let session = Session::open(volume, options)?;
    let manual = Session::open(volume, Options::new().completion(CompletionMode::Manual))?;
    let info = session.info();
    let blocks = (info.size / u64::from(info.block_size) / 4).min(BLOCKS_MAX);
    let run = Run {
        block_size: info.block_size as usize,
        blocks: blocks - blocks % DEPTH as u64,
        until: Instant::now() + duration,
        requests: AtomicU64::new(0),
        has_failed: AtomicBool::new(false),
    };
    if run.blocks == 0 {
        return Err(std::io::Error::other("the volume is too small").into());
    }
    session.write_zeroes(0, 4 * run.blocks * u64::from(info.block_size), OpFlags::NONE)?;

    type Worker = fn(&Session, &mut Blocks<'_>) -> Result<(), Failure>;
    let workers: [(&Session, Worker); 4] =
        [(&session, blocking), (&session, callbacks), (&session, futures), (&manual, by_hand)];
    let results: Vec<Result<(), Failure>> = std::thread::scope(|scope| {
        let workers = workers.iter().zip(0..).map(|((session, worker), number)| {
            let run = &run;
            scope.spawn(move || {
                let mut blocks = Blocks::new(run, number);
                let result =
                    worker(session, &mut blocks).and_then(|()| last_look(session, &mut blocks));
                run.has_failed.fetch_or(result.is_err(), Relaxed);
                result
            })
        });
        let workers: Vec<_> = workers.collect();
        let died = || Failure::from(std::io::Error::other("a worker panicked"));
        workers.into_iter().map(|worker| worker.join().map_err(|_| died())?).collect()
    });
    results.into_iter().collect::<Result<(), Failure>>()?;
    let blackout_ms = session.stats().blackout_worst_us as f64 / 1000.0;
    session.close()?;
    manual.close()?;
    let (requests, servers) = (run.requests.load(Relaxed), servers.load(Relaxed));
    Ok(format!("{requests} requests, {servers} server changes, worst blackout {blackout_ms:.1} ms"))
}

/// Every block once more.
fn last_look(session: &Session, blocks: &mut Blocks<'_>) -> Result<(), Failure> {
    let mut bytes = vec![0; blocks.run.block_size];
    for index in 0..blocks.run.blocks {
        let result = session.read_at(&mut bytes, blocks.offset(index));
        blocks.done(Step::Read { index }, result, &bytes)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match arguments.as_slice() {
        [volume, seconds] => seconds.parse().ok().map(|seconds| (volume, seconds)),
        _ => None,
    };
    let Some((volume, seconds)) = parsed else {
        eprintln!("usage: verified_io VOLUME SECONDS");
        return ExitCode::from(2);
    };
    match run(volume, Duration::from_secs(seconds)) {
        Ok(summary) => {
            println!("verified_io: {summary}: every byte as it was written");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("verified_io: {failure}");
            ExitCode::from(if matches!(failure, Failure::Setup(_)) { 2 } else { 1 })
        }
    }
}
