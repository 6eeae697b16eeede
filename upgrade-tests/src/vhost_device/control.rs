//! What a hypervisor may do with a disk while its guest uses it.

use crate::stamp::Dice;

/// A control operation under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Stops a ring (`GET_VRING_BASE`), and starts it again there.
    RestartRing(usize),
    /// Disables a ring, and enables it again.
    PauseRing(usize),
    /// Another doorbell for the guest to ring.
    ReplaceKick(usize),
    /// Another one to be called by.
    ReplaceCall(usize),
    /// All memory once more.
    SetMemory,
    /// A region that no request uses is plugged in.
    AddRegion,
    /// And out.
    RemoveRegion,
    /// Asks for features and configuration.
    Look,
    /// Hangs up, and connects again with the inflight record.
    Reconnect,
}

impl Control {
    /// One of them.
    pub(super) fn draw(dice: &mut Dice, queues: usize) -> Control {
        let ring = dice.below(queues as u64) as usize;
        match dice.below(19) {
            0..=2 => Control::RestartRing(ring),
            3..=4 => Control::PauseRing(ring),
            5..=7 => Control::ReplaceKick(ring),
            8..=9 => Control::ReplaceCall(ring),
            10..=11 => Control::SetMemory,
            12..=13 => Control::AddRegion,
            14..=15 => Control::RemoveRegion,
            16..=17 => Control::Look,
            _ => Control::Reconnect,
        }
    }
}
