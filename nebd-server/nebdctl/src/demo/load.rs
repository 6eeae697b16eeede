//! Two volumes under load, one thread each: the file system's disk, and one of stamped blocks.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nebd_upgrade_tests::client_device::ClientDevice;
use nebd_upgrade_tests::device::Device;
use nebd_upgrade_tests::report::VolumeReport;
use nebd_upgrade_tests::stream::{Gauges, Goal as StreamGoal, Stream, StreamOptions};
use nebd_upgrade_tests::timeline::Timeline;
use nebd_upgrade_tests::workload::Mix;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::demo::disk::{Disk, DiskReport, Goal as DiskGoal};
use crate::demo::process::is_interrupted;

/// Longest sleep of a thread, so that it notices a change of plans.
const WAIT_MAX: Duration = Duration::from_millis(20);

/// The load, running.
pub struct Load {
    finish: Arc<AtomicBool>,
    gauges: [Arc<Gauges>; 2],
    disk: JoinHandle<Result<DiskReport>>,
    stream: JoinHandle<VolumeReport>,
}

/// What came of it.
#[derive(Debug)]
pub struct Loaded {
    /// On the file system's disk.
    pub disk: DiskReport,
    /// On the volume of stamped blocks.
    pub stream: VolumeReport,
}

/// Writes the image to its disk.
pub fn import(disk: &mut Disk<ClientDevice>) -> Result<()> {
    disk.begin_import();
    pump_disk(disk, &DiskGoal::Import)
}

impl Load {
    /// Starts both; `export` is where the disk's contents go in the end.
    pub fn start(
        mut disk: Disk<ClientDevice>,
        scratch: ClientDevice,
        export: File,
        timeline: Arc<Timeline>,
    ) -> Result<Load> {
        let finish = Arc::new(AtomicBool::new(false));
        let options = StreamOptions { mix: Mix::writes(), depth: 32, ..StreamOptions::default() };
        let mut stream = Stream::new(scratch, 2, options, timeline);
        let gauges = [disk.gauges(), stream.gauges()];
        let finished = finish.clone();
        let disk = std::thread::Builder::new()
            .name("demo-disk".into())
            .spawn(move || {
                while !finished.load(Relaxed) && !disk.is_at_rest(&DiskGoal::Churn) {
                    if !disk.pump(&DiskGoal::Churn)? {
                        wait(disk.device());
                    }
                }
                pump_disk(&mut disk, &DiskGoal::Drain)?;
                disk.begin_export(export);
                pump_disk(&mut disk, &DiskGoal::Export)?;
                Ok(disk.report())
            })
            .context("cannot start a thread")?;
        let finished = finish.clone();
        let stream = std::thread::Builder::new()
            .name("demo-stamps".into())
            .spawn(move || {
                for goal in [StreamGoal::Run, StreamGoal::Drain, StreamGoal::Sweep] {
                    let is_over = |stream: &Stream<ClientDevice>| match goal {
                        StreamGoal::Run => finished.load(Relaxed) || stream.is_at_rest(goal),
                        _ => stream.is_at_rest(goal) || is_interrupted(),
                    };
                    while !is_over(&stream) {
                        if !stream.pump(goal) {
                            wait(stream.device());
                        }
                    }
                }
                stream.report()
            })
            .context("cannot start a thread")?;
        Ok(Load { finish, gauges, disk, stream })
    }

    /// Writes in flight on both volumes.
    pub fn writes_in_flight(&self) -> u64 {
        self.gauges.iter().map(|gauges| gauges.writes.load(Relaxed)).sum()
    }

    /// Requests answered so far, on each volume.
    pub fn completions(&self) -> [u64; 2] {
        self.gauges.each_ref().map(|gauges| gauges.completions.load(Relaxed))
    }

    /// The longest gap on either volume since this was asked last, in nanoseconds.
    pub fn take_gap_ns(&self) -> u64 {
        self.gauges.iter().map(|gauges| gauges.gap_ns_max.swap(0, Relaxed)).max().unwrap_or(0)
    }

    /// Whether a thread has ended before it was told to: its device is gone.
    pub fn is_broken(&self) -> bool {
        self.disk.is_finished() || self.stream.is_finished()
    }

    /// Ends the load, reads everything once more, and tells what happened.
    pub fn finish(self) -> Result<Loaded> {
        self.finish.store(true, Relaxed);
        let disk = self.disk.join().map_err(|_| anyhow!("the disk's thread panicked"))?;
        let stream = self.stream.join().map_err(|_| anyhow!("the stamps' thread panicked"))?;
        Ok(Loaded { disk: disk?, stream })
    }
}

fn pump_disk(disk: &mut Disk<ClientDevice>, goal: &DiskGoal) -> Result<()> {
    while !disk.is_at_rest(goal) && !is_interrupted() {
        if !disk.pump(goal).context("cannot read the image or write its copy")? {
            wait(disk.device());
        }
    }
    Ok(())
}

/// Sleeps until the device has something to tell, at most a little while.
fn wait(device: &impl Device) {
    let Some(event) = device.event() else { return std::thread::sleep(WAIT_MAX) };
    let timeout = Timespec { tv_sec: 0, tv_nsec: WAIT_MAX.as_nanos() as i64 };
    // An interrupted wait is a short one.
    let _ = poll(&mut [PollFd::from_borrowed_fd(event, PollFlags::IN)], Some(&timeout));
}
