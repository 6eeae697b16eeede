//! `SO_PEEK_OFF`: where a socket's next peek begins, kept by the kernel with the socket.
//!
//! The second of the two files that hold `unsafe`: nobody wraps this option. While it is -1, peeks
//! begin at the front and change nothing. Otherwise a peek moves it on by what it saw, and a read moves
//! it back by what it took, in the same system call; so it also tells a successor how much of a message
//! its predecessor has taken. See `connection.rs`.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Peeks begin at the front, and reads leave the offset alone.
pub(crate) const OFF: i32 = -1;

pub(crate) fn set(socket: BorrowedFd<'_>, offset: i32) -> io::Result<()> {
    let value: c_int = offset;
    // SAFETY: the pointer leads to a c_int, whose size goes along; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const value).cast::<c_void>(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(crate) fn of(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: both pointers lead to variables of the types that the kernel writes, and the length says
    // how much room there is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut value).cast::<c_void>(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
