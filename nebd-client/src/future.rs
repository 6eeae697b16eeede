//! Completion as a `Future`.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use nebd_abi::Errno;

/// The completion of a request started with [`Session::start`](crate::Session::start).
///
/// The request runs whether or not this is polled; dropping it forgets the result alone.
#[derive(Debug)]
#[must_use = "a future tells nothing unless polled"]
pub struct IoFuture {}

impl Future for IoFuture {
    type Output = Result<(), Errno>;

    fn poll(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(Err(Errno::IO))
    }
}
