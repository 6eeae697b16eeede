//! Where Prometheus fetches the metrics: HTTP/1.1 at a Unix socket, and over TCP if configured.
//!
//! ```text
//!   accept ─► head within HEAD_LIMIT ─► GET /metrics ─► text, written within ANSWER_LIMIT ─► close
//!          └► CONNECTIONS_MAX are there: the oldest that has not asked yet makes room
//! ```
//!
//! One thread with a runtime of its own, so that whoever floods the endpoint takes nothing from the
//! admin API; without a connection it sleeps and sets no timer. One request a connection. A text is
//! good for [`FRESH`], so that many requests cost little more than one. What fails here is logged,
//! and keeps nobody from being served.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::task::{AbortHandle, LocalSet};

use super::exposition;
use crate::config::Config;
use crate::server::Server;

/// Connections at a time, at each of the two listeners.
const CONNECTIONS_MAX: usize = 64;
/// A client has this long to send its request.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a request.
const HEAD_BYTES_MAX: usize = 8192;
/// A client has this long from the connection to the end of the answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// For so long a text is told again.
const FRESH: Duration = Duration::from_millis(100);
/// Pause between attempts to accept, or to listen at an address that somebody else has.
const RETRY: Duration = Duration::from_millis(500);

/// Why the metrics are not told.
#[derive(Debug, thiserror::Error)]
enum EndpointError {
    #[error("cannot make a runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot listen at {path}")]
    Listen { path: PathBuf, source: io::Error },
}

/// Tells the server's metrics until the process ends.
pub(crate) fn spawn(config: &Config, server: Arc<Server>) {
    let config = config.clone();
    let work = move || {
        if let Err(error) = run(&config, server) {
            tracing::error!(error = &error as &dyn std::error::Error, "metrics are not told");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("nebd-metrics".into()).spawn(work) {
        tracing::error!(%error, "metrics are not told");
    }
}

fn run(config: &Config, server: Arc<Server>) -> Result<(), EndpointError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(EndpointError::Runtime)?;
    let page = Rc::new(Page { server, last: Default::default() });
    let path = config.metrics_socket();
    let tasks = LocalSet::new();
    if let Some(address) = config.metrics.listen {
        tasks.spawn_local(serve_tcp(address, page.clone()));
    }
    let listen = || -> io::Result<UnixListener> {
        let listener = bind(&path, config)?;
        listener.set_nonblocking(true)?;
        let _entered = runtime.enter();
        UnixListener::from_std(listener)
    };
    match listen() {
        Ok(listener) => _ = tasks.spawn_local(serve(Listener::Unix(listener), page)),
        Err(source) if config.metrics.listen.is_some() => {
            tracing::error!(error = %source, path = %path.display(), "metrics over TCP only");
        }
        Err(source) => return Err(EndpointError::Listen { path, source }),
    }
    runtime.block_on(tasks);
    Ok(())
}

/// A listening socket at `path`. It takes the place of the predecessor's in one step: whoever
/// connects finds either of them.
fn bind(path: &Path, config: &Config) -> io::Result<StdUnixListener> {
    let mut new = path.as_os_str().to_owned();
    new.push("~");
    let new = PathBuf::from(new);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = StdUnixListener::bind(&new)?;
    let mode = config.socket_mode().map_err(io::Error::other)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode))?;
    if let Some(gid) = config.access.gid {
        std::os::unix::fs::chown(&new, None, Some(gid))?;
    }
    std::fs::rename(&new, path)?;
    Ok(listener)
}

/// Keeps trying: a predecessor of another build may hold the address for a while.
async fn serve_tcp(address: SocketAddr, page: Rc<Page>) {
    let mut told = false;
    loop {
        match bind_tcp(address) {
            Ok(listener) => {
                tracing::info!(%address, "metrics over TCP");
                return serve(Listener::Tcp(listener), page).await;
            }
            Err(error) if !std::mem::replace(&mut told, true) => {
                tracing::warn!(%address, %error, "cannot tell metrics over TCP; trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Predecessor and successor listen at once for the moment of a planned takeover.
fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(128)
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A connection that is being served.
struct Open {
    task: AbortHandle,
    /// It has sent its request.
    has_asked: Rc<std::cell::Cell<bool>>,
}

async fn serve(listener: Listener, page: Rc<Page>) {
    let mut open: Vec<Open> = Vec::new();
    loop {
        let has_asked = Rc::new(std::cell::Cell::new(false));
        let accepted = match &listener {
            Listener::Unix(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| spawn_connection(stream, page.clone(), has_asked.clone())),
            Listener::Tcp(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| spawn_connection(stream, page.clone(), has_asked.clone())),
        };
        match accepted {
            Ok(task) => {
                open.retain(|open| !open.task.is_finished());
                if open.len() == CONNECTIONS_MAX {
                    let idle = open.iter().position(|open| !open.has_asked.get());
                    open.remove(idle.unwrap_or(0)).task.abort();
                }
                open.push(Open { task, has_asked });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

fn spawn_connection<S>(
    stream: S,
    page: Rc<Page>,
    has_asked: Rc<std::cell::Cell<bool>>,
) -> AbortHandle
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let answer = service_fn(move |request: Request<Incoming>| {
        has_asked.set(true);
        std::future::ready(Ok::<_, Infallible>(page.answer(&request)))
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    let limited = async move {
        // Whatever ends a connection is its client's business.
        let _ = tokio::time::timeout(ANSWER_LIMIT, connection).await;
    };
    tokio::task::spawn_local(limited).abort_handle()
}

/// What is told.
struct Page {
    server: Arc<Server>,
    last: std::cell::RefCell<Option<(Instant, Bytes)>>,
}

impl Page {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, body) = match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, self.text()),
            (&Method::GET | &Method::HEAD, _) => {
                (StatusCode::NOT_FOUND, Bytes::from_static(b"metrics are at /metrics\n"))
            }
            _ => (StatusCode::METHOD_NOT_ALLOWED, Bytes::new()),
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(exposition::CONTENT_TYPE));
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }

    fn text(&self) -> Bytes {
        let mut last = self.last.borrow_mut();
        match &*last {
            Some((made, text)) if made.elapsed() < FRESH => text.clone(),
            _ => {
                let text = Bytes::from(self.server.snapshot().exposition(super::stats()));
                // Made anew is as of now, however long it took.
                *last = Some((Instant::now(), text.clone()));
                text
            }
        }
    }
}
