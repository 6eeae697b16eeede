//! What happens under a guest, and to it.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// What happens under a guest, or to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Nothing, for as long as something else takes: the noise.
    Nothing,
    /// SIGKILL, and a new server at once.
    Kill,
    /// SIGKILL, and no server for two seconds.
    KillAndDown,
    /// SIGSEGV, with a core dump.
    Crash,
    /// SIGSTOP: the keeper has to notice that the server hangs, and puts another in its place.
    Stop,
    /// A planned takeover.
    Takeover,
    /// A planned takeover whose candidate dies on the way: the old server serves on.
    FailedTakeover,
    /// SIGSTOP of the server in the middle of a planned takeover.
    StopInTakeover,
    /// The guest is reset with everything in flight, and boots while a planned takeover happens.
    Reset,
    /// The guest unmounts and boots again, and a planned takeover happens meanwhile.
    Reboot,
    /// The guest is halted, a planned takeover happens, and it goes on later.
    Pause,
    /// QEMU is killed with everything in flight, and started again on the same volumes.
    QemuKill,
    /// A part of every disk loses what was written there: to see that this is noticed.
    Spoil,
}

impl Fault {
    /// All that do no harm.
    pub const ALL: [Fault; 12] = [
        Fault::Nothing,
        Fault::Kill,
        Fault::KillAndDown,
        Fault::Crash,
        Fault::Stop,
        Fault::Takeover,
        Fault::FailedTakeover,
        Fault::StopInTakeover,
        Fault::Reset,
        Fault::Reboot,
        Fault::Pause,
        Fault::QemuKill,
    ];

    /// Whether a server dies of it.
    pub fn is_kill(self) -> bool {
        matches!(self, Fault::Kill | Fault::KillAndDown | Fault::Crash | Fault::Stop)
    }

    /// Whether a planned takeover is carried out.
    pub fn is_takeover(self) -> bool {
        matches!(self, Fault::Takeover | Fault::Reset | Fault::Reboot | Fault::Pause)
    }

    /// Whether the guest is the same one after it, so that gaps in it mean something.
    pub fn leaves_guest(self) -> bool {
        !matches!(self, Fault::Reset | Fault::Reboot | Fault::QemuKill)
    }
}

/// A text names no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no fault")]
pub struct FaultParseError(String);

impl FromStr for Fault {
    type Err = FaultParseError;

    fn from_str(text: &str) -> Result<Fault, FaultParseError> {
        Ok(match text {
            "nothing" => Fault::Nothing,
            "kill" => Fault::Kill,
            "down" => Fault::KillAndDown,
            "crash" => Fault::Crash,
            "stop" => Fault::Stop,
            "takeover" => Fault::Takeover,
            "failed-takeover" => Fault::FailedTakeover,
            "stop-in-takeover" => Fault::StopInTakeover,
            "reset" => Fault::Reset,
            "reboot" => Fault::Reboot,
            "pause" => Fault::Pause,
            "qemu-kill" => Fault::QemuKill,
            _ => return Err(FaultParseError(text.into())),
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Fault::Nothing => "nothing",
            Fault::Kill => "SIGKILL",
            Fault::KillAndDown => "SIGKILL, 2 s down",
            Fault::Crash => "SIGSEGV",
            Fault::Stop => "SIGSTOP",
            Fault::Takeover => "takeover",
            Fault::FailedTakeover => "failed takeover",
            Fault::StopInTakeover => "SIGSTOP in a takeover",
            Fault::Reset => "guest reset, takeover",
            Fault::Reboot => "guest reboot, takeover",
            Fault::Pause => "guest halted, takeover",
            Fault::QemuKill => "QEMU killed",
            Fault::Spoil => "disks spoiled",
        })
    }
}

impl Serialize for Fault {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
