//! A shard: one thread that serves queues, alone.
//!
//! ```text
//!          kick                 nothing for a while
//!  asleep ──────► active ◄────────────────────────► (each queue)
//!
//!  pass:  commands ─► pop and dispatch each active queue ─► flush ─► drain ─► publish ─► call
//!  idle:  spin a little (if that has paid lately) ─► every queue asleep ─► epoll
//! ```
//!
//! What dies at any point of a pass is found again by the successor: a popped request is still in
//! its slot, a finished one without a published completion is issued again.

mod fair;
mod freeze;
mod front;
mod hold;
mod messages;
mod queue;
mod ringer;
mod spin;
mod virt;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use nebd_abi::layout::SessionId;
use nebd_backend::{Done, Lane, LaneConfig, Mailbox};
use rustix::event::{Timespec, epoll};

use crate::tenure::Tenure;
use crate::work_sign::WorkSign;
pub use fair::{Beacon, beacons};
use fair::{Fair, Share};
use freeze::Frozen;
pub(crate) use freeze::monotonic_ns;
pub use freeze::{Freeze, FreezeEvent};
pub(crate) use front::Adopted;
pub use front::Front;
pub use hold::Hold;
pub use messages::{Command, EventSink, QueueSetup, ShardEvent};
use queue::{QueueTask, Served};
use ringer::Ringer;
use spin::Spin;
pub use spin::SpinBudget;
pub use virt::{VirtCommand, VirtEvent, VirtFront, VirtNews, VirtStart};

/// How often a shard with requests in flight shows that it lives.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// Passes between looks at the doorbells while busy, and bytes: with large requests a few passes
/// may take as long as a newcomer should wait.
const PASSES_PER_POLL: u32 = 16;
const BYTES_PER_POLL: u64 = 4 << 20;
/// `data` of the lane's descriptors in epoll.
const LANE_KEY: u64 = u64::MAX;

/// What every shard of a server shares.
#[derive(Clone)]
pub struct ShardContext {
    /// Where work is noted.
    pub work_sign: WorkSign,
    /// This server's.
    pub tenure: Arc<Tenure>,
    /// How lanes are set up.
    pub lane: LaneConfig,
    /// Longest spin.
    pub spin: Duration,
    /// What each shard may spin in all.
    pub spin_budget: SpinBudget,
    /// Requests a queue may have at a turn.
    pub batch: u32,
    /// When a request at the backend raises an alarm.
    pub stall_alarm: Duration,
    /// Where events go.
    pub events: EventSink,
    /// What shards tell each other about who is present.
    pub beacons: Arc<[Beacon]>,
}

/// The way to a running shard.
#[derive(Clone)]
pub struct ShardHandle {
    commands: Sender<Command>,
    mailbox: Arc<Mailbox>,
}

impl ShardHandle {
    /// Tells the shard something.
    pub fn send(&self, command: Command) {
        // A shard ends only with its process.
        if self.commands.send(command).is_ok() {
            self.mailbox.ring();
        }
    }
}

/// Starts shard `index`; also says how its lane does file IO.
pub fn spawn(index: usize, context: ShardContext) -> io::Result<ShardHandle> {
    let (ready_sender, ready) = crossbeam::channel::bounded(1);
    let (commands, receiver) = unbounded();
    std::thread::Builder::new().name(format!("nebd-shard-{index}")).spawn(
        move || match Shard::new(index, context, receiver) {
            Ok(mut shard) => {
                let _ = ready_sender.send(Ok(shard.lane.mailbox().clone()));
                shard.run();
            }
            Err(error) => _ = ready_sender.send(Err(error)),
        },
    )?;
    let mailbox = ready.recv().unwrap_or_else(|_| Err(io::Error::other("the shard panicked")))?;
    Ok(ShardHandle { commands, mailbox })
}

struct Shard {
    index: usize,
    context: ShardContext,
    lane: Lane,
    ringer: Rc<Ringer>,
    epoll: OwnedFd,
    commands: Receiver<Command>,
    queues: Vec<Option<Box<QueueTask>>>,
    by_session: HashMap<(SessionId, u32), usize>,
    /// Keys of queues that are looked at in each pass.
    active: Vec<usize>,
    /// Keys of queues whose volumes' limits are used up, and until when.
    throttled: Vec<(Instant, usize)>,
    /// Who is present, and what each may have.
    fair: Fair,
    /// Bytes that were asked for since the last look at the doorbells.
    moved: u64,
    /// Requests at the backend, over all queues.
    in_flight: usize,
    done: Vec<Done>,
    touched: Vec<usize>,
    events: Vec<epoll::Event>,
    heartbeat_at: Instant,
    /// Set while a successor takes over.
    frozen: Option<Frozen>,
}

impl Shard {
    fn new(index: usize, context: ShardContext, commands: Receiver<Command>) -> io::Result<Shard> {
        let lane = Lane::new(&context.lane)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in lane.wait_fds() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, fd, epoll::EventData::new_u64(LANE_KEY), flags)?;
        }
        Ok(Shard {
            fair: Fair::new(index, context.beacons.clone()),
            moved: 0,
            index,
            context,
            lane,
            ringer: Rc::new(Ringer::new()?),
            epoll,
            commands,
            queues: Vec::new(),
            by_session: HashMap::new(),
            active: Vec::new(),
            throttled: Vec::new(),
            in_flight: 0,
            done: Vec::with_capacity(256),
            touched: Vec::with_capacity(256),
            events: Vec::with_capacity(256),
            heartbeat_at: Instant::now(),
            frozen: None,
        })
    }

    fn run(&mut self) {
        let mut spin = Spin::new(self.context.spin, self.context.spin_budget);
        let mut passes = 0u32;
        loop {
            let busy = self.pass();
            passes = passes.wrapping_add(1);
            if passes.is_multiple_of(PASSES_PER_POLL) || self.moved >= BYTES_PER_POLL {
                self.moved = 0;
                self.look();
                self.poll(Some(Duration::ZERO));
                self.beat();
            }
            if busy {
                spin.worked();
            } else if self.frozen.is_some() || !spin.again() {
                self.sleep();
            }
        }
    }

    fn look(&mut self) {
        if self.fair.wants_look() {
            self.fair.look(monotonic_ns());
        }
    }

    /// One round; whether anything was done.
    fn pass(&mut self) -> bool {
        let mut busy = false;
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
            busy = true;
        }
        if self.frozen.is_some() {
            self.lane.flush();
            let reaped = self.reap();
            return self.seal_if_due() | reaped | busy;
        }
        self.resume_throttled(false);
        self.fair.begin_round();
        let mut at = 0;
        while at < self.active.len() {
            let key = self.active[at];
            let served = self.serve(key);
            let has_taken = matches!(served, Served::Some | Served::Throttled(_));
            busy |= matches!(served, Served::Some | Served::Owes);
            // A queue that was drained just now is gone from the list already.
            let still_here = self.active.get(at) == Some(&key);
            match served {
                Served::Asleep if still_here => _ = self.active.swap_remove(at),
                Served::Throttled(until) if still_here => {
                    self.active.swap_remove(at);
                    self.throttle(key, until);
                }
                _ if still_here => at += 1,
                _ => {}
            }
            if has_taken && self.fair.is_shared() {
                // Its answers must not wait for the turns of the others.
                self.lane.take_answered(&mut self.done);
                if !self.done.is_empty() {
                    self.publish();
                }
            }
        }
        if self.fair.is_shared() && !self.active.is_empty() {
            // Each queue is the first of its session in some round, and so has of its balance.
            self.active.rotate_left(1);
        }
        self.lane.flush();
        self.reap() | busy
    }

    /// Pops and dispatches what one queue has.
    fn serve(&mut self, key: usize) -> Served {
        let Some(task) = self.queues.get_mut(key).and_then(Option::as_mut) else {
            return Served::Asleep;
        };
        let before = task.in_flight_count;
        let served = task.serve(&mut self.lane, &self.context, &mut self.fair, &mut self.moved);
        self.in_flight += task.in_flight_count - before;
        match served {
            Ok(served) => served,
            Err(violation) => {
                task.drain();
                let session = task.session.id;
                self.context.events.send(ShardEvent::Violation(session, violation));
                self.finish_if_drained(key);
                Served::Asleep
            }
        }
    }

    fn throttle(&mut self, key: usize, until: Instant) {
        if let Some(task) = self.queues[key].as_mut()
            && task.start_throttle()
        {
            self.throttled.push((until, key));
        }
    }

    /// Has those served again whose time has come, or all. A key may belong to another queue by
    /// now, which is then looked at once for nothing.
    fn resume_throttled(&mut self, all: bool) {
        if self.throttled.is_empty() {
            return;
        }
        let now = Instant::now();
        let is_due = |(until, _): &mut (Instant, usize)| all || *until <= now;
        let due: Vec<usize> = self.throttled.extract_if(.., is_due).map(|(_, key)| key).collect();
        for key in due {
            if let Some(task) = self.queues.get_mut(key).and_then(Option::as_mut) {
                task.end_throttle(now);
            }
            self.activate(key);
        }
    }

    /// Publishes what backends have answered, then calls each client once.
    fn reap(&mut self) -> bool {
        if let Some(frozen) = self.frozen.as_mut().filter(|frozen| frozen.is_sealed) {
            let before = frozen.kept.len();
            self.lane.drain_unpublished(&mut frozen.kept);
            let has_more = frozen.kept.len() > before;
            self.tell_drained();
            return has_more;
        }
        self.lane.drain(&mut self.done);
        if self.done.is_empty() {
            return false;
        }
        self.publish();
        true
    }

    fn publish(&mut self) {
        let now = Instant::now();
        for done in std::mem::take(&mut self.done).drain(..) {
            let key = (done.tag >> 32) as usize;
            let Some(task) = self.queues.get_mut(key).and_then(Option::as_mut) else { continue };
            if task.answer(done.tag as u32, done.result, now, &self.context) {
                self.in_flight -= 1;
            }
            if !task.touched {
                task.touched = true;
                self.touched.push(key);
                if self.frozen.is_some() {
                    task.last_answer_ns = monotonic_ns();
                }
            }
        }
        crate::failpoint!("after-publish");
        for key in std::mem::take(&mut self.touched).drain(..) {
            if let Some(task) = self.queues[key].as_mut() {
                task.touched = false;
                task.call_if_needed();
                self.end_stop(key);
                self.finish_if_drained(key);
            }
        }
    }

    fn seal_if_due(&mut self) -> bool {
        let Some(frozen) = self.frozen.as_mut().filter(|frozen| !frozen.is_sealed) else {
            return false;
        };
        if self.in_flight > 0 && Instant::now() < frozen.freeze.deadline {
            return false;
        }
        frozen.is_sealed = true;
        let tasks = self.queues.iter().flatten();
        let left = tasks.clone().filter(|task| task.in_flight_count > 0);
        frozen.tell(FreezeEvent::Sealed {
            left: left.map(|task| task.session.id).collect(),
            last_ns: tasks.map(|task| (task.session.id, task.last_answer_ns)).collect(),
        });
        true
    }

    /// Says which queues have had their last answer with those kept just now.
    fn tell_drained(&mut self) {
        let Some(frozen) = &mut self.frozen else { return };
        let mut kept = HashMap::<usize, usize>::new();
        for done in &frozen.kept {
            *kept.entry((done.tag >> 32) as usize).or_default() += 1;
        }
        for (key, count) in kept {
            let Some(task) = self.queues.get_mut(key).and_then(Option::as_mut) else { continue };
            if count == task.in_flight_count && !std::mem::replace(&mut task.told_drained, true) {
                frozen.tell(FreezeEvent::Drained(task.session.id));
            }
        }
    }

    fn thaw(&mut self) {
        let Some(frozen) = self.frozen.take() else { return };
        self.done = frozen.kept;
        for key in 0..self.queues.len() {
            if let Some(task) = self.queues[key].as_mut() {
                task.told_drained = false;
                task.active = false;
            }
        }
        self.active.clear();
        self.publish();
        frozen.kept_commands.into_iter().for_each(|command| self.obey(command));
        for key in 0..self.queues.len() {
            self.activate(key);
        }
    }

    fn obey(&mut self, command: Command) {
        // Rings may be a successor's by now.
        let due = match &mut self.frozen {
            Some(frozen) => frozen.keep(command),
            None => Some(command),
        };
        let Some(command) = due else { return };
        match command {
            Command::Serve(setup) => self.add(*setup),
            Command::Suspect { session, queue, request } => {
                if !self.by_session.contains_key(&(session, queue)) {
                    // Its session has ended meanwhile; the next suspect must not wait for it.
                    self.context.events.send(ShardEvent::SuspectAnswered(session));
                }
                self.with_queue(session, queue, |task, shard| {
                    task.dispatch_suspect(&mut shard.lane, &shard.context, request);
                });
            }
            Command::Abort { session, queue, request } => {
                self.with_queue(session, queue, |task, _| task.abort(&request));
            }
            Command::Virt(session, queue, command) => {
                self.with_queue(session, queue, |task, shard| shard.obey_hypervisor(task, command));
            }
            Command::Park(session, parked) => self.with_session(session, |task, shard| {
                task.set_parked(&mut shard.lane, &shard.context, parked);
            }),
            Command::Drain(session) => self.with_session(session, |task, _| task.drain()),
            Command::LimitsChanged => self.resume_throttled(true),
            Command::Freeze(freeze) => {
                let now = monotonic_ns();
                for task in self.queues.iter_mut().flatten() {
                    task.last_answer_ns = now;
                }
                self.frozen = Some(Frozen::new(freeze));
            }
            Command::Hold(hold) => hold.wait(),
            Command::Thaw => self.thaw(),
            Command::Probe => {
                let has_work = self.in_flight > 0 || !self.active.is_empty();
                self.context.work_sign.pong(1 + self.index, has_work);
            }
        }
    }

    fn with_session(&mut self, session: SessionId, act: impl Fn(&mut QueueTask, &mut Shard)) {
        for queue in 0..nebd_abi::layout::QUEUES_MAX {
            self.with_queue(session, queue, &act);
        }
    }

    fn with_queue(
        &mut self,
        session: SessionId,
        queue: u32,
        act: impl FnOnce(&mut QueueTask, &mut Shard),
    ) {
        let Some(&key) = self.by_session.get(&(session, queue)) else { return };
        let Some(mut task) = self.queues[key].take() else { return };
        let before = task.in_flight_count;
        act(&mut task, self);
        self.in_flight += task.in_flight_count - before;
        self.queues[key] = Some(task);
        self.activate(key);
        self.finish_if_drained(key);
    }

    fn add(&mut self, setup: QueueSetup) {
        let key = self.queues.iter().position(Option::is_none).unwrap_or_else(|| {
            self.queues.push(None);
            self.queues.len() - 1
        });
        let id = (setup.session.id, setup.index);
        let share = self.share(setup.session.id);
        let mut task = QueueTask::new(key, setup, self.ringer.clone(), share);
        self.watch(&task);
        if task.session.is_draining() {
            // Its client died before it was served; the command to drain may have come too early.
            task.drain();
        }
        task.start(&mut self.lane, &self.context);
        self.in_flight += task.in_flight_count;
        self.queues[key] = Some(Box::new(task));
        self.by_session.insert(id, key);
        self.activate(key);
        self.finish_if_drained(key);
    }

    fn watch(&self, task: &QueueTask) {
        let Some(kick) = task.kick() else { return };
        let (data, flags) = (task.key as u64, epoll::EventFlags::IN | epoll::EventFlags::ET);
        if let Err(error) = epoll::add(&self.epoll, kick, epoll::EventData::new_u64(data), flags) {
            // Only a descriptor that cannot be polled, which no eventfd is: the queue is served all
            // the same while the shard is awake.
            tracing::error!(session = %task.session.id, %error, "cannot watch a doorbell");
        }
    }

    /// Before it is closed: the store has a duplicate, and the kernel would go on watching.
    fn unwatch(&self, task: &QueueTask) {
        if let Some(kick) = task.kick() {
            let _ = epoll::delete(&self.epoll, kick.as_fd());
        }
    }

    fn obey_hypervisor(&mut self, task: &mut QueueTask, command: VirtCommand) {
        let is_rewired = matches!(command, VirtCommand::Start(_) | VirtCommand::SetKick(_));
        // A stop that ends at once lets go of its doorbell.
        if is_rewired || matches!(command, VirtCommand::Stop) {
            self.unwatch(task);
        }
        task.obey(command, &mut self.lane, &self.context);
        if is_rewired {
            self.watch(task);
        }
    }

    /// A queue that was told to stop has stopped, if that was its last answer.
    fn end_stop(&mut self, key: usize) {
        if let Some(task) = self.queues[key].as_mut() {
            task.end_stop(&self.context);
        }
    }

    /// What all queues of a session on this shard share.
    fn share(&self, session: SessionId) -> Rc<Share> {
        let mut tasks = self.queues.iter().flatten();
        let sibling = tasks.find(|task| task.session.id == session);
        sibling.map_or_else(|| Share::new(session), |task| task.share.clone())
    }

    fn activate(&mut self, key: usize) {
        if self.frozen.is_some() {
            // Its ring may be a successor's by now; if not, `thaw` looks at every queue.
            return;
        }
        if let Some(task) = self.queues.get_mut(key).and_then(Option::as_mut)
            && !task.active
        {
            task.activate();
            self.active.push(key);
        }
    }

    fn finish_if_drained(&mut self, key: usize) {
        let Some(task) = self.queues[key].as_ref().filter(|task| task.is_drained()) else { return };
        let session = task.session.clone();
        self.unwatch(task);
        self.by_session.remove(&(session.id, task.index));
        self.queues[key] = None;
        self.active.retain(|active| *active != key);
        let id = session.id;
        // Before the event: whoever hears it may count on the region being free.
        drop(session);
        self.context.events.send(ShardEvent::Drained(id));
    }

    fn sleep(&mut self) {
        if let Some(frozen) = &self.frozen {
            let patience = (!frozen.is_sealed)
                .then(|| frozen.freeze.deadline.saturating_duration_since(Instant::now()));
            if self.lane.sleep() && self.commands.is_empty() {
                self.poll(patience);
            }
            self.lane.wake();
            return;
        }
        // Whose session is full is no reason to be awake, whatever its ring holds, and needs no
        // doorbell: an answer of its own wakes the shard.
        let is_full = |fair: &Fair, task: &QueueTask| fair.is_full(&task.share);
        let asleep = self.active.iter().all(|key| {
            let task = self.queues[*key].as_mut();
            task.is_none_or(|task| is_full(&self.fair, task) || task.front.sleep())
        });
        if asleep && self.lane.sleep() && self.commands.is_empty() {
            self.active.retain(|key| {
                let task = self.queues[*key].as_mut();
                task.is_some_and(|task| {
                    task.active = is_full(&self.fair, task);
                    task.active
                })
            });
            self.poll(self.patience());
            self.lane.wake();
            self.look();
            self.beat();
        } else {
            self.lane.wake();
            for key in &self.active {
                if let Some(task) = self.queues[*key].as_mut() {
                    task.front.wake();
                }
            }
        }
    }

    /// How long it may sleep.
    fn patience(&self) -> Option<Duration> {
        let heartbeat = (self.in_flight > 0 || !self.throttled.is_empty()).then_some(HEARTBEAT);
        let next = self.throttled.iter().map(|(until, _)| *until).min();
        let next = next.map(|until| until.saturating_duration_since(Instant::now()));
        heartbeat.into_iter().chain(next).min()
    }

    /// Looks at the doorbells; `None` waits without limit.
    fn poll(&mut self, timeout: Option<Duration>) {
        let timeout = timeout.map(|limit| Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let waited =
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref());
        let has_work = self.in_flight > 0 || !self.active.is_empty();
        if has_work || events.iter().any(|event| event.data.u64() != LANE_KEY) {
            self.context.work_sign.note();
        }
        if waited.is_ok() {
            for event in &events {
                let key = event.data.u64();
                if key != LANE_KEY {
                    self.activate(key as usize);
                }
            }
        }
        self.events = events;
    }

    /// Shows clients with requests in flight that somebody lives, and looks for stalls.
    fn beat(&mut self) {
        let waits = self.in_flight > 0 || !self.throttled.is_empty();
        if self.frozen.is_some() || !waits || self.heartbeat_at.elapsed() < HEARTBEAT {
            return;
        }
        self.heartbeat_at = Instant::now();
        let now = self.heartbeat_at;
        for task in self.queues.iter_mut().flatten() {
            task.beat(now, self.context.stall_alarm);
        }
    }
}
