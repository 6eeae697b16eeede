//! Ways for a disk to come into a guest, and the server behind each.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nebd_rpc::admin::{Upgrade, UpgradeState};
use nix::sys::signal::Signal;
use serde::Serialize;

use super::cores::Cores;
use super::error::{GuestError, system};
use super::fault::Fault;
use super::machine::Disk;
use crate::stamp::Dice;
use crate::supervisor::{Host, HostConfig, wait_for_death};

/// So long no server runs after [`Fault::KillAndDown`].
pub(super) const DOWN: Duration = Duration::from_secs(2);
/// After that a planned takeover has ended, one way or the other.
const TAKEOVER_TIME_MAX: Duration = Duration::from_secs(30);
/// A step of a takeover takes no longer than this: what ends a silence.
const STEP_TIME_MAX: Duration = Duration::from_millis(3000);
/// After that a server that answers no probe hangs.
const HANG_TIME_MAX: Duration = Duration::from_secs(1);
/// Where a candidate may die and the old server serves on.
const FAILING_POINTS: [&str; 6] = [
    "candidate-start",
    "candidate-hello",
    "candidate-offer",
    "candidate-prepare",
    "candidate-ready",
    "candidate-before-claim",
];
/// How.
const FAILING_ACTIONS: [&str; 2] = ["kill", "segv"];
const BLOCK_BYTES: u32 = 4096;
/// Which MiB of a disk lose their content when it is spoiled: not those in which a file system has what
/// it needs to be mounted.
const SPOILED: [u64; 3] = [20, 30, 50];

/// How disks come into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// QEMU's rbd driver, with our library in the place of Ceph's.
    Linked,
    /// QEMU's vhost-user-blk device.
    VhostUser,
    /// QEMU's NBD client.
    Nbd,
}

/// A text names no way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way into a guest: linked, vhost-user, nbd")]
pub struct WayParseError(String);

impl FromStr for Way {
    type Err = WayParseError;

    fn from_str(text: &str) -> Result<Way, WayParseError> {
        match text {
            "linked" => Ok(Way::Linked),
            "vhost-user" => Ok(Way::VhostUser),
            "nbd" => Ok(Way::Nbd),
            _ => Err(WayParseError(text.into())),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Way::Linked => "linked",
            Way::VhostUser => "vhost-user",
            Way::Nbd => "nbd",
        })
    }
}

/// What stands behind the disks of a guest.
pub trait Backing {
    /// QEMU's arguments for the disks.
    fn arguments(&self) -> Vec<String>;
    /// The guest's processors.
    fn cpus(&self) -> u32 {
        1
    }
    /// Whether the virtqueues are this server's, and as a [`Disk`] asks for.
    fn has_virtqueues(&self) -> bool {
        false
    }
    /// QEMU's environment.
    fn environment(&self) -> Vec<(String, String)>;
    /// Does what of the fault is the server's part. Returns when another serves, or the old one again.
    fn strike(&mut self, fault: Fault) -> Result<(), GuestError>;
    /// What the server said last.
    fn log(&self) -> String;
    /// What crashes left, of servers that do.
    fn cores(&self) -> Cores {
        Cores::default()
    }
}

/// A server of ours.
pub struct Nebd {
    way: Way,
    host: Host,
    backend: String,
    disks: Vec<Disk>,
    rbd_library: PathBuf,
    dice: Dice,
    failed_takeovers: usize,
    cores: Cores,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct NebdConfig {
    /// `nebd-server`, with failpoints.
    pub server: PathBuf,
    /// `nebdctl`.
    pub nebdctl: PathBuf,
    /// The directory that has our `librbd.so.1`.
    pub rbd_library: PathBuf,
    /// `file` or `mem`.
    pub backend: String,
    /// Keep a warm standby.
    pub standby: bool,
    /// Seed of what is left to chance.
    pub seed: u64,
}

impl Nebd {
    /// Starts a server, and makes the volumes.
    pub fn start(config: &NebdConfig, way: Way, disks: &[Disk]) -> Result<Nebd, GuestError> {
        let mut host = HostConfig::new(&config.server);
        host.standby = config.standby;
        host.core_dumps = true;
        host.hang_timeout_ms = HANG_TIME_MAX.as_millis() as u64;
        host.step_timeout_ms = STEP_TIME_MAX.as_millis() as u64;
        let host = Host::start(&host)?;
        for (index, disk) in disks.iter().enumerate() {
            let name = format!("{}:{}", config.backend, volume(index));
            host.admin()?.create(&name, disk.bytes, BLOCK_BYTES)?;
            if way != Way::Linked {
                let queues = (way == Way::VhostUser).then_some(disk.queues);
                attach(&config.nebdctl, &host, &name, way, queues, &socket(&host, index))?;
            }
        }
        Ok(Nebd {
            way,
            host,
            backend: config.backend.clone(),
            disks: disks.to_vec(),
            rbd_library: config.rbd_library.clone(),
            dice: Dice::new(config.seed),
            failed_takeovers: 0,
            cores: Cores::new(),
        })
    }

    fn server(&self) -> i32 {
        self.host.server_pid().unwrap_or(0)
    }

    fn kill(&mut self, signal: Signal) -> Result<(), GuestError> {
        let server = self.server();
        self.host.signal(server, signal)?;
        self.host.wait_for_successor(server)?;
        Ok(())
    }

    fn crash(&mut self) -> Result<(), GuestError> {
        self.kill(Signal::SIGSEGV)?;
        // Servers run where the keeper does.
        let dir = self.host.socket().with_file_name("");
        self.cores.count(&dir);
        Ok(())
    }

    /// The keeper, stopped, starts nobody.
    fn kill_and_down(&mut self) -> Result<(), GuestError> {
        let (server, keeper) = (self.server(), self.host.keeper_pid().cast_signed());
        self.host.signal(keeper, Signal::SIGSTOP)?;
        let killed = self.host.signal(server, Signal::SIGKILL);
        let dead = wait_for_death(server, Duration::from_secs(10));
        std::thread::sleep(DOWN);
        self.host.signal(keeper, Signal::SIGCONT)?;
        killed?;
        dead.map_err(system("wait for a death"))?;
        self.host.wait_for_successor(server)?;
        Ok(())
    }

    fn begin_takeover(&mut self) -> Result<(), GuestError> {
        let operation = self.dice.bits().to_le_bytes().repeat(2);
        self.host.admin()?.start_upgrade(&operation, None)?;
        Ok(())
    }

    fn end_takeover(
        &self,
        waited_for: &str,
        is_end: impl Fn(UpgradeState) -> bool,
    ) -> Result<Upgrade, GuestError> {
        let admin = self.host.admin()?;
        let deadline = Instant::now() + TAKEOVER_TIME_MAX;
        loop {
            let upgrade = admin.upgrade()?;
            if is_end(upgrade.state()) {
                return Ok(upgrade);
            }
            if Instant::now() > deadline {
                let state = upgrade.state().as_str_name();
                let log = format!("{state}: {}\n{}", upgrade.reason, self.host.log());
                let (waited_for, limit) = (waited_for.into(), TAKEOVER_TIME_MAX);
                return Err(GuestError::Late { waited_for, limit, log });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn takeover(&mut self) -> Result<(), GuestError> {
        let server = self.server();
        self.begin_takeover()?;
        self.end_takeover("a planned takeover", |state| state == UpgradeState::Done)?;
        self.host.wait_for_successor(server)?;
        Ok(self.host.wait_for_order()?)
    }

    fn failed_takeover(&mut self) -> Result<(), GuestError> {
        let turn = self.failed_takeovers;
        self.failed_takeovers += 1;
        let point = FAILING_POINTS[turn % FAILING_POINTS.len()];
        let action = FAILING_ACTIONS[turn / FAILING_POINTS.len() % FAILING_ACTIONS.len()];
        let server = self.server();
        self.host.arm(point, action, 1)?;
        self.begin_takeover()?;
        self.host.wait_for("the failpoint", |host| host.armed() == 0)?;
        self.end_takeover("the end of a takeover that fails", |state| {
            use UpgradeState::{Failed, Refused, RolledBack};
            matches!(state, Failed | Refused | RolledBack)
        })?;
        self.host.wait_for("the old server serves on", |host| host.server_pid() == Some(server))?;
        Ok(self.host.wait_for_order()?)
    }

    /// Behind the server's back, in the images.
    fn spoil(&mut self) -> Result<(), GuestError> {
        let images = self.host.state_dir().join("images");
        for index in 0..self.disks.len() {
            let image =
                File::options().write(true).open(images.join(format!("{}.img", volume(index))));
            let image = image.map_err(system("open an image"))?;
            for at in SPOILED.iter().map(|mib| mib << 20) {
                image.write_all_at(&[0; 1 << 20], at).map_err(system("spoil an image"))?;
            }
        }
        Ok(())
    }

    /// The candidate is about to be ready when the old server is stopped.
    fn stop_in_takeover(&mut self) -> Result<(), GuestError> {
        // The present server has read its list; the one after it will meet the point.
        self.host.arm("owner-ready", "stop", 1)?;
        self.takeover()?;
        let server = self.server();
        self.begin_takeover()?;
        self.host.wait_for("the failpoint", |host| host.armed() == 0)?;
        self.host.wait_for_successor(server)?;
        self.end_takeover("the end of a takeover", |state| {
            !matches!(state, UpgradeState::Running | UpgradeState::Probation)
        })?;
        Ok(self.host.wait_for_order()?)
    }
}

fn volume(index: usize) -> String {
    format!("guest{index}")
}

/// Where a volume is served to QEMU.
fn socket(host: &Host, index: usize) -> PathBuf {
    host.socket().with_file_name(format!("disk{index}.sock"))
}

fn attach(
    nebdctl: &Path,
    host: &Host,
    volume: &str,
    way: Way,
    queues: Option<u32>,
    socket: &Path,
) -> Result<(), GuestError> {
    let mut command = Command::new(nebdctl);
    command.args(["attach", volume, "--as", &way.to_string(), "--socket"]).arg(socket);
    if let Some(queues) = queues {
        command.args(["--queues", &queues.to_string()]);
    }
    command.env("NEBD_SOCKET", host.socket()).stdin(Stdio::null());
    let output = command.output().map_err(system("start nebdctl"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(GuestError::Attach(String::from_utf8_lossy(&output.stderr).trim_end().to_owned()))
}

impl Backing for Nebd {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["-object".to_owned(), "iothread,id=io0".into()];
        for (index, disk) in self.disks.iter().enumerate() {
            let volume = volume(index);
            let socket = socket(&self.host, index);
            let socket = socket.display();
            match self.way {
                Way::VhostUser => arguments.extend([
                    "-chardev".into(),
                    format!("socket,id=c{index},path={socket},reconnect-ms=100"),
                    "-device".into(),
                    format!(
                        "vhost-user-blk-pci,chardev=c{index},num-queues={},packed={}",
                        disk.queues,
                        if disk.is_packed { "on" } else { "off" }
                    ),
                ]),
                Way::Nbd => arguments.extend([
                    "-blockdev".into(),
                    format!(
                        "driver=nbd,node-name=disk{index},server.type=unix,server.path={socket},\
                         export={}:{volume},reconnect-delay=60,open-timeout=10,cache.direct=on,\
                         discard=unmap",
                        self.backend
                    ),
                    "-device".into(),
                    format!("virtio-blk-pci,drive=disk{index},iothread=io0"),
                ]),
                Way::Linked => arguments.extend([
                    "-blockdev".into(),
                    format!(
                        "driver=rbd,node-name=disk{index},pool={},image={volume},conf=/dev/null,\
                         cache.direct=on,discard=unmap",
                        self.backend
                    ),
                    "-device".into(),
                    format!("virtio-blk-pci,drive=disk{index},iothread=io0"),
                ]),
            }
        }
        arguments
    }

    fn cpus(&self) -> u32 {
        match self.way {
            Way::VhostUser => self.disks.iter().map(|disk| disk.queues).max().unwrap_or(1),
            Way::Linked | Way::Nbd => 1,
        }
    }

    fn has_virtqueues(&self) -> bool {
        self.way == Way::VhostUser
    }

    fn environment(&self) -> Vec<(String, String)> {
        match self.way {
            Way::Linked => vec![
                ("LD_LIBRARY_PATH".into(), self.rbd_library.display().to_string()),
                ("NEBD_SOCKET".into(), self.host.socket().display().to_string()),
                ("NEBD_LOG".into(), "1".into()),
            ],
            Way::VhostUser | Way::Nbd => Vec::new(),
        }
    }

    fn strike(&mut self, fault: Fault) -> Result<(), GuestError> {
        match fault {
            Fault::Nothing | Fault::QemuKill => Ok(()),
            Fault::Kill => self.kill(Signal::SIGKILL),
            Fault::KillAndDown => self.kill_and_down(),
            Fault::Crash => self.crash(),
            Fault::Stop => self.kill(Signal::SIGSTOP),
            Fault::Takeover | Fault::Reset | Fault::Reboot | Fault::Pause => self.takeover(),
            Fault::FailedTakeover => self.failed_takeover(),
            Fault::StopInTakeover => self.stop_in_takeover(),
            Fault::Spoil => self.spoil(),
        }
    }

    fn log(&self) -> String {
        format!("---- server\n{}", self.host.log())
    }

    fn cores(&self) -> Cores {
        self.cores.clone()
    }
}

/// Where our `librbd.so.1` is, unless that is told: as `cargo xtask install` puts it beside programs.
pub fn rbd_library(told: Option<&Path>) -> Result<PathBuf, GuestError> {
    let dir = match told {
        Some(dir) => dir.to_owned(),
        None => {
            let exe = std::env::current_exe();
            let exe = exe.map_err(system("find this program"))?;
            exe.parent().unwrap_or(&exe).join("../lib/nebd/rbd")
        }
    };
    let path = dir.join("librbd.so.1");
    if !path.is_file() {
        let hint = "cargo xtask install puts it into PREFIX/lib/nebd/rbd; say --rbd-library";
        return Err(GuestError::Missing { what: "our librbd.so.1", path, hint });
    }
    Ok(dir)
}
