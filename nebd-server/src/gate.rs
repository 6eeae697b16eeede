//! The gate of the control plane.
//!
//! Whatever changes who is attached, which volumes there are or what the store holds passes it. A
//! planned takeover closes the gate before it asks anything of the data path. It is closed at an
//! instant at which nothing is under way; until there is one, everything passes: nobody, and no
//! control thread that has to answer probes, waits for an operation of somebody else.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_closed: bool,
    /// Somebody waits to close it.
    is_awaited: bool,
    passes: BTreeMap<u64, Cow<'static, str>>,
    next: u64,
}

/// Held while something is under way.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    key: u64,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed. Who holds a pass gets another at once, to be handed to a job.
    pub fn enter(self: &Arc<Self>, what: impl Into<Cow<'static, str>>) -> Pass {
        let state = self.state();
        let mut state = self
            .changed
            .wait_while(state, |state| state.is_closed)
            .unwrap_or_else(PoisonError::into_inner);
        state.next += 1;
        let key = state.next;
        state.passes.insert(key, what.into());
        Pass { gate: self.clone(), key }
    }

    /// Closes the gate as soon as nothing is under way. If something is all the time until
    /// `deadline`, the gate stays open, and the error says what it is at the end.
    pub fn close(&self, deadline: Instant) -> Result<(), Vec<String>> {
        let mut state = self.state();
        state.is_awaited = true;
        while !state.passes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.is_awaited = false;
                return Err(state.passes.values().map(|what| what.to_string()).collect());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_awaited = false;
        state.is_closed = true;
        Ok(())
    }

    /// Opens the gate.
    pub fn open(&self) {
        self.state().is_closed = false;
        self.changed.notify_all();
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.passes.remove(&self.key);
        if state.passes.is_empty() && state.is_awaited {
            self.gate.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::time::Duration;

    #[test]
    fn closing_waits_for_what_is_under_way_and_names_it() {
        let gate = Arc::new(Gate::default());
        let pass = gate.enter("an attach of file:a");
        assert_eq!(gate.close(Instant::now()), Err(vec!["an attach of file:a".to_owned()]));
        drop(gate.enter("it is open"));
        let closer = {
            let gate = gate.clone();
            std::thread::spawn(move || gate.close(Instant::now() + Duration::from_secs(60)))
        };
        drop(pass);
        assert_eq!(closer.join().unwrap(), Ok(()));
    }

    #[test]
    fn nobody_passes_a_closed_gate() {
        let gate = Arc::new(Gate::default());
        gate.close(Instant::now()).unwrap();
        let passed = Arc::new(AtomicBool::new(false));
        let thread = {
            let (gate, passed) = (gate.clone(), passed.clone());
            std::thread::spawn(move || {
                let _pass = gate.enter("late");
                passed.store(true, SeqCst);
            })
        };
        std::thread::sleep(Duration::from_millis(20));
        assert!(!passed.load(SeqCst));
        gate.open();
        thread.join().unwrap();
        assert!(passed.load(SeqCst));
    }
}
