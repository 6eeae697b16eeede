//! Requests that were in flight when servers crashed.
//!
//! ```text
//!   deaths   0, 1 ──► issued again with the rest
//!            2    ──► suspect: issued again alone among suspects, so that the next crash names it
//!            3    ──► its volume is parked until the operator unparks it or aborts the request
//! ```

use std::collections::{HashMap, VecDeque};

use nebd_abi::VolumeName;
use nebd_abi::layout::SessionId;
use nebd_abi::ring::Request;

/// Deaths from which on a request is issued alone.
pub const DEATHS_SUSPECT: u32 = 2;
/// Deaths from which on its volume is parked.
pub const DEATHS_PARKED: u32 = 3;

/// A request under suspicion.
#[derive(Clone, Debug)]
pub struct Suspect {
    /// Its session.
    pub session: SessionId,
    /// Its queue.
    pub queue: u32,
    /// Where the queue is served.
    pub shard: usize,
    /// The request.
    pub request: Request,
}

/// Who waits for a turn, and who is parked.
#[derive(Debug, Default)]
pub struct Quarantine {
    waiting: VecDeque<Suspect>,
    issued: Option<SessionId>,
    parked: HashMap<VolumeName, Vec<Suspect>>,
}

impl Quarantine {
    /// Adds suspects to the end of the line.
    pub fn admit(&mut self, suspects: impl IntoIterator<Item = Suspect>) {
        self.waiting.extend(suspects);
    }

    /// The suspect whose turn it is, if none is out.
    pub fn next(&mut self) -> Option<Suspect> {
        if self.issued.is_some() {
            return None;
        }
        let suspect = self.waiting.pop_front()?;
        self.issued = Some(suspect.session);
        Some(suspect)
    }

    /// The suspect that was out has been answered.
    pub fn answered(&mut self, session: SessionId) {
        if self.issued == Some(session) {
            self.issued = None;
        }
    }

    /// Keeps what parks a volume.
    pub fn park(&mut self, volume: &VolumeName, suspects: Vec<Suspect>) {
        self.parked.entry(volume.clone()).or_default().extend(suspects);
    }

    /// Takes what parked a volume.
    pub fn unpark(&mut self, volume: &VolumeName) -> Vec<Suspect> {
        self.parked.remove(volume).unwrap_or_default()
    }

    /// A session is gone, and its requests with it.
    pub fn forget(&mut self, session: SessionId) {
        self.waiting.retain(|suspect| suspect.session != session);
        self.answered(session);
        for suspects in self.parked.values_mut() {
            suspects.retain(|suspect| suspect.session != session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nebd_abi::ring::Buffers;
    use nebd_abi::{Op, OpFlags};

    fn suspect(slot: u32) -> Suspect {
        let request = Request {
            slot,
            seq: 1,
            op: Ok(Op::Write),
            flags: Ok(OpFlags::NONE),
            offset: 0,
            length: 0,
            buffers: Buffers::None,
        };
        Suspect { session: SessionId([1; 16]), queue: 0, shard: 0, request }
    }

    #[test]
    fn suspects_go_one_at_a_time() {
        let mut quarantine = Quarantine::default();
        quarantine.admit([suspect(0), suspect(1)]);
        assert_eq!(quarantine.next().unwrap().request.slot, 0);
        assert!(quarantine.next().is_none());
        quarantine.answered(SessionId([1; 16]));
        assert_eq!(quarantine.next().unwrap().request.slot, 1);
    }
}
