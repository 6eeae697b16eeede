//! How failures leave the library: as negative errnos, with a line on standard error where an errno
//! does not say enough. librbd does the same, and whoever starts QEMU keeps its standard error.

use std::error::Error;
use std::ffi::c_int;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nebd_client::Errno;

/// `ENOENT`.
pub const NOENT: Errno = Errno(2);
/// `EBUSY`.
pub const BUSY: Errno = Errno(16);
/// `EEXIST`.
pub const EXIST: Errno = Errno(17);
/// `ECONNREFUSED`.
pub const REFUSED: Errno = Errno(111);

/// A result as C wants it: a value, or a negative errno. What is no errno becomes `-EIO`.
pub fn number(result: Result<i64, Errno>) -> i64 {
    result.unwrap_or_else(|errno| if errno.0 > 0 { -i64::from(errno.0) } else { -5 })
}

/// Carries out an exported function; a panic becomes `-EIO`.
pub fn guard_long(call: impl FnOnce() -> Result<i64, Errno>) -> i64 {
    guard_with(-5, || number(call()))
}

/// Like [`guard_long`] for functions that return an `int`.
pub fn guard(call: impl FnOnce() -> Result<(), Errno>) -> c_int {
    guard_long(|| call().map(|()| 0)) as c_int
}

/// Like [`guard_long`] for functions with other results; `fallback` stands for a panic.
pub fn guard_with<T>(fallback: T, call: impl FnOnce() -> T) -> T {
    // What a panic leaves half done is behind locks that poison, or private to this call.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| {
        // A payload's destructor may panic too, with nobody left to catch it.
        std::mem::forget(payload);
        fallback
    })
}

/// A line for whoever reads the host's standard error.
pub fn tell(text: &str) {
    // A host without one has nobody who reads.
    let _ = writeln!(std::io::stderr(), "nebd: {text}");
}

/// Tells an error with its causes.
pub fn tell_error(error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    tell(&text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_errno() {
        assert_eq!(guard(|| panic!("as a bug would")), -5);
        assert_eq!(guard(|| Err(Errno(0))), -5);
        assert_eq!(guard(|| Err(Errno::INVAL)), -22);
        assert_eq!(guard_long(|| Ok(1 << 40)), 1 << 40);
    }
}
