//! A request of the host on its way through the ring: cut into chunks that fit a slot, copied
//! through the arena where the server cannot reach the caller's memory.
//!
//! ```text
//!  segments    │ caller memory │ arena buffer │ caller memory │ registered memory │
//!  chunk 1     └── bounced ────┴─── direct ───┴── bounced ──┐ │                   │
//!  chunk 2                                                  └─┴──── direct ───────┘
//! ```
//!
//! A chunk ends where its slot's iovecs, a transfer's bytes or the share of the arena end, and is
//! a whole number of blocks. The first error ends the request; chunks already in the ring are
//! waited for first, since the server may still write to their memory.

use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::Instant;

use nebd_abi::ring::Buffer as RingBuffer;
use nebd_abi::{Errno, Op, OpFlags};

use crate::arena::{Allocation, Arena};
use crate::error::errno;
use crate::future::FutureState;
use crate::memory::Span;
use crate::registered::Lease;
use crate::sync::lock;

/// Called with the result of a request, once.
pub type Callback = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// Who wants to know that a request is done.
pub(crate) enum Handler {
    Callback(Callback),
    /// A thread that waits, and looks at [`Transfer::result`].
    Wait(Thread),
    Future(Arc<FutureState>),
    /// The host's queue, by its user data.
    Host(u64),
}

/// What must stay allocated while a request is in flight.
#[derive(Debug, Default)]
#[expect(dead_code, reason = "held, not read")]
pub(crate) enum Keep {
    #[default]
    None,
    Arena(Arc<Allocation>),
    Memory(Arc<Lease>),
    Many(Box<[Keep]>),
}

/// A piece of a request's data.
#[derive(Debug)]
pub(crate) struct Segment {
    /// Memory id and offset, where the server can reach it.
    pub(crate) direct: Option<(u32, u64)>,
    /// Where this process can reach it.
    pub(crate) span: Option<Span>,
    /// Bytes.
    pub(crate) length: u64,
}

/// How much fits a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) iovecs: usize,
    pub(crate) transfer: u64,
    pub(crate) bounce: u64,
    pub(crate) block: u64,
}

/// A place in the segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    segment: usize,
    within: u64,
}

/// A chunk that is to be put into a slot.
pub(crate) struct Planned {
    pub(crate) buffers: Vec<RingBuffer>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) chunk: Chunk,
    pub(crate) next: Cursor,
}

/// What of a chunk is remembered while it is in its slot.
pub(crate) struct Chunk {
    bounce: Option<Allocation>,
    start: Cursor,
    length: u64,
    /// Everything was copied, what the server could have reached too.
    whole: bool,
}

/// Marks a buffer whose place in the arena is yet to be found.
const BOUNCED: u32 = u32::MAX;
/// The smallest share of the arena that is worth asking for: a page, which holds any block.
const BOUNCE_BYTES_MIN: u64 = nebd_abi::layout::PAGE;

/// What to do next with a transfer.
pub(crate) enum Next {
    /// Put this into a slot.
    Chunk(Planned),
    /// The arena is full.
    NoRoom,
    /// Nothing is left to submit. If nothing is in flight either, this is to be told.
    Exhausted(Option<Finished>),
}

/// A request that is done, and who is to be told.
pub(crate) struct Finished {
    pub(crate) handler: Handler,
    pub(crate) result: Result<(), Errno>,
}

/// A request of the host.
pub(crate) struct Transfer {
    pub(crate) op: Op,
    pub(crate) flags: OpFlags,
    offset: u64,
    length: u64,
    pub(crate) deadline: Option<Instant>,
    is_done: AtomicBool,
    state: Mutex<State>,
    _keep: Keep,
}

pub(crate) struct State {
    segments: Vec<Segment>,
    cursor: Cursor,
    /// Bytes not yet submitted.
    left: u64,
    in_flight: u32,
    exhausted: bool,
    abandoned: bool,
    error: Option<Errno>,
    handler: Option<Handler>,
}

impl Transfer {
    pub(crate) fn new(
        (op, flags, offset, length): (Op, OpFlags, u64, u64),
        segments: Vec<Segment>,
        keep: Keep,
        deadline: Option<Instant>,
        handler: Handler,
    ) -> Arc<Transfer> {
        let state = State {
            segments,
            cursor: Cursor::default(),
            left: length,
            in_flight: 0,
            exhausted: false,
            abandoned: false,
            error: None,
            handler: Some(handler),
        };
        Arc::new(Transfer {
            op,
            flags,
            offset,
            length,
            deadline,
            is_done: AtomicBool::new(false),
            state: Mutex::new(state),
            _keep: keep,
        })
    }

    /// Whether the handler was taken to be told.
    pub(crate) fn is_done(&self) -> bool {
        self.is_done.load(Acquire)
    }

    /// The result of a request that is done.
    pub(crate) fn result(&self) -> Result<(), Errno> {
        lock(&self.state).error.map_or(Ok(()), Err)
    }

    /// The handler of a request that has nothing to do.
    pub(crate) fn take_if_empty(&self) -> Option<Handler> {
        if self.length > 0 || self.op == Op::Flush {
            return None;
        }
        lock(&self.state).handler.take()
    }

    /// Whether any of it was ever in the ring.
    pub(crate) fn has_begun(&self) -> bool {
        lock(&self.state).left < self.length
    }

    /// Exclusive use of the state, for submitting.
    pub(crate) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Plans the next chunk; for a write its data is copied already.
    pub(crate) fn next(&self, state: &mut State, limits: Limits, arena: &Arc<Arena>) -> Next {
        if state.exhausted {
            return Next::Exhausted(self.finish(state));
        }
        if !self.op.has_data() {
            let start = Cursor::default();
            let chunk = Chunk { bounce: None, start, length: self.length, whole: false };
            let (offset, length) = (self.offset, self.length);
            return Next::Chunk(Planned {
                buffers: Vec::new(),
                offset,
                length,
                chunk,
                next: start,
            });
        }
        match self.plan(state, limits, arena) {
            Ok(Some(planned)) => Next::Chunk(planned),
            Ok(None) => Next::NoRoom,
            Err(errno) => {
                state.fail(errno);
                Next::Exhausted(self.finish(state))
            }
        }
    }

    fn plan(
        &self,
        state: &State,
        mut limits: Limits,
        arena: &Arc<Arena>,
    ) -> Result<Option<Planned>, Errno> {
        loop {
            let mut whole = false;
            let mut draft = Draft::new(state, limits, whole);
            if draft.length == 0 {
                // The first block is in more pieces than a slot has iovecs.
                whole = true;
                draft = Draft::new(state, limits, whole);
            }
            if draft.length == 0 {
                return Err(Errno::INVAL);
            }
            let bounce = match draft.bounced {
                0 => None,
                bytes => match arena.bounce(bytes) {
                    Some(allocation) => Some(allocation),
                    // It would wait for ever.
                    None if arena.size() == 0 => return Err(errno::NOBUFS),
                    None if bytes <= BOUNCE_BYTES_MIN => return Ok(None),
                    None => {
                        // Below `bytes`, and never below a page.
                        limits.bounce = (bytes / 2).next_multiple_of(BOUNCE_BYTES_MIN);
                        continue;
                    }
                },
            };
            let chunk = Chunk { bounce, start: state.cursor, length: draft.length, whole };
            let mut buffers = draft.buffers;
            if let Some(bounce) = &chunk.bounce {
                for buffer in buffers.iter_mut().filter(|buffer| buffer.memory == BOUNCED) {
                    buffer.memory = 0;
                    buffer.offset += bounce.offset();
                }
            }
            if self.op == Op::Write {
                state.copy(&chunk, |caller, arena| caller.copy_to(arena));
            }
            let offset = self.offset + (self.length - state.left);
            let (length, next) = (draft.length, draft.next);
            return Ok(Some(Planned { buffers, offset, length, chunk, next }));
        }
    }

    /// A chunk came back from the ring.
    pub(crate) fn chunk_done(&self, chunk: &Chunk, result: Result<(), Errno>) -> Option<Finished> {
        let mut state = lock(&self.state);
        state.in_flight = state.in_flight.saturating_sub(1);
        match result {
            Err(errno) => state.fail(errno),
            Ok(()) if self.op == Op::Read && !state.abandoned => {
                state.copy(chunk, |caller, arena| arena.copy_to(caller));
            }
            Ok(()) => {}
        }
        self.finish(&mut state)
    }

    /// The host stops waiting: it is told `errno`, and its memory is not touched from here on.
    /// `None` if it was told a result before.
    pub(crate) fn abandon(&self, errno: Errno) -> Option<Finished> {
        let mut state = lock(&self.state);
        state.fail(errno);
        state.abandoned = true;
        state.segments.iter_mut().for_each(|segment| segment.span = None);
        let handler = state.handler.take()?;
        self.is_done.store(true, Release);
        Some(Finished { handler, result: state.error.map_or(Ok(()), Err) })
    }

    fn finish(&self, state: &mut State) -> Option<Finished> {
        if !state.exhausted || state.in_flight > 0 {
            return None;
        }
        let handler = state.handler.take()?;
        let result = state.error.map_or(Ok(()), Err);
        self.is_done.store(true, Release);
        Some(Finished { handler, result })
    }
}

impl State {
    /// The planned chunk is in a slot.
    pub(crate) fn submitted(&mut self, length: u64, next: Cursor) {
        self.cursor = next;
        self.left = self.left.saturating_sub(length);
        self.in_flight += 1;
        self.exhausted |= self.left == 0;
    }

    /// Whether every chunk was submitted, or the rest never will be.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    fn fail(&mut self, errno: Errno) {
        self.error.get_or_insert(errno);
        self.exhausted = true;
    }

    /// Calls `copy(caller, arena)` for each bounced piece of a chunk, in order.
    fn copy(&self, chunk: &Chunk, copy: impl Fn(&Span, &Span)) {
        let Some(bounce) = &chunk.bounce else { return };
        let (mut left, mut at, mut within) = (chunk.length, 0, chunk.start.within);
        for segment in self.segments.iter().skip(chunk.start.segment) {
            if left == 0 {
                break;
            }
            let length = (segment.length - within).min(left);
            if chunk.whole || segment.direct.is_none() {
                let caller = segment.span.and_then(|span| span.part(within, length));
                if let (Some(caller), Some(arena)) = (caller, bounce.span(at, length)) {
                    copy(&caller, &arena);
                }
                at += length;
            }
            left -= length;
            within = 0;
        }
    }
}

/// A chunk whose bounced pieces have no place yet.
struct Draft {
    buffers: Vec<RingBuffer>,
    length: u64,
    bounced: u64,
    next: Cursor,
}

impl Draft {
    fn new(state: &State, limits: Limits, whole: bool) -> Draft {
        let next = state.cursor;
        let mut draft = Draft { buffers: Vec::new(), length: 0, bounced: 0, next };
        for segment in state.segments.iter().skip(next.segment) {
            let left = segment.length - draft.next.within;
            let taken = draft.take(segment, left, limits, whole);
            draft.next.within += taken;
            if taken < left {
                break;
            }
            draft.next = Cursor { segment: draft.next.segment + 1, within: 0 };
        }
        draft.trim(limits.block);
        draft.next = advance(&state.segments, state.cursor, draft.length);
        draft
    }

    /// Adds what fits of a segment; returns how much.
    fn take(&mut self, segment: &Segment, left: u64, limits: Limits, whole: bool) -> u64 {
        let mut room = limits.transfer - self.length;
        let direct = segment.direct.filter(|_| !whole);
        if direct.is_none() {
            room = room.min(limits.bounce - self.bounced);
            if segment.span.is_none() {
                // Memory that is neither here nor there: nothing can be copied from it.
                return 0;
            }
        }
        // A transfer is far below what 32 bits hold; a u32 is what an iovec has.
        let length = left.min(room).min(u32::MAX.into());
        let is_full = length == 0 || self.buffers.len() >= limits.iovecs;
        let last = self.buffers.last_mut().filter(|last| last.memory == BOUNCED);
        match (direct, last) {
            (None, Some(last)) => last.length += length as u32,
            _ if is_full => return 0,
            (Some((memory, offset)), _) => {
                let offset = offset + self.next.within;
                self.buffers.push(RingBuffer { memory, length: length as u32, offset });
            }
            (None, None) => {
                let offset = self.bounced;
                self.buffers.push(RingBuffer { memory: BOUNCED, length: length as u32, offset });
            }
        }
        if direct.is_none() {
            self.bounced += length;
        }
        self.length += length;
        length
    }

    /// Cuts the end off that is no whole block.
    fn trim(&mut self, block: u64) {
        let mut excess = self.length % block.max(1);
        self.length -= excess;
        while let Some(last) = self.buffers.last_mut().filter(|_| excess > 0) {
            let cut = excess.min(last.length.into());
            last.length -= cut as u32;
            if last.memory == BOUNCED {
                self.bounced -= cut;
            }
            excess -= cut;
            if last.length == 0 {
                self.buffers.pop();
            }
        }
    }
}

fn advance(segments: &[Segment], from: Cursor, mut bytes: u64) -> Cursor {
    let mut cursor = from;
    while let Some(segment) = segments.get(cursor.segment) {
        let left = segment.length - cursor.within;
        if bytes < left {
            cursor.within += bytes;
            break;
        }
        bytes -= left;
        cursor = Cursor { segment: cursor.segment + 1, within: 0 };
    }
    cursor
}
