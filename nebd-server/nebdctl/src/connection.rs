//! Calls of the admin API that survive the server's death on the way.
//!
//! A call that breaks off is made again with the same operation id until the deadline: its server
//! was replaced, and the successor gives the answer that the first one would have given.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use nebd_rpc::ERRNO_METADATA;
use nebd_rpc::admin::admin_client::AdminClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::failure::Failure;

/// Pause between two tries; the server comes back within milliseconds.
const RETRY: Duration = Duration::from_millis(20);

/// Thousands of volumes with their counters are more than the default allows.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// The admin socket of a server, and how long to wait for it.
#[derive(Debug)]
pub struct Connection {
    runtime: tokio::runtime::Runtime,
    socket: PathBuf,
    timeout: Duration,
    /// Once the server was there, its absence is taken for a restart.
    seen: AtomicBool,
}

/// Why one try gave no answer.
enum Broken {
    Connect(io::Error),
    Call(Status),
}

impl Connection {
    /// For the server whose client socket is `socket`. Nothing is sent yet.
    pub fn new(socket: &Path, timeout: Duration) -> io::Result<Connection> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let mut admin = socket.as_os_str().to_owned();
        admin.push(".admin");
        Ok(Connection { runtime, socket: admin.into(), timeout, seen: AtomicBool::new(false) })
    }

    /// Makes a call; `call` may run several times, so it keeps its operation id.
    pub fn call<A, F>(&self, call: impl Fn(AdminClient<Channel>) -> F) -> Result<A, Failure>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let deadline = Instant::now() + self.timeout;
        let mut last = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let attempt = self.attempt(&call);
            let broken =
                match self.runtime.block_on(async { tokio::time::timeout(left, attempt).await }) {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(Broken::Call(status))) if !is_passing(&status) => {
                        return Err(refused(status));
                    }
                    Ok(Err(Broken::Connect(source))) if !self.seen.load(Relaxed) => {
                        return Err(self.unreachable(source));
                    }
                    Ok(Err(Broken::Call(status))) => status.message().to_owned(),
                    Ok(Err(Broken::Connect(error))) => error.to_string(),
                    Err(_) => return Err(self.silent(last)),
                };
            last = Some(broken);
            if Instant::now() + RETRY >= deadline {
                return Err(self.silent(last));
            }
            std::thread::sleep(RETRY);
        }
    }

    async fn attempt<A, F>(&self, call: impl Fn(AdminClient<Channel>) -> F) -> Result<A, Broken>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let stream = UnixStream::connect(&self.socket).await.map_err(Broken::Connect)?;
        self.seen.store(true, Relaxed);
        // The connector is asked once; a second time would mean that the connection broke.
        let stream = std::sync::Mutex::new(Some(TokioIo::new(stream)));
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let stream = stream.lock().ok().and_then(|mut stream| stream.take());
            std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe)))
        });
        let channel = Endpoint::from_static("http://nebd")
            .connect_with_connector(connector)
            .await
            .map_err(|error| Broken::Call(Status::unavailable(error.to_string())))?;
        let client = AdminClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(call(client).await.map_err(Broken::Call)?.into_inner())
    }

    fn silent(&self, last: Option<String>) -> Failure {
        Failure::Silent {
            socket: self.socket.clone(),
            timeout_s: self.timeout.as_secs(),
            detail: last.unwrap_or_else(|| "it is there, but does not speak".into()),
        }
    }

    fn unreachable(&self, source: io::Error) -> Failure {
        let advice = match source.kind() {
            io::ErrorKind::NotFound => {
                "is it running? Name its socket with --socket or NEBD_SOCKET"
            }
            io::ErrorKind::PermissionDenied => {
                "run as root, or as a member of the group that owns the socket"
            }
            io::ErrorKind::ConnectionRefused => {
                "the socket is left over from a server that is gone: start nebd-server"
            }
            _ => "look at the socket and at the server's log",
        };
        Failure::Unreachable { socket: self.socket.clone(), source, advice }
    }
}

/// A new operation id: 16 random bytes.
pub fn operation_id() -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut id = vec![0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}

fn errno(status: &Status) -> Option<i32> {
    status.metadata().get(ERRNO_METADATA)?.to_str().ok()?.parse().ok()
}

/// Whether trying again may help: the connection broke, or the server said "not yet".
fn is_passing(status: &Status) -> bool {
    match errno(status) {
        Some(errno) => errno == libc::EAGAIN,
        None => matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled),
    }
}

fn refused(status: Status) -> Failure {
    let message = match status.message() {
        // An error of the server's own has words; this is what a router says of an unknown path.
        "" if status.code() == Code::Unimplemented => {
            "the server does not know this call: it is older than this nebdctl".to_owned()
        }
        "" => format!("the server refused: {}", status.code()),
        message => message.to_owned(),
    };
    Failure::Refused { errno: errno(&status), message }
}
