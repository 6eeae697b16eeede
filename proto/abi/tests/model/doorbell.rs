//! Sleeping and waking: nobody sleeps for good beside work that waits. Loom calls a lost wakeup a
//! deadlock.

use std::sync::Arc;

use loom::sync::{Condvar, Mutex};
use nebd_abi::region::QueueMemory;
use nebd_abi::ring::{ClientReap, ClientSubmit, ServerQueue, Submission};
use nebd_abi::{Epoch, Op, OpFlags};

/// An eventfd: it stays rung until somebody waits for it, even if the one who waited died.
#[derive(Default)]
struct Doorbell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Doorbell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// What the actors take care of, and may forget.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Care {
    /// Everything.
    Taken,
    /// Whoever wants to sleep does so even if `sleep` says that something came.
    NoSecondLook,
    /// A successor does not look or ring unasked.
    SilentSuccessor,
}

const FLUSH: Submission<'_> =
    Submission { op: Op::Flush, flags: OpFlags::NONE, offset: 0, length: 0, buffers: &[] };
const EPOCH: Epoch = Epoch { major: 1, minor: 1 };

fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A client that submits, against a server that sleeps whenever it may, and one that dies having
/// heard the kick.
pub fn kick(care: Care) {
    check(3, move || {
        let memory = QueueMemory::for_model(2);
        let (server, _) = ServerQueue::adopt(memory.clone(), EPOCH);
        let doorbell = Arc::new(Doorbell::default());
        let client = loom::thread::spawn({
            let (memory, doorbell) = (memory.clone(), doorbell.clone());
            move || {
                let mut submit = ClientSubmit::new(memory);
                for slot in 0..2 {
                    submit.submit(slot, &FLUSH);
                    if submit.kick_needed() {
                        doorbell.ring();
                    }
                }
            }
        });
        let mut popped = 0;
        // The first server dies once it has slept, before it looks at what it was woken for.
        let may_sleep = server.sleep();
        if may_sleep || care == Care::NoSecondLook {
            doorbell.wait();
        }
        drop(server);
        let (mut successor, in_flight) = ServerQueue::adopt(memory, EPOCH);
        popped += in_flight.len();
        if care == Care::SilentSuccessor {
            popped = 0;
        }
        while popped < 2 {
            while successor.pop().unwrap().is_some() {
                popped += 1;
            }
            if popped < 2 {
                let may_sleep = successor.sleep();
                if may_sleep || care == Care::NoSecondLook {
                    doorbell.wait();
                }
                successor.wake();
            }
        }
        client.join().unwrap();
    });
}

/// A client that sleeps until its completion comes, against a server that may die after the
/// completion is published and before it has called, and its successor, which calls once unasked.
pub fn call(care: Care) {
    for dies in [false, true] {
        check(3, move || {
            let memory = QueueMemory::for_model(2);
            let mut submit = ClientSubmit::new(memory.clone());
            let seqs = [submit.submit(0, &FLUSH), submit.submit(1, &FLUSH)];
            let doorbell = Arc::new(Doorbell::default());
            let server = loom::thread::spawn({
                let (memory, doorbell) = (memory.clone(), doorbell.clone());
                move || {
                    let (mut server, _) = ServerQueue::adopt(memory, EPOCH);
                    server.publish(0, seqs[0], Ok(()));
                    if server.call_needed() {
                        doorbell.ring();
                    }
                    server.publish(1, seqs[1], Ok(()));
                    if !dies && server.call_needed() {
                        doorbell.ring();
                    }
                }
            });
            let client = loom::thread::spawn({
                let doorbell = doorbell.clone();
                move || {
                    let mut reap = ClientReap::new(memory);
                    let mut reaped = 0;
                    while reaped < 2 {
                        while reap.reap().is_some() {
                            reaped += 1;
                        }
                        if reaped < 2 {
                            let may_sleep = reap.sleep();
                            if may_sleep || care == Care::NoSecondLook {
                                doorbell.wait();
                            }
                            reap.wake();
                        }
                    }
                }
            });
            server.join().unwrap();
            if dies && care != Care::SilentSuccessor {
                doorbell.ring();
            }
            client.join().unwrap();
        });
    }
}
