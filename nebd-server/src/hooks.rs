//! Faults that a test build commits when its environment asks for them, so that the harness can
//! prove it would notice. Without the feature `test-hooks` they compile to nothing.

use nebd_abi::Op;
use nebd_abi::ring::ServerQueue;

#[cfg(feature = "test-hooks")]
fn switched_on(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

/// Whether a successor forgets what its predecessor left in flight (`NEBD_TEST_REISSUE_OFF=1`).
pub fn reissue_is_off() -> bool {
    #[cfg(feature = "test-hooks")]
    return switched_on("NEBD_TEST_REISSUE_OFF");
    #[cfg(not(feature = "test-hooks"))]
    false
}

/// Dies if the request writes the poisoned offset (`NEBD_TEST_POISON=BYTES`).
pub fn poison(_op: Op, _offset: u64, _length: u64) {
    #[cfg(feature = "test-hooks")]
    {
        use std::sync::OnceLock;
        static POISON: OnceLock<Option<u64>> = OnceLock::new();
        let poison = POISON.get_or_init(|| std::env::var("NEBD_TEST_POISON").ok()?.parse().ok());
        if let Some(poison) = poison
            && _op == Op::Write
            && (_offset.._offset.saturating_add(_length)).contains(poison)
        {
            std::process::abort();
        }
    }
}

/// Now and then publishes an old completion of the slot again (`NEBD_TEST_DUPLICATE_COMPLETIONS=1`).
pub fn duplicate_completion(_ring: &mut ServerQueue, _slot: u32, _seq: u64) {
    #[cfg(feature = "test-hooks")]
    {
        use std::cell::RefCell;
        use std::collections::VecDeque;
        use std::sync::OnceLock;
        static ON: OnceLock<bool> = OnceLock::new();
        if *ON.get_or_init(|| switched_on("NEBD_TEST_DUPLICATE_COMPLETIONS")) {
            thread_local!(static OLD: RefCell<VecDeque<(u32, u64)>> = RefCell::default());
            OLD.with_borrow_mut(|old| {
                old.push_back((_slot, _seq));
                if old.len() > 64 {
                    let again = old.pop_front().filter(|(_, seq)| seq % 7 == 0);
                    if let Some((slot, seq)) = again {
                        _ring.publish(slot, seq, Ok(()));
                    }
                }
            });
        }
    }
}
