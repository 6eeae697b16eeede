//! Switches that break promises on purpose: a harness must notice.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Set to `1`, it turns flush off from the start of the process.
pub const FLUSH_OFF_ENV: &str = "NEBD_TEST_FLUSH_OFF";

/// Milliseconds that each sync by a thread of the pool takes longer.
pub const SYNC_MS_ENV: &str = "NEBD_TEST_SYNC_MS";

/// Waits as long as [`SYNC_MS_ENV`] says.
pub(super) fn delay_sync() {
    static DELAY: OnceLock<Option<u64>> = OnceLock::new();
    let delay = DELAY.get_or_init(|| std::env::var(SYNC_MS_ENV).ok()?.parse().ok());
    if let Some(ms) = delay {
        std::thread::sleep(std::time::Duration::from_millis(*ms));
    }
}

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
