//! The actors of the models: a client that rewrites what was acknowledged, a server that dies.

pub mod doorbell;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use loom::sync::atomic::{AtomicU64, Ordering::SeqCst};
use nebd_abi::region::QueueMemory;
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, Request, ServerQueue, Submission};
use nebd_abi::sync::model::{run_mortal, step};
use nebd_abi::{Epoch, Op, OpFlags};

/// One model.
pub struct Plan {
    pub depth: usize,
    /// `(slot, block)` of each of the client's writes.
    pub requests: &'static [(u32, u64)],
    /// How many of them may be in flight at once.
    pub at_once: usize,
    /// How many of them are over before the threads start.
    pub warm_up: usize,
    /// Whether servers dispatch all they find before they answer, last first.
    pub reversed: bool,
    /// The request that the first server answers twice, which no server should.
    pub stutters_at: Option<u64>,
    /// Loom's bound on preemptions; `None` for every interleaving.
    pub preemptions: Option<usize>,
}

/// The storage, and what the world outside the ring knows.
struct World {
    /// The last value written to each block.
    blocks: [AtomicU64; 2],
    /// For each seq (from 1), whether the client saw its completion.
    acknowledged: Vec<AtomicU64>,
    /// Dispatches as `(epoch, slot, seq)`, in order.
    dispatched: std::sync::Mutex<Vec<(Epoch, u32, u64)>>,
}

impl World {
    fn new(plan: &Plan) -> World {
        World {
            blocks: std::array::from_fn(|_| AtomicU64::new(0)),
            acknowledged: plan.requests.iter().map(|_| AtomicU64::new(0)).collect(),
            dispatched: std::sync::Mutex::new(Vec::new()),
        }
    }

    /// The write reaches the storage. The client wrote `seq` into every field that it could.
    fn dispatch(&self, epoch: Epoch, request: &Request, plan: &Plan) {
        let (slot, block) = plan.requests[request.seq as usize - 1];
        let buffer = Buffer { memory: 0, length: request.seq as u32, offset: request.seq };
        assert_eq!(request.op, Ok(Op::Write));
        assert_eq!((request.slot, request.offset, request.length), (slot, block, request.seq));
        assert_eq!(request.buffers.as_slice(), [buffer], "the slot was copied half written");
        let key = (epoch, request.slot, request.seq);
        let mut dispatched = self.dispatched.lock().unwrap();
        assert!(!dispatched.contains(&key), "{key:?} is dispatched twice");
        dispatched.push(key);
        drop(dispatched);
        let acknowledged = self.acknowledged[request.seq as usize - 1].load(SeqCst);
        assert_eq!(acknowledged, 0, "{key:?} is dispatched over what came after it");
        step();
        self.blocks[block as usize].store(request.seq, SeqCst);
    }
}

/// A server's state between its batches.
struct Server<'a> {
    queue: ServerQueue,
    epoch: Epoch,
    plan: &'a Plan,
    world: Arc<World>,
}

impl<'a> Server<'a> {
    /// Takes over and serves what it finds.
    fn start(memory: QueueMemory, minor: u32, plan: &'a Plan, world: Arc<World>) -> Server<'a> {
        let epoch = Epoch { major: 1, minor };
        let (queue, in_flight) = ServerQueue::adopt(memory, epoch);
        let mut server = Server { queue, epoch, plan, world };
        server.serve(in_flight);
        server
    }

    /// Serves what was submitted by now.
    fn poll(&mut self) {
        if !self.plan.reversed {
            while let Some(request) = self.queue.pop().unwrap() {
                self.serve(vec![request]);
            }
            return;
        }
        let batch: Vec<Request> = std::iter::from_fn(|| self.queue.pop().unwrap()).collect();
        self.serve(batch);
    }

    fn serve(&mut self, batch: Vec<Request>) {
        for request in &batch {
            self.world.dispatch(self.epoch, request, self.plan);
        }
        for request in batch.iter().rev() {
            self.queue.publish(request.slot, request.seq, Ok(()));
            if self.epoch.minor == 1 && self.plan.stutters_at == Some(request.seq) {
                self.queue.publish(request.slot, request.seq, Ok(()));
            }
        }
    }
}

/// The client's state between its turns.
struct Guest<'a> {
    submit: ClientSubmit,
    reap: ClientReap,
    plan: &'a Plan,
    world: Arc<World>,
    submitted: usize,
    completed: Vec<u64>,
}

impl<'a> Guest<'a> {
    fn new(memory: QueueMemory, plan: &'a Plan, world: Arc<World>) -> Guest<'a> {
        let (submit, reap) = (ClientSubmit::new(memory.clone()), ClientReap::new(memory));
        Guest { submit, reap, plan, world, submitted: 0, completed: Vec::new() }
    }

    /// Submits what may be submitted.
    fn submit(&mut self) {
        let requests = self.plan.requests;
        while let Some(&(slot, block)) = requests.get(self.submitted) {
            if self.submitted - self.completed.len() == self.plan.at_once {
                return;
            }
            // A slot is reused only once it is free.
            let holder = requests[..self.submitted].iter().rposition(|r| r.0 == slot);
            if holder.is_some_and(|at| !self.completed.contains(&(at as u64 + 1))) {
                return;
            }
            self.submitted += 1;
            let seq = self.submitted as u64;
            let buffers = [Buffer { memory: 0, length: seq as u32, offset: seq }];
            let submission = Submission {
                op: Op::Write,
                flags: OpFlags::NONE,
                offset: block,
                length: seq,
                buffers: &buffers,
            };
            assert_eq!(self.submit.submit(slot, &submission), seq);
        }
    }

    /// Reaps one completion, if there is one.
    fn reap(&mut self) {
        let Some(completion) = self.reap.reap() else { return };
        let seq = completion.seq;
        assert!(seq as usize <= self.submitted, "{seq} was never submitted");
        assert_eq!(completion.result, Ok(()));
        assert_eq!(completion.slot, self.plan.requests[seq as usize - 1].0);
        assert!(!self.completed.contains(&seq), "{seq} completed twice");
        self.completed.push(seq);
        let block = self.plan.requests[seq as usize - 1].1;
        let stored = self.world.blocks[block as usize].load(SeqCst);
        assert!(stored >= seq, "{seq} is acknowledged, the block holds {stored}");
        self.world.acknowledged[seq as usize - 1].store(1, SeqCst);
    }
}

/// Runs a plan once for each store at which its first server can die.
pub fn takeover(plan: &'static Plan) {
    for stores in 0.. {
        let died = Arc::new(AtomicBool::new(false));
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = plan.preemptions;
        let seen = died.clone();
        builder.check(move || {
            if takeover_once(plan, stores) {
                seen.store(true, Relaxed);
            }
        });
        if !died.load(Relaxed) {
            return;
        }
    }
}

/// One execution; whether the first server died of its limit.
fn takeover_once(plan: &'static Plan, stores: u32) -> bool {
    let (memory, world) = (QueueMemory::for_model(plan.depth), Arc::new(World::new(plan)));
    let mut guest = Guest::new(memory.clone(), plan, world.clone());
    let mut first = Server::start(memory.clone(), 1, plan, world.clone());
    while guest.completed.len() < plan.warm_up {
        guest.submit();
        first.poll();
        guest.reap();
    }
    let client = loom::thread::spawn(move || {
        for _ in plan.warm_up..plan.requests.len() {
            guest.submit();
            guest.reap();
        }
        guest
    });
    let first = loom::thread::spawn(move || run_mortal(stores, || first.poll()).is_none());
    let died = first.join().unwrap();
    // The death is confirmed: the successor, in this thread, meets the running client.
    let mut successor = Server::start(memory, 2, plan, world);
    successor.poll();
    let mut guest = client.join().unwrap();
    // Everybody gets as many turns as it takes to finish.
    for _ in 0..=2 * plan.requests.len() {
        successor.poll();
        guest.reap();
        guest.submit();
    }
    let count = plan.requests.len();
    assert_eq!(guest.completed.len(), count, "a request is lost: {:?}", guest.completed);
    assert_eq!(successor.queue.pop(), Ok(None));
    died
}

/// What a failed model said.
pub fn message(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("(no message)")
}
