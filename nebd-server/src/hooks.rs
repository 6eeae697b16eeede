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

/// Whether a predecessor that does not let go is left alive (`NEBD_TEST_SPARE_PREDECESSOR=1`): the
/// fence alone must hold then.
pub fn predecessor_is_spared() -> bool {
    #[cfg(feature = "test-hooks")]
    return switched_on("NEBD_TEST_SPARE_PREDECESSOR");
    #[cfg(not(feature = "test-hooks"))]
    false
}

/// A candidate that answers with something else than a welcome (`NEBD_TEST_CANDIDATE`: `version`,
/// `garbage` or `tag`).
pub fn strange_welcome(_socket: &std::os::fd::OwnedFd) {
    #[cfg(feature = "test-hooks")]
    {
        use crate::handover::wire::{self, Fields, REQUIRED};
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(1);
        let welcome = REQUIRED | 2;
        let version = |version: u32| Fields::new().with(REQUIRED | 2, version.to_le_bytes());
        let sent = match std::env::var("NEBD_TEST_CANDIDATE").as_deref() {
            Ok("version") => wire::send(_socket, welcome, version(77).bytes(), &[], deadline),
            Ok("garbage") => wire::send(_socket, welcome, &[0x5a; 100], &[], deadline),
            Ok("tag") => {
                let fields = version(1).with(REQUIRED | 0x7ff0, b"of a later version");
                wire::send(_socket, welcome, fields.bytes(), &[], deadline)
            }
            _ => return,
        };
        if let Err(error) = sent {
            eprintln!("the strange welcome was not sent: {error}");
        }
        loop {
            std::thread::park();
        }
    }
}

/// An owner that says something else than it should, in the place of a hello (`NEBD_TEST_OWNER`:
/// `hello-version`, `hello-garbage`, `hello-tag`) or of an offer (`offer-garbage`, `offer-tag`).
/// `place` is `hello` or `offer`. Whether it did.
pub fn strange_owner(_place: &str, _socket: std::os::fd::BorrowedFd<'_>) -> bool {
    #[cfg(feature = "test-hooks")]
    {
        use crate::handover::wire::{self, Fields, REQUIRED};
        let fault = std::env::var("NEBD_TEST_OWNER").unwrap_or_default();
        let Some(fault) = fault.strip_prefix(_place).and_then(|rest| rest.strip_prefix('-')) else {
            return false;
        };
        let kind = REQUIRED | if _place == "hello" { 1 } else { 4 };
        let version = |number: u32| number.to_le_bytes();
        let body = match fault {
            "version" => {
                Fields::new().with(REQUIRED | 1, version(77)).with(REQUIRED | 2, version(78))
            }
            "tag" if _place == "hello" => Fields::new()
                .with(REQUIRED | 1, version(1))
                .with(REQUIRED | 2, version(1))
                .with(REQUIRED | 0x7ff0, b"of a later version"),
            "tag" => Fields::new().with(REQUIRED | 0x7ff0, b"of a later version"),
            // A field that is longer than its message.
            _ => Fields::new().with(0x5a5a, [0x5a; 100]),
        };
        let bytes = if fault == "garbage" { &body.bytes()[..90] } else { body.bytes() };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(1);
        if let Err(error) = wire::send(_socket, kind, bytes, &[], deadline) {
            eprintln!("the strange message was not sent: {error}");
        }
        true
    }
    #[cfg(not(feature = "test-hooks"))]
    false
}

/// What a server on probation has to complain of, whatever it sees (`NEBD_TEST_COMPLAINT`).
pub fn complaint() -> Option<String> {
    #[cfg(feature = "test-hooks")]
    return std::env::var("NEBD_TEST_COMPLAINT").ok();
    #[cfg(not(feature = "test-hooks"))]
    None
}
