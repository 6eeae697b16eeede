//! The part client as a device of the test harness.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use nebd_client::{
    Buffer, CompletionMode, DataRange, Errno, Io as ClientIo, OpFlags, OpenError, Options, Queue,
    Session, SubmitError,
};
use nebd_upgrade_tests::device::{Device, DeviceGone, Done, Geometry, Io, Op};

/// Requests in flight.
const DEPTH: u32 = 32;
/// Room for every request's data: 32 of at most 64 KiB, with some to spare.
const ARENA_BYTES: u64 = 16 << 20;

/// A volume, attached with one queue.
#[derive(Debug)]
pub struct PartDevice {
    session: Session,
    queue: Queue,
    in_flight: HashMap<u64, Flight>,
    /// Taken, but not yet in the ring.
    waiting: VecDeque<(u64, Io)>,
}

#[derive(Debug)]
struct Flight {
    op: Op,
    arena: Vec<Buffer>,
    buffers: Vec<Vec<u8>>,
}

impl PartDevice {
    /// Attaches a volume.
    pub fn open(socket: &Path, volume: &str) -> Result<PartDevice, OpenError> {
        let options = Options::new()
            .socket(socket)
            .depth(DEPTH)
            .arena_bytes(ARENA_BYTES)
            .completion(CompletionMode::Manual);
        let session = Session::open(volume, options)?;
        // A session has at least one queue; that it has none would be the library's bug.
        let queue = session.queue(0).ok_or(OpenError::Layout(0))?;
        let (in_flight, waiting) = (HashMap::new(), VecDeque::new());
        Ok(PartDevice { session, queue, in_flight, waiting })
    }

    /// Waits for a completion, at most this long.
    pub fn wait(&self, timeout: Duration) {
        self.queue.wait(Some(timeout));
    }

    /// Puts a request into the ring; gives it back if there is no room now.
    fn start(&mut self, tag: u64, io: Io) -> Result<Option<Io>, DeviceGone> {
        let mut arena = Vec::with_capacity(io.buffers.len());
        for bytes in &io.buffers {
            let Ok(mut buffer) = self.session.alloc(bytes.len()) else {
                return Ok(Some(io)); // Something in flight gives its room back.
            };
            buffer.write(0, bytes);
            arena.push(buffer);
        }
        let ranges: Vec<DataRange<'_>> = arena.iter().map(DataRange::from).collect();
        let request = match io.op {
            Op::Read => ClientIo::readv(io.offset, &ranges),
            Op::Write => ClientIo::writev(io.offset, &ranges),
            Op::Flush => ClientIo::flush(),
            Op::Discard => ClientIo::discard(io.offset, io.length),
            Op::WriteZeroes => ClientIo::write_zeroes(io.offset, io.length),
        };
        let flags = if io.fua { OpFlags::FUA } else { OpFlags::NONE };
        match self.queue.submit(request.with_flags(flags), tag) {
            Ok(()) => {
                self.in_flight.insert(tag, Flight { op: io.op, arena, buffers: io.buffers });
                Ok(None)
            }
            Err(SubmitError::WouldBlock) => Ok(Some(io)),
            Err(error) => Err(DeviceGone(Box::new(error))),
        }
    }

    fn start_waiting(&mut self) -> Result<(), DeviceGone> {
        let mut started = false;
        while let Some((tag, io)) = self.waiting.pop_front() {
            if let Some(io) = self.start(tag, io)? {
                self.waiting.push_front((tag, io));
                break;
            }
            started = true;
        }
        if started {
            self.queue.kick();
        }
        Ok(())
    }

    fn finish(&mut self, tag: u64, result: Result<(), Errno>, out: &mut Vec<Done>) {
        let errno = result.err().map_or(0, |errno| errno.0);
        let mut buffers = Vec::new();
        if let Some(flight) = self.in_flight.remove(&tag) {
            buffers = flight.buffers;
            if flight.op == Op::Read {
                for (bytes, arena) in buffers.iter_mut().zip(&flight.arena) {
                    arena.read(0, bytes);
                }
            }
        }
        out.push(Done { tag, errno, buffers });
    }
}

impl Device for PartDevice {
    fn geometry(&self) -> Geometry {
        let info = self.session.info();
        Geometry {
            size_bytes: info.size,
            block_bytes: info.block_size,
            depth: DEPTH as usize,
            iovecs_max: 16,
            transfer_bytes_max: info.transfer_bytes_max.min(64 << 10),
            can_discard: info.can_discard,
            can_write_zeroes: info.can_write_zeroes,
        }
    }

    fn submit(&mut self, tag: u64, io: Io) -> Result<(), DeviceGone> {
        self.waiting.push_back((tag, io));
        self.start_waiting()
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        let mut completed = Vec::new();
        self.queue.reap(|tag, result| completed.push((tag, result)));
        for (tag, result) in completed {
            self.finish(tag, result, out);
        }
        self.start_waiting()
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.queue.event_fd())
    }
}
