//! What `nebd_options` is.

use std::sync::{Arc, Mutex, PoisonError};

use nebd_client::{CompletionMode, Event};

use crate::failure::negative;
use crate::raw::{EventCallback, RawEvent, Target};

/// `nebd_options`.
#[derive(Clone, Default)]
pub struct Options {
    inner: nebd_client::Options,
    mode: CompletionMode,
    events: Option<Target<EventCallback>>,
}

/// Passes events on until it is shut; one for each volume.
#[derive(Default)]
pub struct EventGate(Mutex<Option<Target<EventCallback>>>);

impl EventGate {
    fn pass(&self, event: Event) {
        let Some(event) = raw_event(event) else { return };
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = *target {
            // Under the lock, so that none runs once the gate is shut.
            target.call(&event);
        }
    }

    /// Waits for an event that is being told; none is told any more.
    pub fn shut(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Options {
    /// Changes the options below this layer.
    pub fn change(&mut self, with: impl FnOnce(nebd_client::Options) -> nebd_client::Options) {
        self.inner = with(std::mem::take(&mut self.inner));
    }

    /// Who runs callbacks.
    pub fn set_mode(&mut self, mode: CompletionMode) {
        self.mode = mode;
        self.change(|options| options.completion(mode));
    }

    /// Who is told of events.
    pub fn set_events(&mut self, target: Option<Target<EventCallback>>) {
        self.events = target;
    }

    /// Who runs callbacks.
    pub fn mode(&self) -> CompletionMode {
        self.mode
    }

    /// Options for one volume, and the gate its events go through.
    pub fn for_volume(&self) -> (nebd_client::Options, Arc<EventGate>) {
        let gate = Arc::new(EventGate(Mutex::new(self.events)));
        let inner = self.inner.clone();
        if self.events.is_none() {
            return (inner, gate);
        }
        let passing = Arc::clone(&gate);
        (inner.on_event(move |event| passing.pass(event)), gate)
    }
}

/// As C sees it; `None` for what this interface has no number for.
fn raw_event(event: Event) -> Option<RawEvent> {
    let (kind, error, value) = match event {
        Event::Resized { size } => (1, 0, size),
        Event::ServerChanged { generation } => (2, 0, u64::from(generation.0)),
        Event::Stalled => (3, 0, 0),
        Event::Resumed => (4, 0, 0),
        Event::Parked => (5, 0, 0),
        Event::Unparked => (6, 0, 0),
        Event::Detached { errno } => (7, negative(errno), 0),
        _ => return None,
    };
    Some(RawEvent { kind, error, value })
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;

    unsafe extern "C" fn keep(user_data: *mut c_void, event: *const RawEvent) {
        // SAFETY: the test passes a Mutex, and the gate an event.
        unsafe { (*user_data.cast::<Mutex<Vec<RawEvent>>>()).lock().unwrap().push(*event) };
    }

    #[test]
    fn a_shut_gate_passes_nothing() {
        let seen = Mutex::new(Vec::<RawEvent>::new());
        let target =
            Target::new(Some(keep as EventCallback), (&raw const seen).cast_mut().cast()).unwrap();
        let gate = EventGate(Mutex::new(Some(target)));
        gate.pass(Event::Resized { size: 4096 });
        gate.pass(Event::Detached { errno: nebd_client::Errno::INVAL });
        gate.shut();
        gate.pass(Event::Stalled);
        let expected =
            [(1, 0, 4096), (7, -22, 0)].map(|(kind, error, value)| RawEvent { kind, error, value });
        assert_eq!(*seen.lock().unwrap(), expected);
    }
}
