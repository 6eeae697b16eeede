//! Completion as a `Future`.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use nebd_abi::Errno;

use crate::error::errno;
use crate::memory;
use crate::sync::lock;

/// The completion of a request started with [`Session::start`](crate::Session::start).
///
/// The request runs whether or not this is polled; dropping it forgets the result alone.
#[derive(Debug)]
#[must_use = "a future tells nothing unless polled"]
pub struct IoFuture {
    state: Arc<FutureState>,
}

/// What the future and the one who completes it share.
#[derive(Debug, Default)]
pub(crate) struct FutureState {
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    result: Option<Result<(), Errno>>,
    waker: Option<Waker>,
}

impl FutureState {
    /// Tells the result; the waker is woken without a lock held.
    pub(crate) fn complete(&self, result: Result<(), Errno>) {
        let waker = {
            let mut progress = lock(&self.progress);
            progress.result = Some(result);
            progress.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl IoFuture {
    pub(crate) fn new(state: Arc<FutureState>) -> IoFuture {
        IoFuture { state }
    }
}

impl Future for IoFuture {
    type Output = Result<(), Errno>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if memory::is_forked_child() {
            return Poll::Ready(Err(errno::FORKED));
        }
        let mut progress = lock(&self.state.progress);
        if let Some(result) = progress.result {
            return Poll::Ready(result);
        }
        match &mut progress.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}
