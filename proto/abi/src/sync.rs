//! Atomics of the standard library, or of loom when the ring is model-checked.

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{Ordering, fence};
#[cfg(loom)]
pub use model::{AtomicU32, AtomicU64};

/// Loom's atomics, with a process's death built in: a modelled server dies between any two of its
/// stores, without a hook in the ring's code.
#[cfg(loom)]
pub mod model {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    use super::Ordering;

    loom::thread_local! {
        /// Stores that this thread may still make; `None` if it is immortal.
        static STORES_LEFT: Cell<Option<u32>> = Cell::new(None);
    }

    struct Died;

    /// Runs `life`, and ends it just before its store number `stores` (from 0); `None` if it died.
    ///
    /// Deaths between loads need no step of their own: nobody else can see a load.
    pub fn run_mortal<T>(stores: u32, life: impl FnOnce() -> T) -> Option<T> {
        STORES_LEFT.with(|left| left.set(Some(stores)));
        let end = catch_unwind(AssertUnwindSafe(life));
        STORES_LEFT.with(|left| left.set(None));
        match end {
            Ok(value) => Some(value),
            Err(payload) if payload.is::<Died>() => None,
            Err(payload) => resume_unwind(payload),
        }
    }

    /// Counts one store of the calling thread; does not return if the thread dies before it.
    pub fn step() {
        let dies = STORES_LEFT.with(|left| match left.get() {
            None => false,
            Some(0) => true,
            Some(stores) => {
                left.set(Some(stores - 1));
                false
            }
        });
        if dies {
            resume_unwind(Box::new(Died));
        }
    }

    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            /// An atomic in loom's memory.
            #[derive(Debug)]
            pub struct $name(loom::sync::atomic::$name);

            impl $name {
                /// With this value at first.
                pub fn new(value: $value) -> $name {
                    $name(loom::sync::atomic::$name::new(value))
                }

                /// As of the standard library.
                pub fn load(&self, order: Ordering) -> $value {
                    self.0.load(order)
                }

                /// As of the standard library, unless the thread dies before it.
                pub fn store(&self, value: $value, order: Ordering) {
                    step();
                    self.0.store(value, order);
                }
            }
        };
    }

    atomic!(AtomicU32, u32);
    atomic!(AtomicU64, u64);
}
