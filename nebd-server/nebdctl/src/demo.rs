//! `nebdctl demo`: a disk outlives its server.
//!
//! ```text
//!   temporary directory: keeper ── server, standby
//!                                    ▲ SIGKILL, again and again, with writes in flight
//!   volume file:disk    ext4 image: chunks inverted, restored, compared ┐ part client,
//!   volume file:stamps  stamped blocks: each read is judged             ┘ a thread each
//!   then: every block read once more, the image compared, e2fsck -fn
//! ```

mod disk;
mod image;
mod load;
pub mod process;
mod stage;

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use nebd_upgrade_tests::client_device::{AttachOptions, ClientDevice};
use nebd_upgrade_tests::timeline::Timeline;
use serde::Serialize;

use crate::bench::failed;
use crate::cli::DemoArgs;
use crate::failure::Failure;
use crate::table::Table;
use crate::units::{Count, Micros};
use crate::view;
use disk::Disk;
use image::{Check, Image};
use load::{Load, Loaded};
use process::is_interrupted;
use stage::Stage;

/// A kill that meets fewer writes in flight is made again.
const WRITES_MIN: u64 = 8;
/// Size of the volume of stamped blocks.
const STAMPS_BYTES: u64 = 32 << 20;
/// Requests that a volume takes at a time.
const DEPTH: u32 = 32;
/// How long to wait for enough writes in flight, and for completions after a kill.
const LOAD_LIMIT: Duration = Duration::from_secs(20);
/// A Unix socket's path is at most this long, less the names that the demo appends.
const SOCKET_DIRECTORY_MAX: usize = 80;

/// One kill.
#[derive(Clone, Debug, Serialize)]
struct Event {
    kind: &'static str,
    blackout_ms: f64,
    pid: u32,
    writes_in_flight: u32,
}

/// The result.
#[derive(Debug, Serialize)]
struct Report {
    requests: u64,
    errors: u64,
    mismatches: u64,
    iops: f64,
    seconds: f64,
    standby: bool,
    image: String,
    filesystem: Check,
    events: Vec<Event>,
}

/// Runs the demonstration, and returns what to print.
pub fn run(args: &DemoArgs) -> Result<String, Failure> {
    process::watch_interrupts().context("cannot catch Ctrl-C")?;
    let server = stage::find_server(args.server.as_deref())?;
    let directory = directory()?;
    say(format_args!("making a file system image"));
    let image = match &args.image {
        Some(source) => Image::copied(source, directory.path())?,
        None => Image::made(directory.path())?,
    };
    let standby = !args.no_standby;
    let with = if standby { " with a warm standby" } else { "" };
    say(format_args!("starting {}{with}", server.display()));
    let stage = Stage::start(&server, directory, standby)?;
    let (report, problems) = perform(&stage, args, image)?;
    // Processes and files are gone before the result is told.
    drop(stage);
    finish(args, &report, problems)
}

/// A directory of the demo's own, short enough for a socket.
fn directory() -> anyhow::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("nebd-demo-");
    let directory = match std::env::temp_dir() {
        long if long.as_os_str().as_bytes().len() > SOCKET_DIRECTORY_MAX => {
            builder.tempdir_in("/tmp")
        }
        short => builder.tempdir_in(short),
    };
    directory.context("cannot make a temporary directory")
}

fn perform(stage: &Stage, args: &DemoArgs, image: Image) -> Result<(Report, Vec<String>), Failure> {
    let socket = stage.socket();
    let bytes = std::fs::metadata(&image.path).context("cannot see the image")?.len();
    stage.create("file:disk", bytes.next_multiple_of(4096))?;
    stage.create("file:stamps", STAMPS_BYTES)?;
    let how = AttachOptions { depth: DEPTH, ..AttachOptions::default() };
    let open =
        |volume| ClientDevice::open(&socket, volume, &how).map_err(|error| failed(&socket, error));
    let timeline = Arc::new(Timeline::default());
    let original = File::open(&image.path).context("cannot open the image")?;
    let mut disk = Disk::new(open("file:disk")?, original, timeline.clone());
    say(format_args!("writing {} to file:disk", image.description));
    load::import(&mut disk)?;
    let exported = stage.directory().join("exported");
    let export = File::create_new(&exported).context("cannot make the exported image")?;
    let begun = Instant::now();
    let load = Load::start(disk, open("file:stamps")?, export, timeline.clone())?;
    let killed = kill_all(stage, args, &load, &timeline);
    let seconds = begun.elapsed().as_secs_f64();
    let requests_timed: u64 = load.completions().iter().sum();
    say(format_args!("reading everything once more"));
    let loaded = load.finish()?;
    if is_interrupted() {
        return Err(Failure::Interrupted);
    }
    let events = killed?;
    let filesystem = image::check(&exported)?;
    let (mut errors, mismatches, mut problems) = judge(&loaded);
    if filesystem == Check::Damaged {
        errors += 1;
        problems.push("e2fsck found the file system damaged".into());
    }
    let report = Report {
        requests: loaded.disk.requests + loaded.stream.requests,
        errors,
        mismatches,
        iops: round(requests_timed as f64 / seconds),
        seconds: round(seconds),
        standby: !args.no_standby,
        image: image.description,
        filesystem,
        events,
    };
    Ok((report, problems))
}

fn judge(loaded: &Loaded) -> (u64, u64, Vec<String>) {
    let Loaded { disk, stream } = loaded;
    let errors = disk.errors + stream.errors + stream.failures;
    let mut problems: Vec<String> =
        disk.first_problem.iter().map(|problem| format!("file:disk: {problem}")).collect();
    problems.extend(stream.problems.iter().map(|problem| format!("file:stamps: {problem}")));
    (errors, disk.mismatches + stream.mismatches, problems)
}

/// Kills the server as often as asked, evenly over the time.
fn kill_all(
    stage: &Stage,
    args: &DemoArgs,
    load: &Load,
    timeline: &Timeline,
) -> Result<Vec<Event>, Failure> {
    let begun = Instant::now();
    let interval = Duration::from_secs(args.seconds) / (args.kills + 1);
    let mut events = Vec::new();
    for number in 1..=args.kills {
        let due = begun + interval * number;
        while Instant::now() < due && !load.is_broken() {
            if is_interrupted() {
                return Err(Failure::Interrupted);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        loop {
            let event = kill_one(stage, load, timeline, number)?;
            let is_enough = u64::from(event.writes_in_flight) >= WRITES_MIN;
            events.push(event);
            if is_enough {
                break;
            }
        }
    }
    Ok(events)
}

/// Kills the server once, and waits until both volumes go on.
fn kill_one(
    stage: &Stage,
    load: &Load,
    timeline: &Timeline,
    number: u32,
) -> Result<Event, Failure> {
    let pid = stage.server_pid().context("the keeper's server.pid is gone")?;
    until(load, "there were never enough writes in flight", |load| {
        load.writes_in_flight() >= 2 * WRITES_MIN
    })?;
    load.take_gap_ns();
    timeline.kill.arm(timeline.now());
    process::kill_by_pidfd(pid).with_context(|| format!("cannot kill the server {pid}"))?;
    timeline.kill.happened();
    timeline.note(format!("kill #{number} (sigkill of {pid})"));
    let successor = stage.wait_for_successor(pid)?;
    timeline.note(format!("server {successor} took over"));
    let before = load.completions();
    until(load, "a volume was not served again", |load| {
        load.completions().iter().zip(before).all(|(now, before)| *now > before + 16)
    })?;
    let gap_ns = load.take_gap_ns();
    let held = timeline.kill.held();
    let event = Event {
        kind: "sigkill",
        blackout_ms: round(gap_ns as f64 / 1e6),
        pid,
        writes_in_flight: held,
    };
    let after = Micros(gap_ns / 1000);
    say(format_args!("kill {number}: server {pid}, {held} writes in flight, blackout {after}"));
    Ok(event)
}

fn until(load: &Load, otherwise: &str, is_so: impl Fn(&Load) -> bool) -> Result<(), Failure> {
    let deadline = Instant::now() + LOAD_LIMIT;
    while !is_so(load) {
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        if load.is_broken() {
            return Err(anyhow!("the load ended early: {otherwise}").into());
        }
        if Instant::now() >= deadline {
            return Err(anyhow!("{otherwise} within {} s", LOAD_LIMIT.as_secs()).into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Progress, for people.
fn say(what: std::fmt::Arguments<'_>) {
    eprintln!("nebdctl: {what}");
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn finish(args: &DemoArgs, report: &Report, problems: Vec<String>) -> Result<String, Failure> {
    let mut text = text(report);
    if args.output.json {
        text.push_str(&view::line(report)?);
    }
    if report.errors == 0 && report.mismatches == 0 {
        return Ok(text);
    }
    let mut message = format!("{} errors and {} mismatches", report.errors, report.mismatches);
    for problem in problems {
        let _ = write!(message, "\n{problem}");
    }
    Err(Failure::Wrong { report: text, message })
}

fn text(report: &Report) -> String {
    let mut kills = Table::new(&[">KILL", ">SERVER", ">WRITES IN FLIGHT", ">BLACKOUT"]);
    for (number, event) in report.events.iter().enumerate() {
        kills.row(vec![
            (number + 1).to_string(),
            format!("pid {}", event.pid),
            event.writes_in_flight.to_string(),
            format!("{:.1} ms", event.blackout_ms),
        ]);
    }
    let mut text = format!("{kills}\n");
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<12}{value}");
    };
    let filesystem = match report.filesystem {
        Check::Clean => "clean (e2fsck -fn)",
        Check::Damaged => "DAMAGED (e2fsck -fn)",
        Check::Skipped => "compared byte by byte; no ext file system, or no e2fsck",
    };
    line("image", report.image.clone());
    line("kills", report.events.len().to_string());
    line("requests", Count(report.requests).to_string());
    line("errors", report.errors.to_string());
    line("mismatches", report.mismatches.to_string());
    line("throughput", format!("{} IOPS over {} s", Count(report.iops as u64), report.seconds));
    line("file system", filesystem.into());
    text
}
