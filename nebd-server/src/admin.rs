//! The admin API: gRPC over a Unix socket, the one `nebdctl` speaks.
//!
//! ```text
//!   nebdctl ── HTTP/2 ──► accept ──► service ──► blocking thread ──► AdminApi (the daemon)
//!                         │          who is it    at most CALLS_RUNNING_MAX
//!                         └ SO_PEERCRED ──► Caller
//! ```
//!
//! One thread runs a tokio runtime that does nothing else; without a call it sleeps in epoll and
//! sets no timer. Calls may block, so each runs on a thread of a small bounded pool. The daemon
//! stands behind [`AdminApi`], a synchronous trait: nothing else in the server knows tokio.

mod error;
mod service;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nebd_rpc::admin::{
    AbortVolumeRequest, AttachRequest, Attachment, CreateVolumeRequest, DeleteVolumeRequest,
    DetachRequest, GetStatusRequest, GetVolumeRequest, LimitVolumeRequest, ResizeVolumeRequest,
    StartUpgradeRequest, Status, UnparkVolumeRequest, Upgrade, Volume,
};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

pub use error::AdminError;

/// Calls that run at a time; more wait their turn.
pub const CALLS_RUNNING_MAX: usize = 4;
/// Calls that run or wait; more are refused at once.
pub const CALLS_PENDING_MAX: usize = 64;

/// A pause after a failed accept (no descriptors left), so that it does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long a stopping server waits for calls that run.
const STOP_GRACE: Duration = Duration::from_millis(250);

/// Who makes a call, as the kernel knows it (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id; 0 if it lives in a pid namespace that is not visible from here.
    pub pid: i32,
}

impl Caller {
    /// Whether the caller may do anything.
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }
}

/// What the daemon does for an operator. Calls come from several threads and may block.
///
/// `operation_id` of a request stays the same when the caller tries again (its server may have
/// died on the way): a repeated one is to be answered as the first time.
pub trait AdminApi: Send + Sync + 'static {
    /// Makes a volume, or registers an existing file or device as one.
    fn create_volume(
        &self,
        caller: &Caller,
        request: CreateVolumeRequest,
    ) -> Result<Volume, AdminError>;

    /// Those volumes that the caller may see, by name.
    fn list_volumes(&self, caller: &Caller) -> Result<Vec<Volume>, AdminError>;

    /// One volume.
    fn volume(&self, caller: &Caller, request: GetVolumeRequest) -> Result<Volume, AdminError>;

    /// Changes the size; a smaller one only with `shrink`.
    fn resize_volume(
        &self,
        caller: &Caller,
        request: ResizeVolumeRequest,
    ) -> Result<Volume, AdminError>;

    /// Deletes a volume that nobody has attached.
    fn delete_volume(
        &self,
        caller: &Caller,
        request: DeleteVolumeRequest,
    ) -> Result<(), AdminError>;

    /// Serves a parked volume again; its suspect request gets another chance.
    fn unpark_volume(
        &self,
        caller: &Caller,
        request: UnparkVolumeRequest,
    ) -> Result<Volume, AdminError>;

    /// Serves a parked volume again; its suspect request is answered with `EIO`.
    fn abort_volume(
        &self,
        caller: &Caller,
        request: AbortVolumeRequest,
    ) -> Result<Volume, AdminError>;

    /// Limits what a volume may have; for root.
    fn limit_volume(
        &self,
        caller: &Caller,
        request: LimitVolumeRequest,
    ) -> Result<Volume, AdminError>;

    /// Serves a volume to hypervisors without our library, until it is detached.
    fn attach_volume(
        &self,
        caller: &Caller,
        request: AttachRequest,
    ) -> Result<Attachment, AdminError>;

    /// Ends attachments of a volume, and returns what they were.
    fn detach_volume(
        &self,
        caller: &Caller,
        request: DetachRequest,
    ) -> Result<Vec<Attachment>, AdminError>;

    /// The attachments of those volumes that the caller may see, by volume.
    fn attachments(&self, caller: &Caller) -> Result<Vec<Attachment>, AdminError>;

    /// Starts a planned takeover, and returns at once; for root.
    fn start_upgrade(
        &self,
        caller: &Caller,
        request: StartUpgradeRequest,
    ) -> Result<Upgrade, AdminError>;

    /// The planned takeover under way, or the last one.
    fn upgrade(&self, caller: &Caller) -> Result<Upgrade, AdminError>;

    /// What the server is doing.
    fn status(&self, caller: &Caller, request: GetStatusRequest) -> Result<Status, AdminError>;
}

/// A running admin service. Dropping it stops the service without waiting.
#[derive(Debug)]
pub struct AdminHandle {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminHandle {
    /// Stops accepting, lets calls that run finish for a moment, closes the connections.
    pub fn stop(mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the admin thread panicked");
        }
    }
}

/// Serves `api` on the listening socket, on a thread of its own.
///
/// The listener may be inherited and shared with other processes; it is set to non-blocking.
pub fn spawn(listener: UnixListener, api: Arc<dyn AdminApi>) -> io::Result<AdminHandle> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        // No timer runs while nothing waits for one; a caller's deadline (grpc-timeout) needs them.
        .enable_time()
        .max_blocking_threads(CALLS_RUNNING_MAX)
        .thread_keep_alive(Duration::from_secs(1))
        .thread_name("nebd-admin-call")
        .build()?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::UnixListener::from_std(listener)?
    };
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new().name("nebd-admin".into()).spawn(move || {
        runtime.block_on(serve(listener, api, stopped));
        // A call that still blocks must not hold up the process's end.
        runtime.shutdown_background();
    })?;
    Ok(AdminHandle { stop: Some(stop), thread: Some(thread) })
}

async fn serve(
    listener: tokio::net::UnixListener,
    api: Arc<dyn AdminApi>,
    mut stopped: oneshot::Receiver<()>,
) {
    let (accepted, incoming) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(listener, accepted));
    let (finish, finished) = oneshot::channel::<()>();
    let mut server = std::pin::pin!(
        tonic::transport::Server::builder()
            .add_service(service::service(api))
            .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async {
                let _ = finished.await;
            })
    );
    let result = tokio::select! {
        result = &mut server => Some(result),
        _ = &mut stopped => None,
    };
    // From here on a successor that shares the listener gets the connections.
    accepting.abort();
    drop(finish);
    let result = match result {
        Some(result) => Some(result),
        None => tokio::time::timeout(STOP_GRACE, server).await.ok(),
    };
    if let Some(Err(error)) = result {
        tracing::error!(%error, "the admin service ended");
    }
}

async fn accept(
    listener: tokio::net::UnixListener,
    accepted: mpsc::Sender<io::Result<UnixStream>>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if accepted.send(Ok(stream)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an admin connection; trying again");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
