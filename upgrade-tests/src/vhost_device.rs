//! A volume of any vhost-user-blk server, driven without a guest.
//!
//! ```text
//!  Device ─► guest: requests, rings ──────── shared memory, doorbells ───────► server
//!   │          │ knows no messages                                              ▲
//!   └─ Driver ─┴► hypervisor: a thread with the connection ─── messages ────────┘
//! ```
//!
//! A server that dies under a connection which stays open must not be noticed. One that closes it finds
//! it made again, with the inflight record, as QEMU does. Answers to nothing, answers twice, bytes that
//! were not written, a ring that stops with something in flight: each ends the device, and the harness
//! reports that.

mod control;
mod guest;
mod hypervisor;
mod memory;
pub mod message;
mod ring;
mod shared;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use nebd_abi::region::RegionError;

pub use control::Control;
use guest::Plan;
pub use guest::{Answer, Guest, PIECES_MAX, RequestKind, TRANSFER_BYTES_MAX};
use hypervisor::{Hypervisor, feature};
use memory::Memory;
pub use message::MessageError;
use ring::Kind;
pub use ring::Violation;
pub use shared::Figures;
use shared::{Command, Shared};

use crate::device::{Device, DeviceGone, Done, Geometry, Io, Op};

/// How a disk is driven.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the server listens.
    pub socket: PathBuf,
    /// Queues.
    pub queues: usize,
    /// Requests in flight.
    pub depth: usize,
    /// Descriptors of a ring; of a split one a power of two.
    pub ring_size: u16,
    /// Packed rings.
    pub packed: bool,
    /// Indirect descriptors.
    pub indirect: bool,
    /// Doorbells are rung by index.
    pub event_idx: bool,
    /// Every message is acknowledged.
    pub acknowledged: bool,
    /// The data of some requests lies in two regions of memory. Not every server can do that:
    /// libvhost-user, of qemu-storage-daemon, takes it for a loop in an indirect table.
    pub straddles: bool,
}

impl Options {
    /// A split ring with all that is usual.
    pub fn new(socket: impl Into<PathBuf>) -> Options {
        Options {
            socket: socket.into(),
            queues: 1,
            depth: 32,
            ring_size: 128,
            packed: false,
            indirect: true,
            event_idx: true,
            acknowledged: true,
            straddles: true,
        }
    }
}

/// Why a disk cannot be driven.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The connection.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// A system call failed.
    #[error("cannot make doorbells")]
    System(#[from] std::io::Error),
    /// The server does not offer what was asked for.
    #[error("the server does not offer the features {0:#x}")]
    Missing(u64),
}

/// What others may do to a driver while its device is under load.
#[derive(Clone)]
pub struct Driver {
    shared: Arc<Shared>,
}

impl Driver {
    /// What happened so far.
    pub fn figures(&self) -> Figures {
        self.shared.figures()
    }

    /// Carries out a control, and returns when it is done; false if the driver has given up.
    pub fn perform(&self, control: Control) -> bool {
        let (done, is_done) = channel();
        self.shared.command(Command::Perform(control, done));
        is_done.recv().is_ok()
    }

    /// Carries out controls at random from now on, or no more.
    pub fn churn(&self, seed: Option<u64>) {
        self.shared.command(Command::Churn(seed));
    }

    /// Why the device is of no use, if it is not.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure()
    }
}

/// A connected disk: its rings, to be driven by one thread, and its hypervisor, a thread of its own.
pub struct Disk {
    /// The rings.
    pub guest: Guest,
    /// Bytes.
    pub size_bytes: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    features: u64,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Disk {
    /// Connects, and starts the rings.
    pub fn open(options: &Options) -> Result<Disk, DriverError> {
        let shared = Arc::new(Shared::new(options.queues)?);
        let mut hypervisor = Hypervisor::new(options.clone(), shared.clone())?;
        let offer = hypervisor.probe()?;
        let kind = Kind {
            size: options.ring_size,
            is_packed: options.packed,
            event_idx: options.event_idx,
            indirect: options.indirect,
        };
        let asked = [
            (kind.is_packed, feature::PACKED),
            (kind.event_idx, feature::EVENT_IDX),
            (kind.indirect, feature::INDIRECT),
            (true, feature::VERSION_1 | feature::PROTOCOL),
        ];
        let asked: u64 = asked.iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum();
        if asked & !offer.features != 0 {
            return Err(DriverError::Missing(asked & !offer.features));
        }
        let plan = Plan::new(options.queues, options.ring_size, options.depth, options.straddles);
        let memory = Arc::new(Memory::new(plan.bytes, plan.split)?);
        let guest = Guest::new(memory.clone(), plan.clone(), kind, shared.clone());
        hypervisor.start(memory, plan, kind)?;
        let thread = std::thread::spawn(move || hypervisor.run());
        Ok(Disk {
            guest,
            size_bytes: offer.size_bytes,
            block_bytes: offer.block_bytes,
            features: offer.features,
            shared,
            thread: Some(thread),
        })
    }

    /// A handle for others.
    pub fn driver(&self) -> Driver {
        Driver { shared: self.shared.clone() }
    }

    /// Readable when the device has called.
    pub fn called(&self) -> BorrowedFd<'_> {
        self.shared.called()
    }

    /// An error once the hypervisor has given up.
    pub fn check(&self) -> Result<(), DeviceGone> {
        self.shared.failure().map_or(Ok(()), |why| Err(DeviceGone(why.into())))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.command(Command::End);
        if let Some(thread) = self.thread.take() {
            // A panic there is a failure of the test that is under way, which has seen its effects.
            let _ = thread.join();
        }
    }
}

struct Request {
    tag: u64,
    op: Op,
    /// A flush is still to come: virtio knows no FUA, so its drivers flush.
    flushes: bool,
    buffers: Vec<Vec<u8>>,
}

/// See the [module](self).
pub struct VhostDevice {
    disk: Disk,
    geometry: Geometry,
    requests: Vec<Option<Request>>,
    free: Vec<usize>,
    answers: Vec<Answer>,
}

impl VhostDevice {
    /// Connects to a server, and drives its disk.
    pub fn open(options: &Options) -> Result<VhostDevice, DriverError> {
        let disk = Disk::open(options)?;
        let geometry = Geometry {
            size_bytes: disk.size_bytes,
            block_bytes: disk.block_bytes.max(512),
            depth: options.depth,
            iovecs_max: PIECES_MAX,
            transfer_bytes_max: TRANSFER_BYTES_MAX as u64,
            can_discard: disk.features & feature::DISCARD != 0,
            can_write_zeroes: disk.features & feature::WRITE_ZEROES != 0,
        };
        Ok(VhostDevice {
            requests: (0..options.depth).map(|_| None).collect(),
            free: (0..options.depth).rev().collect(),
            answers: Vec::new(),
            disk,
            geometry,
        })
    }

    /// A handle for others.
    pub fn driver(&self) -> Driver {
        self.disk.driver()
    }

    /// What the device says its serial is: asked for by a request of its own, while nothing is in flight.
    pub fn serial(&mut self) -> Result<String, DeviceGone> {
        let Some(slot) = self.free.pop() else { return Err(DeviceGone("busy".into())) };
        self.disk.guest.submit(slot, RequestKind::GetId, 0, &[20]);
        self.disk.guest.kick();
        let mut answer = None;
        while answer.is_none() {
            self.disk.check()?;
            if self.disk.guest.arm() {
                let limit = std::time::Duration::from_millis(20);
                message::is_readable(self.disk.called(), limit);
            }
            let reaped = self.disk.guest.reap(|one| answer = Some(one));
            reaped.map_err(|violation| DeviceGone(Box::new(violation)))?;
        }
        let mut bytes = [0; 20];
        self.disk.guest.read_data(slot, 0, &mut bytes);
        self.free.push(slot);
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    fn reap(&mut self, out: &mut Vec<Done>) -> Result<usize, DeviceGone> {
        let mut answers = std::mem::take(&mut self.answers);
        let reaped = self.disk.guest.reap(|answer| answers.push(answer));
        for answer in answers.drain(..) {
            self.finish(answer, out);
        }
        self.answers = answers;
        reaped.map_err(|violation| DeviceGone(Box::new(violation)))
    }

    fn finish(&mut self, answer: Answer, out: &mut Vec<Done>) {
        let Answer { slot, errno } = answer;
        let Some(mut request) = self.requests[slot].take() else { return };
        if request.flushes && errno == 0 {
            request.flushes = false;
            self.requests[slot] = Some(request);
            return self.disk.guest.submit(slot, RequestKind::Flush, 0, &[]);
        }
        if request.op == Op::Read {
            let mut at = 0;
            for buffer in &mut request.buffers {
                self.disk.guest.read_data(slot, at, buffer);
                at += buffer.len();
            }
        }
        self.free.push(slot);
        out.push(Done { tag: request.tag, errno, buffers: request.buffers });
    }
}

impl Device for VhostDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u64, io: Io) -> Result<(), DeviceGone> {
        let slot = self.free.pop().ok_or_else(|| DeviceGone("more than depth".into()))?;
        let guest = &mut self.disk.guest;
        // Reads too: what the harness put into a buffer to be overwritten must lie there.
        let mut at = 0;
        for buffer in &io.buffers {
            guest.write_data(slot, at, buffer);
            at += buffer.len();
        }
        let lengths: Vec<usize> = io.buffers.iter().map(Vec::len).collect();
        match io.op {
            Op::Read => guest.submit(slot, RequestKind::Read, io.offset, &lengths),
            Op::Write => guest.submit(slot, RequestKind::Write, io.offset, &lengths),
            Op::Flush => guest.submit(slot, RequestKind::Flush, 0, &[]),
            Op::Discard => guest.submit_range(slot, RequestKind::Discard, io.offset, io.length),
            Op::WriteZeroes => {
                guest.submit_range(slot, RequestKind::WriteZeroes, io.offset, io.length);
            }
        }
        let flushes = io.fua && io.op.is_change();
        self.requests[slot] = Some(Request { tag, op: io.op, flushes, buffers: io.buffers });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        self.disk.check()?;
        self.disk.guest.kick();
        // Until there is something to tell, or nothing, and the device will call.
        while out.is_empty() && (self.reap(out)? > 0 || !self.disk.guest.arm()) {
            // Flushes.
            self.disk.guest.kick();
        }
        // And what waited for room.
        self.disk.guest.kick();
        Ok(())
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.disk.called())
    }
}
