//! Measures the `file` engine alone: 4 KiB random reads or writes through a lane that sleeps in
//! `epoll_wait`, as a shard does. Prints one line of JSON.
//!
//! ```text
//! file_engine DIR [read|write] [DEPTH] [SECONDS] [auto|threads] [deferred|cooperative|interrupting] [spin]
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::{Generation, Op, OpFlags};
use nebd_backend::{
    Backend, FileBackend, FileConfig, FileEngineChoice, Lane, LaneConfig, NoStore, OpenContext,
    Request, Segment, Segments, TaskRun, Volume, VolumeSpec,
};
use rustix::event::epoll;

const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 4096;

struct Options {
    dir: String,
    op: Op,
    depth: usize,
    time: Duration,
    engine: FileEngineChoice,
    task_run: TaskRun,
    spins: bool,
}

fn options() -> Options {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().expect("a directory");
    let rest: Vec<_> = arguments.collect();
    let has = |word: &str| rest.iter().any(|argument| argument == word);
    let mut numbers = rest.iter().filter_map(|argument| argument.parse::<u64>().ok());
    Options {
        dir,
        op: if has("write") { Op::Write } else { Op::Read },
        depth: numbers.next().unwrap_or(1) as usize,
        time: Duration::from_secs(numbers.next().unwrap_or(3)),
        engine: if has("threads") { FileEngineChoice::Threads } else { FileEngineChoice::Auto },
        task_run: match (has("cooperative"), has("interrupting")) {
            (true, _) => TaskRun::Cooperative,
            (_, true) => TaskRun::Interrupting,
            _ => TaskRun::Deferred,
        },
        spins: has("spin"),
    }
}

/// A 1 GiB image, allocated and written, so that reads meet data.
fn prepare(backend: &FileBackend, dir: &str) -> VolumeSpec {
    use std::io::Write;
    let spec = VolumeSpec {
        name: "file:bench".parse().expect("a valid name"),
        size: SIZE,
        block_size: BLOCK as u32,
        path: None,
    };
    if backend.create(&spec).is_ok() {
        let path = std::path::Path::new(dir).join("bench.img");
        let mut image = std::fs::OpenOptions::new().write(true).open(path).expect("the image");
        let chunk: Vec<u8> = (0..1u32 << 20).map(|index| (index / 7) as u8).collect();
        (0..SIZE >> 20).for_each(|_| image.write_all(&chunk).expect("room for 1 GiB"));
        image.sync_all().expect("a disk");
    }
    spec
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

struct Bench<'a> {
    lane: Lane,
    volume: &'a dyn Volume,
    op: Op,
    buffers: Vec<Segment>,
    started: Vec<Instant>,
    random: u64,
}

impl Bench<'_> {
    fn submit(&mut self, slot: usize) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let offset = self.random % (SIZE / BLOCK) * BLOCK;
        let mailbox = self.lane.mailbox().clone();
        let mut request = Request::new(self.op, OpFlags::NONE, offset, BLOCK, mailbox, slot as u64);
        request.segments = Segments::One(self.buffers[slot]);
        self.started[slot] = Instant::now();
        self.volume.submit(&mut self.lane, request);
    }
}

fn main() {
    let options = options();
    let config =
        FileConfig { engine: options.engine, pool_threads: 32, ..FileConfig::new(&options.dir) };
    let backend = FileBackend::new(config).expect("an engine");
    let spec = prepare(&backend, &options.dir);
    let context = OpenContext {
        previous_major: None,
        host_major: 1,
        generation: Generation(1),
        store: Arc::new(NoStore::default()),
    };
    let volume = backend.open(&spec, &context).expect("the volume").volume;
    let lane = Lane::new(&LaneConfig { task_run: options.task_run, ..LaneConfig::default() })
        .expect("a lane");
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
    for fd in lane.wait_fds() {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags).expect("epoll");
    }
    let bytes = (options.depth + 1) * BLOCK as usize;
    let memory = Box::leak(vec![0x5A_u8; bytes].into_boxed_slice());
    let start = memory.as_ptr().align_offset(BLOCK as usize);
    let buffers = memory[start..][..options.depth * BLOCK as usize]
        .chunks_exact_mut(BLOCK as usize)
        .map(|chunk| Segment { pointer: chunk.as_mut_ptr(), length: chunk.len() })
        .collect();
    let begin = Instant::now();
    let mut bench = Bench {
        lane,
        volume: &*volume,
        op: options.op,
        buffers,
        started: vec![begin; options.depth],
        random: 0x9E37_79B9_7F4A_7C15,
    };
    let cpu = cpu_seconds();
    (0..options.depth).for_each(|slot| bench.submit(slot));
    bench.lane.flush();
    let (mut done, mut latencies_ns, mut sleeps, mut in_flight) =
        (Vec::new(), Vec::new(), 0u64, options.depth);
    while in_flight > 0 {
        bench.lane.drain(&mut done);
        if done.is_empty() {
            if !options.spins && bench.lane.sleep() {
                sleeps += 1;
                let event = epoll::Event {
                    flags: epoll::EventFlags::empty(),
                    data: epoll::EventData::new_u64(0),
                };
                let _ = epoll::wait(&epoll, &mut [event; 4][..], None);
            }
            bench.lane.wake();
            continue;
        }
        let is_over = begin.elapsed() > options.time;
        for done in done.drain(..) {
            done.result.expect("success");
            let slot = done.tag as usize;
            latencies_ns.push(bench.started[slot].elapsed().as_nanos() as u64);
            if is_over {
                in_flight -= 1;
            } else {
                bench.submit(slot);
            }
        }
        bench.lane.flush();
    }
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    latencies_ns.sort_unstable();
    let count = latencies_ns.len();
    let quantile = |q: f64| latencies_ns[((count - 1) as f64 * q) as usize] as f64 / 1000.0;
    println!(
        "{{\"engine\":\"{}\",\"task_run\":\"{:?}\",\"op\":\"{:?}\",\"depth\":{},\"iops\":{:.0},\
         \"latency_us\":{{\"p50\":{:.1},\"p99\":{:.1}}},\"cpu_us_per_io\":{:.2},\"sleeps\":{sleeps}}}",
        backend.engine(),
        bench.lane.uring(),
        options.op,
        options.depth,
        count as f64 / seconds,
        quantile(0.5),
        quantile(0.99),
        cpu * 1e6 / count as f64,
    );
}
