//! The few calls of the admin API that the harness needs.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use nebd_rpc::admin::admin_client::AdminClient;
use nebd_rpc::admin::{self, CreateVolumeRequest, GetStatusRequest, GetVolumeRequest};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// There is no runtime to make calls with.
    #[error("cannot start the runtime of the admin client")]
    Runtime(#[source] io::Error),
    /// The server refused.
    #[error("the server refused: {}", .0.message())]
    Refused(#[source] Box<Status>),
    /// No server answered in time.
    #[error("no server answered at {}: {last}", socket.display())]
    Silent {
        /// The admin socket.
        socket: PathBuf,
        /// What the last try met.
        last: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A client of the admin API; its calls are made again when the server dies under them.
pub struct Admin {
    runtime: tokio::runtime::Runtime,
    socket: PathBuf,
}

const PATIENCE: Duration = Duration::from_secs(30);

impl Admin {
    /// For the server whose client socket is `socket`.
    pub fn new(socket: &Path) -> Result<Admin, AdminError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let mut admin = socket.as_os_str().to_owned();
        admin.push(".admin");
        Ok(Admin { runtime: runtime.map_err(AdminError::Runtime)?, socket: admin.into() })
    }

    /// Creates a volume; `BACKEND:NAME`.
    pub fn create(&self, name: &str, bytes: u64, block_bytes: u32) -> Result<(), AdminError> {
        let request = CreateVolumeRequest {
            operation_id: operation_id(name).into(),
            name: name.into(),
            size_bytes: bytes,
            block_size: block_bytes,
            ..CreateVolumeRequest::default()
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.create_volume(request).await }
        })?;
        Ok(())
    }

    /// Has a volume served by vhost-user-blk; returns the socket.
    pub fn attach(&self, volume: &str, queues: u32) -> Result<PathBuf, AdminError> {
        let request = admin::AttachRequest {
            operation_id: operation_id(&format!("attach {volume}")).into(),
            volume: volume.into(),
            kind: admin::AttachmentKind::VhostUser.into(),
            queues,
            ..admin::AttachRequest::default()
        };
        let attachment = self.call(|mut client| {
            let request = request.clone();
            async move { client.attach(request).await }
        })?;
        Ok(attachment.socket.into())
    }

    /// Gives a volume another size.
    pub fn resize(&self, volume: &str, bytes: u64) -> Result<(), AdminError> {
        let request = admin::ResizeVolumeRequest {
            operation_id: operation_id(&format!("resize {volume} {bytes}")).into(),
            name: volume.into(),
            size_bytes: bytes,
            ..admin::ResizeVolumeRequest::default()
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.resize_volume(request).await }
        })?;
        Ok(())
    }

    /// What the server says of a volume.
    pub fn volume(&self, name: &str) -> Result<admin::Volume, AdminError> {
        self.call(|mut client| {
            let request = GetVolumeRequest { name: name.into() };
            async move { client.get_volume(request).await }
        })
    }

    /// A parked volume is to be served again.
    pub fn unpark(&self, name: &str) -> Result<admin::Volume, AdminError> {
        self.call(|mut client| {
            let request = admin::UnparkVolumeRequest { name: name.into() };
            async move { client.unpark_volume(request).await }
        })
    }

    /// The suspect request of a parked volume is to fail.
    pub fn abort(&self, name: &str) -> Result<admin::Volume, AdminError> {
        self.call(|mut client| {
            let request = admin::AbortVolumeRequest { name: name.into() };
            async move { client.abort_volume(request).await }
        })
    }

    /// Starts a planned takeover by this binary or the server's own, without a probation.
    pub fn start_upgrade(
        &self,
        operation_id: &[u8],
        binary: Option<&Path>,
    ) -> Result<admin::Upgrade, AdminError> {
        self.start_upgrade_on_probation(operation_id, binary, Duration::ZERO)
    }

    /// The same; the new server is on probation for so long.
    pub fn start_upgrade_on_probation(
        &self,
        operation_id: &[u8],
        binary: Option<&Path>,
        probation: Duration,
    ) -> Result<admin::Upgrade, AdminError> {
        let request = admin::StartUpgradeRequest {
            operation_id: operation_id.to_vec().into(),
            kind: admin::UpgradeKind::Upgrade.into(),
            binary: binary.map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
            probation_ms: probation.as_millis() as u64,
            ..admin::StartUpgradeRequest::default()
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.start_upgrade(request).await }
        })
    }

    /// The planned takeover under way, or the last one.
    pub fn upgrade(&self) -> Result<admin::Upgrade, AdminError> {
        self.call(|mut client| async move { client.get_upgrade(admin::GetUpgradeRequest {}).await })
    }

    /// What the server says of itself.
    pub fn status(&self) -> Result<admin::Status, AdminError> {
        self.call(|mut client| async move { client.get_status(GetStatusRequest::default()).await })
    }

    fn call<A, F>(&self, call: impl Fn(AdminClient<Channel>) -> F) -> Result<A, AdminError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // In a block, for the timeout's timer needs the runtime around it when it is made.
            let attempt = async { tokio::time::timeout(PATIENCE, self.attempt(&call)).await };
            let status = match self.runtime.block_on(attempt) {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => status,
                Err(late) => Status::unavailable(late.to_string()),
            };
            let may_pass = matches!(
                status.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
            );
            if !may_pass {
                return Err(AdminError::Refused(Box::new(status)));
            }
            if Instant::now() > deadline {
                let socket = self.socket.clone();
                return Err(AdminError::Silent { socket, last: Box::new(status) });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    async fn attempt<A, F>(&self, call: impl Fn(AdminClient<Channel>) -> F) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://nebd")
            .connect_with_connector(connector)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(call(AdminClient::new(channel)).await?.into_inner())
    }
}

/// The same over retries; no operation is wanted twice in a run.
fn operation_id(operation: &str) -> Vec<u8> {
    let words = [1, 2].map(|salt| {
        operation.bytes().fold(salt, |hash, byte| crate::stamp::mix(hash ^ u64::from(byte)))
    });
    words.map(u64::to_le_bytes).concat()
}
