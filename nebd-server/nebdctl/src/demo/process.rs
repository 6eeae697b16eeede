//! Processes of the demo, and Ctrl-C. The only `unsafe` of this crate.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::process::{Pid, PidfdFlags, WaitOptions};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Relaxed);
}

/// From here on Ctrl-C and SIGTERM are noted in [`is_interrupted`]; a second one ends the process.
pub fn watch_interrupts() -> nix::Result<()> {
    let flags = SaFlags::SA_RESETHAND | SaFlags::SA_RESTART;
    let action = SigAction::new(SigHandler::Handler(note_interrupt), flags, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether Ctrl-C was pressed.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Relaxed)
}

/// Starts a keeper whose output goes to `log`. It is outside the terminal's process group, so that
/// Ctrl-C reaches this process alone, and is told to end if this process dies unexpectedly.
pub fn spawn(command: &mut Command, log: File) -> std::io::Result<Child> {
    // Servers that outlive their keeper become children of this process, and can be ended.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    // SAFETY: prctl is async-signal-safe, and the closure does nothing else.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
            Ok(())
        })
    };
    command.spawn()
}

/// Sends SIGKILL, through a descriptor, so that it can reach no other process.
pub fn kill_by_pidfd(pid: u32) -> std::io::Result<()> {
    let pid = Pid::from_raw(pid as i32).ok_or(std::io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    Ok(rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL)?)
}

/// Ends the keeper, then whatever servers it left behind.
pub fn end(keeper: &mut Child) {
    const POLITE: Duration = Duration::from_secs(5);
    let deadline = Instant::now() + POLITE;
    if let Some(pid) = Pid::from_raw(keeper.id() as i32)
        && matches!(keeper.try_wait(), Ok(None))
    {
        // Not yet waited for, so the pid is still the keeper's.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    while matches!(keeper.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            let _ = keeper.kill();
            let _ = keeper.wait();
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    end_orphans(deadline);
}

/// Kills and reaps the children that this process did not start itself: orphaned servers.
fn end_orphans(deadline: Instant) {
    // A server that was told to stop gets a moment to do so.
    let patience = Instant::now() + Duration::from_millis(500);
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => continue,
            Ok(None) => {}
            Err(_) => return, // No children are left.
        }
        let now = Instant::now();
        if now >= deadline.max(patience) + Duration::from_secs(1) {
            return;
        }
        if now >= patience {
            children().into_iter().for_each(|pid| drop(kill_by_pidfd(pid)));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes whose parent is this one.
fn children() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    let lists = entries
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}
