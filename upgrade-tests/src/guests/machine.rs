//! A guest: QEMU, its console, its monitor and its board.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use nebd_guest::board::{self, Board, Common, Kind, OfDisk, State};

use super::error::{GuestError, system};
use super::file_board::{self, BoardFile};
use crate::supervisor::Process;

/// For a guest without hardware's help, which is what every machine has. A panic stays: a guest that
/// boots again would look well.
const KERNEL_OPTIONS: &str =
    "console=ttyS0 quiet panic=0 mitigations=off nokaslr tsc=reliable no_timer_check";
const MEMORY: &str = "384M";
/// What no guest may say. Lockups that the kernel suspects are a matter of how busy this machine is.
const SIGNS_OF_TROUBLE: [&str; 11] = [
    "GUEST-FAILED",
    "GUEST-WRONG",
    "I/O error",
    "Kernel panic",
    "blocked for more",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Corruption",
    "Oops",
    "BUG: unable",
    "panicked at",
];
/// Lines of the console's end, and of QEMU's words, that are shown.
const TAIL_LINES: usize = 30;

/// What is on a disk, and what is done with it.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its content.
    pub kind: Kind,
    /// Its size.
    pub bytes: u64,
    /// Requests in flight.
    pub depth: u64,
    /// Milliseconds that each pauses after a request.
    pub rest_ms: u64,
    /// Virtqueues, on the ways that let the server have them.
    pub queues: u32,
    /// Whether these are packed, likewise.
    pub is_packed: bool,
}

/// How a guest is started.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The kernel's image.
    pub kernel: PathBuf,
    /// The guest's file system.
    pub initrd: PathBuf,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its processors; it uses no more virtqueues of a disk than that.
    pub cpus: u32,
    /// QEMU's arguments that make these disks.
    pub arguments: Vec<String>,
    /// QEMU's environment.
    pub environment: Vec<(String, String)>,
}

/// A guest that runs, ended when this is dropped.
pub struct Machine {
    config: MachineConfig,
    dir: PathBuf,
    qemu: Process,
    board: Board<BoardFile>,
    interrupted: Arc<AtomicBool>,
    commands: u64,
}

impl Machine {
    /// Starts it, with a new board; files of its are in `dir`.
    pub fn start(
        config: MachineConfig,
        dir: &Path,
        interrupted: &Arc<AtomicBool>,
    ) -> Result<Machine, GuestError> {
        let board = file_board::make(&config.disks)?;
        let qemu = start_qemu(&config, &board, dir)?;
        let interrupted = interrupted.clone();
        Ok(Machine { config, dir: dir.to_owned(), qemu, board, interrupted, commands: 0 })
    }

    /// Kills QEMU and starts it again on the same disks; the board stays.
    pub fn kill_and_start(&mut self) -> Result<(), GuestError> {
        self.qemu.end(Duration::ZERO);
        self.board.set(Common::State, State::Absent as u64);
        self.qemu = start_qemu(&self.config, &self.board, &self.dir)?;
        Ok(())
    }

    /// Resets the guest with everything in flight.
    pub fn reset(&mut self) -> Result<(), GuestError> {
        self.monitor("system_reset")?;
        self.board.set(Common::State, State::Absent as u64);
        Ok(())
    }

    /// The board.
    pub fn board(&self) -> &Board<BoardFile> {
        &self.board
    }

    /// The disks.
    pub fn disks(&self) -> &[Disk] {
        &self.config.disks
    }

    /// Gives a command, and does not wait.
    pub fn command(&mut self, command: board::Command) {
        self.commands += 1;
        self.board.set(Common::Command, self.commands << 8 | command as u64);
    }

    /// What the guest does.
    pub fn state(&self) -> Option<State> {
        State::from_word(self.board.get(Common::State))
    }

    /// A count of each disk.
    pub fn counts(&self, field: OfDisk) -> Vec<u64> {
        (0..self.config.disks.len()).map(|disk| self.board.of_disk(disk, field)).collect()
    }

    /// Waits for something, as long as QEMU lives and nobody wants an end.
    pub fn wait_for(
        &mut self,
        waited_for: &str,
        limit: Duration,
        mut is_so: impl FnMut(&Machine) -> bool,
    ) -> Result<(), GuestError> {
        let deadline = Instant::now() + limit;
        while !is_so(self) {
            if self.interrupted.load(SeqCst) {
                return Err(GuestError::Interrupted);
            }
            if self.qemu.wait(Duration::ZERO) {
                return Err(GuestError::Gone(self.tail()));
            }
            if Instant::now() > deadline {
                let (waited_for, log) = (waited_for.into(), self.tail());
                return Err(GuestError::Late { waited_for, limit, log });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Waits for the end of QEMU.
    pub fn wait_for_end(&mut self, limit: Duration) -> Result<(), GuestError> {
        if self.qemu.wait(limit) {
            return Ok(());
        }
        let (waited_for, log) = ("the end of QEMU".into(), self.tail());
        Err(GuestError::Late { waited_for, limit, log })
    }

    /// Halts the guest, or lets it go on.
    pub fn monitor(&self, command: &str) -> Result<(), GuestError> {
        let talk = || -> std::io::Result<String> {
            let stream = UnixStream::connect(self.dir.join("monitor"))?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            let mut reader = BufReader::new(stream.try_clone()?);
            let mut answer = String::new();
            reader.read_line(&mut answer)?; // the greeting
            for command in ["qmp_capabilities", command] {
                (&stream).write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes())?;
                loop {
                    answer.clear();
                    reader.read_line(&mut answer)?;
                    if !answer.contains("\"event\"") {
                        break;
                    }
                }
            }
            Ok(answer)
        };
        match talk() {
            Ok(answer) if answer.contains("\"return\"") => Ok(()),
            Ok(answer) => Err(GuestError::Monitor(answer)),
            Err(error) => Err(GuestError::Monitor(error.to_string())),
        }
    }

    /// Lines of the console that no guest should say.
    pub fn trouble(&self) -> Vec<String> {
        let console = read_text(&self.dir.join("console"));
        let is_trouble = |line: &&str| SIGNS_OF_TROUBLE.iter().any(|sign| line.contains(sign));
        console.lines().filter(is_trouble).map(|line| line.trim().to_owned()).collect()
    }

    /// What guest and QEMU said last.
    pub fn tail(&self) -> String {
        let tail = |name: &str| {
            let text = read_text(&self.dir.join(name));
            let lines: Vec<&str> = text.lines().collect();
            let from = lines.len().saturating_sub(TAIL_LINES);
            format!("---- {name}\n{}\n", lines[from..].join("\n"))
        };
        tail("console") + &tail("qemu.log")
    }
}

fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn start_qemu(
    config: &MachineConfig,
    board: &Board<BoardFile>,
    dir: &Path,
) -> Result<Process, GuestError> {
    let file = |name: &str| dir.join(name).display().to_string();
    let _ = fs::remove_file(dir.join("monitor"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]);
    qemu.args(["-machine", "q35,memory-backend=ram", "-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2"]);
    qemu.args(["-smp", &config.cpus.to_string(), "-m", MEMORY]);
    qemu.args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY},share=on")]);
    let (board, bytes) = (board.0.path(), board::BYTES);
    let board = format!("memory-backend-file,id=board,mem-path={board},size={bytes},share=on");
    qemu.args(["-object", &board, "-device", "ivshmem-plain,memdev=board"]);
    let console = format!("file,id=console,path={},append=on", file("console"));
    qemu.args(["-chardev", &console, "-serial", "chardev:console"]);
    qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", file("monitor"))]);
    qemu.arg("-kernel").arg(&config.kernel).arg("-initrd").arg(&config.initrd);
    qemu.args(["-append", KERNEL_OPTIONS]).args(&config.arguments);
    qemu.envs(config.environment.iter().cloned());
    Process::start(qemu, &dir.join("qemu.log")).map_err(system("start qemu-system-x86_64"))
}
