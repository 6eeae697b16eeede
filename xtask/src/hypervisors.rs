//! QEMU, its tools and fio on nebd volumes, with the commands of docs/hypervisors.md, while the
//! server is killed.
//!
//! ```text
//!  docs/hypervisors.md ── blocks ci=NAME ──► bash, in a directory of its own ──► has to succeed
//!                                              ▲
//!  init.c ── cc -static ──► initrd ────────────┘ ci=guest: has to say GUEST-DONE, and no error
//!  host: SIGKILL of the server at once, and again and again until the block is done
//! ```

mod document;
mod frontend;
mod guest;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::c_example::Host;
use crate::cargo::{self, Profile};
use crate::guest_tools;
use crate::install::Installed;

use document::Document;
use nebd_guest::kernel::Kernel;

/// Blocks that are run before all others: what all ways need, and what the linked one does.
const PREPARATIONS: [&str; 3] = ["install", "environment", "library"];
/// Blocks of the linked way, in this order.
const LINKED: [&str; 12] = [
    "create",
    "info",
    "guest",
    "convert",
    "compare",
    "qemu-io",
    "bench",
    "fio",
    "fio-sectors",
    "resize",
    "verify",
    "delete",
];
/// A block that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(90);
/// The first kill is when the program has just begun, so that none is too quick for it. Then a pause,
/// and each is twice the one before, up to the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(40);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Bytes of a third of the image that is converted.
const THIRD: usize = 40 << 20;
/// What the guest says when its load begins.
const GUEST_WORKS: &str = "GUEST-READY";
/// For a guest without hardware's help, which is what every machine has.
const KERNEL_OPTIONS: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check";

/// How long.
#[derive(Args)]
pub struct HypervisorsArgs {
    /// Seconds that the guest writes and verifies.
    #[arg(long, default_value_t = 12)]
    pub guest_seconds: u32,
    /// How to compile the library and the programs.
    #[arg(long, value_enum, default_value = "dev")]
    pub profile: Profile,
}

/// Runs all blocks. Returns why that is not possible here, if it is not.
pub fn run(args: &HypervisorsArgs) -> Result<Option<String>> {
    let work_dir = cargo::target_dir()?.join("hypervisors");
    fs::create_dir_all(&work_dir)?;
    let kernel = match guest_tools::prepare(&guest_tools::shared_dir()?)? {
        Ok(kernel) => kernel,
        Err(reason) => return Ok(Some(reason)),
    };
    let document = Document::read()?;
    document.expect_only(&blocks())?;
    let installed = install(&document, args.profile, &work_dir)?;
    let initrd = guest::build(&work_dir, &kernel, args.guest_seconds)?;
    let host = Host::start(&installed)?;
    let scratch = Scratch::make(&work_dir)?;
    let run = Run { document: &document, host: &host, prefix: work_dir.join("prefix"), scratch };
    for way in frontend::WAYS {
        run.frontend(way, &kernel, &initrd)?;
    }
    for name in LINKED {
        match name {
            "guest" => run.guest(&kernel, &initrd)?,
            name => _ = run.block(name)?,
        }
    }
    drop(run);
    host.stop()?;
    Ok(None)
}

/// All blocks of the page.
fn blocks() -> Vec<String> {
    let of_frontends = frontend::WAYS.iter().flat_map(|way| frontend::blocks(way));
    let others = PREPARATIONS.iter().chain(&LINKED).map(|name| (*name).to_owned());
    others.chain(of_frontends).collect()
}

/// Installs with the page's own line, only quicker to build.
fn install(document: &Document, profile: Profile, work_dir: &Path) -> Result<Installed> {
    let prefix = work_dir.join("prefix");
    let line = document.block("install")?.trim_end();
    let line = format!("{line} --profile {} --keep-debug", profile.name());
    let mut bash = Command::new("bash");
    bash.arg("-euc").arg(line).env("PREFIX", &prefix).current_dir(crate::repo_root());
    cargo::run(&mut bash)?;
    Ok(Installed {
        pkgconfig_dir: prefix.join("lib/pkgconfig"),
        lib_dir: prefix.join("lib"),
        bin_dir: Some(prefix.join("bin")),
    })
}

/// Files of the examples, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn make(work_dir: &Path) -> Result<Scratch> {
        let dir = work_dir.join("scratch");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        // What cannot be guessed: a third random, a third zeros, a third a pattern.
        let mut image = vec![0; 3 * THIRD];
        fs::File::open("/dev/urandom")?.read_exact(&mut image[..THIRD])?;
        image[2 * THIRD..].iter_mut().enumerate().for_each(|(i, byte)| *byte = (i >> 12) as u8);
        fs::write(dir.join("disk.raw"), image)?;
        cargo::run(
            Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"])
                .current_dir(&dir),
        )?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Run<'a> {
    document: &'a Document,
    host: &'a Host,
    prefix: PathBuf,
    scratch: Scratch,
}

impl Run<'_> {
    fn block(&self, name: &str) -> Result<String> {
        let text = self.under_kills(name, &[], None)?;
        ensure!(!text.contains("Pattern verification failed"), "{name}: wrong bytes");
        Ok(text)
    }

    /// QEMU's library says how it reached the memory.
    fn guest(&self, kernel: &Kernel, initrd: &Path) -> Result<()> {
        let text = self.boot("guest", kernel, initrd, None)?;
        let (in_memory, copied) = requests(&text).context("the library told no numbers")?;
        ensure!(in_memory > 100, "guest memory was not used in place: {in_memory} requests");
        ensure!(copied * 20 < in_memory, "{copied} requests were copied, {in_memory} were not");
        Ok(())
    }

    /// Boots a guest, which says how it went on its console.
    fn boot(
        &self,
        name: &str,
        kernel: &Kernel,
        initrd: &Path,
        meanwhile: Option<&str>,
    ) -> Result<String> {
        let (image, initrd) = (kernel.image.to_string_lossy(), initrd.to_string_lossy());
        let arguments = ["-kernel", &*image, "-initrd", &*initrd, "-append", KERNEL_OPTIONS];
        let text = self.under_kills(name, &arguments, meanwhile)?;
        ensure!(text.contains("GUEST-DONE"), "the guest did not finish");
        for sign in ["GUEST-FAILED", "GUEST-WRONG", "I/O error", "Kernel panic"] {
            ensure!(!text.contains(sign), "the guest met an error: {sign}");
        }
        Ok(text)
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Result<Block> {
        let mut script = self.document.block("environment")?.to_owned();
        if LINKED.contains(&name) {
            script += self.document.block("library")?;
        }
        script += self.document.block(name)?;
        println!("---- docs/hypervisors.md: {name}");
        let mut bash = Command::new("bash");
        bash.args(["-euo", "pipefail", "-c", &script, name]).args(arguments);
        bash.env("PREFIX", &self.prefix).env("NEBD_SOCKET", self.host.socket());
        bash.env("NEBD_LOG", "1").env("ACCEL", "tcg").current_dir(&self.scratch.0);
        bash.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Of its own, so that whatever hangs can be ended as one.
        bash.process_group(0);
        Block::start(&mut bash)
    }

    /// Runs a block while the server is killed, and another in a pause of that, once there is a guest
    /// that works; returns all that the first printed.
    fn under_kills(
        &self,
        name: &str,
        arguments: &[&str],
        mut meanwhile: Option<&str>,
    ) -> Result<String> {
        let begin = Instant::now();
        let mut block = self.start(name, arguments)?;
        let kills = self.kill_until_done(&mut block, &mut meanwhile);
        let status = block.end()?;
        let kills = kills.with_context(|| format!("block {name}"))?;
        ensure!(status.success(), "block {name}: {status}");
        ensure!(kills > 0, "block {name}: it was over before the server could be killed");
        ensure!(meanwhile.is_none(), "block {name}: it was over before {meanwhile:?} could run");
        let seconds = begin.elapsed().as_secs_f64();
        println!("---- {name}: done in {seconds:.1} s, {kills} kills of the server, no error");
        Ok(block.text())
    }

    fn kill_until_done(&self, block: &mut Block, meanwhile: &mut Option<&str>) -> Result<u32> {
        let begin = Instant::now();
        let (mut kills, mut next, mut pause) = (0, begin, PAUSE_FIRST);
        while block.child.try_wait()?.is_none() {
            ensure!(begin.elapsed() < PATIENCE, "not done within {} s", PATIENCE.as_secs());
            if Instant::now() >= next {
                self.host.kill_server()?;
                kills += 1;
                next = Instant::now() + pause;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            if block.text().contains(GUEST_WORKS)
                && let Some(name) = meanwhile.take()
            {
                self.undisturbed(name)?;
                ensure!(!block.text().contains("GUEST-DONE"), "the guest was done before {name}");
            }
            sleep(Duration::from_millis(5));
        }
        Ok(kills)
    }

    /// Runs a block without killing anybody; returns all that it printed.
    fn undisturbed(&self, name: &str) -> Result<String> {
        let begin = Instant::now();
        let mut block = self.start(name, &[])?;
        while block.child.try_wait()?.is_none() && begin.elapsed() < PATIENCE {
            sleep(Duration::from_millis(5));
        }
        let status = block.end()?;
        ensure!(status.success(), "block {name}: {status}");
        println!("---- {name}: done in {:.1} s", begin.elapsed().as_secs_f64());
        Ok(block.text())
    }
}

/// How many requests were in guest memory, and how many were copied.
fn requests(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.contains("requests in guest memory"))?;
    let before = |words: &str| line.split_once(words)?.0.rsplit(' ').next()?.parse().ok();
    Some((before(" requests in guest memory")?, before(" copied")?))
}

/// A block that runs, and what it has printed.
struct Block {
    child: Child,
    readers: Vec<JoinHandle<()>>,
    text: Arc<Mutex<String>>,
}

impl Block {
    fn start(command: &mut Command) -> Result<Block> {
        let mut child = command.spawn().context("bash")?;
        let text = Arc::new(Mutex::new(String::new()));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let readers = [
            stdout.map(|stdout| follow(stdout, &text)),
            stderr.map(|stderr| follow(stderr, &text)),
        ];
        Ok(Block { child, readers: readers.into_iter().flatten().collect(), text })
    }

    /// Ends what still runs, and waits for the last of the output.
    fn end(&mut self) -> Result<std::process::ExitStatus> {
        if self.child.try_wait()?.is_none() {
            // Its own group, and the leader is not reaped yet.
            kill_process_group(Pid::from_child(&self.child), Signal::KILL)?;
        }
        let status = self.child.wait()?;
        for reader in self.readers.drain(..) {
            if reader.join().is_err() {
                bail!("a reader of the output panicked");
            }
        }
        Ok(status)
    }

    fn text(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Prints and keeps what comes.
fn follow(from: impl Read + Send + 'static, text: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let text = text.clone();
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            let mut text = text.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(&line);
            text.push('\n');
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_library_s_numbers() {
        let text = "GUEST-DONE\nnebd: file:g: 933 requests in guest memory, 2 copied, 8 of parts\n";
        assert_eq!(requests(text), Some((933, 2)));
        assert_eq!(requests("GUEST-DONE\n"), None);
    }
}
