//! A process that takes the server's address space down after the server's death.
//!
//! A process counts as dead only when its last thread has taken its address space down, and a
//! successor may not begin before that. Unmapping the memory of guests costs about 0.1 s for each
//! GiB that was touched in pages of 4 KiB, and an asynchronous IO context waits for two grace
//! periods of RCU, 50 ms on an idle machine. All guests would stand still meanwhile. So a second
//! process shares the address space (`CLONE_VM`) and nothing else: it sleeps until the server is
//! dead, which the server now is within a millisecond, and then does that work beside the successor.
//!
//! The mappings of io_uring go first: each holds its ring, and a ring holds the requests whose
//! completions the dead thread has not processed, and with them the locks of their files.
//!
//! Without the holder (no pidfds, no memory) everything works, with a longer blackout.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{PollFd, PollFlags};
use rustix::pipe::PipeFlags;
use rustix::process::PidfdFlags;

/// Enough for the few frames of [`hold`].
const STACK_BYTES: usize = 32 << 10;
/// Two for each ring: one ring a shard.
const RINGS_MAX: usize = 2 * nebd_abi::host::PROBES_MAX;

/// A range of addresses; empty in the beginning.
struct Mapping {
    start: AtomicUsize,
    length: AtomicUsize,
}

/// What the holder unmaps first. It cannot look for it: a thread of the dead server may have held
/// the allocator's lock.
static RINGS: [Mapping; RINGS_MAX] =
    [const { Mapping { start: AtomicUsize::new(0), length: AtomicUsize::new(0) } }; RINGS_MAX];

/// Starts the holder. To be called while the process has one thread and holds no locks.
pub fn start() -> io::Result<()> {
    let server = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let (ready, holder_end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    // Never freed: the holder uses it for as long as this address space exists.
    let stack = Box::leak(vec![0u8; STACK_BYTES].into_boxed_slice());
    // What ends the server tells the holder through the pidfd, and nothing else shall.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: `hold` runs on a stack of its own, which grows down from an aligned end and lives as
    // long as the address space. It shares this thread's thread-local storage, but uses it only
    // while this thread waits for it below, and after this process is dead; see there.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(STACK_BYTES);
        let top = top.sub(top.addr() % 16).cast::<c_void>();
        let server = ptr::without_provenance_mut::<c_void>(server.as_raw_fd() as usize);
        libc::clone(hold, top, libc::CLONE_VM, server)
    };
    let error = io::Error::last_os_error();
    mask.thread_set_mask()?;
    if pid < 0 {
        return Err(error);
    }
    // Until it has closed its copies of all descriptors, or is gone: locks and sockets are not to
    // be held by two.
    drop(holder_end);
    rustix::io::retry_on_intr(|| rustix::io::read(&ready, &mut [0u8; 1]))?;
    Ok(())
}

/// The holder's life. Only system calls that touch no thread-local storage, but for `close_range`
/// and `prctl`, which set `errno` if they fail: the server's only thread waits meanwhile.
extern "C" fn hold(server: *mut c_void) -> c_int {
    let server = server.addr() as c_int;
    // SAFETY: the holder's descriptor table is a copy, and nothing here uses what is closed.
    let closed = unsafe {
        libc::prctl(libc::PR_SET_NAME, c"nebd-memory".as_ptr());
        let (below, above) = (server.cast_unsigned() - 1, server.cast_unsigned() + 1);
        libc::syscall(libc::SYS_close_range, above, libc::c_uint::MAX, 0) == 0
            && libc::syscall(libc::SYS_close_range, 0, below, 0) == 0
    };
    if !closed {
        return 1;
    }
    // SAFETY: it was opened for this process, which has closed all others and closes this one by
    // exiting.
    let server = unsafe { BorrowedFd::borrow_raw(server) };
    let mut fds = [PollFd::from_borrowed_fd(server, PollFlags::IN)];
    while rustix::event::poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
    if !fds[0].revents().contains(PollFlags::IN) {
        // That failed, so the server may live: what it uses must stay.
        return 1;
    }
    for ring in &RINGS {
        let start = ptr::without_provenance_mut(ring.start.load(Relaxed));
        // SAFETY: no thread of the server exists any more, and this one uses neither the rings nor
        // what may have taken their place.
        let _ = unsafe { rustix::mm::munmap(start, ring.length.load(Relaxed)) };
    }
    0
}

/// Notes the mappings of all io_urings that there are, for the holder.
pub fn note_rings() -> io::Result<()> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let rings = maps.lines().filter(|line| line.ends_with("anon_inode:[io_uring]"));
    let ranges = rings.filter_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        Some((start, usize::from_str_radix(end, 16).ok()?.checked_sub(start)?))
    });
    for (slot, (start, length)) in RINGS.iter().zip(ranges) {
        slot.start.store(start, Relaxed);
        slot.length.store(length, Relaxed);
    }
    Ok(())
}
