//! The ring under loom: client, dying server and successor in one model, and the doorbells.
//!
//! ```text
//!   RUSTFLAGS="--cfg loom" cargo test -p nebd-abi --release --test loom
//! ```
//!
//! A model is run once for each store at which the first server can die (its own stores to the
//! storage included), and loom runs each with every interleaving of the threads and every value a
//! load may return, up to the bound on preemptions that the model names. The death is confirmed (a
//! join) before the successor adopts, and the client runs on all the while.
//!
//! What a model checks: each request completes exactly once and none is lost; a request is
//! dispatched as the client wrote it, once an epoch, and never after its completion was reaped,
//! which is what would put an old write over a newer one that is acknowledged.
//!
//! `a_broken_rule_is_noticed` breaks each rule of the ring in turn and demands that a model fails.
//!
//! Not covered: loom treats `SeqCst` accesses as `AcqRel` (the ring uses fences instead, which it
//! does model), and no model has more than two slots, one takeover, or a queue that wraps; the
//! random walks of `tests/takeover.rs` have those, one interleaving at a time.

#![cfg(loom)]

mod model;

use std::panic::catch_unwind;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use model::doorbell::{self, Care};
use model::{Plan, takeover};
use nebd_abi::ring::hooks::{Rule, switch_broken};

/// Rules are switched for the whole process: whoever breaks one is alone.
static RULES: RwLock<()> = RwLock::new(());

fn rules_kept() -> RwLockReadGuard<'static, ()> {
    RULES.read().unwrap_or_else(PoisonError::into_inner)
}

fn rules_broken() -> RwLockWriteGuard<'static, ()> {
    RULES.write().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a model that is expected to fail; without the hook that prints where and how it did.
fn quietly(model: impl FnOnce() + std::panic::UnwindSafe) -> std::thread::Result<()> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let end = catch_unwind(model);
    std::panic::set_hook(hook);
    end
}

/// One slot: each request takes the place of the one before, and the rings wrap.
const REUSE: Plan = Plan {
    depth: 1,
    requests: &[(0, 0); 4],
    at_once: 1,
    warm_up: 2,
    reversed: false,
    stutters_at: None,
    preemptions: Some(3),
};

/// Two slots: a block is written anew through another slot once the first write is acknowledged,
/// while a slot that was freed long ago lies idle.
const REWRITE: Plan = Plan {
    depth: 2,
    requests: &[(0, 0), (1, 1), (1, 0), (1, 0), (0, 0)],
    at_once: 1,
    warm_up: 3,
    reversed: false,
    stutters_at: None,
    preemptions: Some(4),
};

/// Two requests in flight, answered in the other order, then a third over the first one's block.
const OVERTAKE: Plan = Plan {
    depth: 2,
    requests: &[(0, 0), (1, 1), (0, 0)],
    at_once: 2,
    warm_up: 0,
    reversed: true,
    stutters_at: None,
    preemptions: Some(2),
};

/// A server that answers one request twice: the client must take the second answer for none.
const STUTTER: Plan = Plan {
    depth: 2,
    requests: &[(0, 0), (0, 0), (1, 1)],
    at_once: 1,
    warm_up: 0,
    reversed: false,
    stutters_at: Some(1),
    preemptions: Some(2),
};

#[test]
fn a_slot_is_reused_over_a_takeover() {
    let _rules = rules_kept();
    takeover(&REUSE);
}

#[test]
fn a_block_is_rewritten_over_a_takeover() {
    let _rules = rules_kept();
    takeover(&REWRITE);
}

#[test]
fn requests_overtake_each_other_over_a_takeover() {
    let _rules = rules_kept();
    takeover(&OVERTAKE);
}

#[test]
fn a_second_answer_is_passed_over() {
    let _rules = rules_kept();
    takeover(&STUTTER);
}

#[test]
fn no_kick_is_lost() {
    let _rules = rules_kept();
    doorbell::kick(Care::Taken);
}

#[test]
fn no_call_is_lost() {
    let _rules = rules_kept();
    doorbell::call(Care::Taken);
}

/// Each rule of the ring, and the model that needs it.
#[test]
fn a_broken_rule_is_noticed() {
    let _rules = rules_broken();
    for (rule, plan) in [
        (Rule::ReapMatch, &STUTTER),
        (Rule::ReapFrees, &REWRITE),
        (Rule::SeqLast, &REUSE),
        (Rule::MarkDone, &REUSE),
        (Rule::TornEntry, &REUSE),
        (Rule::TailFirst, &REUSE),
        (Rule::DispatchOnce, &REUSE),
    ] {
        switch_broken(rule, true);
        let end = quietly(|| takeover(plan));
        switch_broken(rule, false);
        let why = end.expect_err(&format!("no model noticed that {rule:?} is broken"));
        println!("{rule:?} broken: {}", model::message(&*why));
    }
}

/// A sleeper that does not look once more, a caller that does not look at the flag in time, and a
/// successor that does not ring unasked.
#[test]
fn a_lost_wakeup_is_noticed() {
    let _rules = rules_broken();
    for (what, end) in [
        ("sleep without a second look", quietly(|| doorbell::kick(Care::NoSecondLook))),
        ("call without a second look", quietly(|| doorbell::call(Care::NoSecondLook))),
        ("a silent kick", quietly(|| doorbell::kick(Care::SilentSuccessor))),
        ("a silent call", quietly(|| doorbell::call(Care::SilentSuccessor))),
    ] {
        let why = end.expect_err(what);
        println!("{what}: {}", model::message(&*why));
    }
}
