//! Other servers in the same place: the same guest and the same load, while they are killed.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nebd_guest::board::{Kind, OfDisk};
use serde::Serialize;

use super::error::{GuestError, system};
use super::fault::Fault;
use super::machine::Disk;
use super::summary::{FaultSummary, Happened, WaySummary};
use super::way::{Backing, DOWN, Nebd, NebdConfig, Way};
use super::{GuestConfig, Run};

/// The disk of the comparison; file systems would stay broken after the first error.
const DISKS: [Disk; 1] =
    [Disk { kind: Kind::Raw, bytes: 64 << 20, depth: 16, rest_ms: 0, queues: 1, is_packed: false }];
/// So many guests may fail before a row is given up.
const GUESTS_MAX: usize = 4;
/// What is compared.
const FAULTS: [Fault; 3] = [Fault::Nothing, Fault::Kill, Fault::KillAndDown];
/// A server that does not listen after this does not start.
const START_TIME_MAX: Duration = Duration::from_secs(10);

/// Another server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// qemu-storage-daemon's vhost-user-blk export.
    StorageDaemonVhost,
    /// qemu-storage-daemon's NBD export, which listens anew each time.
    StorageDaemonNbd,
    /// qemu-nbd, whose listening socket is held by the one that starts it.
    QemuNbd,
}

/// All of them.
pub const PEERS: [Peer; 3] = [Peer::StorageDaemonVhost, Peer::StorageDaemonNbd, Peer::QemuNbd];

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Peer::StorageDaemonVhost => "qemu-storage-daemon, vhost-user-blk",
            Peer::StorageDaemonNbd => "qemu-storage-daemon, NBD",
            Peer::QemuNbd => "qemu-nbd, its listening socket held",
        }
    }
}

/// A running peer, ended when this is dropped.
struct Served {
    peer: Peer,
    child: Option<Child>,
    listener: Option<UnixListener>,
    dir: tempfile::TempDir,
}

impl Served {
    fn start(peer: Peer) -> Result<Served, GuestError> {
        let dir = tempfile::Builder::new().prefix("nebd-peer-").tempdir();
        let dir = dir.map_err(system("make a temporary directory"))?;
        let disk = File::create(dir.path().join("disk")).and_then(|it| it.set_len(DISKS[0].bytes));
        disk.map_err(system("make a disk"))?;
        let mut listener = None;
        if peer == Peer::QemuNbd {
            let bound = UnixListener::bind(dir.path().join("socket"));
            listener = Some(bound.map_err(system("listen"))?);
        }
        let mut served = Served { peer, child: None, listener, dir };
        served.launch()?;
        Ok(served)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts the server, and waits until it listens.
    fn launch(&mut self) -> Result<(), GuestError> {
        let socket = self.socket();
        if self.listener.is_none() {
            let _ = std::fs::remove_file(&socket);
        }
        let mut command = self.command().map_err(system("start a peer"))?;
        let log = File::options().create(true).append(true).open(self.dir.path().join("log"));
        let log = log.map_err(system("open a log"))?;
        command.stdout(Stdio::null()).stderr(log).current_dir(self.dir.path());
        self.child = Some(command.spawn().map_err(system("start a peer"))?);
        let deadline = Instant::now() + START_TIME_MAX;
        while !socket.exists() {
            if Instant::now() > deadline {
                let (waited_for, log) = (self.peer.name().into(), self.log());
                return Err(GuestError::Late { waited_for, limit: START_TIME_MAX, log });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn command(&self) -> io::Result<Command> {
        let (disk, socket) = (self.dir.path().join("disk"), self.socket());
        let (disk, socket) = (disk.display(), socket.display());
        let mut command = match self.peer {
            Peer::QemuNbd => Command::new("bash"),
            _ => Command::new("qemu-storage-daemon"),
        };
        let file = format!("driver=file,node-name=disk,filename={disk},cache.direct=on,aio=native");
        match self.peer {
            Peer::StorageDaemonVhost => {
                let export = format!(
                    "type=vhost-user-blk,id=disk,node-name=disk,writable=on,num-queues=1,\
                     addr.type=unix,addr.path={socket}"
                );
                command.args(["--blockdev", &file, "--export", &export]).stdin(Stdio::null());
            }
            Peer::StorageDaemonNbd => {
                let server = format!("addr.type=unix,addr.path={socket}");
                let export = "type=nbd,id=disk,node-name=disk,name=disk,writable=on";
                command.args(["--blockdev", &file, "--nbd-server", &server, "--export", export]);
                command.stdin(Stdio::null());
            }
            Peer::QemuNbd => {
                // The socket comes as standard input, and is to be descriptor 3.
                let line = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd --persistent \
                     --format=raw --cache=none --aio=native --export-name=disk \"$0\"";
                command.args(["-c", line]).arg(disk.to_string());
                if let Some(listener) = &self.listener {
                    command.stdin(OwnedFd::from(listener.try_clone()?));
                }
            }
        }
        Ok(command)
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Backing for Served {
    fn arguments(&self) -> Vec<String> {
        let socket = self.socket();
        let socket = socket.display();
        match self.peer {
            Peer::StorageDaemonVhost => vec![
                "-chardev".into(),
                format!("socket,id=c0,path={socket},reconnect-ms=100"),
                "-device".into(),
                "vhost-user-blk-pci,chardev=c0,num-queues=1".into(),
            ],
            Peer::StorageDaemonNbd | Peer::QemuNbd => vec![
                "-object".into(),
                "iothread,id=io0".into(),
                "-blockdev".into(),
                format!(
                    "driver=nbd,node-name=disk0,server.type=unix,server.path={socket},export=disk,\
                     reconnect-delay=60,open-timeout=10,cache.direct=on"
                ),
                "-device".into(),
                "virtio-blk-pci,drive=disk0,iothread=io0".into(),
            ],
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn strike(&mut self, fault: Fault) -> Result<(), GuestError> {
        match fault {
            Fault::Kill => {
                self.kill();
                self.launch()
            }
            Fault::KillAndDown => {
                self.kill();
                std::thread::sleep(DOWN);
                self.launch()
            }
            // There is nothing more that these can do.
            _ => Ok(()),
        }
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        format!("---- {}\n{log}", self.peer.name())
    }
}

/// What the guests of one server met.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// The server, and how its disk came into the guest.
    pub server: String,
    /// While nothing happened.
    pub nothing: FaultSummary,
    /// Killed, and restarted at once.
    pub killed: FaultSummary,
    /// Killed, and restarted after two seconds.
    pub down: FaultSummary,
    /// Guests that were needed.
    pub guests: usize,
    /// Of these, with a disk that hung for good.
    pub hung: usize,
    /// Requests that failed.
    pub errors: u64,
    /// Blocks that held what they must not.
    pub mismatches: u64,
}

impl Row {
    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.hung == 0 && self.errors == 0 && self.mismatches == 0
    }
}

/// Measures ours, and then the peers: each is killed `times` times, and as often for two seconds. The
/// rows of ours come first.
pub fn compare(
    config: &GuestConfig,
    nebd: &NebdConfig,
    ways: &[Way],
    times: usize,
    mut progress: impl FnMut(&Row),
) -> Result<Vec<Row>, GuestError> {
    let mut rows = Vec::new();
    for way in ways {
        let name = format!("nebd, {way}");
        rows.push(row(config, name, times, || Nebd::start(nebd, *way, &DISKS))?);
        rows.last().into_iter().for_each(&mut progress);
    }
    for peer in PEERS {
        rows.push(row(config, peer.name().into(), times, || Served::start(peer))?);
        rows.last().into_iter().for_each(&mut progress);
    }
    Ok(rows)
}

fn row<B: Backing>(
    config: &GuestConfig,
    server: String,
    times: usize,
    start: impl Fn() -> Result<B, GuestError>,
) -> Result<Row, GuestError> {
    let mut left = FAULTS.repeat(times);
    let mut row = Row { server, ..Row::default() };
    let mut happened: Vec<Happened> = Vec::new();
    while !left.is_empty() && row.guests < GUESTS_MAX {
        row.guests += 1;
        let config = GuestConfig { faults: left.clone(), ..config.clone() };
        let mut run = Run::start(&config, &DISKS, start()?)?;
        let mut met = Vec::new();
        let hung = match run.meet_all(&mut met, |_| ()) {
            Err(GuestError::Late { .. }) => true,
            other => other.map(|()| false)?,
        };
        row.hung += usize::from(hung);
        // What it hung at is not tried again.
        left.drain(..(met.len() + usize::from(hung)).min(left.len()));
        happened.append(&mut met);
        row.errors += run.machine.counts(OfDisk::Errors).iter().sum::<u64>();
        row.mismatches += run.machine.counts(OfDisk::Mismatches).iter().sum::<u64>();
    }
    let mut summary = WaySummary::default();
    summary.sum_up(&happened);
    let mut of = |fault| summary.faults.remove(&fault).unwrap_or_default();
    row.nothing = of(Fault::Nothing);
    row.killed = of(Fault::Kill);
    row.down = of(Fault::KillAndDown);
    Ok(row)
}

/// The rows, in Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut text =
        "| server | nothing happens | SIGKILL, at once | SIGKILL, 2 s down | errors | hung |\n\
         | --- | --- | --- | --- | --- | --- |\n"
            .to_owned();
    let gaps = |of: &FaultSummary| match of.count {
        0 => "–".into(),
        count => format!("{:.0}, worst {:.0} ({count})", of.gap_median_ms, of.gap_worst_ms),
    };
    for row in rows {
        let Row { server, nothing, killed, down, guests, hung, errors, .. } = row;
        let [nothing, killed, down] = [nothing, killed, down].map(gaps);
        // Writing into a text cannot fail.
        let _ = writeln!(
            text,
            "| {server} | {nothing} | {killed} | {down} | {errors} | {hung} of {guests} guests |"
        );
    }
    text
}
