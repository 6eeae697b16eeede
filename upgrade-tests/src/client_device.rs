//! A volume of nebd, through the part client.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use nebd_client::{Buffer, CompletionMode, DataRange, Io, OpFlags, OpenError, Options, Queue};
use nebd_client::{Session, SubmitError};

use crate::device::{self, Device, DeviceGone, Done, Geometry, Op};

/// Most bytes of one request of the harness: its share of the arena.
const TRANSFER_BYTES_MAX: usize = 64 * 1024;

/// A slot of the arena, and the request that uses it.
struct Lane {
    buffer: Buffer,
    request: Option<(u64, Op, Vec<Vec<u8>>)>,
}

/// An attached volume, driven through its queue.
pub struct ClientDevice {
    session: Session,
    queue: Queue,
    geometry: Geometry,
    lanes: Vec<Lane>,
    free: Vec<usize>,
    kick_needed: bool,
}

/// How a volume is attached.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Requests in flight; a power of two.
    pub depth: u32,
    /// How long to wait for a server.
    pub connect_timeout: Duration,
}

impl Default for AttachOptions {
    fn default() -> AttachOptions {
        AttachOptions { depth: 16, connect_timeout: Duration::from_secs(20) }
    }
}

impl ClientDevice {
    /// Attaches `volume` at the server behind `socket`.
    pub fn open(socket: &Path, volume: &str, how: &AttachOptions) -> Result<Self, OpenError> {
        let depth = how.depth.next_power_of_two();
        let arena_bytes = u64::from(depth) * TRANSFER_BYTES_MAX as u64;
        let options = Options::new()
            .socket(socket)
            .depth(depth)
            .arena_bytes(arena_bytes)
            .completion(CompletionMode::Manual)
            .connect_timeout(how.connect_timeout);
        let session = Session::open(volume, options)?;
        let info = session.info();
        let queue = session.queue(0).ok_or(OpenError::Forked)?;
        let lanes: Vec<Lane> = (0..depth)
            .map_while(|_| session.alloc(TRANSFER_BYTES_MAX).ok())
            .map(|buffer| Lane { buffer, request: None })
            .collect();
        let geometry = Geometry {
            size_bytes: info.size,
            block_bytes: info.block_size,
            depth: lanes.len(),
            iovecs_max: 8,
            transfer_bytes_max: info.transfer_bytes_max.min(TRANSFER_BYTES_MAX as u64),
            can_discard: info.can_discard,
            // Asked for in any case: the server writes the zeros where the backend cannot.
            can_write_zeroes: true,
        };
        let free = (0..lanes.len()).collect();
        Ok(ClientDevice { session, queue, geometry, lanes, free, kick_needed: false })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }
}

impl Device for ClientDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u64, io: device::Io) -> Result<(), DeviceGone> {
        let lane_index = self.free.pop().ok_or_else(|| DeviceGone("more than depth".into()))?;
        let lane = &mut self.lanes[lane_index];
        // Reads too: what the harness put into a buffer to be overwritten must lie in the arena.
        let mut at = 0;
        for buffer in &io.buffers {
            if !lane.buffer.write(at, buffer) {
                return Err(DeviceGone("a request is larger than its buffer".into()));
            }
            at += buffer.len();
        }
        let mut at = 0;
        let ranges: Vec<DataRange<'_>> = io
            .buffers
            .iter()
            .map(|buffer| {
                let range = lane.buffer.range(at, buffer.len() as u32);
                at += buffer.len() as u64;
                range
            })
            .collect();
        let request = match io.op {
            Op::Read => Io::readv(io.offset, &ranges),
            Op::Write => Io::writev(io.offset, &ranges),
            Op::Flush => Io::flush(),
            Op::Discard => Io::discard(io.offset, io.length),
            Op::WriteZeroes => Io::write_zeroes(io.offset, io.length),
        };
        let flags = if io.fua { OpFlags::FUA } else { OpFlags::NONE };
        let submitted = self.queue.submit(request.with_flags(flags), lane_index as u64);
        self.kick_needed = true;
        lane.request = Some((tag, io.op, io.buffers));
        submitted.map_err(|error: SubmitError| DeviceGone(Box::new(error)))
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        if std::mem::take(&mut self.kick_needed) {
            self.queue.kick();
        }
        if self.reap(out) == 0 && self.queue.arm() {
            // Something came meanwhile, and the event will not tell.
            self.reap(out);
        }
        Ok(())
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.queue.event_fd())
    }
}

impl ClientDevice {
    fn reap(&mut self, out: &mut Vec<Done>) -> usize {
        let (lanes, free) = (&mut self.lanes, &mut self.free);
        self.queue.reap(|lane_index, result| {
            let lane = &mut lanes[lane_index as usize];
            let Some((tag, op, mut buffers)) = lane.request.take() else {
                // Not in flight: the stream is told, and reports it.
                return out.push(Done { tag: u64::MAX, errno: 0, buffers: Vec::new() });
            };
            if op == Op::Read {
                let mut at = 0;
                for buffer in &mut buffers {
                    let is_inside = lane.buffer.read(at, buffer);
                    debug_assert!(is_inside, "it was written to the same place at submission");
                    at += buffer.len();
                }
            }
            free.push(lane_index as usize);
            let errno = result.err().map_or(0, |errno| errno.0);
            out.push(Done { tag, errno, buffers });
        })
    }
}
