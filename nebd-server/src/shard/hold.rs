//! Shards that wait until a new server has taken up all sessions: clients of the first to be served
//! would take the cores from the last.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Command, ShardHandle};

/// Some sessions may take long; the others do not wait longer than this for them.
const HOLD_TIME_MAX: Duration = Duration::from_millis(10);

/// What shards that serve nothing yet wait for.
#[derive(Debug, Default)]
pub struct Hold {
    is_over: Mutex<bool>,
    over: Condvar,
}

impl Hold {
    /// Whatever these are told from now on waits.
    pub fn begin(shards: &[ShardHandle]) -> Arc<Hold> {
        let hold = Arc::<Hold>::default();
        shards.iter().for_each(|shard| shard.send(Command::Hold(hold.clone())));
        hold
    }

    /// They need not wait any longer.
    pub fn end(&self) {
        *self.is_over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.notify_all();
    }

    pub(super) fn wait(&self) {
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.over.wait_timeout_while(is_over, HOLD_TIME_MAX, |is_over| !*is_over);
    }
}
