//! The crate's `unsafe`: taking descriptors by number, fork and exec, and receiving datagrams with
//! credentials.

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// First descriptor that is passed.
pub(crate) const FIRST_FD: RawFd = 3;
/// Descriptors of one datagram; more than one is already nobody we know.
const DATAGRAM_FDS_MAX: usize = 253;

/// Removes variables; false (and nothing done) if the process has other threads.
pub(crate) fn clear_environment(variables: &[&str]) -> bool {
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    if alone {
        for variable in variables {
            // SAFETY: this is the only thread, so nobody else reads the environment.
            unsafe { std::env::remove_var(variable) };
        }
    }
    alone
}

/// Owns the descriptors from 3 up that `LISTEN_FDS` announced, close-on-exec.
pub(crate) fn take_inherited(count: usize) -> io::Result<Vec<OwnedFd>> {
    let numbers: Vec<RawFd> = (FIRST_FD..).take(count).collect();
    take(&numbers)
}

/// Owns descriptors that an earlier image of this process left open, close-on-exec.
pub(crate) fn take(numbers: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    for &fd in numbers {
        // SAFETY: F_SETFD touches no memory; a number that is not open gives EBADF.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the numbers are open, and were named by the parent or by this process's earlier
    // image before anything here could open one; each caller takes its own list once.
    Ok(numbers.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect())
}

static RESTORED: AtomicBool = AtomicBool::new(false);

/// As [`take`], but only the first call in a process gets anything.
pub(crate) fn take_once(numbers: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    if RESTORED.swap(true, Ordering::Relaxed) {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    take(numbers)
}

/// Keeps a descriptor open over exec, or not.
pub(crate) fn set_inheritable(fd: BorrowedFd<'_>, inheritable: bool) -> io::Result<()> {
    let flags =
        if inheritable { rustix::io::FdFlags::empty() } else { rustix::io::FdFlags::CLOEXEC };
    Ok(rustix::io::fcntl_setfd(fd, flags)?)
}

/// A program to start, prepared so that the child only makes system calls.
pub(crate) struct Program {
    argv: Vec<CString>,
    env: Vec<CString>,
}

/// Both ends of the pipe at which a child waits until its parent has written down that it exists.
pub(crate) struct Gate<'a> {
    pub(crate) read: BorrowedFd<'a>,
    pub(crate) write: BorrowedFd<'a>,
}

fn c_string(text: OsString) -> io::Result<CString> {
    CString::new(text.into_vec()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Program {
    /// `argv[0]` is the path of the program.
    pub(crate) fn new(
        argv: &[OsString],
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> io::Result<Program> {
        if argv.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let argv = argv.iter().cloned().map(c_string).collect::<io::Result<_>>()?;
        let pair = |(mut name, value): (OsString, OsString)| {
            name.push("=");
            name.push(value);
            c_string(name)
        };
        Ok(Program { argv, env: env.into_iter().map(pair).collect::<io::Result<_>>()? })
    }

    /// Replaces this process; returns only if that failed.
    pub(crate) fn exec(&self) -> io::Error {
        let (argv, env) = (pointers(&self.argv), pointers(&self.env));
        // SAFETY: both arrays end with null and hold strings that outlive the call.
        unsafe { libc::execve(argv[0], argv.as_ptr(), env.as_ptr()) };
        io::Error::last_os_error()
    }

    /// Forks. The child waits at `gate` for one byte, then becomes the program with exactly `fds`,
    /// in this order, from 3 up, `LISTEN_PID` set, no signal blocked. At end of file it is gone.
    pub(crate) fn spawn(&self, fds: &[BorrowedFd<'_>], gate: Gate<'_>) -> io::Result<libc::pid_t> {
        let mut listen_pid = *b"LISTEN_PID=\0\0\0\0\0\0\0\0\0\0\0\0";
        let argv = pointers(&self.argv);
        let mut env = pointers(&self.env);
        env.insert(0, listen_pid.as_ptr().cast());
        let mut numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let end = FIRST_FD
            + i32::try_from(fds.len()).map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
        // SAFETY: the child makes system calls only, on memory prepared above.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            // SAFETY: in the child; all pointers are valid, and nothing here allocates.
            unsafe {
                if !pass_gate(&gate) {
                    libc::_exit(126);
                }
                write_decimal(&mut listen_pid[11..], libc::getpid());
                ptr::write_volatile(&mut env[0], listen_pid.as_ptr().cast());
                if !renumber(&mut numbers, end) {
                    fail(c"nebd keeper: cannot pass the descriptors to the server\n");
                }
                reset_signals();
                libc::execve(argv[0], argv.as_ptr(), env.as_ptr());
                fail(c"nebd keeper: cannot execute the server\n");
            }
        }
        Ok(pid)
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// The parent has written down that this child exists; false if it died before.
unsafe fn pass_gate(gate: &Gate<'_>) -> bool {
    let mut byte = 0_u8;
    // SAFETY: in the child, whose copy of the write end nobody uses.
    unsafe { libc::close(gate.write.as_raw_fd()) };
    loop {
        // SAFETY: one byte of our own stack.
        match unsafe { libc::read(gate.read.as_raw_fd(), (&raw mut byte).cast(), 1) } {
            1 => return true,
            0 => return false,
            // SAFETY: errno of this thread.
            _ if unsafe { *libc::__errno_location() } == libc::EINTR => {}
            _ => return false,
        }
    }
}

/// Moves the descriptors to 3 and up, and marks all others close-on-exec.
unsafe fn renumber(numbers: &mut [RawFd], end: RawFd) -> bool {
    // SAFETY: plain descriptor calls; the numbers are the parent's, open in this copy.
    unsafe {
        for number in numbers.iter_mut() {
            // Out of the way of a dup2 to come.
            if *number < end {
                *number = libc::fcntl(*number, libc::F_DUPFD_CLOEXEC, end);
                if *number < 0 {
                    return false;
                }
            }
        }
        for (target, &number) in (FIRST_FD..).zip(numbers.iter()) {
            if libc::dup2(number, target) < 0 {
                return false;
            }
        }
        libc::close_range(end as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) == 0
    }
}

unsafe fn reset_signals() {
    // SAFETY: sets of our own stack; SIG_DFL is no handler of ours.
    unsafe {
        // Rust ignores it at start, and what is ignored stays so over exec.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
}

unsafe fn fail(message: &CStr) -> ! {
    // SAFETY: writes a constant, and leaves without running anything of the parent's.
    unsafe {
        libc::write(2, message.as_ptr().cast(), message.count_bytes());
        libc::_exit(127)
    }
}

fn write_decimal(out: &mut [u8], mut number: i32) {
    let mut digits = [0_u8; 10];
    let mut count = 0;
    while count == 0 || number > 0 {
        digits[count] = b'0' + (number % 10) as u8;
        number /= 10;
        count += 1;
    }
    for (place, digit) in out.iter_mut().zip(digits[..count].iter().rev()) {
        *place = *digit;
    }
}

/// Children report their end even if our parent had ignored theirs.
pub(crate) fn default_sigchld() {
    // SAFETY: SIG_DFL is no handler of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// A datagram and who sent it.
pub(crate) struct Datagram {
    /// Its bytes.
    pub(crate) length: usize,
    /// It did not fit.
    pub(crate) truncated: bool,
    /// Sender, as the kernel says; 0 if it is in another pid namespace.
    pub(crate) pid: libc::pid_t,
    /// Descriptors, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Receives one datagram into `buffer`, without waiting. rustix cannot be used here: its type for
/// credentials has no place for the pid 0 of a foreign namespace.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
    #[repr(align(8))]
    struct Control([u8; 64 + DATAGRAM_FDS_MAX * 4]);
    let mut control = Control([0; 64 + DATAGRAM_FDS_MAX * 4]);
    let mut datagram = Datagram { length: 0, truncated: false, pid: 0, fds: Vec::new() };
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all pointers lead to live memory of the lengths given. The kernel fills in whole
    // control messages; each descriptor in them is ours alone.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &mut slice;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = control.0.len() as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let length = libc::recvmsg(socket.as_raw_fd(), &mut header, flags);
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        datagram.length = length as usize;
        let mut message = libc::CMSG_FIRSTHDR(&header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            let bytes = (*message).cmsg_len as usize - (data as usize - message as usize);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for index in 0..bytes / size_of::<RawFd>() {
                        let fd = data.cast::<RawFd>().add(index).read_unaligned();
                        datagram.fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                    datagram.pid = data.cast::<libc::ucred>().read_unaligned().pid;
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(&header, message);
        }
        datagram.truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    }
    Ok(datagram)
}

/// A child that has ended and was not waited for yet; it stays so. rustix does not tell which.
pub(crate) fn ended_child() -> Option<libc::pid_t> {
    // SAFETY: all zeros are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the kernel fills in one siginfo_t, whose `si_pid` stays 0 if no child has ended.
    let (result, pid) =
        unsafe { (libc::waitid(libc::P_ALL, 0, &mut info, options), info.si_pid()) };
    (result == 0 && pid != 0).then_some(pid)
}

/// Takes note of the end of a child that has ended.
pub(crate) fn reap(pid: libc::pid_t) {
    // SAFETY: no status is asked for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
}

/// The wait status of a process that is not our child, from its pidfd: `None` until its parent has
/// reaped it, an error before Linux 6.15.
pub(crate) fn end_of_stranger(pidfd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    /// The first version of the kernel's `struct pidfd_info`.
    #[repr(C)]
    #[derive(Default)]
    struct PidfdInfo {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    /// `_IOWR(0xff, 11, struct pidfd_info)`.
    const PIDFD_GET_INFO: libc::c_ulong = (3 << 30) | (64 << 16) | (0xff << 8) | 11;
    const _: () = assert!(size_of::<PidfdInfo>() == 64);

    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the request's number says how long the structure is; the kernel writes no more.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as _, &mut info) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code))
}
