//! Whether this process may use io_uring at all: many containers refuse it.

use std::io;
use std::sync::OnceLock;

use io_uring::{IoUring, Probe, opcode};
use nebd_abi::Errno;

/// Why there is no io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UringRefusal {
    /// The configuration does not want it.
    #[error("not wanted")]
    NotWanted,
    /// The kernel, a security module or a seccomp filter refused it.
    #[error("io_uring refused: {0}")]
    Refused(Errno),
    /// The kernel is too old for an operation.
    #[error("io_uring refused: the kernel lacks operation {0}")]
    Operation(u8),
}

impl From<io::Error> for UringRefusal {
    fn from(error: io::Error) -> Self {
        UringRefusal::Refused(Errno::from_io(&error))
    }
}

/// Why io_uring does not work in this process, if it does not. Tried once, end to end: a filter
/// may allow the setup and refuse what comes after.
pub fn uring_refusal() -> Option<UringRefusal> {
    static REFUSAL: OnceLock<Option<UringRefusal>> = OnceLock::new();
    *REFUSAL.get_or_init(|| attempt().err())
}

fn attempt() -> Result<(), UringRefusal> {
    let mut uring = IoUring::new(2)?;
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    if let Some(code) = needed.into_iter().find(|code| !probe.is_supported(*code)) {
        return Err(UringRefusal::Operation(code));
    }
    // SAFETY: a no-operation refers to no memory.
    let pushed = unsafe { uring.submission().push(&opcode::Nop::new().build()) };
    debug_assert!(pushed.is_ok(), "a new ring is empty");
    uring.submit_and_wait(1)?;
    match uring.completion().next().map(|entry| entry.result()) {
        Some(0) => Ok(()),
        Some(result) => Err(UringRefusal::Refused(Errno(-result))),
        None => Err(UringRefusal::Refused(Errno::IO)),
    }
}
