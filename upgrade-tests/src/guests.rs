//! Guests whose disks are volumes, while their server is killed and replaced: what `upgrade-tests
//! guests` does.
//!
//! ```text
//!  guest: guest-verifier ── disk 0: stamps   ── virtio ── QEMU ── way in ── server ◄── faults
//!              │            disk 1: ext4                                     │
//!              │            disk 2: XFS                                      └─► successor
//!              └── board ── host: epoch before each fault, gaps and progress after it
//! ```
//!
//! What is asserted are outcomes: no error, no mismatch, every disk goes on after every fault, clean
//! file systems. Durations are told, and judged by whoever reads them.

mod cores;
mod error;
mod fault;
mod file_board;
mod machine;
mod peer;
mod plan;
mod summary;
mod way;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use nebd_guest::board::{Command, Common, Kind, OfDisk, State};
use nebd_guest::image;
use nebd_guest::kernel::Kernel;
use nix::sys::signal::{SigSet, Signal};

use crate::stamp::Dice;
use error::system;
use machine::{Machine, MachineConfig};
use way::Nebd;

pub use cores::Cores;
pub use error::GuestError;
pub use fault::{Fault, FaultParseError};
pub use machine::Disk;
pub use peer::{PEERS, Peer, Row, compare, table};
pub use plan::plan;
pub use summary::{FaultSummary, Happened, WaySummary};
pub use way::{Backing, NebdConfig, Way, WayParseError, rbd_library};

/// A guest that takes longer to boot, or to compare everything, hangs.
const BOOT_TIME_MAX: Duration = Duration::from_secs(180);
/// A disk that does not go on for so long hangs, if nothing else is said.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Longest load between two faults.
const PAUSE_MS_MAX: u64 = 400;
/// After a fault, so that what it brought about still counts as its own.
const AFTER: Duration = Duration::from_millis(300);

/// The disks of a guest: one without a file system, and two with.
pub const DISKS: [Disk; 3] = [
    Disk { kind: Kind::Raw, bytes: 64 << 20, depth: 16, rest_ms: 0, queues: 2, is_packed: true },
    Disk { kind: Kind::Ext4, bytes: 128 << 20, depth: 2, rest_ms: 20, queues: 2, is_packed: false },
    // As small as mkfs.xfs makes it.
    Disk { kind: Kind::Xfs, bytes: 304 << 20, depth: 2, rest_ms: 20, queues: 1, is_packed: false },
];

/// What a guest needs.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Where `install.sh` put the kernel.
    pub tools: PathBuf,
    /// The guest's first program, static.
    pub verifier: PathBuf,
    /// What happens, in this order.
    pub faults: Vec<Fault>,
    /// How long a halted guest stands still.
    pub halt: Duration,
    /// A disk that does not go on for so long hangs.
    pub patience: Duration,
    /// Seed of what is left to chance.
    pub seed: u64,
    /// Set when the end is wanted.
    pub interrupted: Arc<AtomicBool>,
}

/// Runs a guest on disks of this way through all faults.
pub fn run(
    config: &GuestConfig,
    nebd: &NebdConfig,
    way: Way,
    progress: impl FnMut(&Happened),
) -> Result<WaySummary, GuestError> {
    let backing = Nebd::start(nebd, way, &DISKS)?;
    let mut run = Run::start(config, &DISKS, backing)?;
    let mut happened = Vec::new();
    run.meet_all(&mut happened, progress)?;
    let way = format!("{way}, {}", nebd.backend);
    let mut summary = WaySummary { way, ..WaySummary::default() };
    summary.sum_up(&happened);
    run.finish(&mut summary)?;
    Ok(summary)
}

/// A guest, and what stands behind its disks.
struct Run<'a, B> {
    config: &'a GuestConfig,
    // The guest ends before what it stands on.
    machine: Machine,
    backing: B,
    dice: Dice,
    begun: Instant,
    epoch: u64,
    _dir: tempfile::TempDir,
}

impl<'a, B: Backing> Run<'a, B> {
    fn start(config: &'a GuestConfig, disks: &[Disk], backing: B) -> Result<Self, GuestError> {
        let dir = tempfile::Builder::new().prefix("nebd-guest-").tempdir();
        let dir = dir.map_err(system("make a temporary directory"))?;
        let kernel = Kernel::find(&config.tools).ok_or_else(|| GuestError::Missing {
            what: "a guest's kernel",
            path: config.tools.join("kernel"),
            hint: "upgrade-tests/guest/install.sh DIR fetches it; say --tools DIR",
        })?;
        let initrd = dir.path().join("initrd");
        let archive = image::build(&config.verifier, &kernel).map_err(GuestError::Image)?;
        std::fs::write(&initrd, archive).map_err(system("write the guest's file system"))?;
        let machine = MachineConfig {
            kernel: kernel.image,
            initrd,
            disks: disks.to_vec(),
            cpus: backing.cpus(),
            arguments: backing.arguments(),
            environment: backing.environment(),
        };
        let mut machine = Machine::start(machine, dir.path(), &config.interrupted)?;
        wait_until_works(&mut machine)?;
        let (dice, begun) = (Dice::new(config.seed), Instant::now());
        Ok(Run { config, machine, backing, dice, begun, epoch: 0, _dir: dir })
    }

    /// All faults, up to the first after which something is wrong.
    fn meet_all(
        &mut self,
        happened: &mut Vec<Happened>,
        mut progress: impl FnMut(&Happened),
    ) -> Result<(), GuestError> {
        for fault in self.config.faults.clone() {
            let one = self.meet(fault).map_err(|error| self.explain(fault, error))?;
            progress(&one);
            happened.push(one);
            if self.is_wrong() {
                break;
            }
        }
        Ok(())
    }

    /// One fault: a new epoch, what happens, and every disk going on after it.
    fn meet(&mut self, fault: Fault) -> Result<Happened, GuestError> {
        std::thread::sleep(Duration::from_millis(self.dice.below(PAUSE_MS_MAX)));
        self.epoch += 1;
        self.machine.board().set(Common::Epoch, self.epoch);
        let in_flight = self.machine.board().of_disk(0, OfDisk::InFlight);
        let at_seconds = self.begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        match fault {
            Fault::Nothing => std::thread::sleep(AFTER),
            Fault::Reset => self.reset()?,
            Fault::Reboot => self.reboot()?,
            Fault::Pause => self.pause()?,
            Fault::QemuKill => self.machine.kill_and_start()?,
            _ => self.backing.strike(fault)?,
        }
        let host_us = begun.elapsed().as_micros() as u64;
        if !fault.leaves_guest() {
            wait_until_works(&mut self.machine)?;
        }
        self.wait_until_all_go_on(fault)?;
        std::thread::sleep(AFTER);
        let board = self.machine.board();
        let files = 1..self.machine.disks().len();
        Ok(Happened {
            fault,
            gap_us: board.gap(0, self.epoch),
            files_gap_us: files.map(|disk| board.gap(disk, self.epoch)).max().unwrap_or(0),
            in_flight,
            host_us,
            at_seconds,
        })
    }

    /// The reset is one of the hardware: a guest that reboots by itself first takes the bus from its disks,
    /// and whatever is in flight then fails. The takeover happens while requests are drained, and the
    /// guest boots.
    fn reset(&mut self) -> Result<(), GuestError> {
        self.machine.reset()?;
        self.backing.strike(Fault::Reset)
    }

    fn reboot(&mut self) -> Result<(), GuestError> {
        self.machine.command(Command::Reboot);
        self.backing.strike(Fault::Reboot)?;
        let is_gone = |machine: &Machine| machine.state() != Some(State::Works);
        self.machine.wait_for("the guest to boot again", self.config.patience, is_gone)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        let halted = Instant::now();
        self.machine.monitor("stop")?;
        let struck = self.backing.strike(Fault::Pause);
        std::thread::sleep(self.config.halt.saturating_sub(halted.elapsed()));
        self.machine.monitor("cont")?;
        struck
    }

    /// Each disk answers more requests than it can have had in flight.
    fn wait_until_all_go_on(&mut self, fault: Fault) -> Result<(), GuestError> {
        let depths: Vec<u64> = self.machine.disks().iter().map(|disk| 2 * disk.depth).collect();
        let before = self.machine.counts(OfDisk::Requests);
        let waited_for = format!("IO on every disk after: {fault}");
        self.machine.wait_for(&waited_for, self.config.patience, |machine| {
            let now = machine.counts(OfDisk::Requests);
            now.iter().zip(&before).zip(&depths).all(|((now, before), depth)| now - before > *depth)
        })
    }

    fn is_wrong(&self) -> bool {
        let count = |field| self.machine.counts(field).iter().sum::<u64>();
        count(OfDisk::Errors) + count(OfDisk::Mismatches) > 0
    }

    /// Disks whose virtqueues are not what was asked for, where the way lets one ask.
    fn other_virtqueues(&self) -> Vec<String> {
        let mut others = Vec::new();
        for (index, disk) in self.machine.disks().iter().enumerate() {
            let of = |field| self.machine.board().of_disk(index, field);
            let (queues, packed) = (of(OfDisk::Queues), of(OfDisk::Packed));
            let is_as_asked =
                queues == u64::from(disk.queues) && packed == 2 - u64::from(disk.is_packed);
            if self.backing.has_virtqueues() && !is_as_asked {
                others
                    .push(format!("disk {index}: {queues} queues, packed {packed}, not {disk:?}"));
            }
        }
        others
    }

    /// Has the guest compare everything and check its file systems, and sums up.
    fn finish(mut self, summary: &mut WaySummary) -> Result<(), GuestError> {
        self.machine.command(Command::Rest);
        let rests = |machine: &Machine| machine.state() == Some(State::Rests);
        let rested = self.machine.wait_for("everything to be compared", BOOT_TIME_MAX, rests);
        rested.map_err(|error| self.explain(Fault::Nothing, error))?;
        self.machine.command(Command::PowerOff);
        self.machine.wait_for_end(BOOT_TIME_MAX)?;
        let sum = |field| self.machine.counts(field).iter().sum::<u64>();
        summary.requests = sum(OfDisk::Requests);
        summary.errors = sum(OfDisk::Errors);
        summary.mismatches = sum(OfDisk::Mismatches);
        summary.checked = sum(OfDisk::Checked);
        summary.boots = self.machine.board().get(Common::Boots);
        let fscks = self.machine.counts(OfDisk::Fsck);
        summary.file_systems_clean = fscks.iter().filter(|result| **result == 1).count();
        let disks = self.machine.disks().iter();
        summary.file_systems = disks.filter(|disk| disk.kind != Kind::Raw).count();
        summary.problems = self.machine.trouble();
        summary.problems.extend(self.other_virtqueues());
        summary.cores = self.backing.cores();
        summary.seconds = self.begun.elapsed().as_secs_f64();
        if !summary.is_clean() {
            summary.problems.push(self.machine.tail() + &self.backing.log());
        }
        Ok(())
    }

    /// Adds what everybody said last.
    fn explain(&self, fault: Fault, error: GuestError) -> GuestError {
        match error {
            GuestError::Late { waited_for, limit, log } => {
                let more = format!("{}{}", self.machine.tail(), self.backing.log());
                let log = format!("at {fault}\n{log}\n{more}");
                GuestError::Late { waited_for, limit, log }
            }
            GuestError::Gone(log) => {
                GuestError::Gone(format!("at {fault}\n{log}{}", self.backing.log()))
            }
            error => error,
        }
    }
}

fn wait_until_works(machine: &mut Machine) -> Result<(), GuestError> {
    let works = |machine: &Machine| machine.state() == Some(State::Works);
    machine.wait_for("the guest to boot", BOOT_TIME_MAX, works)
}

/// Has SIGINT, SIGTERM and SIGHUP ask for an end that leaves nothing behind. To be called before there
/// are other threads.
pub fn watch_signals(interrupted: &Arc<AtomicBool>) -> Result<(), GuestError> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Those that are started do not inherit this: the standard library sees to it.
    let blocked = signals.thread_block();
    blocked.map_err(|errno| system("block signals")(errno.into()))?;
    let interrupted = interrupted.clone();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            interrupted.store(true, SeqCst);
        }
    });
    Ok(())
}

/// Where the guest's first program is, unless that is told: beside this program.
pub fn verifier(told: Option<&Path>) -> Result<PathBuf, GuestError> {
    let path = match told {
        Some(path) => path.to_owned(),
        None => {
            let exe = std::env::current_exe().map_err(system("find this program"))?;
            exe.with_file_name("guest-verifier")
        }
    };
    if !path.is_file() {
        let hint = "cargo rustc -p nebd-guest --bin guest-verifier -- -C target-feature=+crt-static; \
                    say --verifier";
        return Err(GuestError::Missing { what: "the guest's program", path, hint });
    }
    Ok(path)
}
