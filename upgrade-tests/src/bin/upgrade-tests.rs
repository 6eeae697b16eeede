//! `upgrade-tests`: proves that a block device survives the death and replacement of its server.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use nebd_upgrade_tests::campaign::{self, CampaignConfig, Kill, Way};
use nebd_upgrade_tests::client_device::{AttachOptions, ClientDevice};
use nebd_upgrade_tests::device::Device;
use nebd_upgrade_tests::drive;
use nebd_upgrade_tests::file_device::FileDevice;
use nebd_upgrade_tests::guests::{self, Fault, GuestConfig, Happened, NebdConfig, WaySummary};
use nebd_upgrade_tests::load::{Load, total};
use nebd_upgrade_tests::matrix::{self, Cell};
use nebd_upgrade_tests::report::VolumeReport;
use nebd_upgrade_tests::stream::{Stream, StreamOptions};
use nebd_upgrade_tests::supervisor::Programs;
use nebd_upgrade_tests::timeline::Timeline;
use nebd_upgrade_tests::vhost_device::{self, Disk, VhostDevice};
use nebd_upgrade_tests::workload::Mix;

/// Kills servers under load and checks every byte. Exit code 0: nothing was wrong; 1: something
/// was; 2: the test itself could not be carried out.
#[derive(Parser)]
#[command(name = "upgrade-tests", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a nebd-server of our own, and kill it again and again under verified load.
    Soak(Soak),
    /// Meet every step of a planned takeover with every fault, on the old server, the new one and the
    /// keeper, under verified load.
    Matrix(MatrixArgs),
    /// Boot guests whose disks are volumes, and kill and replace the server under them.
    Guests(Guests),
    /// Measure a server of vhost-user-blk; nothing is checked, and writes overwrite the disk.
    Drive(Drive),
    /// Put a device that is there already under verified load; its contents are overwritten.
    Run(Run),
}

#[derive(Args)]
struct Soak {
    /// Kills that must have met enough writes in flight.
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// file, mem or fence-test.
    #[arg(long, default_value = "file")]
    backend: String,
    /// Volumes, each attached once.
    #[arg(long, default_value_t = 1)]
    sessions: usize,
    /// How the server dies, taken in turn: sigkill, sigsegv, sigabrt, sigstop, stop-cont, planned,
    /// POINT:ACTION.
    #[arg(long, value_delimiter = ',', default_value = "sigkill")]
    kind: Vec<Kill>,
    /// How volumes are attached.
    #[arg(long, value_enum, default_value_t)]
    way: WayName,
    #[command(flatten)]
    rings: Rings,
    /// By vhost-user: control messages are sent all the time.
    #[arg(long)]
    churn: bool,
    /// Requests in flight on each volume.
    #[arg(long, default_value_t = 32)]
    depth: u32,
    /// Size of each volume in MiB.
    #[arg(long, default_value_t = 16)]
    size_mib: u64,
    /// 4096 or 512.
    #[arg(long, default_value_t = 4096)]
    block_size: u32,
    /// Writes in flight without which a kill does not count.
    #[arg(long, default_value_t = 8)]
    writes: u64,
    /// Keep a warm standby.
    #[arg(long)]
    standby: bool,
    /// Longest load between two kills, in milliseconds.
    #[arg(long, default_value_t = 30)]
    pause_ms: u64,
    /// Threads of the harness.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Seed of the workload and of the pauses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// An argument for the fence-store, such as --store-arg=--no-fence; may be repeated.
    #[arg(long)]
    store_arg: Vec<String>,
    /// NAME=VALUE for the server's environment; may be repeated.
    #[arg(long, value_parser = variable)]
    env: Vec<(String, String)>,
    /// nebd-server, of a build with the feature test-hooks [default: beside this program]
    #[arg(long)]
    nebd_server: Option<PathBuf>,
    /// fence-store [default: beside this program]
    #[arg(long)]
    fence_store: Option<PathBuf>,
    /// Compare what keeper, servers and client hold after the first N kills and after the last N:
    /// descriptors, threads, children, memory. More is a failure.
    #[arg(long, value_name = "N", default_value_t = 0)]
    growth: usize,
    /// Print the result as JSON, on the last line.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct MatrixArgs {
    /// file, mem or fence-test.
    #[arg(long, default_value = "file")]
    backend: String,
    /// Volumes, each attached once.
    #[arg(long, default_value_t = 2)]
    sessions: usize,
    /// Requests in flight on each volume.
    #[arg(long, default_value_t = 32)]
    depth: u32,
    /// Seed of the workload and of the pauses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// nebd-server, of a build with the feature test-hooks [default: beside this program]
    #[arg(long)]
    nebd_server: Option<PathBuf>,
    /// fence-store [default: beside this program]
    #[arg(long)]
    fence_store: Option<PathBuf>,
    /// Print the result as JSON, on the last line.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Guests {
    /// How disks come into the guest, one guest after the other: linked, vhost-user, nbd.
    #[arg(long, value_delimiter = ',', default_value = "linked")]
    way: Vec<guests::Way>,
    /// Deaths of the server under each guest.
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Planned takeovers under each guest.
    #[arg(long, default_value_t = 20)]
    takeovers: usize,
    /// Only these faults, each as often as --kills says: nothing, kill, down, crash, stop, takeover,
    /// failed-takeover, stop-in-takeover, reset, reboot, pause,
    /// qemu-kill.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Fault>,
    /// Spoil the disks behind the server's back, and nothing else; fail unless the guest complains.
    #[arg(long)]
    spoil: bool,
    /// Instead, kill other servers beside ours, as often as --kills says and as often for 2 s, and
    /// compare the gaps in the guest.
    #[arg(long)]
    peers: bool,
    /// Seconds that a halted guest stands still.
    #[arg(long, default_value_t = 30)]
    halt_seconds: u64,
    /// file or mem.
    #[arg(long, default_value = "file")]
    backend: String,
    /// Keep a warm standby.
    #[arg(long)]
    standby: bool,
    /// Seed of the order of faults and of the pauses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The directory given to upgrade-tests/guest/install.sh, which has the kernel.
    #[arg(long, value_name = "DIR")]
    tools: PathBuf,
    /// guest-verifier, a static program [default: beside this program]
    #[arg(long)]
    verifier: Option<PathBuf>,
    /// The directory of nebd's librbd.so.1 [default: ../lib/nebd/rbd beside this program]
    #[arg(long, value_name = "DIR")]
    rbd_library: Option<PathBuf>,
    /// nebd-server, of a build with the feature test-hooks [default: beside this program]
    #[arg(long)]
    nebd_server: Option<PathBuf>,
    /// nebdctl [default: on the path]
    #[arg(long)]
    nebdctl: Option<PathBuf>,
    /// Print the result as JSON, on the last line.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Run {
    /// A volume of nebd, BACKEND:NAME, at the socket of --socket; vhost-user:SOCKET for whatever serves
    /// vhost-user-blk there; or the path of a block device or file of any other system.
    device: String,
    /// nebd's client socket.
    #[arg(long, env = "NEBD_SOCKET", default_value = "/run/nebd/nebd.sock")]
    socket: PathBuf,
    /// Requests in flight.
    #[arg(long, default_value_t = 16)]
    depth: u32,
    /// How long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// A shell command that kills or replaces the server, called again and again.
    #[arg(long)]
    kill_command: Option<String>,
    /// Between two such calls, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    kill_every_ms: u64,
    #[command(flatten)]
    rings: Rings,
    /// A request that takes longer is taken for lost, in seconds.
    #[arg(long, default_value_t = 60)]
    stall_seconds: u64,
    /// Seed of the workload.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the result as JSON, on the last line.
    #[arg(long)]
    json: bool,
}

/// How volumes are attached.
#[derive(Clone, Copy, Default, ValueEnum)]
enum WayName {
    /// By the part client.
    #[default]
    Library,
    /// By vhost-user-blk, without a guest.
    VhostUser,
}

/// How a driver of vhost-user-blk goes about it.
#[derive(Args)]
struct Rings {
    /// Queues of vhost-user-blk.
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Descriptors of each ring.
    #[arg(long, default_value_t = 128)]
    ring_size: u16,
    /// Packed rings instead of split ones.
    #[arg(long)]
    packed: bool,
    /// No indirect descriptors.
    #[arg(long)]
    no_indirect: bool,
    /// No event indices.
    #[arg(long)]
    no_event_idx: bool,
    /// Messages are not acknowledged.
    #[arg(long)]
    no_acknowledgements: bool,
    /// The data of a request lies in one region of memory.
    #[arg(long)]
    no_straddling: bool,
}

impl Rings {
    fn options(&self, socket: &Path, depth: u32) -> anyhow::Result<vhost_device::Options> {
        let is_possible = self.packed || self.ring_size.is_power_of_two();
        anyhow::ensure!(is_possible, "the size of a split ring is a power of two");
        anyhow::ensure!(self.queues > 0 && self.ring_size > 0 && depth > 0, "none is too few");
        Ok(vhost_device::Options {
            queues: self.queues,
            depth: depth as usize,
            ring_size: self.ring_size,
            packed: self.packed,
            indirect: !self.no_indirect,
            event_idx: !self.no_event_idx,
            acknowledged: !self.no_acknowledgements,
            straddles: !self.no_straddling,
            ..vhost_device::Options::new(socket)
        })
    }
}

#[derive(Args)]
struct Drive {
    /// Where it listens.
    socket: PathBuf,
    /// randread, randwrite, read or write.
    #[arg(long, default_value = "randread")]
    op: String,
    /// Bytes of a request.
    #[arg(long, default_value_t = 4096)]
    block_size: u64,
    /// Requests in flight.
    #[arg(long, default_value_t = 1)]
    depth: u32,
    /// How long.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Look for answers all the time.
    #[arg(long)]
    poll: bool,
    #[command(flatten)]
    rings: Rings,
}

fn variable(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("not of the form NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

fn main() -> ExitCode {
    let clean = match Cli::parse().command {
        Command::Soak(soak) => run_soak(soak),
        Command::Matrix(args) => run_matrix(args),
        Command::Guests(args) => run_guests(args),
        Command::Run(run) => run_device(&run),
        Command::Drive(args) => run_drive(&args),
    };
    match clean {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("upgrade-tests: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run_soak(soak: Soak) -> anyhow::Result<bool> {
    let programs = Programs::find(soak.nebd_server, soak.fence_store)?;
    let way = match soak.way {
        WayName::Library => Way::Library,
        WayName::VhostUser => Way::VhostUser {
            options: soak.rings.options(Path::new(""), soak.depth)?,
            churns: soak.churn,
        },
    };
    let config = CampaignConfig {
        way,
        sessions: soak.sessions,
        kills: soak.kills,
        kinds: soak.kind,
        depth: soak.depth,
        volume_bytes: soak.size_mib << 20,
        block_bytes: soak.block_size,
        writes_min: soak.writes,
        standby: soak.standby,
        pause_ms_max: soak.pause_ms,
        threads: soak.threads,
        seed: soak.seed,
        store_arguments: soak.store_arg,
        environment: soak.env,
        growth_window: soak.growth,
        ..CampaignConfig::new(programs, &soak.backend)
    };
    let summary = campaign::run(config)?;
    println!("{summary}");
    if soak.json {
        println!("{}", serde_json::to_string(&summary)?);
    }
    Ok(summary.is_clean() && !summary.has_grown())
}

fn run_matrix(args: MatrixArgs) -> anyhow::Result<bool> {
    let programs = Programs::find(args.nebd_server, args.fence_store)?;
    let config = CampaignConfig {
        sessions: args.sessions,
        depth: args.depth,
        seed: args.seed,
        ..CampaignConfig::new(programs, &args.backend)
    };
    let matrix = matrix::run(&config, |cell| {
        let verdict = if cell.wrong.is_some() { "FAIL" } else { "passed" };
        let Cell { point, action, blackout_ms, .. } = cell;
        eprintln!("{point}:{action}: {verdict}, blackout {blackout_ms:.1} ms");
    });
    println!("{matrix}");
    if args.json {
        println!("{}", serde_json::to_string(&matrix)?);
    }
    Ok(matrix.is_clean())
}

fn run_guests(args: Guests) -> anyhow::Result<bool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    guests::watch_signals(&interrupted)?;
    let nebd = NebdConfig {
        server: Programs::find_server(args.nebd_server)?,
        nebdctl: args.nebdctl.unwrap_or_else(|| "nebdctl".into()),
        rbd_library: guests::rbd_library(args.rbd_library.as_deref())?,
        backend: args.backend,
        standby: args.standby,
        seed: args.seed,
    };
    let faults = match &args.only[..] {
        _ if args.spoil => vec![Fault::Spoil],
        [] => guests::plan(args.kills, args.takeovers, args.seed),
        only => only.repeat(args.kills),
    };
    let config = GuestConfig {
        tools: args.tools,
        verifier: guests::verifier(args.verifier.as_deref())?,
        faults,
        halt: Duration::from_secs(args.halt_seconds),
        patience: guests::PATIENCE,
        seed: args.seed,
        interrupted,
    };
    if args.peers {
        return compare_peers(&config, &nebd, &args.way, args.kills, args.json);
    }
    let mut summaries = Vec::new();
    for way in args.way {
        eprintln!("{way}: {} faults", config.faults.len());
        let summary = guests::run(&config, &nebd, way, |happened| {
            let Happened { fault, gap_us, files_gap_us, in_flight, host_us, at_seconds } = happened;
            let [gap, files, host] = [gap_us, files_gap_us, host_us].map(|us| *us as f64 / 1e3);
            eprintln!(
                "{at_seconds:7.1} s {fault:<24} {in_flight:>3} in flight, gap {gap:.0} ms, \
                 files {files:.0} ms; host {host:.0} ms"
            );
        })?;
        if args.spoil {
            let mismatches = summary.mismatches;
            println!("{way}: the disks were spoiled, and the guest found {mismatches} mismatches");
        } else {
            println!("{summary}");
        }
        summaries.push(summary);
        if config.interrupted.load(SeqCst) {
            anyhow::bail!("interrupted");
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&summaries)?);
    }
    let is_noticed = |summary: &WaySummary| summary.mismatches > 0 && !summary.is_clean();
    Ok(summaries.iter().all(if args.spoil { is_noticed } else { WaySummary::is_clean }))
}

/// What peers do is told, and what ours does is judged.
fn compare_peers(
    config: &GuestConfig,
    nebd: &NebdConfig,
    ways: &[guests::Way],
    times: usize,
    json: bool,
) -> anyhow::Result<bool> {
    let config = GuestConfig { patience: Duration::from_secs(30), ..config.clone() };
    let rows = guests::compare(&config, nebd, ways, times, |row| {
        eprint!("{}", guests::table(std::slice::from_ref(row)));
    })?;
    print!("gaps in ms: median, worst (times)\n\n{}", guests::table(&rows));
    if json {
        println!("{}", serde_json::to_string(&rows)?);
    }
    Ok(rows[..ways.len()].iter().all(guests::Row::is_clean))
}

fn run_drive(args: &Drive) -> anyhow::Result<bool> {
    let mut disk = Disk::open(&args.rings.options(&args.socket, args.depth)?)?;
    let load = drive::Load {
        is_write: args.op.ends_with("write"),
        is_random: args.op.starts_with("rand"),
        block_bytes: args.block_size,
        depth: args.depth as usize,
        time: Duration::try_from_secs_f64(args.seconds)?,
        polls: args.poll,
    };
    println!("{}", serde_json::to_string(&drive::drive(&mut disk, &load)?)?);
    Ok(true)
}

fn run_device(run: &Run) -> anyhow::Result<bool> {
    let device: Box<dyn Device> = if let Some(socket) = run.device.strip_prefix("vhost-user:") {
        Box::new(VhostDevice::open(&run.rings.options(socket.as_ref(), run.depth)?)?)
    } else if run.device.contains('/') {
        Box::new(FileDevice::open(run.device.as_ref(), run.depth as usize)?)
    } else {
        let how = AttachOptions { depth: run.depth, ..AttachOptions::default() };
        Box::new(ClientDevice::open(&run.socket, &run.device, &how)?)
    };
    let options = StreamOptions {
        seed: run.seed,
        // Whatever an earlier run left is told apart from what this one writes.
        incarnation: std::process::id(),
        starts_zeroed: false,
        depth: run.depth as usize,
        mix: Mix::default(),
        stall_limit: Duration::from_secs(run.stall_seconds),
        ..StreamOptions::default()
    };
    let timeline = Timeline::shared();
    let load = Load::start(vec![Stream::new(device, 0, options, timeline.clone())], 1);
    let begun = Instant::now();
    let mut next_kill = Duration::from_millis(run.kill_every_ms);
    while begun.elapsed() < Duration::from_secs(run.seconds) && load.problems() == 0 {
        std::thread::sleep(Duration::from_millis(5));
        let Some(command) = run.kill_command.as_deref().filter(|_| begun.elapsed() > next_kill)
        else {
            continue;
        };
        timeline.note(format!("kill command at {} writes in flight", load.writes_in_flight()));
        let status = std::process::Command::new("sh").args(["-c", command]).status()?;
        anyhow::ensure!(status.success(), "the kill command failed: {status}");
        next_kill = begun.elapsed() + Duration::from_millis(run.kill_every_ms);
    }
    let report = total(&load.sweep());
    print_report(&report, begun.elapsed().as_secs_f64());
    if run.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(report.is_clean())
}

fn print_report(report: &VolumeReport, seconds: f64) {
    let VolumeReport { requests, blocks_checked, errors, mismatches, failures, .. } = report;
    println!("{requests} requests in {seconds:.1} s, {blocks_checked} blocks checked");
    println!("longest gap between completions {:.1} ms", report.blackout_us_max as f64 / 1000.0);
    println!("errors {errors}, mismatches {mismatches}, failures {failures}");
    report.problems.iter().for_each(|problem| println!("{problem}"));
}
