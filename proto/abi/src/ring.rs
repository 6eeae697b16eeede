//! Both halves of the ring: what a client and a server do to a queue, and nothing else.
//!
//! ```text
//!  client                         shared                         server
//!  submit ── slot fields, seq ──► slot S (seq 7)
//!         ── (S, 7), tail+1 ────► SQ ─────────────────────────► pop: copy slot, dispatch once
//!                                                               … storage …
//!  reap  ◄─────────────────────── CQ ◄── (S, 7, result), tail+1 publish
//!         matches slot.seq == 7?  slot S (seq 0): free
//! ```
//!
//! When a server dies, at any instruction, its successor calls [`ServerQueue::adopt`]: every slot
//! whose `(slot, seq)` no published completion carries is still in flight and is returned, to be
//! issued again. The rules that make this exact:
//!
//! - The client clears a slot's `seq` before it rewrites the slot and sets it last, so a copy that
//!   reads the same `seq` before and after is whole ([`ServerQueue::copy`]).
//! - Rings have twice as many entries as there are slots. At most `depth` completions are
//!   unreaped, so the last `depth` published entries include every completion of a slot that is
//!   not yet reaped, and never the entry that a dying server was half way through writing.
//! - The successor reads the submission tail *before* the slots: what was submitted by then is
//!   seen in the slots, what comes later is popped; a request seen both ways is dispatched once,
//!   since its `(slot, seq)` is remembered.
//! - The client reaps only a completion whose `seq` is the one in the slot.
//!
//! Nothing here blocks, allocates in the hot path, or reads a clock. Indices that come from the
//! other side are masked or checked, never trusted.

use crate::layout::{CqEntry, Slot};
use crate::op::{Op, OpFlags};
use crate::region::QueueMemory;
use crate::sync::Ordering::{Acquire, Relaxed, Release, SeqCst};
use crate::sync::fence;
use crate::{Epoch, Errno};

pub mod hooks;

use hooks::Rule;

/// A buffer of a request: `length` bytes at `offset` of memory `memory` (0 is the arena).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// 0 for the arena, otherwise the id of a registered memory.
    pub memory: u32,
    /// Bytes.
    pub length: u32,
    /// Bytes from the start of that memory.
    pub offset: u64,
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submission<'a> {
    /// The operation.
    pub op: Op,
    /// Its modifiers.
    pub flags: OpFlags,
    /// Bytes from the start of the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Buffers, whose lengths add up to `length`, for reads and writes; empty otherwise.
    pub buffers: &'a [Buffer],
}

/// A completion that the client reaped: its slot is free again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The slot, below the queue's depth.
    pub slot: u32,
    /// The request's sequence number.
    pub seq: u64,
    /// How it went.
    pub result: Result<(), Errno>,
    /// Under whose rule it was completed.
    pub epoch: Epoch,
}

/// The client's submitting half of a queue. One thread at a time.
pub struct ClientSubmit {
    memory: QueueMemory,
    tail: u32,
    seq_next: u64,
}

impl ClientSubmit {
    /// The submitting half of a queue in a region that this client has just created.
    pub fn new(memory: QueueMemory) -> ClientSubmit {
        ClientSubmit { memory, tail: 0, seq_next: 1 }
    }

    /// Puts a request into a free slot and publishes it; returns its sequence number.
    ///
    /// # Panics
    /// If `slot` is beyond the queue, or there are more buffers than the slot's table holds:
    /// the caller's bugs, kept out of shared memory.
    pub fn submit(&mut self, slot: u32, request: &Submission<'_>) -> u64 {
        let seq = self.write_slot(slot, request);
        self.publish(slot, seq);
        seq
    }

    /// First half of [`submit`](Self::submit): from here on the request is in flight.
    fn write_slot(&mut self, slot: u32, request: &Submission<'_>) -> u64 {
        let shared = &self.memory.slots()[slot as usize];
        let seq = self.seq_next;
        self.seq_next += 1;
        // A successor that copies this slot meanwhile must notice: seq is 0 (set by the reaper, or
        // never used) before any field changes.
        shared.seq.store(0, Relaxed);
        fence(Release);
        if hooks::is_broken(Rule::SeqLast) {
            shared.seq.store(seq, Release);
        }
        let count = request.buffers.len();
        let op = u64::from(request.op as u8)
            | u64::from(request.flags.bits()) << 8
            | (count as u64) << 16;
        shared.op.store(op, Relaxed);
        shared.offset.store(request.offset, Relaxed);
        shared.length.store(request.length, Relaxed);
        if let [buffer] = request.buffers {
            store_buffer(&shared.iovec, buffer);
        } else {
            let table = self.memory.iovecs(slot as usize);
            assert!(count <= table.len(), "{count} buffers, the slot holds {}", table.len());
            for (entry, buffer) in table.iter().zip(request.buffers) {
                store_buffer(entry, buffer);
            }
        }
        shared.seq.store(seq, Release);
        seq
    }

    /// Second half of [`submit`](Self::submit): tells the server where to look.
    fn publish(&mut self, slot: u32, seq: u64) {
        let sq = self.memory.sq();
        let entry = &sq[self.tail as usize % sq.len()];
        entry.seq.store(seq, Relaxed);
        entry.slot.store(u64::from(slot), Relaxed);
        self.tail = self.tail.wrapping_add(1);
        self.memory.header().sq_tail.word.store(self.tail, Release);
    }

    /// Whether the server sleeps and must be kicked; ask after the last submission of a batch.
    pub fn kick_needed(&self) -> bool {
        // Pairs with the fence in `ServerQueue::sleep`: either it sees the tail, or we see its flag.
        fence(SeqCst);
        self.memory.header().sq_need_wakeup.word.load(Relaxed) != 0
    }
}

fn store_buffer(entry: &crate::layout::Iovec, buffer: &Buffer) {
    let memory_length = u64::from(buffer.memory) | u64::from(buffer.length) << 32;
    entry.memory_length.store(memory_length, Relaxed);
    entry.offset.store(buffer.offset, Relaxed);
}

fn load_buffer(entry: &crate::layout::Iovec) -> Buffer {
    let memory_length = entry.memory_length.load(Relaxed);
    Buffer {
        memory: memory_length as u32,
        length: (memory_length >> 32) as u32,
        offset: entry.offset.load(Relaxed),
    }
}

/// The client's reaping half of a queue. One thread at a time.
pub struct ClientReap {
    memory: QueueMemory,
    head: u32,
}

impl ClientReap {
    /// The reaping half of a queue in a region that this client has just created.
    pub fn new(memory: QueueMemory) -> ClientReap {
        ClientReap { memory, head: 0 }
    }

    /// The next completion, if one was published. Its slot is free once this returns.
    ///
    /// An entry that matches no request in flight (a second answer to one already reaped) is
    /// passed over.
    pub fn reap(&mut self) -> Option<Completion> {
        let header = self.memory.header();
        loop {
            let tail = header.cq_tail.word.load(Acquire);
            if tail == self.head {
                return None;
            }
            let cq = self.memory.cq();
            if tail.wrapping_sub(self.head) as usize > cq.len() {
                // Only a server that breaks the rules is so far ahead: each entry gets one look.
                self.head = tail.wrapping_sub(cq.len() as u32);
            }
            let entry = &cq[self.head as usize % cq.len()];
            let completion = self.accept(entry);
            self.head = self.head.wrapping_add(1);
            header.cq_head.word.store(self.head, Release);
            if completion.is_some() {
                return completion;
            }
        }
    }

    fn accept(&self, entry: &CqEntry) -> Option<Completion> {
        let seq = entry.seq.load(Relaxed);
        let slot_result = entry.slot_result.load(Relaxed);
        let slot = slot_result as u32;
        let shared = self.memory.slots().get(slot as usize)?;
        let matches = seq != 0 && shared.seq.load(Relaxed) == seq;
        if !matches && !hooks::is_broken(Rule::ReapMatch) {
            return None;
        }
        // The slot is freed before the head moves on: as long as a successor may see the slot in
        // flight, the entry that completed it has not been overwritten.
        if !hooks::is_broken(Rule::ReapFrees) {
            shared.seq.store(0, Relaxed);
        }
        let code = (slot_result >> 32) as u32 as i32;
        Some(Completion {
            slot,
            seq,
            result: if code == 0 { Ok(()) } else { Err(Errno(code.saturating_neg())) },
            epoch: Epoch::from_bits(entry.epoch.load(Relaxed)),
        })
    }

    /// Asks for the call doorbell; true if the caller may sleep, false if something came meanwhile.
    pub fn sleep(&self) -> bool {
        let header = self.memory.header();
        header.cq_head.flag.store(1, Relaxed);
        // Pairs with the fence in `ServerQueue::call_needed`.
        fence(SeqCst);
        header.cq_tail.word.load(Relaxed) == self.head
    }

    /// No doorbell is wanted any more.
    pub fn wake(&self) {
        self.memory.header().cq_head.flag.store(0, Relaxed);
    }

    /// Whether a completion waits to be reaped.
    pub fn is_ready(&self) -> bool {
        self.memory.header().cq_tail.word.load(Acquire) != self.head
    }
}

/// A request as the server copied it, once, out of shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The slot it came from, below the queue's depth.
    pub slot: u32,
    /// Its sequence number.
    pub seq: u64,
    /// The operation, or its unknown number.
    pub op: Result<Op, u8>,
    /// The modifiers, or their bits if one is unknown.
    pub flags: Result<OpFlags, u8>,
    /// Bytes from the start of the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The buffers, unchecked.
    pub buffers: Buffers,
}

/// Buffers of a request; one is the common case and costs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Buffers {
    /// None at all.
    None,
    /// One.
    One(Buffer),
    /// Several.
    Many(Vec<Buffer>),
    /// The request claims more buffers than its table has.
    TooMany,
}

impl Buffers {
    /// As a slice; empty if there were too many.
    pub fn as_slice(&self) -> &[Buffer] {
        match self {
            Buffers::None | Buffers::TooMany => &[],
            Buffers::One(buffer) => std::slice::from_ref(buffer),
            Buffers::Many(buffers) => buffers,
        }
    }
}

/// The client broke the rules of the ring; its session is to be detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingViolation {
    /// More entries than the ring holds.
    #[error("the submission tail {tail} is {ahead} entries ahead")]
    Tail {
        /// The tail as read.
        tail: u32,
        /// How far ahead of the server's head.
        ahead: u32,
    },
    /// A slot beyond the queue.
    #[error("a submission names slot {0}")]
    Slot(u64),
}

/// Stale entries that one [`ServerQueue::pop`] passes over.
const STALE_ENTRIES_MAX: u32 = 64;

/// The server's half of a queue. One thread at a time.
pub struct ServerQueue {
    memory: QueueMemory,
    sq_head: u32,
    cq_tail: u32,
    epoch: Epoch,
    /// For each slot, the last seq dispatched (or found done) by this server.
    dispatched: Box<[u64]>,
}

impl ServerQueue {
    /// Takes the queue over, from a predecessor confirmed dead or quiescent, or brand new.
    ///
    /// Returns the requests still in flight, in the order of their submission.
    pub fn adopt(memory: QueueMemory, epoch: Epoch) -> (ServerQueue, Vec<Request>) {
        let depth = memory.slots().len();
        // Before the slots are read: what comes later will be popped.
        let sq_head = memory.header().sq_tail.word.load(Acquire);
        let cq_tail = memory.header().cq_tail.word.load(Acquire);
        let mut queue =
            ServerQueue { memory, sq_head, cq_tail, epoch, dispatched: vec![0; depth].into() };
        if !hooks::is_broken(Rule::MarkDone) {
            queue.mark_done();
        }
        let mut in_flight: Vec<Request> = (0..depth as u32)
            .filter_map(|slot| {
                let request = queue.copy(slot)?;
                let remembered = &mut queue.dispatched[slot as usize];
                (*remembered != request.seq).then(|| {
                    *remembered = request.seq;
                    request
                })
            })
            .collect();
        if hooks::is_broken(Rule::TailFirst) {
            queue.sq_head = queue.memory.header().sq_tail.word.load(Acquire);
        }
        in_flight.sort_by_key(|request| request.seq);
        (queue, in_flight)
    }

    /// Remembers what the published completions among the last `depth` answered.
    fn mark_done(&mut self) {
        let cq = self.memory.cq();
        let depth = self.dispatched.len() as u32;
        let newest = u32::from(!hooks::is_broken(Rule::TornEntry));
        for back in newest..=depth {
            let entry = &cq[self.cq_tail.wrapping_sub(back) as usize % cq.len()];
            let (seq, slot) = (entry.seq.load(Relaxed), entry.slot_result.load(Relaxed) as u32);
            if let Some(dispatched) = self.dispatched.get_mut(slot as usize) {
                // Of several completions of one slot the latest counts.
                *dispatched = seq.max(*dispatched);
            }
        }
    }

    /// Copies a slot once; `None` if it is free or the client is rewriting it.
    fn copy(&self, slot: u32) -> Option<Request> {
        let shared = &self.memory.slots()[slot as usize];
        let seq = shared.seq.load(Acquire);
        if seq == 0 {
            return None;
        }
        let request = self.copy_fields(slot, seq, shared);
        fence(Acquire);
        (shared.seq.load(Relaxed) == seq).then_some(request)
    }

    fn copy_fields(&self, slot: u32, seq: u64, shared: &Slot) -> Request {
        let op = shared.op.load(Relaxed);
        let count = usize::from((op >> 16) as u16);
        let buffers = match count {
            0 => Buffers::None,
            1 => Buffers::One(load_buffer(&shared.iovec)),
            _ => match self.memory.iovecs(slot as usize).get(..count) {
                Some(table) => Buffers::Many(table.iter().map(load_buffer).collect()),
                None => Buffers::TooMany,
            },
        };
        let flags = (op >> 8) as u8;
        Request {
            slot,
            seq,
            op: Op::from_bits(op as u8).ok_or(op as u8),
            flags: OpFlags::from_bits(flags).ok_or(flags),
            offset: shared.offset.load(Relaxed),
            length: shared.length.load(Relaxed),
            buffers,
        }
    }

    /// The next request, if one was submitted. Each `(slot, seq)` comes once.
    ///
    /// Passes over a bounded number of stale entries: `None` with [`is_ready`](Self::is_ready) still
    /// true means that there are more, and that the other queues should have their turn first.
    pub fn pop(&mut self) -> Result<Option<Request>, RingViolation> {
        for _ in 0..STALE_ENTRIES_MAX {
            let tail = self.memory.header().sq_tail.word.load(Acquire);
            let ahead = tail.wrapping_sub(self.sq_head);
            if ahead == 0 {
                return Ok(None);
            }
            let sq = self.memory.sq();
            if ahead as usize > sq.len() {
                return Err(RingViolation::Tail { tail, ahead });
            }
            let entry = &sq[self.sq_head as usize % sq.len()];
            let (seq, slot) = (entry.seq.load(Relaxed), entry.slot.load(Relaxed));
            self.sq_head = self.sq_head.wrapping_add(1);
            let remembered = usize::try_from(slot)
                .ok()
                .and_then(|slot| self.dispatched.get_mut(slot))
                .ok_or(RingViolation::Slot(slot))?;
            if *remembered == seq && !hooks::is_broken(Rule::DispatchOnce) {
                continue;
            }
            // An entry whose slot has moved on is stale: it was answered by an earlier server.
            if self.memory.slots()[slot as usize].seq.load(Relaxed) != seq {
                continue;
            }
            let Some(request) = self.copy(slot as u32).filter(|request| request.seq == seq) else {
                continue;
            };
            self.dispatched[slot as usize] = seq;
            return Ok(Some(request));
        }
        Ok(None)
    }

    /// Answers a request that [`adopt`](Self::adopt) or [`pop`](Self::pop) returned.
    pub fn publish(&mut self, slot: u32, seq: u64, result: Result<(), Errno>) {
        let cq = self.memory.cq();
        let entry = &cq[self.cq_tail as usize % cq.len()];
        let code = result.err().map_or(0, |errno| errno.0.saturating_neg());
        entry.seq.store(seq, Relaxed);
        entry.slot_result.store(u64::from(slot) | u64::from(code as u32) << 32, Relaxed);
        entry.epoch.store(self.epoch.to_bits(), Relaxed);
        self.cq_tail = self.cq_tail.wrapping_add(1);
        self.memory.header().cq_tail.word.store(self.cq_tail, Release);
    }

    /// Whether the client sleeps and must be called; ask after the last completion of a batch.
    pub fn call_needed(&self) -> bool {
        // Pairs with the fence in `ClientReap::sleep`.
        fence(SeqCst);
        self.memory.header().cq_head.flag.load(Relaxed) != 0
    }

    /// Asks for the kick doorbell; true if this queue may sleep, false if something came meanwhile.
    pub fn sleep(&self) -> bool {
        let header = self.memory.header();
        header.sq_need_wakeup.word.store(1, Relaxed);
        // Pairs with the fence in `ClientSubmit::kick_needed`.
        fence(SeqCst);
        header.sq_tail.word.load(Relaxed) == self.sq_head
    }

    /// No doorbell is wanted any more.
    pub fn wake(&self) {
        self.memory.header().sq_need_wakeup.word.store(0, Relaxed);
    }

    /// Whether a submission waits to be popped.
    pub fn is_ready(&self) -> bool {
        self.memory.header().sq_tail.word.load(Relaxed) != self.sq_head
    }

    /// Slots in this queue.
    pub fn depth(&self) -> u32 {
        self.dispatched.len() as u32
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
