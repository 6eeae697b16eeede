//! One queue of one session, as its shard serves it.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use nebd_abi::ring::{Request as RingRequest, RingViolation};
use nebd_abi::{Errno, Fence, Op};
use nebd_backend::{Lane, Request};

use super::fair::{Fair, Pace, Share};
use super::ringer::Ringer;
use super::{
    Front, HEARTBEAT, QueueSetup, ShardContext, ShardEvent, VirtCommand, VirtEvent, VirtNews,
};
use crate::hooks;
use crate::metrics::{Tally, alarm};
use crate::session::{Memories, Rejected, Session, Translated, translate};

/// How a turn of a queue went.
pub(super) enum Served {
    /// Requests were taken.
    Some,
    /// There were none, and the queue stays active.
    None,
    /// Its session pays for what it took in earlier rounds.
    Owes,
    /// Its session has as much at the storage as it may while others are present.
    Full,
    /// There have been none for long: it waits for its doorbell.
    Asleep,
    /// The volume's limits are used up until then.
    Throttled(Instant),
}

/// Turns without a request after which a queue of a busy shard goes to sleep.
const IDLE_TURNS_MAX: u32 = 4096;

/// A request at the backend.
struct InFlight {
    seq: u64,
    fence: Fence,
    op: Op,
    length: u64,
    since: Instant,
    alarmed: bool,
    suspect: bool,
    /// Keeps registered memories mapped.
    _memories: Option<Arc<Memories>>,
}

pub(super) struct QueueTask {
    pub(super) session: Arc<Session>,
    pub(super) index: u32,
    pub(super) front: Front,
    pub(super) active: bool,
    pub(super) touched: bool,
    /// Waits for its volume's limits since then.
    throttled: Option<Instant>,
    pub(super) in_flight_count: usize,
    /// While frozen: when it last answered, and whether its end was told.
    pub(super) last_answer_ns: u64,
    pub(super) told_drained: bool,
    /// Of its session, on this shard.
    pub(super) share: Rc<Share>,
    pub(super) key: usize,
    ringer: Rc<Ringer>,
    in_flight: Vec<Option<InFlight>>,
    /// Not dispatched yet: of the predecessor, or held back while parked.
    held: Vec<RingRequest>,
    /// Answered without the backend; the client must be called.
    answered_inline: bool,
    parked: bool,
    draining: bool,
    idle_turns: u32,
    /// When requests of this turn were taken up: one look at the clock for all of them.
    turn: Instant,
    tally: Tally,
    /// At the last beat some request had waited conspicuously; how many of them were stalls.
    conspicuous: Option<u32>,
    memories: Arc<Memories>,
    memories_version: u64,
    /// First of the session's slots that belongs to this queue, in the ledger.
    ledger_base: u32,
}

impl QueueTask {
    pub(super) fn new(
        key: usize,
        setup: QueueSetup,
        ringer: Rc<Ringer>,
        share: Rc<Share>,
    ) -> QueueTask {
        let depth = setup.session.region.geometry().queue_depth;
        QueueTask {
            share,
            key,
            ringer,
            in_flight: (0..setup.front.slots()).map(|_| None).collect(),
            held: setup.reissue,
            parked: setup.parked,
            memories: setup.session.memories(),
            memories_version: setup.session.memories_version(),
            ledger_base: setup.index * depth,
            session: setup.session,
            index: setup.index,
            front: setup.front,
            active: false,
            touched: false,
            throttled: None,
            in_flight_count: 0,
            last_answer_ns: 0,
            told_drained: false,
            turn: Instant::now(),
            tally: Tally::default(),
            conspicuous: None,
            answered_inline: false,
            draining: false,
            idle_turns: 0,
        }
    }

    /// Takes up what the predecessor left, and calls the client once: the predecessor may have
    /// died between publishing and calling.
    pub(super) fn start(&mut self, lane: &mut Lane, context: &ShardContext) {
        if !self.parked {
            self.release_held(lane, context);
        }
        self.call();
    }

    fn release_held(&mut self, lane: &mut Lane, context: &ShardContext) {
        self.turn = Instant::now();
        for request in std::mem::take(&mut self.held) {
            crate::failpoint!("reissue");
            self.dispatch(lane, context, &request, false);
        }
    }

    pub(super) fn activate(&mut self) {
        self.active = true;
        self.idle_turns = 0;
        self.front.wake();
    }

    /// Pops and dispatches what its turn allows; adds the bytes to `moved`.
    pub(super) fn serve(
        &mut self,
        lane: &mut Lane,
        context: &ShardContext,
        fair: &mut Fair,
        moved: &mut u64,
    ) -> Result<Served, RingViolation> {
        if self.parked || self.draining {
            self.active = false;
            return Ok(Served::Asleep);
        }
        let mut taken = 0;
        let mut closed_until = None;
        let mut turn = fair.turn(&self.share, context.batch);
        let pace = loop {
            let pace = turn.pace(&self.share);
            if pace != Pace::Take {
                break pace;
            }
            closed_until = self.session.volume.throttle.closed_until();
            if closed_until.is_some() {
                break pace;
            }
            let Some(request) = self.front.pop()? else { break pace };
            crate::failpoint!("after-pop");
            if taken == 0 {
                self.turn = Instant::now();
            }
            self.dispatch(lane, context, &request, false);
            taken += 1;
            turn.took(request.length);
            *moved = moved.saturating_add(request.length);
        };
        let owes = fair.end(&turn, &self.share, taken > 0);
        if std::mem::take(&mut self.answered_inline) | self.front.has_answered() {
            self.call_if_needed();
        }
        self.tell_violation(context);
        if let Some(until) = closed_until {
            self.active = false;
            return Ok(Served::Throttled(until));
        }
        if taken > 0 {
            self.idle_turns = 0;
            return Ok(Served::Some);
        }
        if pace == Pace::Full {
            return Ok(Served::Full);
        }
        if owes {
            return Ok(Served::Owes);
        }
        self.idle_turns += 1;
        if self.idle_turns > IDLE_TURNS_MAX {
            if self.front.sleep() {
                self.active = false;
                return Ok(Served::Asleep);
            }
            self.front.wake();
            self.idle_turns = 0;
        }
        Ok(Served::None)
    }

    fn dispatch(
        &mut self,
        lane: &mut Lane,
        context: &ShardContext,
        request: &RingRequest,
        suspect: bool,
    ) {
        self.refresh_memories();
        let data = self.front.take_data(request.slot);
        let translated = match translate(&self.session, &self.memories, request, data) {
            Ok(translated) => translated,
            Err(rejected) => {
                let result = match rejected {
                    Rejected::Empty => Ok(()),
                    Rejected::Errno(errno) => Err(errno),
                };
                self.publish(request.slot, request.seq, result);
                self.tally.answered(request.op.ok(), request.length, result);
                self.answered_inline = true;
                return;
            }
        };
        if self.in_flight[request.slot as usize].is_some() {
            // Only a client that rewrites a slot in flight gets here; its memory must not be
            // handed out twice, and its other request is answered first.
            return;
        }
        if translated.op != Op::Flush {
            self.session.volume.throttle.charge(data_bytes(translated.op, request.length));
        }
        let ledger_slot = self.ledger_base + request.slot;
        self.session.ledger.dispatch(ledger_slot, request.seq, context.tenure.generation());
        hooks::poison(translated.op, request.offset, request.length);
        self.submit(lane, request, translated, suspect);
    }

    fn submit(
        &mut self,
        lane: &mut Lane,
        request: &RingRequest,
        translated: Translated,
        suspect: bool,
    ) {
        let fence = self.session.volume.fence();
        self.in_flight[request.slot as usize] = Some(InFlight {
            seq: request.seq,
            fence,
            op: translated.op,
            length: request.length,
            since: self.turn,
            alarmed: false,
            suspect,
            _memories: translated.uses_memories.then(|| self.memories.clone()),
        });
        self.in_flight_count += 1;
        self.share.submitted(data_bytes(translated.op, request.length));
        self.counter_in_flight();
        let tag = (self.key as u64) << 32 | u64::from(request.slot);
        let mailbox = lane.mailbox().clone();
        let (offset, length) = match translated.op {
            Op::Flush => (0, 0),
            _ => (request.offset, request.length),
        };
        let mut io = Request::new(translated.op, translated.flags, offset, length, mailbox, tag);
        io.segments = translated.segments;
        io.fence = fence;
        crate::failpoint!("before-submit");
        self.session.volume.volume.submit(lane, io);
        crate::failpoint!("after-submit");
    }

    /// Issues a suspect, alone among suspects.
    pub(super) fn dispatch_suspect(
        &mut self,
        lane: &mut Lane,
        context: &ShardContext,
        request: RingRequest,
    ) {
        if self.draining || !self.front.holds(&request) {
            context.events.send(ShardEvent::SuspectAnswered(self.session.id));
        } else if self.parked {
            self.held.push(request);
            context.events.send(ShardEvent::SuspectAnswered(self.session.id));
        } else {
            let slot = request.slot as usize;
            self.turn = Instant::now();
            self.dispatch(lane, context, &request, true);
            let is_out = |out: &InFlight| out.suspect && out.seq == request.seq;
            if !self.in_flight[slot].as_ref().is_some_and(is_out) {
                context.events.send(ShardEvent::SuspectAnswered(self.session.id));
                self.call_if_needed();
            }
        }
    }

    /// Answers a request that killed servers, without trying it again.
    pub(super) fn abort(&mut self, request: &RingRequest) {
        self.held.retain(|held| held.slot != request.slot);
        self.publish(request.slot, request.seq, Err(Errno::IO));
        self.session.ledger.done(self.ledger_base + request.slot);
        self.tally.answered(None, 0, Err(Errno::IO));
        self.call_if_needed();
    }

    /// The backend answered. Whether it was a request of this queue.
    pub(super) fn answer(
        &mut self,
        slot: u32,
        result: Result<(), Errno>,
        now: Instant,
        context: &ShardContext,
    ) -> bool {
        let Some(done) = self.in_flight.get_mut(slot as usize).and_then(Option::take) else {
            return false;
        };
        self.in_flight_count -= 1;
        self.share.answered(data_bytes(done.op, done.length));
        self.counter_in_flight();
        self.session.volume.answered(&done.fence);
        crate::failpoint!("before-publish");
        self.publish(slot, done.seq, result);
        if let Front::Ring(ring) = &mut self.front {
            hooks::duplicate_completion(ring, slot, done.seq);
        }
        self.session.ledger.done(self.ledger_base + slot);
        self.tally.answered(Some(done.op), done.length, result);
        let took_ns = now.saturating_duration_since(done.since).as_nanos() as u64;
        self.tally.took(self.session.ledger.counters(), took_ns);
        if self.in_flight_count == 0 && self.conspicuous.is_some() {
            // The next beat may be long in coming.
            self.tell_waits(0, None);
        }
        if done.suspect {
            context.events.send(ShardEvent::SuspectAnswered(self.session.id));
        }
        true
    }

    fn publish(&mut self, slot: u32, seq: u64, result: Result<(), Errno>) {
        self.front.publish(slot, seq, result);
    }

    fn counter_in_flight(&self) {
        let live = &self.session.live[self.index as usize];
        live.in_flight.store(self.in_flight_count as u32, Relaxed);
    }

    /// Calls the client if it sleeps; what it was answered is counted by then.
    pub(super) fn call_if_needed(&mut self) {
        self.tally.settle(self.session.ledger.counters());
        if self.front.call_needed() {
            self.call();
        }
    }

    fn call(&mut self) {
        match &mut self.front {
            Front::Ring(_) => self.ringer.ring(&self.session.calls[self.index as usize]),
            Front::Virt(front) => {
                if let Some(call) = front.call() {
                    self.ringer.ring(call);
                }
            }
        }
    }

    /// The doorbell to be watched.
    pub(super) fn kick(&self) -> Option<&OwnedFd> {
        match &self.front {
            Front::Ring(_) => self.session.kicks.get(self.index as usize),
            Front::Virt(front) => front.kick(),
        }
    }

    /// A hypervisor wants something of its queue.
    pub(super) fn obey(&mut self, command: VirtCommand, lane: &mut Lane, context: &ShardContext) {
        let Front::Virt(front) = &mut self.front else { return };
        let mut news = VirtNews::Done;
        match command {
            VirtCommand::Start(start) => {
                self.held = front.start(*start);
                self.in_flight.clear();
                self.in_flight.resize_with(front.slots(), || None);
                self.start(lane, context);
                self.call_if_needed();
                return;
            }
            VirtCommand::Stop => {
                // Not dispatched: it stays in the queue's record.
                self.held.clear();
                front.begin_stop();
                return self.end_stop(context);
            }
            VirtCommand::SetKick(kick) => front.set_kick(kick),
            VirtCommand::SetCall(call) => {
                front.set_call(call);
                // The old one may have been rung after its driver had turned away from it.
                self.call();
            }
            VirtCommand::SetMemory(memory) => {
                if let Err(error) = front.set_memory(memory) {
                    news = VirtNews::Failed(error);
                }
            }
            VirtCommand::SetAgreement(agreement) => front.set_agreement(agreement),
        }
        self.tell(news, context);
    }

    /// A queue that is to stop has stopped, if nothing of it is in flight.
    pub(super) fn end_stop(&mut self, context: &ShardContext) {
        let Front::Virt(front) = &mut self.front else { return };
        if front.is_stopping() && self.in_flight_count == 0 {
            let base = front.end();
            self.tell(VirtNews::Stopped(base), context);
        }
    }

    fn tell_violation(&mut self, context: &ShardContext) {
        let Front::Virt(front) = &mut self.front else { return };
        if let Some(violation) = front.violation() {
            self.tell(VirtNews::Broken(violation), context);
        }
    }

    fn tell(&self, news: VirtNews, context: &ShardContext) {
        let (session, queue) = (self.session.id, self.index);
        context.events.send(ShardEvent::Virt(VirtEvent { session, queue, news }));
    }

    pub(super) fn set_parked(&mut self, lane: &mut Lane, context: &ShardContext, parked: bool) {
        self.parked = parked;
        if !parked && !self.draining {
            self.release_held(lane, context);
            self.call_if_needed();
        }
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.held.clear();
    }

    pub(super) fn is_drained(&self) -> bool {
        self.draining && self.in_flight_count == 0
    }

    /// Its volume's limits are used up; false if it waits for them already.
    pub(super) fn start_throttle(&mut self) -> bool {
        if self.throttled.is_some() {
            return false;
        }
        self.throttled = Some(Instant::now());
        self.session.ledger.counters().throttles.fetch_add(1, Relaxed);
        true
    }

    /// It need not wait any longer.
    pub(super) fn end_throttle(&mut self, now: Instant) {
        if let Some(since) = self.throttled.take() {
            let waited_ns = now.saturating_duration_since(since).as_nanos() as u64;
            self.session.ledger.counters().throttled_ns.fetch_add(waited_ns, Relaxed);
        }
    }

    pub(super) fn beat(&mut self, now: Instant, stall_alarm: Duration) {
        if self.in_flight_count == 0 && self.throttled.is_none() {
            return;
        }
        self.session.region.header().heartbeat.fetch_add(1, Relaxed);
        self.session.note_blackout();
        let (mut stalled, mut new) = (0, 0);
        let mut oldest: Option<(Duration, usize, Op)> = None;
        for (slot, request) in self.in_flight.iter_mut().enumerate() {
            let Some(request) = request else { continue };
            let waited = now.saturating_duration_since(request.since);
            if waited >= stall_alarm {
                stalled += 1;
                new += u32::from(!std::mem::replace(&mut request.alarmed, true));
            }
            if oldest.is_none_or(|(longest, ..)| waited > longest) {
                oldest = Some((waited, slot, request.op));
            }
        }
        let oldest = oldest.filter(|(waited, ..)| *waited >= HEARTBEAT.min(stall_alarm));
        if let Some((waited, slot, op)) = oldest.filter(|_| new > 0) {
            self.session.ledger.counters().stalls.fetch_add(new.into(), Relaxed);
            let (volume, session) = (&self.session.volume.name, self.session.id);
            let stall = alarm::Stall { volume, session, requests: new, slot, op, waited };
            alarm::request_stalled(&stall, now);
        }
        if oldest.is_some() || self.conspicuous.is_some() {
            self.tell_waits(stalled, oldest.map(|(waited, ..)| waited));
        }
    }

    fn tell_waits(&mut self, stalled: u32, oldest: Option<Duration>) {
        let live = &self.session.live[self.index as usize];
        live.note(stalled, oldest.map(|waited| waited.as_nanos() as u64));
        if self.conspicuous.is_some_and(|before| before > 0) && stalled == 0 {
            alarm::stall_over(&self.session.volume.name, self.session.id);
        }
        self.conspicuous = oldest.map(|_| stalled);
    }

    fn refresh_memories(&mut self) {
        let version = self.session.memories_version();
        if version != self.memories_version {
            self.memories_version = version;
            self.memories = self.session.memories();
        }
    }
}

/// Bytes that a request moves: none if it only names a range.
fn data_bytes(op: Op, length: u64) -> u64 {
    if op.has_data() { length } else { 0 }
}
