//! A load without checks on any vhost-user-blk server, to measure it: what `upgrade-tests drive` does.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;

use crate::stamp::Dice;
use crate::vhost_device::{Disk, RequestKind};

/// A server that is silent for so long is broken.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writes, or reads.
    pub is_write: bool,
    /// Anywhere, or one block after the other.
    pub is_random: bool,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: usize,
    /// How long.
    pub time: Duration,
    /// Look for answers all the time, instead of waiting to be called.
    pub polls: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Result {
    /// Requests that were answered in time.
    pub requests: usize,
    /// Of them a second.
    pub iops: f64,
    /// Latencies.
    pub latency_us: Latencies,
}

/// Latencies, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latencies {
    /// Half of them were shorter.
    pub p50: f64,
    /// 99 of 100 were shorter.
    pub p99: f64,
}

/// Loads the disk through its queues, and checks nothing but that all is answered well.
pub fn drive(disk: &mut Disk, load: &Load) -> anyhow::Result<Result> {
    let blocks = disk.size_bytes / load.block_bytes;
    anyhow::ensure!(blocks > 0 && load.depth > 0, "there is nothing to be done");
    anyhow::ensure!(load.depth <= disk.guest.slots(), "more requests than slots");
    let kind = if load.is_write { RequestKind::Write } else { RequestKind::Read };
    let (mut dice, mut next) = (Dice::new(1), 0);
    let mut submit = |disk: &mut Disk, slot: usize| {
        next = if load.is_random { dice.below(blocks) } else { (next + 1) % blocks };
        disk.guest.submit(slot, kind, next * load.block_bytes, &[load.block_bytes as usize]);
    };
    for slot in 0..load.depth {
        submit(disk, slot);
    }
    disk.guest.kick();
    let begin = Instant::now();
    let mut since = vec![begin; load.depth];
    let mut latencies_ns = Vec::with_capacity(1 << 22);
    let (mut left, mut answers) = (load.depth, Vec::with_capacity(load.depth));
    while left > 0 {
        if disk.guest.reap(|answer| answers.push(answer))? == 0 {
            if !load.polls && disk.guest.arm() {
                disk.check()?;
                wait(disk)?;
            }
            continue;
        }
        let now = Instant::now();
        for answer in answers.drain(..) {
            anyhow::ensure!(answer.errno == 0, "a request failed: {}", answer.errno);
            if now.duration_since(begin) >= load.time {
                left -= 1;
                continue;
            }
            latencies_ns.push(now.duration_since(since[answer.slot]).as_nanos() as u64);
            since[answer.slot] = now;
            submit(disk, answer.slot);
        }
        disk.guest.kick();
    }
    latencies_ns.sort_unstable();
    let requests = latencies_ns.len();
    anyhow::ensure!(requests > 0, "no request was answered in time");
    let at = |share: f64| latencies_ns[((requests - 1) as f64 * share) as usize] as f64 / 1e3;
    Ok(Result {
        requests,
        iops: requests as f64 / load.time.as_secs_f64(),
        latency_us: Latencies { p50: at(0.5), p99: at(0.99) },
    })
}

/// Until the device calls.
fn wait(disk: &Disk) -> anyhow::Result<()> {
    let mut polled = [PollFd::from_borrowed_fd(disk.called(), PollFlags::IN)];
    let limit = Timespec { tv_sec: SILENCE_MAX.as_secs() as i64, tv_nsec: 0 };
    let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&limit)))?;
    anyhow::ensure!(ready > 0, "nothing was answered within {SILENCE_MAX:?}");
    Ok(())
}
