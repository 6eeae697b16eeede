//! Many volumes under load, on a few threads.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::device::Device;
use crate::report::VolumeReport;
use crate::stream::{Gauges, Goal, Stream};

/// Volumes under load until they are told to rest.
pub struct Load<D> {
    shared: Arc<Shared>,
    gauges: Vec<Arc<Gauges>>,
    threads: Vec<JoinHandle<Vec<Stream<D>>>>,
}

struct Shared {
    goal: AtomicU8,
    /// Threads all of whose streams rest, for the present goal.
    resting: AtomicUsize,
}

impl Shared {
    fn goal(&self) -> Goal {
        let goal = self.goal.load(SeqCst);
        [Goal::Run, Goal::Drain]
            .into_iter()
            .find(|known| *known as u8 == goal)
            .unwrap_or(Goal::Sweep)
    }
}

impl<D: Device + 'static> Load<D> {
    /// Puts streams under load on `threads` threads.
    pub fn start(streams: Vec<Stream<D>>, threads: usize) -> Load<D> {
        Load::start_with(streams, threads, Goal::Run)
    }

    /// The same with another goal than [`Goal::Run`] to begin with.
    pub fn start_with(streams: Vec<Stream<D>>, threads: usize, goal: Goal) -> Load<D> {
        let gauges = streams.iter().map(Stream::gauges).collect();
        let goal = AtomicU8::new(goal as u8);
        let shared = Arc::new(Shared { goal, resting: AtomicUsize::new(0) });
        let threads = threads.clamp(1, streams.len().max(1));
        let mut shares: Vec<Vec<Stream<D>>> = (0..threads).map(|_| Vec::new()).collect();
        for (index, stream) in streams.into_iter().enumerate() {
            shares[index % threads].push(stream);
        }
        let threads = shares
            .into_iter()
            .map(|share| {
                let shared = shared.clone();
                std::thread::spawn(move || drive(share, &shared))
            })
            .collect();
        Load { shared, gauges, threads }
    }

    /// Figures of every volume.
    pub fn gauges(&self) -> &[Arc<Gauges>] {
        &self.gauges
    }

    /// Writes in flight on all volumes.
    pub fn writes_in_flight(&self) -> u64 {
        self.gauges.iter().map(|gauges| gauges.writes.load(SeqCst)).sum()
    }

    /// Requests answered on all volumes.
    pub fn completions(&self) -> u64 {
        self.gauges.iter().map(|gauges| gauges.completions.load(SeqCst)).sum()
    }

    /// Problems found on all volumes.
    pub fn problems(&self) -> u64 {
        self.gauges.iter().map(|gauges| gauges.problems.load(SeqCst)).sum()
    }

    /// Whether every stream rests: each has done its share of steps, or has given up.
    pub fn is_at_rest(&self) -> bool {
        self.shared.resting.load(SeqCst) == self.threads.len()
    }

    /// Waits until nothing is in flight.
    pub fn drain(self) -> Vec<Stream<D>> {
        self.join(Goal::Drain)
    }

    /// Waits until nothing is in flight, then reads every block.
    pub fn sweep(self) -> Vec<Stream<D>> {
        self.join(Goal::Sweep)
    }

    fn join(self, goal: Goal) -> Vec<Stream<D>> {
        self.shared.goal.store(goal as u8, SeqCst);
        let joined = self.threads.into_iter().map(JoinHandle::join);
        joined
            .flat_map(|streams| streams.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    }
}

/// Sums up what happened on all volumes.
pub fn total<D: Device>(streams: &[Stream<D>]) -> VolumeReport {
    streams.iter().fold(VolumeReport::default(), |mut total, stream| {
        total.add(&stream.report());
        total
    })
}

fn drive<D: Device>(mut streams: Vec<Stream<D>>, shared: &Shared) -> Vec<Stream<D>> {
    let mut counted = false;
    loop {
        let goal = shared.goal();
        let mut moved = false;
        for stream in &mut streams {
            moved |= stream.pump(goal);
        }
        if moved {
            continue;
        }
        if streams.iter().all(|stream| stream.is_at_rest(goal)) {
            if goal != Goal::Run {
                return streams;
            }
            if !counted {
                counted = true;
                shared.resting.fetch_add(1, SeqCst);
            }
        }
        wait(&streams);
    }
}

/// Sleeps until a device has something to say; not for long, for limits and goals are looked at
/// between two sleeps.
fn wait<D: Device>(streams: &[Stream<D>]) {
    let events: Vec<_> = streams.iter().filter_map(|stream| stream.device().event()).collect();
    let limit = Duration::from_millis(if events.len() == streams.len() { 20 } else { 1 });
    if events.is_empty() {
        return std::thread::sleep(limit);
    }
    let mut polled: Vec<_> =
        events.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)).collect();
    let timeout = Timespec { tv_sec: 0, tv_nsec: limit.as_nanos() as i64 };
    // An interrupted or refused poll is only a shorter sleep.
    let _ = rustix::event::poll(&mut polled, Some(&timeout));
}
