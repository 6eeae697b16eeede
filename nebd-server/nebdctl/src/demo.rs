//! `nebdctl demo`: a disk outlives its server.
//!
//! ```text
//!   temporary directory: keeper ── server, standby
//!                                    ▲ SIGKILL, again and again, with writes in flight
//!   volume file:disk    ext4 image: chunks inverted, restored, compared ┐ part client,
//!   volume file:stamps  stamped blocks: each read is judged             ┘ a thread each
//!   then: every block read once more, the image compared, e2fsck -fn
//! ```
//!
//! With `--upgrade` the server is not only killed, see [`upgrades`].

mod candidate;
mod disk;
mod event;
mod image;
mod load;
pub mod process;
mod stage;
mod upgrades;

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nebd_upgrade_tests::client_device::{AttachOptions, ClientDevice};
use nebd_upgrade_tests::timeline::Timeline;
use serde::Serialize;

use crate::bench::failed;
use crate::cli::DemoArgs;
use crate::failure::Failure;
use crate::table::Table;
use crate::units::Count;
use crate::view;
use disk::Disk;
use event::{Event, Events, Kind};
use image::{Check, Image};
use load::{Load, Loaded};
use process::is_interrupted;
use stage::Stage;

/// Size of the volume of stamped blocks.
const STAMPS_BYTES: u64 = 32 << 20;
/// Requests that a volume takes at a time.
const DEPTH: u32 = 32;
/// A Unix socket's path is at most this long, less the names that the demo appends.
const SOCKET_DIRECTORY_MAX: usize = 80;

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
    /// Between two completions on a volume, while nothing happened to the server.
    gap_quiet_ms_max: f64,
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
    let mut events = Events::new(stage, &load, &timeline);
    let happened = match args.upgrade {
        true => upgrades::run(&mut events, args.seconds),
        false => kill_all(&mut events, args),
    };
    let (events, gap_quiet_ms_max) = events.into_list();
    let seconds = begun.elapsed().as_secs_f64();
    let requests_timed: u64 = load.completions().iter().sum();
    say(format_args!("reading everything once more"));
    let loaded = load.finish()?;
    if is_interrupted() {
        return Err(Failure::Interrupted);
    }
    happened?;
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
        gap_quiet_ms_max,
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
fn kill_all(events: &mut Events<'_>, args: &DemoArgs) -> Result<(), Failure> {
    let begun = Instant::now();
    let interval = Duration::from_secs(args.seconds) / (args.kills + 1);
    for number in 1..=args.kills {
        events.rest_until(begun + interval * number)?;
        events.sigkill()?;
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
    let mut events = Table::new(&["KIND", "SERVER", ">WRITES IN FLIGHT", ">BLACKOUT", ""]);
    for event in &report.events {
        let server = match event.successor_pid == event.pid {
            true => format!("pid {} serves on", event.pid),
            false => format!("pid {}, then {}", event.pid, event.successor_pid),
        };
        events.row(vec![
            event.kind.name().into(),
            server,
            event.writes_in_flight.to_string(),
            format!("{:.1} ms", event.blackout_ms),
            event.detail.clone(),
        ]);
    }
    let mut text = format!("{events}\n");
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<12}{value}");
    };
    let filesystem = match report.filesystem {
        Check::Clean => "clean (e2fsck -fn)",
        Check::Damaged => "DAMAGED (e2fsck -fn)",
        Check::Skipped => "compared byte by byte; no ext file system, or no e2fsck",
    };
    line("image", report.image.clone());
    let kills = report.events.iter().filter(|event| event.kind == Kind::Sigkill).count();
    line("kills", kills.to_string());
    line("requests", Count(report.requests).to_string());
    line("errors", report.errors.to_string());
    line("mismatches", report.mismatches.to_string());
    line("throughput", format!("{} IOPS over {} s", Count(report.iops as u64), report.seconds));
    line("quiet gap", format!("{} ms at most, without an event", report.gap_quiet_ms_max));
    line("file system", filesystem.into());
    text
}
