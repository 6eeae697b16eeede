//! A connection that the service can break in the middle of a call, as the death of a server does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::Request;
use tonic::transport::server::Connected;

/// Breaks one connection.
#[derive(Clone, Default)]
pub struct Break(Arc<AtomicBool>);

impl Break {
    /// For the connection of this request.
    pub fn of<T>(request: &Request<T>) -> Break {
        request.extensions().get::<Break>().cloned().expect("connections are breakable")
    }

    /// From now on nothing is read or written.
    pub fn now(&self) {
        self.0.store(true, SeqCst);
    }

    fn check(&self) -> io::Result<()> {
        match self.0.load(SeqCst) {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Ok(()),
        }
    }
}

/// A stream, and whether it is broken.
pub struct Breakable {
    stream: UnixStream,
    broken: Break,
}

impl From<UnixStream> for Breakable {
    fn from(stream: UnixStream) -> Breakable {
        Breakable { stream, broken: Break::default() }
    }
}

impl Connected for Breakable {
    type ConnectInfo = Break;

    fn connect_info(&self) -> Break {
        self.broken.clone()
    }
}

impl AsyncRead for Breakable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.broken.check()?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Breakable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.broken.check()?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.broken.check()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
