//! Processor time of this process, and of the server and its successors.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

use crate::connection::Connection;
use crate::status;

/// How often the server's time is looked at: what it used between the last look and its death is
/// not counted.
const INTERVAL: Duration = Duration::from_millis(50);

/// Seconds that this process has used.
pub fn own_s() -> f64 {
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    getrusage(UsageWho::RUSAGE_SELF)
        .map_or(0.0, |usage| seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Seconds that a process has used; `None` if it is gone, or not visible from here.
fn process_s(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; fields count from behind it, state first.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let total = ticks()? + ticks()?;
    Some(total as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Adds up the time of the server, whoever that is.
#[derive(Debug)]
pub struct ServerClock {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<f64>>,
}

impl ServerClock {
    /// Starts with the server of this pid; asks for the next one when that is gone.
    pub fn start(connection: Connection, pid: u32) -> std::io::Result<ServerClock> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("server-clock".into())
            .spawn(move || follow(&connection, pid, &stopped))?;
        Ok(ServerClock { stop, thread })
    }

    /// Seconds used since the start; `None` if the server's time is not visible from here.
    pub fn stop(self) -> Option<f64> {
        self.stop.store(true, Relaxed);
        self.thread.join().ok().flatten()
    }
}

fn follow(connection: &Connection, mut pid: u32, stopped: &AtomicBool) -> Option<f64> {
    // What the first server used before the start does not count; a successor counts whole.
    let mut before = process_s(pid)?;
    let mut now = before;
    let mut total = 0.0;
    loop {
        let is_last = stopped.load(Relaxed);
        match process_s(pid) {
            Some(seconds) => now = seconds,
            None if is_last => {}
            None => {
                if let Ok(status) = status::ask(connection)
                    && status.pid != pid
                {
                    total += now - before;
                    (pid, before) = (status.pid, 0.0);
                    now = process_s(pid).unwrap_or(0.0);
                }
            }
        }
        if is_last {
            return Some(total + now - before);
        }
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_time_and_one_that_is_not_there_has_none() {
        assert!(process_s(std::process::id()).is_some());
        assert!(process_s(u32::MAX).is_none());
    }
}
