//! Switches that break promises on purpose: a harness must notice.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Set to `1`, it turns flush off from the start of the process.
pub const FLUSH_OFF_ENV: &str = "NEBD_TEST_FLUSH_OFF";

fn flush_off() -> &'static AtomicBool {
    static OFF: OnceLock<AtomicBool> = OnceLock::new();
    OFF.get_or_init(|| AtomicBool::new(std::env::var(FLUSH_OFF_ENV).is_ok_and(|v| v == "1")))
}

/// Whether the `file` backend answers FLUSH and FUA without `fdatasync`.
pub fn is_flush_off() -> bool {
    flush_off().load(SeqCst)
}

/// Turns flush off, or on again.
pub fn set_flush_off(off: bool) {
    flush_off().store(off, SeqCst);
}
