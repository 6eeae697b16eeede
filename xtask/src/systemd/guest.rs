//! The guest: QEMU without hardware's help, and its console.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::root::Disks;

/// The kernel has drivers for NVMe and ext4 built in, so that it needs no initramfs.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable \
     no_timer_check root=/dev/nvme0n1 rw init=/lib/systemd/systemd systemd.unit=nebd-guest.target \
     systemd.show_status=no";
/// The guest's last word, if all is well.
const DONE: &str = "GUEST-DONE";
/// Any of these, and it is not.
const SIGNS_OF_TROUBLE: [&str; 4] =
    ["GUEST-FAILED", "Kernel panic", "I/O error", "blocked for more"];

/// A child that does not outlive this.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the guest to its end.
pub fn run(work_dir: &Path, kernel: &Path, disks: &Disks, patience: Duration) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.args(["-accel", "tcg,thread=multi", "-machine", "q35", "-smp", "2", "-m", "768M"]);
    qemu.args(["-serial", "stdio", "-append", KERNEL_OPTIONS]).arg("-kernel").arg(kernel);
    for (id, disk) in [("root", &disks.root), ("empty", &disks.empty)] {
        // What the disks hold is not needed after the guest. Past this machine's page cache, in which
        // a read and a write of one sector at once would tear it, as no disk does.
        let cache = "cache.direct=on,cache.no-flush=on";
        let drive = format!("if=none,id={id},format=raw,{cache},file={}", disk.display());
        qemu.args(["-drive", &drive, "-device", &format!("nvme,drive={id},serial={id}")]);
    }
    qemu.current_dir(work_dir).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let begin = Instant::now();
    let mut guest = Guest(qemu.spawn().context("qemu-system-x86_64")?);
    let lines = follow(guest.0.stdout.take().context("no console")?);
    let mut trouble = Vec::new();
    let mut is_done = false;
    loop {
        match lines.recv_timeout(patience.saturating_sub(begin.elapsed())) {
            Ok(line) => {
                println!("{:7.1} {line}", begin.elapsed().as_secs_f64());
                is_done |= line.starts_with(DONE);
                if SIGNS_OF_TROUBLE.iter().any(|sign| line.contains(sign)) {
                    trouble.push(line);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest was not done after {} s", patience.as_secs());
            }
        }
    }
    let status = guest.0.wait()?;
    ensure!(status.success(), "qemu-system-x86_64: {status}");
    ensure!(trouble.is_empty(), "the guest met an error: {}", trouble.join("; "));
    ensure!(is_done, "the guest did not finish");
    println!("systemd: the guest took {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

fn follow(console: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
