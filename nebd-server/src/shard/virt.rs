//! A guest's virtqueue as one side of a [`Front`](super::Front): it runs or is stopped, as the
//! messages of its hypervisor say, and while it runs its chains are requests.
//!
//! ```text
//!            Start                        Stop, and nothing in flight
//!   stopped ───────► running ─ pop ─► … ──────────────────────────────► stopped (base)
//! ```
//!
//! A request's slot is its chain's head. Its sequence number is one more than the slot's last, as the
//! ledger has it; of a chain that a predecessor had taken, it is the slot's last: so what killed
//! servers is found out as on a part client's rings.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nebd_abi::layout::SessionId;
use nebd_abi::ring::{Buffers, Request};
use nebd_abi::{Errno, Op, OpFlags};
use nebd_backend::{Segment, Segments};
use nebd_vhost::chain::{self, Chain, Ticket, Violation};
use nebd_vhost::memory::GuestMemory;
use nebd_vhost::queue::{StartError, VirtQueue};
use nebd_vhost::request::{Agreement, Disk, Operation, Range, Status, parse};

use crate::session::ledger::Ledger;
use crate::volume::OpenVolume;

/// Chains that are answered on the spot before others get their turn.
const ANSWERED_MAX: u32 = 64;

/// What a hypervisor wants of one of its queues. Each but `Start` is answered by a [`VirtEvent`].
pub enum VirtCommand {
    /// It runs from now on.
    Start(Box<VirtStart>),
    /// It stops once nothing of it is in flight.
    Stop,
    /// Its driver rings another doorbell.
    SetKick(OwnedFd),
    /// Its driver is called by another doorbell, or not at all.
    SetCall(Option<OwnedFd>),
    /// The guest's memory is another.
    SetMemory(Arc<GuestMemory>),
    /// Requests are subject to something else.
    SetAgreement(Agreement),
}

/// A queue that is to run.
pub struct VirtStart {
    /// The queue.
    pub queue: VirtQueue,
    /// What was in flight.
    pub chains: Vec<Chain>,
    /// Rung by the driver.
    pub kick: OwnedFd,
    /// Rung by us.
    pub call: Option<OwnedFd>,
    /// What requests are subject to.
    pub agreement: Agreement,
}

/// What a queue of a hypervisor has to tell.
#[derive(Debug)]
pub struct VirtEvent {
    /// Its session.
    pub session: SessionId,
    /// The queue.
    pub queue: u32,
    /// What.
    pub news: VirtNews,
}

/// See [`VirtEvent`].
#[derive(Debug)]
pub enum VirtNews {
    /// It has done what it was told.
    Done,
    /// It has stopped, and would go on there; `None` if it did not run.
    Stopped(Option<u32>),
    /// It could not.
    Failed(StartError),
    /// Nothing is taken from it any more, until it is started again: its driver broke the rules.
    Broken(Violation),
}

/// A chain that waits for its answer.
struct Taken {
    ticket: Ticket,
    /// A slot may have been another chain's when a request was held back.
    seq: u64,
    /// Until it is dispatched.
    data: Segments,
    /// Bytes that the driver is told of.
    written: u32,
}

/// See the [module](self).
pub struct VirtFront {
    disk: Disk,
    volume: Arc<OpenVolume>,
    ledger: Ledger,
    /// First of the session's slots that belongs to this queue, in the ledger.
    ledger_base: u32,
    agreement: Agreement,
    queue: Option<VirtQueue>,
    taken: Vec<Option<Taken>>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    stopping: bool,
    /// Its driver broke the rules.
    broken: bool,
    violation: Option<Violation>,
    has_answered: bool,
}

impl VirtFront {
    /// A queue that is stopped.
    pub fn new(disk: Disk, volume: Arc<OpenVolume>, ledger: Ledger, ledger_base: u32) -> VirtFront {
        VirtFront {
            disk,
            volume,
            ledger,
            ledger_base,
            agreement: Agreement { features: 0, writeback: true },
            queue: None,
            taken: Vec::new(),
            kick: None,
            call: None,
            stopping: false,
            broken: false,
            violation: None,
            has_answered: false,
        }
    }

    /// It runs from now on; returns what is to be issued again.
    pub fn start(&mut self, start: VirtStart) -> Vec<Request> {
        let VirtStart { queue, chains, kick, call, agreement } = start;
        self.taken.clear();
        self.taken.resize_with(queue.setup().size.into(), || None);
        self.queue = Some(queue);
        self.kick = Some(kick);
        self.call = call;
        self.agreement = agreement;
        (self.stopping, self.broken, self.violation) = (false, false, None);
        chains.into_iter().filter_map(|chain| self.take(chain, true)).collect()
    }

    /// Nothing is taken any more.
    pub(super) fn begin_stop(&mut self) {
        self.stopping = true;
    }

    /// Whether it is to stop as soon as nothing is in flight.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// It has stopped; where it would go on. What it took and did not answer stays in its record.
    pub(super) fn end(&mut self) -> Option<u32> {
        (self.stopping, self.broken, self.violation) = (false, false, None);
        self.kick = None;
        let mut queue = self.queue.take()?;
        queue.flush();
        self.taken.iter_mut().for_each(|taken| *taken = None);
        Some(queue.base())
    }

    pub(super) fn kick(&self) -> Option<&OwnedFd> {
        self.kick.as_ref()
    }

    pub(super) fn set_kick(&mut self, kick: OwnedFd) {
        self.kick = Some(kick);
    }

    pub(super) fn call(&self) -> Option<&OwnedFd> {
        self.call.as_ref()
    }

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
    }

    pub(super) fn set_agreement(&mut self, agreement: Agreement) {
        self.agreement = agreement;
    }

    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), StartError> {
        self.queue.as_mut().map_or(Ok(()), |queue| queue.set_memory(memory))
    }

    /// How its driver broke the rules, once.
    pub(super) fn violation(&mut self) -> Option<Violation> {
        self.violation.take()
    }

    pub(super) fn slots(&self) -> usize {
        self.taken.len()
    }

    pub(super) fn pop(&mut self) -> Option<Request> {
        if self.stopping || self.broken {
            return None;
        }
        for _ in 0..ANSWERED_MAX {
            match self.queue.as_mut()?.pop() {
                Ok(None) => return None,
                Ok(Some(chain)) => {
                    let request = self.take(chain, false);
                    if request.is_some() {
                        return request;
                    }
                }
                Err(violation) => {
                    (self.broken, self.violation) = (true, Some(violation));
                    return None;
                }
            }
        }
        None
    }

    /// From a chain to a request; `None` if it is answered already.
    fn take(&mut self, chain: Chain, is_again: bool) -> Option<Request> {
        // It may have been resized.
        self.disk.size = self.volume.size();
        let (operation, ticket) = parse(chain, &self.disk, &self.agreement);
        let slot = u32::from(ticket.head());
        let fua = |fua| if fua { OpFlags::FUA } else { OpFlags::NONE };
        let of_range = |range: &Range| (range.offset, range.length);
        let (op, flags, (offset, length), data, written) = match operation {
            Ok(Operation::Read { offset, length, segments }) => {
                (Op::Read, OpFlags::NONE, (offset, length.into()), mapped(&segments), length)
            }
            Ok(Operation::Write { offset, length, segments, fua: is_fua }) => {
                (Op::Write, fua(is_fua), (offset, length.into()), mapped(&segments), 0)
            }
            Ok(Operation::Flush) => (Op::Flush, OpFlags::NONE, (0, 0), Segments::None, 0),
            Ok(Operation::Discard(ranges)) => {
                let Some(range) = ranges.as_slice().first() else {
                    return self.answer(ticket, Status::Ok, 0);
                };
                (Op::Discard, OpFlags::NONE, of_range(range), Segments::None, 0)
            }
            Ok(Operation::WriteZeroes { ranges, fua: is_fua }) => {
                let Some(range) = ranges.as_slice().first() else {
                    return self.answer(ticket, Status::Ok, 0);
                };
                let unmap = if range.unmap { OpFlags::NONE } else { OpFlags::NO_UNMAP };
                (Op::WriteZeroes, fua(is_fua) | unmap, of_range(range), Segments::None, 0)
            }
            Ok(Operation::Done(written)) => return self.answer(ticket, Status::Ok, written),
            Err(refused) => return self.answer(ticket, refused.0, 0),
        };
        let last = self.ledger.last_seq(self.ledger_base + slot);
        let seq = if is_again { last } else { last.wrapping_add(1) };
        *self.taken.get_mut(slot as usize)? = Some(Taken { ticket, seq, data, written });
        let (op, flags, buffers) = (Ok(op), Ok(flags), Buffers::None);
        Some(Request { slot, seq, op, flags, offset, length, buffers })
    }

    fn answer(&mut self, ticket: Ticket, status: Status, written: u32) -> Option<Request> {
        if let Some(queue) = &mut self.queue {
            queue.publish(ticket, status, written);
            self.has_answered = true;
        }
        None
    }

    /// Where the data is of a request that is about to be dispatched.
    pub(super) fn take_data(&mut self, slot: u32) -> Segments {
        let taken = self.taken.get_mut(slot as usize).and_then(Option::as_mut);
        taken.map_or(Segments::None, |taken| std::mem::replace(&mut taken.data, Segments::None))
    }

    pub(super) fn holds(&self, slot: u32, seq: u64) -> bool {
        let taken = self.taken.get(slot as usize).and_then(Option::as_ref);
        taken.is_some_and(|taken| taken.seq == seq)
    }

    pub(super) fn publish(&mut self, slot: u32, seq: u64, result: Result<(), Errno>) {
        let taken = self.taken.get_mut(slot as usize);
        let taken = taken.and_then(|taken| taken.take_if(|taken| taken.seq == seq));
        let (Some(taken), Some(queue)) = (taken, &mut self.queue) else { return };
        let (status, written) = match result {
            Ok(()) => (Status::Ok, taken.written),
            Err(Errno::NOTSUP) => (Status::Unsupported, 0),
            Err(_) => (Status::IoError, 0),
        };
        queue.publish(taken.ticket, status, written);
    }

    pub(super) fn has_answered(&mut self) -> bool {
        std::mem::take(&mut self.has_answered)
    }

    pub(super) fn call_needed(&mut self) -> bool {
        self.queue.as_mut().is_some_and(|queue| {
            queue.flush();
            queue.call_needed()
        })
    }

    pub(super) fn sleep(&mut self) -> bool {
        match &mut self.queue {
            Some(queue) if !self.stopping && !self.broken => queue.sleep(),
            _ => true,
        }
    }

    pub(super) fn wake(&mut self) {
        if let Some(queue) = self.queue.as_mut().filter(|_| !self.stopping && !self.broken) {
            queue.wake();
        }
    }
}

/// The chain's ticket keeps them mapped.
fn mapped(segments: &chain::Segments) -> Segments {
    let segment =
        |found: &chain::Segment| Segment { pointer: found.pointer(), length: found.len() };
    match segments {
        chain::Segments::None => Segments::None,
        chain::Segments::One(found) => Segments::One(segment(found)),
        chain::Segments::Many(many) => Segments::Many(many.iter().map(segment).collect()),
    }
}
