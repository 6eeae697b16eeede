//! A volume read or written by many requests at a time, on one queue of a session of its own.
//!
//! There is a buffer a slot. A slot's requests are in flight together, and the slot is used again
//! once all of them are answered. Requests wait while the server is replaced, without limit; Ctrl-C
//! ends the wait.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use nebd_client::{Buffer, CompletionMode, Event, Io, Options, Queue, Session, SubmitError};

use crate::bench::failed;
use crate::demo::process::is_interrupted;
use crate::failure::Failure;

/// Bytes of a buffer.
pub const CHUNK_BYTES: usize = 1 << 20;
/// At the beginning of each block of a buffer before it is read into.
const UNREAD: &[u8] = b"nebdctl: never read";
/// Most requests that one chunk is cut into: one for each other piece of 64 KiB, or a hole.
const RUNS_MAX: u32 = 16;
/// How long a wait lasts until Ctrl-C is looked for.
const WAIT_MAX: Duration = Duration::from_millis(50);
/// How long requests in flight are waited for when it is over.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The session, its queue and its buffers.
pub struct Pump {
    session: Session,
    queue: Queue,
    buffers: Vec<Buffer>,
    /// Requests of each slot; the last one's have no buffer.
    in_flight: Vec<u32>,
    /// The first request that failed.
    failed: Option<String>,
    /// Whether buffers are spoilt before they are read into.
    distrusts: bool,
}

impl Pump {
    /// Attaches the volume: exclusively for writing, beside others for reading.
    pub fn open(socket: &Path, volume: &str, iodepth: u32, writes: bool) -> Result<Pump, Failure> {
        let parked = format!(
            "nebdctl: {volume} is parked, and waits for you: see `nebdctl volume info {volume}`"
        );
        let options = Options::new()
            .socket(socket)
            .depth((iodepth * RUNS_MAX).next_power_of_two())
            .arena_bytes((u64::from(iodepth) + 1) * CHUNK_BYTES as u64)
            .completion(CompletionMode::Manual)
            .exclusive(writes)
            .read_only(!writes)
            .on_event(move |event| {
                if event == Event::Parked {
                    eprintln!("{parked}");
                }
            });
        let session = Session::open(volume, options).map_err(|error| failed(socket, error))?;
        let queue = session.queue(0).context("the session has no queue")?;
        let buffers = (0..iodepth)
            .map(|_| session.alloc(CHUNK_BYTES))
            .collect::<Result<Vec<_>, _>>()
            .context("the session's arena is too small")?;
        let in_flight = vec![0; buffers.len() + 1];
        Ok(Pump { session, queue, buffers, in_flight, failed: None, distrusts: false })
    }

    /// The volume's name.
    pub fn volume(&self) -> &str {
        self.session.volume().as_str()
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        self.session.info().size
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        self.session.info().block_size
    }

    /// Slots that have a buffer.
    pub fn slot_count(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes of all buffers.
    pub fn window_bytes(&self) -> u64 {
        (self.buffers.len() * CHUNK_BYTES) as u64
    }

    /// Waits until nothing of the slot is in flight.
    pub fn settle(&mut self, slot: usize) -> Result<(), Failure> {
        self.check()?;
        while self.in_flight[slot] > 0 {
            self.wait()?;
        }
        Ok(())
    }

    /// Fills a slot's buffer; the slot is settled.
    pub fn copy_in(&mut self, slot: usize, bytes: &[u8]) -> Result<(), Failure> {
        self.copy_at(slot, 0, bytes)
    }

    fn copy_at(&mut self, slot: usize, at: usize, bytes: &[u8]) -> Result<(), Failure> {
        match self.buffers[slot].write(at, bytes) {
            true => Ok(()),
            false => Err(anyhow!("{} bytes do not fit a buffer", bytes.len()).into()),
        }
    }

    /// Copies what was read into a slot's buffer; the slot is settled.
    pub fn copy_out(&self, slot: usize, bytes: &mut [u8]) -> Result<(), Failure> {
        match self.buffers[slot].read(0, bytes) {
            true => Ok(()),
            false => Err(anyhow!("{} bytes are more than a buffer has", bytes.len()).into()),
        }
    }

    /// From here on a block that a read leaves out does not pass for what was in the buffer before.
    /// (`null` leaves them all out, and counts on them to be zeros.)
    pub fn distrust(&mut self) {
        self.distrusts = true;
    }

    /// Reads at `offset` into a settled slot.
    pub fn read(&mut self, slot: usize, offset: u64, length: usize) -> Result<(), Failure> {
        if self.distrusts {
            for at in (0..length).step_by(512) {
                self.copy_at(slot, at, UNREAD)?;
            }
        }
        self.submit(Kind::Read, slot, offset, length as u64, 0)
    }

    /// Writes a part of a slot's buffer, to `offset` of the volume.
    pub fn write(&mut self, slot: usize, offset: u64, part: Range<usize>) -> Result<(), Failure> {
        self.submit(Kind::Write, slot, offset, part.len() as u64, part.start as u64)
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), Failure> {
        self.submit(Kind::WriteZeroes, self.buffers.len(), offset, length, 0)
    }

    /// Tells the server of what was submitted.
    pub fn kick(&self) {
        self.queue.kick();
    }

    /// Waits for everything that was written, and makes it durable.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.kick();
        (0..self.in_flight.len()).try_for_each(|slot| self.settle(slot))?;
        let bare = self.buffers.len();
        self.submit(Kind::Flush, bare, 0, 0, 0)?;
        self.kick();
        self.settle(bare)
    }

    fn submit(
        &mut self,
        kind: Kind,
        slot: usize,
        offset: u64,
        length: u64,
        place: u64,
    ) -> Result<(), Failure> {
        loop {
            // At most a chunk, where there is a buffer at all.
            let range = |buffers: &[Buffer]| buffers.get(slot).map(|_| (place, length as u32));
            let io = match (kind, range(&self.buffers)) {
                (Kind::Read, Some((at, length))) => {
                    Io::read(offset, self.buffers[slot].range(at, length))
                }
                (Kind::Write, Some((at, length))) => {
                    Io::write(offset, self.buffers[slot].range(at, length))
                }
                (Kind::WriteZeroes, _) => Io::write_zeroes(offset, length),
                _ => Io::flush(),
            };
            match self.queue.submit(io, tag(kind, slot, offset)) {
                Ok(()) => {
                    self.in_flight[slot] += 1;
                    return Ok(());
                }
                Err(SubmitError::WouldBlock) => {
                    self.kick();
                    self.wait()?;
                }
                Err(error) => {
                    let volume = self.volume();
                    let what = kind.name();
                    return Err(anyhow!("volume {volume}: {what} at byte {offset}: {error}").into());
                }
            }
        }
    }

    fn wait(&mut self) -> Result<(), Failure> {
        self.queue.wait(Some(WAIT_MAX));
        self.reap();
        self.check()
    }

    fn reap(&mut self) {
        let volume = self.session.volume();
        let (in_flight, failed) = (&mut self.in_flight, &mut self.failed);
        self.queue.reap(|user_data, result| {
            let (what, slot, offset) = untag(user_data);
            if let Some(count) = in_flight.get_mut(slot) {
                *count = count.saturating_sub(1);
            }
            if let Err(errno) = result {
                failed.get_or_insert_with(|| {
                    format!("volume {volume}: {what} at byte {offset}: {errno}")
                });
            }
        });
    }

    fn check(&mut self) -> Result<(), Failure> {
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        if let Some(problem) = &self.failed {
            return Err(anyhow!("{problem}").into());
        }
        match self.queue.failure() {
            Some(errno) => Err(anyhow!("volume {}: detached: {errno}", self.volume()).into()),
            None => Ok(()),
        }
    }

    /// Waits a while for what is in flight, whatever becomes of it, and detaches.
    pub fn close(mut self) {
        self.kick();
        let deadline = Instant::now() + DRAIN_LIMIT;
        let is_busy = |pump: &Pump| pump.in_flight.iter().any(|count| *count > 0);
        while is_busy(&self) && self.queue.failure().is_none() && Instant::now() < deadline {
            self.queue.wait(Some(WAIT_MAX));
            self.reap();
        }
        // A session whose requests hang would be waited for without limit: it ends with the process.
        if !is_busy(&self)
            && let Err(error) = self.session.close()
        {
            eprintln!("nebdctl: {error}");
        }
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    WriteZeroes,
    Flush,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Read, Kind::Write, Kind::WriteZeroes, Kind::Flush];

    fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::WriteZeroes => "write of zeros",
            Kind::Flush => "flush",
        }
    }
}

/// Offsets are multiples of 512, which leaves 9 bits: 2 for the kind, 7 for the slot.
fn tag(kind: Kind, slot: usize, offset: u64) -> u64 {
    offset | (kind as u64) << 7 | slot as u64
}

fn untag(tag: u64) -> (&'static str, usize, u64) {
    let kind = Kind::ALL[(tag >> 7 & 3) as usize];
    (kind.name(), (tag & 127) as usize, tag & !511)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_tells_all() {
        for kind in Kind::ALL {
            for (slot, offset) in [(0, 0), (64, 512), (16, 1 << 50)] {
                assert_eq!(untag(tag(kind, slot, offset)), (kind.name(), slot, offset));
            }
        }
    }
}
