//! Shards that wait until a new server has taken up all sessions: clients of the first to be served
//! would take the cores from the last.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Command, ShardHandle, monotonic_ns};

/// Some sessions may take long; the others do not wait longer than this for them.
const HOLD_TIME_MAX: Duration = Duration::from_millis(10);

/// What shards that serve nothing yet wait for.
#[derive(Debug)]
pub struct Hold {
    begin_ns: u64,
    /// When it was ended.
    end_ns: Mutex<Option<u64>>,
    ended: Condvar,
}

impl Hold {
    /// Whatever these are told from now on waits.
    pub fn begin(shards: &[ShardHandle]) -> Arc<Hold> {
        let hold = Arc::new(Hold {
            begin_ns: monotonic_ns(),
            end_ns: Mutex::default(),
            ended: Condvar::new(),
        });
        shards.iter().for_each(|shard| shard.send(Command::Hold(hold.clone())));
        hold
    }

    /// They need not wait any longer.
    pub fn end(&self) {
        let mut end_ns = self.end_ns.lock().unwrap_or_else(PoisonError::into_inner);
        end_ns.get_or_insert_with(monotonic_ns);
        self.ended.notify_all();
    }

    /// Since when nobody waits any more (`CLOCK_MONOTONIC`), if it has been ended.
    pub fn over_ns(&self) -> u64 {
        let end_ns = *self.end_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let latest_ns = self.begin_ns + HOLD_TIME_MAX.as_nanos() as u64;
        end_ns.map_or(latest_ns, |end_ns| end_ns.min(latest_ns))
    }

    pub(super) fn wait(&self) {
        let end_ns = self.end_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.ended.wait_timeout_while(end_ns, HOLD_TIME_MAX, |end_ns| end_ns.is_none());
    }
}
