//! How far a connection's messages have been dealt with, and what was agreed on: a sealed memfd that a
//! successor finds in the descriptor store.
//!
//! ```text
//!        0       1       2       3       4       5       6       7
//!    0  │ magic  "NEBDVHJ1"                                             │
//!    8  │ version = 1                   │ ─ zero ─                      │
//!   16  │ messages dealt with, times 4, plus the phase of the next one  │
//!   24  │ bytes of the message that a phase is about                    │
//!   32  │ states saved: the last one is in slot (this modulo 2)         │
//!   40  │ bytes of the state in slot 0                                  │
//!   48  │ bytes of the state in slot 1                                  │
//!   56  │ ─ zero ─ (to 4096)                                            │
//! 4096  │ slot 0, 28672 bytes                                           │
//! 32768 │ slot 1, 28672 bytes                                           │
//! 61440 │ ─ zero ─ (to 65536)                                           │
//! ```
//!
//! A state is written to the slot that is not in use, and one store makes it the valid one.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use nebd_abi::region::{RegionError, SharedMemory};

use crate::access::Window;

const MAGIC: u64 = u64::from_le_bytes(*b"NEBDVHJ1");
const VERSION: u32 = 1;
const BYTES: u64 = 65536;
const VERSION_AT: usize = 8;
const WORD_AT: usize = 16;
const LENGTH_AT: usize = 24;
const STATES_AT: usize = 32;
const STATE_LENGTHS_AT: usize = 40;
const SLOTS_AT: usize = 4096;

/// Bytes that a state may have.
pub const STATE_BYTES_MAX: usize = 28672;

/// Why a memfd is no journal, or a state cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It cannot be made or mapped.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// Something else.
    #[error("the memory is no journal of a vhost-user connection")]
    Magic,
    /// Written by something newer.
    #[error("version {0} of the journal is unknown")]
    Version(u32),
    /// Its words contradict each other.
    #[error("the journal is damaged")]
    Damaged,
    /// More than a slot holds.
    #[error("a state of {0} bytes is too long")]
    TooLong(usize),
}

/// What has become of the message after those that were dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing that matters: it may have been acted on, but no reply has gone out and it is not taken
    /// from the socket.
    Open,
    /// Its reply may have gone out, or not.
    Replying,
    /// Its reply has gone out, or it has none; it may have been taken from the socket.
    Done,
}

/// The journal of a connection. Written by one thread of one process.
pub struct Journal {
    memory: Arc<SharedMemory>,
    window: Window,
}

impl Journal {
    /// The journal of a new connection.
    pub fn create() -> Result<Journal, JournalError> {
        let journal = Journal::open(SharedMemory::create("vhost-journal", BYTES)?)?;
        journal.window.store_u32(VERSION_AT, VERSION, Relaxed);
        journal.window.store_u64(0, MAGIC, Release);
        Ok(journal)
    }

    /// The journal that a predecessor kept.
    pub fn map(fd: OwnedFd) -> Result<Journal, JournalError> {
        let journal = Journal::open(SharedMemory::map(fd, BYTES)?)?;
        if journal.window.load_u64(0, Acquire) != MAGIC {
            return Err(JournalError::Magic);
        }
        let version = journal.window.load_u32(VERSION_AT, Relaxed);
        if version != VERSION {
            return Err(JournalError::Version(version));
        }
        if journal.phase().is_none() || journal.state().is_none() {
            return Err(JournalError::Damaged);
        }
        Ok(journal)
    }

    fn open(memory: SharedMemory) -> Result<Journal, JournalError> {
        let memory = Arc::new(memory);
        let window = Window::of(&memory, 0, BYTES).ok_or(JournalError::Magic)?;
        Ok(Journal { memory, window })
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Messages that were dealt with.
    pub fn count(&self) -> u64 {
        self.window.load_u64(WORD_AT, Relaxed) >> 2
    }

    /// What has become of the next message, and its bytes; `None` if the journal is damaged.
    pub(crate) fn phase(&self) -> Option<(Phase, usize)> {
        let length = usize::try_from(self.window.load_u64(LENGTH_AT, Relaxed)).ok()?;
        let phase = match self.window.load_u64(WORD_AT, Acquire) & 3 {
            0 => Phase::Open,
            1 => Phase::Replying,
            2 => Phase::Done,
            _ => return None,
        };
        Some((phase, length))
    }

    /// The next message, of so many bytes, gets into a phase.
    pub(crate) fn enter(&self, phase: Phase, length: usize) {
        let count = self.window.load_u64(WORD_AT, Relaxed) & !3;
        let phase = match phase {
            Phase::Open => 0,
            Phase::Replying => 1,
            Phase::Done => 2,
        };
        self.window.store_u64(LENGTH_AT, length as u64, Relaxed);
        self.window.store_u64(WORD_AT, count | phase, Release);
    }

    /// The next message was dealt with.
    pub(crate) fn close_message(&self) {
        let count = self.window.load_u64(WORD_AT, Relaxed) >> 2;
        self.window.store_u64(WORD_AT, count.wrapping_add(1) << 2, Release);
    }

    /// Saves a state: it is whole, or the one before is.
    pub fn save(&self, state: &[u8]) -> Result<(), JournalError> {
        if state.len() > STATE_BYTES_MAX {
            return Err(JournalError::TooLong(state.len()));
        }
        let states = self.window.load_u64(STATES_AT, Relaxed).wrapping_add(1);
        let slot = (states % 2) as usize;
        self.window.write(SLOTS_AT + slot * STATE_BYTES_MAX, state);
        self.window.store_u64(STATE_LENGTHS_AT + 8 * slot, state.len() as u64, Release);
        self.window.store_u64(STATES_AT, states, Release);
        Ok(())
    }

    /// The last state that was saved, empty if there is none; `None` if the journal is damaged.
    pub fn state(&self) -> Option<Vec<u8>> {
        let slot = (self.window.load_u64(STATES_AT, Acquire) % 2) as usize;
        let length = self.window.load_u64(STATE_LENGTHS_AT + 8 * slot, Relaxed);
        let length = usize::try_from(length).ok().filter(|length| *length <= STATE_BYTES_MAX)?;
        let mut state = vec![0; length];
        self.window.read(SLOTS_AT + slot * STATE_BYTES_MAX, &mut state);
        Some(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::hooks;

    fn again(journal: &Journal) -> Journal {
        Journal::map(journal.fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn a_state_is_whole_whenever_its_writer_dies() {
        for deaths in 0..8 {
            let journal = Journal::create().unwrap();
            journal.save(b"first").unwrap();
            journal.save(b"the second").unwrap();
            hooks::die_after(deaths);
            journal.save(b"a third").unwrap();
            let whole = hooks::alive();
            hooks::die_after(u64::MAX);
            let state = again(&journal).state().unwrap();
            let expected: &[u8] = if deaths >= 3 { b"a third" } else { b"the second" };
            assert_eq!(state, expected, "dead after {deaths} stores ({whole})");
        }
        let journal = Journal::create().unwrap();
        assert_eq!(journal.state().unwrap(), b"");
        assert!(matches!(
            journal.save(&vec![0; STATE_BYTES_MAX + 1]),
            Err(JournalError::TooLong(_))
        ));
        journal.save(&vec![7; STATE_BYTES_MAX]).unwrap();
        assert_eq!(again(&journal).state().unwrap(), vec![7; STATE_BYTES_MAX]);
    }

    #[test]
    fn other_memory_is_refused() {
        let memory = |value: u64, at: usize| {
            let journal = Journal::create().unwrap();
            journal.window.store_u64(at, value, Relaxed);
            Journal::map(journal.fd().try_clone_to_owned().unwrap()).err()
        };
        assert!(matches!(memory(1, 0), Some(JournalError::Magic)));
        assert!(matches!(memory(2, VERSION_AT), Some(JournalError::Version(2))));
        assert!(matches!(memory(3, WORD_AT), Some(JournalError::Damaged)));
        assert!(matches!(memory(1 << 40, STATE_LENGTHS_AT), Some(JournalError::Damaged)));
        let short = SharedMemory::create("short", 4096).unwrap();
        let fd = short.fd().try_clone_to_owned().unwrap();
        assert!(matches!(Journal::map(fd), Err(JournalError::Magic)));
    }
}
