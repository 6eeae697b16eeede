//! Ringing a client's doorbell without ever blocking.
//!
//! The doorbell is an eventfd that the client holds too, and with it the file status flags: a
//! client can clear O_NONBLOCK and fill the counter at any moment, and a `write` would then wait
//! for ever. The kernel's own way to signal an eventfd saturates instead; it is reached through a
//! completion of the old asynchronous IO interface (`IOCB_FLAG_RESFD`). The request is a poll of a
//! descriptor that is always ready, so it completes within the call that submits it.
//!
//! Where that interface is missing (a kernel without it, a seccomp filter) the doorbell is
//! written to, and a client that plays this trick costs what the watchdog allows.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

use rustix::event::EventfdFlags;

/// Requests that may be completed and not collected.
const EVENTS_MAX: u32 = 64;
const IOCB_CMD_POLL: u16 = 5;
const IOCB_FLAG_RESFD: u32 = 1;

/// `struct iocb` of the kernel, little-endian variant.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

/// `struct io_event` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

const _: () = {
    assert!(size_of::<Iocb>() == 64);
    assert!(size_of::<IoEvent>() == 32);
};

/// One shard's way to ring doorbells.
pub(super) struct Ringer {
    /// `None` where doorbells are written to.
    context: Option<u64>,
    /// An eventfd whose counter is never 0.
    ready: OwnedFd,
    uncollected: Cell<u32>,
}

impl Ringer {
    pub(super) fn new() -> io::Result<Ringer> {
        let ready = rustix::event::eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut context = 0u64;
        // SAFETY: io_setup writes one word, the context's handle, which must be 0 before.
        let made = unsafe {
            libc::syscall(libc::SYS_io_setup, libc::c_long::from(EVENTS_MAX), &raw mut context)
        };
        if made != 0 {
            let error = io::Error::last_os_error();
            tracing::warn!(%error, "no asynchronous IO: doorbells are written to");
        }
        Ok(Ringer { context: (made == 0).then_some(context), ready, uncollected: Cell::new(0) })
    }

    /// Rings; never blocks where [`Ringer::new`] found the means.
    pub(super) fn ring(&self, doorbell: &OwnedFd) {
        let rung = self.context.is_some_and(|context| self.signal(context, doorbell));
        if !rung && self.context.is_none() {
            // It fails only if the counter is full, and then the client has been called already.
            let _ = rustix::io::write(doorbell.as_fd(), &1u64.to_ne_bytes());
        }
    }

    fn signal(&self, context: u64, doorbell: &OwnedFd) -> bool {
        if self.uncollected.get() == EVENTS_MAX / 2 {
            self.collect(context);
        }
        let mut request = Iocb {
            opcode: IOCB_CMD_POLL,
            fd: self.ready.as_raw_fd() as u32,
            buffer: libc::POLLIN as u64,
            flags: IOCB_FLAG_RESFD,
            result_fd: doorbell.as_raw_fd() as u32,
            ..Iocb::default()
        };
        let requests = [&raw mut request];
        // SAFETY: one request, which the kernel copies before the call returns; it refers to no
        // memory of ours, and both descriptors are open.
        let submitted = unsafe {
            libc::syscall(libc::SYS_io_submit, context, 1 as libc::c_long, requests.as_ptr())
        };
        if submitted == 1 {
            self.uncollected.set(self.uncollected.get() + 1);
            return true;
        }
        tracing::error!(error = %io::Error::last_os_error(), "cannot ring a client's doorbell");
        false
    }

    fn collect(&self, context: u64) {
        let mut events = [IoEvent::default(); EVENTS_MAX as usize];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `events` has room for as many events as the call may return.
        let collected = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                0 as libc::c_long,
                libc::c_long::from(EVENTS_MAX),
                events.as_mut_ptr(),
                ptr::from_ref(&now),
            )
        };
        let collected = u32::try_from(collected).unwrap_or(0);
        self.uncollected.set(self.uncollected.get().saturating_sub(collected));
    }
}

impl Drop for Ringer {
    fn drop(&mut self) {
        if let Some(context) = self.context {
            // SAFETY: the context is ours, and no request of it is outstanding.
            unsafe { libc::syscall(libc::SYS_io_destroy, context) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_doorbell_that_blocks_writers_does_not_block_the_ringer() {
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&doorbell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let ringer = Ringer::new().unwrap();
        assert!(ringer.context.is_some(), "this kernel has no asynchronous IO");
        for _ in 0..1000 {
            ringer.ring(&doorbell);
        }
    }

    #[test]
    fn each_ring_is_counted() {
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let ringer = Ringer::new().unwrap();
        for _ in 0..1000 {
            ringer.ring(&doorbell);
        }
        let mut count = [0; 8];
        rustix::io::read(&doorbell, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1000);
    }
}
