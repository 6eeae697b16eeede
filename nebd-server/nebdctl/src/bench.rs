//! `nebdctl bench`: a volume under load, through the part client's queues.
//!
//! ```text
//!   session 0 ── queue 0 ── lane ┐
//!             └─ queue 1 ── lane ├── threads: one a lane, as long as there are not too many
//!   session 1 ── queue 0 ── lane ┘
//! ```

mod cpu;
mod histogram;
mod lane;
mod verify;

use std::fmt::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nebd_client::{CompletionMode, OpenError, Options, Session};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::connection::{Connection, operation_id};
use crate::failure::Failure;
use crate::status;
use crate::units::{Count, Micros, Size};
use crate::view;
use cpu::ServerClock;
use lane::{GapMeter, Lane, Phase, Tally, Work};
use verify::Checker;

/// More threads than this, and lanes share them.
const THREADS_MAX: usize = 16;
/// How long an unanswered request is waited for once the time is over.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// Latencies in microseconds.
#[derive(Debug, Serialize)]
struct LatencyUs {
    p50: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

/// Processor seconds; the server's is unknown if its process is not visible from here.
#[derive(Debug, Serialize)]
struct CpuS {
    client: f64,
    server: Option<f64>,
}

/// The result.
#[derive(Debug, Serialize)]
struct Report {
    volume: String,
    op: &'static str,
    block_size: u64,
    iodepth: u32,
    queues: u32,
    sessions: u32,
    seconds: f64,
    requests: u64,
    iops: f64,
    mib_per_s: f64,
    latency_us: LatencyUs,
    blackout_ms_max: f64,
    /// Over the sessions, each with its longest.
    blackout_ms_p99: f64,
    /// The same, of half of the sessions.
    blackout_ms_p50: f64,
    errors: u64,
    mismatches: u64,
    cpu_s: CpuS,
}

/// Runs the benchmark, and returns what to print.
pub fn run(socket: &Path, connection: Connection, args: &BenchArgs) -> Result<String, Failure> {
    let server_pid = status::ask(&connection)?.pid;
    let sessions = open(socket, args)?;
    let start = Instant::now();
    let meters: Vec<Arc<GapMeter>> =
        sessions.iter().map(|_| Arc::new(GapMeter::new(start))).collect();
    let lanes = lanes(&sessions, &meters, args)?;
    let server_clock =
        ServerClock::start(connection, server_pid).context("cannot start a thread")?;
    let cpu_before = cpu::own_s();
    let begun = Instant::now();
    let tally = drive(lanes, args)?;
    let client = cpu::own_s() - cpu_before;
    let cpu_s = CpuS { client, server: server_clock.stop() };
    let elapsed_s = (begun.elapsed().as_secs_f64()).min(args.seconds as f64);
    let mut blackouts_ns: Vec<u64> = meters.iter().map(|meter| meter.max_ns()).collect();
    blackouts_ns.sort_unstable();
    for session in sessions {
        // A server that is gone by now is no fault of what was measured.
        if let Err(error) = session.close() {
            eprintln!("nebdctl: {error}");
        }
    }
    finish(args, &report(args, &tally, elapsed_s, &blackouts_ns, cpu_s), tally)
}

/// Attaches the volumes, all at once.
fn open(socket: &Path, args: &BenchArgs) -> Result<Vec<Session>, Failure> {
    let unit = args.block_size.0;
    if unit == 0 || !unit.is_multiple_of(512) || unit > 1 << 26 {
        return Err(Failure::Usage(format!(
            "--block-size {unit} is not possible: a multiple of 512 up to 64 MiB"
        )));
    }
    let buffers = u64::from(args.queues) * u64::from(args.iodepth);
    let options = Options::new()
        .socket(socket)
        .queues(args.queues)
        .depth(args.iodepth.next_power_of_two())
        .arena_bytes(buffers * unit.next_multiple_of(4096) + (1 << 20))
        .completion(CompletionMode::Manual)
        .read_only(!args.op.writes());
    let names = (0..args.sessions).map(|n| args.volume.replace("{}", &n.to_string()));
    let opened: Vec<Result<Session, OpenError>> = std::thread::scope(|scope| {
        let spawn = |name: String| {
            let options = options.clone();
            scope.spawn(move || Session::open(&name, options))
        };
        let threads: Vec<_> = names.map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Err(OpenError::Forked))).collect()
    });
    opened.into_iter().map(|result| result.map_err(|error| failed(socket, error))).collect()
}

/// An attach that failed, as an exit code and a message.
pub fn failed(socket: &Path, error: OpenError) -> Failure {
    match error {
        OpenError::Connect { source, .. } => Failure::Unreachable {
            socket: socket.into(),
            source,
            advice: "is it running? Name its socket with --socket or NEBD_SOCKET",
        },
        OpenError::Name(error) => Failure::Usage(error.to_string()),
        error => Failure::Other(anyhow::Error::new(error).context("cannot attach the volume")),
    }
}

fn lanes(
    sessions: &[Session],
    meters: &[Arc<GapMeter>],
    args: &BenchArgs,
) -> Result<Vec<Lane>, Failure> {
    let run = operation_id().context("cannot draw a number for this run")?;
    let run = run.iter().take(4).fold(0, |run, byte| run << 8 | u32::from(*byte));
    let unit_bytes = args.block_size.0;
    let mut lanes = Vec::new();
    for (session, meter) in sessions.iter().zip(meters) {
        let info = session.info();
        let name = session.volume().as_str();
        if !unit_bytes.is_multiple_of(u64::from(info.block_size)) {
            return Err(Failure::Usage(format!(
                "volume {name}: --block-size {unit_bytes} is not a multiple of its block size {}",
                info.block_size
            )));
        }
        let units = info.size / unit_bytes;
        let shares = u64::from(args.queues);
        if units < shares * u64::from(args.iodepth) {
            return Err(Failure::Usage(format!(
                "volume {name}: its {} are too small for {} requests of {} in flight",
                Size(info.size),
                shares * u64::from(args.iodepth),
                args.block_size
            )));
        }
        for index in 0..args.queues {
            let queue = session.queue(index).context("the session has fewer queues than asked")?;
            let buffers = (0..args.iodepth)
                .map(|_| session.alloc(unit_bytes as usize))
                .collect::<Result<Vec<_>, _>>()
                .context("the session's arena is too small")?;
            // Each lane has a part of its own, so that no two writes of one block overlap.
            let unit_count = units / shares;
            let work = Work {
                writes: args.op.writes(),
                random: args.op.random(),
                unit_bytes,
                unit_first: u64::from(index) * unit_count,
                unit_count,
            };
            let checker = args.verify.then(|| Checker::new(name, run, unit_bytes));
            let seed = u64::from(run) << 32 | lanes.len() as u64;
            lanes.push(Lane::new(queue, buffers, work, checker, meter.clone(), seed));
        }
    }
    Ok(lanes)
}

/// Runs every lane to its end.
fn drive(lanes: Vec<Lane>, args: &BenchArgs) -> Result<Tally, Failure> {
    let per_thread = lanes.len().div_ceil(THREADS_MAX);
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut threads = Vec::new();
    let mut lanes = lanes.into_iter().peekable();
    while lanes.peek().is_some() {
        let mut share: Vec<Lane> = lanes.by_ref().take(per_thread).collect();
        let polls = args.poll;
        let thread = std::thread::Builder::new()
            .name(format!("bench-{}", threads.len()))
            .spawn(move || {
                drive_share(&mut share, end, polls);
                share
            })
            .context("cannot start a thread")?;
        threads.push(thread);
    }
    let mut tally = Tally::default();
    for thread in threads {
        let lanes =
            thread.join().map_err(|_| anyhow::anyhow!("a thread of the benchmark panicked"))?;
        lanes.into_iter().for_each(|lane| tally.add(lane.tally));
    }
    Ok(tally)
}

fn drive_share(lanes: &mut [Lane], end: Instant, polls: bool) {
    let is_idle = |lanes: &[Lane]| lanes.iter().all(Lane::is_idle);
    step(lanes, polls, |_| (Phase::Run, Instant::now() >= end));
    let limit = Instant::now() + DRAIN_LIMIT;
    step(lanes, polls, |lanes| (Phase::Drain, is_idle(lanes) || Instant::now() >= limit));
    if !is_idle(lanes) {
        lanes.iter_mut().filter(|lane| !lane.is_idle()).for_each(Lane::give_up);
        return;
    }
    lanes.iter_mut().for_each(Lane::begin_sweep);
    step(lanes, polls, |lanes| (Phase::Sweep, lanes.iter().all(Lane::has_swept)));
}

/// Pumps all lanes until `phase` says that it is over; waits while nothing moves.
fn step(lanes: &mut [Lane], polls: bool, phase: impl Fn(&[Lane]) -> (Phase, bool)) {
    let mut idle_since: Option<Instant> = None;
    loop {
        let (phase, is_over) = phase(lanes);
        if is_over {
            return;
        }
        let moved = lanes.iter_mut().fold(false, |moved, lane| lane.pump(phase) | moved);
        if moved {
            idle_since = None;
            continue;
        }
        if polls
            && idle_since.get_or_insert_with(Instant::now).elapsed() < Duration::from_millis(10)
        {
            std::hint::spin_loop();
            continue;
        }
        idle_since = None;
        wait(lanes);
    }
}

/// Sleeps until some lane has something to reap, at most a little while.
fn wait(lanes: &[Lane]) {
    const WAIT_MAX: Duration = Duration::from_millis(50);
    if let [lane] = lanes {
        lane.queue().wait(Some(WAIT_MAX));
        return;
    }
    let mut ready = false;
    for lane in lanes.iter().filter(|lane| !lane.is_idle()) {
        ready |= lane.queue().arm();
    }
    if ready {
        return;
    }
    let events: Vec<_> = lanes.iter().map(|lane| lane.queue().event_fd()).collect();
    let mut events: Vec<PollFd<'_>> =
        events.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)).collect();
    let timeout = Timespec { tv_sec: 0, tv_nsec: WAIT_MAX.as_nanos() as i64 };
    // An interrupted wait is a short one.
    let _ = poll(&mut events, Some(&timeout));
}

fn report(
    args: &BenchArgs,
    tally: &Tally,
    seconds: f64,
    blackouts_ns: &[u64],
    cpu_s: CpuS,
) -> Report {
    let us = |ns: u64| (ns as f64 / 10.0).round() / 100.0;
    let round = |value: f64| (value * 100.0).round() / 100.0;
    let blackout_ms = |quantile: f64| {
        let rank = (blackouts_ns.len() as f64 * quantile).ceil() as usize;
        round(blackouts_ns.get(rank.max(1) - 1).map_or(0.0, |ns| *ns as f64 / 1e6))
    };
    let latency = &tally.latency;
    let bytes = tally.requests * args.block_size.0;
    Report {
        volume: args.volume.clone(),
        op: args.op.name(),
        block_size: args.block_size.0,
        iodepth: args.iodepth,
        queues: args.queues,
        sessions: args.sessions,
        seconds: round(seconds),
        requests: tally.requests,
        iops: round(tally.requests as f64 / seconds),
        mib_per_s: round(bytes as f64 / f64::from(1 << 20) / seconds),
        latency_us: LatencyUs {
            p50: us(latency.quantile(0.5)),
            p99: us(latency.quantile(0.99)),
            p99_9: us(latency.quantile(0.999)),
            max: us(latency.max()),
        },
        blackout_ms_max: blackout_ms(1.0),
        blackout_ms_p99: blackout_ms(0.99),
        blackout_ms_p50: blackout_ms(0.50),
        errors: tally.errors,
        mismatches: tally.mismatches,
        cpu_s: CpuS { client: round(cpu_s.client), server: cpu_s.server.map(round) },
    }
}

fn finish(args: &BenchArgs, report: &Report, tally: Tally) -> Result<String, Failure> {
    let text = match args.output.json {
        true => view::line(report)?,
        false => text(report),
    };
    if tally.errors == 0 && tally.mismatches == 0 {
        return Ok(text);
    }
    let message = format!(
        "volume {}: {} errors, {} mismatches; the first: {}",
        args.volume,
        tally.errors,
        tally.mismatches,
        tally.first_problem.as_deref().unwrap_or("unknown")
    );
    Err(Failure::Wrong { report: text, message })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<12}{value}");
    };
    let us = |value: f64| Micros(value.round() as u64).to_string();
    let LatencyUs { p50, p99, p99_9, max } = report.latency_us;
    line(
        "load",
        format!(
            "{} of {} on {}, {} session(s) × {} queue(s) × {} in flight, {} s",
            report.op,
            Size(report.block_size),
            report.volume,
            report.sessions,
            report.queues,
            report.iodepth,
            report.seconds
        ),
    );
    line("requests", Count(report.requests).to_string());
    line("throughput", format!("{} IOPS, {} MiB/s", Count(report.iops as u64), report.mib_per_s));
    line(
        "latency",
        format!("p50 {}, p99 {}, p99.9 {}, max {}", us(p50), us(p99), us(p99_9), us(max)),
    );
    line("blackout", format!("{} ms at most", report.blackout_ms_max));
    let server = report.cpu_s.server.map_or("unknown".into(), |s| format!("{s} s"));
    line("processor", format!("client {} s, server {server}", report.cpu_s.client));
    line("errors", report.errors.to_string());
    line("mismatches", report.mismatches.to_string());
    text
}
