//! What goes wrong between a server and its storage: delays, duplicates, late copies, cut lines.

use std::collections::{BinaryHeap, VecDeque};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nebd_rpc::frame::Header;

use crate::stamp::Dice;

/// How often what goes wrong; per 1000 operations unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    /// Operations that are carried out later, and so out of order.
    pub delay: u32,
    /// Longest such delay, in milliseconds.
    pub delay_ms_max: u64,
    /// Operations that are delivered a second time, later.
    pub duplicate: u32,
    /// Frames of a dead connection are delivered again after its successor has written: each this
    /// many times.
    pub redeliver: u32,
    /// Connections that break, per million operations.
    pub cut_per_million: u32,
}

impl Faults {
    /// Everything works.
    pub const NONE: Faults =
        Faults { delay: 0, delay_ms_max: 0, duplicate: 0, redeliver: 0, cut_per_million: 0 };
    /// What the campaigns use.
    pub const LATE: Faults =
        Faults { delay: 20, delay_ms_max: 20, duplicate: 20, redeliver: 3, cut_per_million: 100 };
}

/// A data frame, kept.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub payload: std::sync::Arc<[u8]>,
}

impl Frame {
    fn overlaps(&self, other: &Header) -> bool {
        let (a, b) = (&self.header, other);
        a.offset < b.offset.saturating_add(b.length) && b.offset < a.offset.saturating_add(a.length)
    }
}

/// Most frames and bytes that a connection's history keeps.
const HISTORY_FRAMES: usize = 2048;
const HISTORY_BYTES: usize = 16 << 20;

/// The last changes that came over a connection.
#[derive(Debug, Default)]
pub struct History {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl History {
    /// Keeps a frame, and forgets the oldest if there are too many.
    pub fn push(&mut self, frame: Frame) {
        self.bytes += frame.payload.len();
        self.frames.push_back(frame);
        while self.frames.len() > HISTORY_FRAMES || self.bytes > HISTORY_BYTES {
            let Some(oldest) = self.frames.pop_front() else { break };
            self.bytes -= oldest.payload.len();
        }
    }

    /// The frames, oldest first.
    pub fn into_frames(self) -> impl Iterator<Item = Frame> {
        self.frames.into_iter()
    }
}

/// Frames of dead connections that wait to be delivered again to their volume.
#[derive(Debug, Default)]
pub struct Stale {
    frames: Vec<(Frame, u32)>,
}

/// Most stale frames of a volume; the newest stay, they hurt most.
const STALE_MAX: usize = 8192;

impl Stale {
    /// A frame to be delivered again `times` times.
    pub fn push(&mut self, frame: Frame, times: u32) {
        if times > 0 {
            self.frames.push((frame, times));
        }
        if self.frames.len() > STALE_MAX {
            self.frames.drain(..STALE_MAX / 2);
        }
    }

    /// `written` was just applied for a successor: up to two older frames to be delivered now,
    /// preferably ones that overlap it.
    pub fn after(&mut self, written: &Header, dice: &mut Dice) -> Vec<Frame> {
        let mut chosen = Vec::new();
        for attempt in 0..48 {
            let count = self.frames.len();
            if count == 0 || chosen.len() == 2 {
                break;
            }
            let at = dice.below(count as u64) as usize;
            let (frame, left) = &mut self.frames[at];
            let is_older = frame.header.fence.epoch < written.fence.epoch;
            if !is_older || !(frame.overlaps(written) || attempt > 40) {
                continue;
            }
            chosen.push(frame.clone());
            *left -= 1;
            if *left == 0 {
                self.frames.swap_remove(at);
            }
        }
        chosen
    }
}

struct Later<T> {
    due: Instant,
    what: T,
}

impl<T> PartialEq for Later<T> {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl<T> Eq for Later<T> {}

impl<T> PartialOrd for Later<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Later<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.due.cmp(&self.due) // The heap's greatest is the one due first.
    }
}

/// Things to be done later, by whoever calls [`wait`](Self::wait).
pub struct DelayQueue<T> {
    heap: Mutex<BinaryHeap<Later<T>>>,
    added: Condvar,
}

impl<T> Default for DelayQueue<T> {
    fn default() -> Self {
        DelayQueue { heap: Mutex::default(), added: Condvar::new() }
    }
}

impl<T> DelayQueue<T> {
    /// To be done after `delay`.
    pub fn push(&self, delay: Duration, what: T) {
        let mut heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        heap.push(Later { due: Instant::now() + delay, what });
        self.added.notify_one();
    }

    /// Waits for the next thing that is due.
    pub fn wait(&self) -> T {
        let mut heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = Instant::now();
            let due = heap.peek().map(|later| later.due);
            heap = match due {
                None => self.added.wait(heap).unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    let wait = self.added.wait_timeout(heap, due - now);
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => match heap.pop() {
                    Some(later) => return later.what,
                    None => heap,
                },
            };
        }
    }
}
