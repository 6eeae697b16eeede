//! How failures leave the library: as negative errnos, with an explanation kept for the thread.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nebd_client::Errno;

/// `EAGAIN`: the chosen queue is full.
pub const AGAIN: Errno = Errno(11);
/// `EBADF`: no descriptor has such a number.
pub const BADF: Errno = Errno(9);
/// `EDEADLK`: a callback asked for something that waits for callbacks.
pub const DEADLOCK: Errno = Errno(35);

thread_local! {
    static EXPLANATION: RefCell<String> = const { RefCell::new(String::new()) };
    static CALLBACK_DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// The result of an exported function: its value, a negative errno, or `-EIO` for a panic.
pub fn guard(call: impl FnOnce() -> Result<c_int, Errno>) -> c_int {
    guard_with(negative(Errno::IO), || call().unwrap_or_else(negative))
}

/// Like [`guard`] for functions with other results; `fallback` stands for a panic.
pub fn guard_with<T>(fallback: T, call: impl FnOnce() -> T) -> T {
    // What a panic leaves half done is behind locks that poison, or private to this call.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| {
        // A payload's destructor may panic too, with nobody left to catch it.
        std::mem::forget(payload);
        fallback
    })
}

/// As C wants it; what is no errno becomes `-EIO`.
pub fn negative(errno: Errno) -> c_int {
    if errno.0 > 0 { -errno.0 } else { -Errno::IO.0 }
}

/// Keeps what `error` and its causes say for [`explanation`].
pub fn explain(error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    // A thread on its way out has nobody left to read it.
    let _ = EXPLANATION.try_with(|kept| *kept.borrow_mut() = text);
}

/// The explanation of this thread's last failure.
pub fn explanation() -> String {
    EXPLANATION.try_with(|kept| kept.borrow().clone()).unwrap_or_default()
}

/// Marks this thread as being inside a callback of the host, while it lives.
pub struct InCallback(());

impl InCallback {
    /// Begins the callback.
    pub fn enter() -> InCallback {
        let _ = CALLBACK_DEPTH.try_with(|depth| depth.set(depth.get() + 1));
        InCallback(())
    }

    /// Fails on a thread that is inside a callback.
    pub fn refuse() -> Result<(), Errno> {
        let depth = CALLBACK_DEPTH.try_with(Cell::get).unwrap_or(0);
        if depth == 0 { Ok(()) } else { Err(DEADLOCK) }
    }
}

impl Drop for InCallback {
    fn drop(&mut self) {
        let _ = CALLBACK_DEPTH.try_with(|depth| depth.set(depth.get() - 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_errno() {
        assert_eq!(guard(|| panic!("as a bug would")), -5);
        assert_eq!(guard(|| Err(Errno(0))), -5);
        assert_eq!(guard(|| Err(Errno::INVAL)), -22);
        assert_eq!(guard(|| Ok(7)), 7);
    }

    #[test]
    fn an_explanation_names_the_causes() {
        #[derive(Debug)]
        struct Outer(std::io::Error);
        impl std::fmt::Display for Outer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("cannot attach")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        explain(&Outer(std::io::Error::other("no server")));
        assert_eq!(explanation(), "cannot attach: no server");
    }

    #[test]
    fn callbacks_are_noticed() {
        assert_eq!(InCallback::refuse(), Ok(()));
        let outer = InCallback::enter();
        drop(InCallback::enter());
        assert_eq!(InCallback::refuse(), Err(DEADLOCK));
        drop(outer);
        assert_eq!(InCallback::refuse(), Ok(()));
    }
}
