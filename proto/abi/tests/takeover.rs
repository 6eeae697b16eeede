//! Random walks of a client and a row of servers that die, against a reference of a page.
//!
//! One interleaving at a time, but many takeovers, deep queues and rings that wrap: what the loom
//! models of `tests/loom.rs` are too small for.

#![cfg(not(loom))]

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, SessionId};
use nebd_abi::region::{QueueMemory, Region};
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, Request, ServerQueue, Submission};
use nebd_abi::{Epoch, Errno, Op, OpFlags};
use proptest::prelude::*;

/// One step of a walk; a number chooses among what is possible.
#[derive(Clone, Debug)]
enum Step {
    Submit(usize),
    Reap,
    Pop,
    Answer(usize),
    /// The server dies, having written so many words of its next completion entry.
    Die {
        answer: usize,
        words: usize,
    },
    Adopt,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<usize>().prop_map(Step::Submit),
        6 => Just(Step::Reap),
        6 => Just(Step::Pop),
        6 => any::<usize>().prop_map(Step::Answer),
        1 => (any::<usize>(), 0..=3usize).prop_map(|(answer, words)| Step::Die { answer, words }),
        2 => Just(Step::Adopt),
    ]
}

fn walk() -> impl Strategy<Value = (u32, Vec<Step>)> {
    (0..4u32).prop_flat_map(|log| (Just(1 << log), prop::collection::vec(step(), 1..300)))
}

/// The reference: what is in flight, and what the world was told.
struct Walk {
    memory: QueueMemory,
    submit: ClientSubmit,
    reap: ClientReap,
    server: Option<ServerQueue>,
    generation: u32,
    seq_last: u64,
    /// Slot to seq, of what was submitted and not reaped.
    in_flight: BTreeMap<u32, u64>,
    /// What the present server has still to pop, in order.
    unpopped: VecDeque<(u32, u64)>,
    /// What the present server dispatched and has not answered.
    dispatched: Vec<(u32, u64)>,
    /// What was published and not reaped, in order.
    published: VecDeque<(u32, u64, u32)>,
}

/// The request that the client makes with this sequence number.
fn length_of(seq: u64) -> u64 {
    seq * 512
}

fn result_of(seq: u64) -> Result<(), Errno> {
    if seq.is_multiple_of(3) { Err(Errno::IO) } else { Ok(()) }
}

impl Walk {
    fn new(depth: u32) -> Walk {
        let geometry =
            Geometry { queue_count: 2, queue_depth: depth, iovecs_per_slot: 3, arena_size: 0 };
        let params = RegionParams {
            version: LayoutVersion::CURRENT,
            session: SessionId([1; 16]),
            geometry,
            volume: "null:walk".parse().unwrap(),
            client_pid: 1,
            client_version: "walk".into(),
        };
        let memory = Arc::new(Region::create(params).unwrap()).queue(1).unwrap();
        let mut walk = Walk {
            submit: ClientSubmit::new(memory.clone()),
            reap: ClientReap::new(memory.clone()),
            memory,
            server: None,
            generation: 0,
            seq_last: 0,
            in_flight: BTreeMap::new(),
            unpopped: VecDeque::new(),
            dispatched: Vec::new(),
            published: VecDeque::new(),
        };
        walk.adopt();
        walk
    }

    fn depth(&self) -> u32 {
        self.memory.slots().len() as u32
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Submit(choice) => self.submit(choice),
            Step::Reap => self.reap(),
            Step::Pop => self.pop(),
            Step::Answer(choice) => self.answer(choice),
            Step::Die { answer, words } => self.die(answer, words),
            Step::Adopt if self.server.is_none() => self.adopt(),
            Step::Adopt => {}
        }
    }

    fn submit(&mut self, choice: usize) {
        let free: Vec<u32> =
            (0..self.depth()).filter(|slot| !self.in_flight.contains_key(slot)).collect();
        let Some(slot) = free.get(choice % free.len().max(1)) else { return };
        self.seq_last += 1;
        let length = length_of(self.seq_last);
        // One buffer stands in the slot, several in the table.
        let buffers = [Buffer { memory: 2, length: length as u32, offset: self.seq_last }; 3];
        let buffers = &buffers[..self.seq_last as usize % 4];
        let flags = OpFlags::FUA;
        let request = Submission { op: Op::Write, flags, offset: 4096, length, buffers };
        assert_eq!(self.submit.submit(*slot, &request), self.seq_last);
        self.in_flight.insert(*slot, self.seq_last);
        if self.server.is_some() {
            self.unpopped.push_back((*slot, self.seq_last));
        }
    }

    fn reap(&mut self) {
        let Some(completion) = self.reap.reap() else {
            assert_eq!(self.published, [], "a completion is lost");
            return;
        };
        let key = (completion.slot, completion.seq, completion.epoch.minor);
        assert_eq!(Some(key), self.published.pop_front(), "not the next completion");
        assert_eq!(completion.result, result_of(completion.seq));
        assert_eq!(self.in_flight.remove(&completion.slot), Some(completion.seq));
    }

    fn check(request: &Request) -> (u32, u64) {
        assert_eq!((request.op, request.flags), (Ok(Op::Write), Ok(OpFlags::FUA)));
        assert_eq!((request.offset, request.length), (4096, length_of(request.seq)));
        let buffer = Buffer { memory: 2, length: request.length as u32, offset: request.seq };
        assert_eq!(request.buffers.as_slice(), vec![buffer; request.seq as usize % 4]);
        (request.slot, request.seq)
    }

    fn pop(&mut self) {
        let Some(server) = &mut self.server else { return };
        let request = server.pop().expect("the client keeps the rules");
        let key = request.as_ref().map(Walk::check);
        assert_eq!(key, self.unpopped.pop_front(), "not the next request");
        self.dispatched.extend(key);
    }

    /// One of the dispatched requests, if the server lives and there is one.
    fn take_dispatched(&mut self, choice: usize) -> Option<(u32, u64)> {
        let count = self.dispatched.len();
        (self.server.is_some() && count > 0).then(|| self.dispatched.swap_remove(choice % count))
    }

    fn answer(&mut self, choice: usize) {
        let Some((slot, seq)) = self.take_dispatched(choice) else { return };
        let server = self.server.as_mut().expect("as taken");
        server.publish(slot, seq, result_of(seq));
        self.published.push_back((slot, seq, self.generation));
    }

    fn die(&mut self, choice: usize, words: usize) {
        let torn = self.take_dispatched(choice);
        if self.server.take().is_none() {
            return;
        }
        self.dispatched.clear();
        self.unpopped.clear();
        let Some((slot, seq)) = torn else { return };
        let cq = self.memory.cq();
        let entry = &cq[self.memory.header().cq_tail.word.load(Relaxed) as usize % cq.len()];
        let stores = [(&entry.seq, seq), (&entry.slot_result, slot.into()), (&entry.epoch, 7)];
        for (word, value) in &stores[..words] {
            word.store(*value, Relaxed);
        }
    }

    fn adopt(&mut self) {
        self.generation += 1;
        let epoch = Epoch { major: 1, minor: self.generation };
        let (server, requests) = ServerQueue::adopt(self.memory.clone(), epoch);
        let mut expected: Vec<(u32, u64)> = self
            .in_flight
            .iter()
            .map(|(slot, seq)| (*slot, *seq))
            .filter(|(_, seq)| !self.published.iter().any(|answer| answer.1 == *seq))
            .collect();
        expected.sort_by_key(|key| key.1);
        self.dispatched = requests.iter().map(Walk::check).collect();
        assert_eq!(self.dispatched, expected, "not what was in flight");
        self.server = Some(server);
    }

    /// Everything submitted completes.
    fn finish(&mut self) {
        if self.server.is_none() {
            self.adopt();
        }
        while !self.unpopped.is_empty() {
            self.pop();
        }
        while !self.dispatched.is_empty() {
            self.answer(0);
        }
        while !self.published.is_empty() {
            self.reap();
        }
        self.pop();
        self.reap();
        assert!(self.in_flight.is_empty(), "requests are lost: {:?}", self.in_flight);
    }
}

fn run(depth: u32, steps: &[Step]) {
    let mut walk = Walk::new(depth);
    steps.iter().for_each(|step| walk.step(step));
    walk.finish();
}

#[cfg(not(feature = "test-hooks"))]
proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn servers_die_and_no_request_is_lost_or_repeated((depth, steps) in walk()) {
        run(depth, &steps);
    }
}

/// With `test-hooks` the rules can be broken, for the whole process: one test does it all.
#[cfg(feature = "test-hooks")]
#[test]
fn the_walk_notices_a_broken_rule() {
    use nebd_abi::ring::hooks::{Rule, switch_broken};
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

    let walks = || {
        let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        TestRunner::new_with_rng(config, rng).run(&walk(), |(depth, steps)| {
            run(depth, &steps);
            Ok(())
        })
    };
    walks().expect("with every rule kept");
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    // The other rules need two threads to be broken: `tests/loom.rs` does that.
    let ends = [Rule::ReapFrees, Rule::MarkDone, Rule::TornEntry].map(|rule| {
        switch_broken(rule, true);
        let end = walks();
        switch_broken(rule, false);
        (rule, end)
    });
    std::panic::set_hook(hook);
    for (rule, end) in ends {
        assert!(end.is_err(), "no walk noticed that {rule:?} is broken");
    }
}
