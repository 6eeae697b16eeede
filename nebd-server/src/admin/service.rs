//! The generated service, turned into calls of [`AdminApi`] on blocking threads.

use std::sync::Arc;

use nebd_rpc::admin::admin_server::{Admin, AdminServer};
use nebd_rpc::admin::{
    AbortVolumeRequest, AttachRequest, Attachment, CreateVolumeRequest, DeleteVolumeReply,
    DeleteVolumeRequest, DetachReply, DetachRequest, GetStatusRequest, GetUpgradeRequest,
    GetVolumeRequest, LimitVolumeRequest, ListAttachmentsReply, ListAttachmentsRequest,
    ListVolumesReply, ListVolumesRequest, ResizeVolumeRequest, StartUpgradeRequest,
    Status as ServerStatus, UnparkVolumeRequest, Upgrade, Volume,
};
use tokio::sync::Semaphore;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::{AdminApi, AdminError, CALLS_PENDING_MAX, Caller};

/// The service, to be added to a tonic server over a Unix socket.
pub(super) fn service(api: Arc<dyn AdminApi>) -> AdminServer<Service> {
    AdminServer::new(Service { api, pending: Arc::new(Semaphore::new(CALLS_PENDING_MAX)) })
}

/// Who calls, then the call.
pub(super) struct Service {
    api: Arc<dyn AdminApi>,
    pending: Arc<Semaphore>,
}

impl Service {
    async fn call<Q, A, F>(&self, request: Request<Q>, call: F) -> Result<Response<A>, Status>
    where
        Q: Send + 'static,
        A: Send + 'static,
        F: FnOnce(&dyn AdminApi, &Caller, Q) -> Result<A, AdminError> + Send + 'static,
    {
        let caller = caller(&request)?;
        let permit = self.pending.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("too many admin calls are waiting; try again later")
        })?;
        let api = self.api.clone();
        let request = request.into_inner();
        let answer = tokio::task::spawn_blocking(move || {
            // Moved in: a caller that gives up does not end the call, so it must keep its place.
            let _permit = permit;
            call(&*api, &caller, request)
        })
        .await;
        match answer {
            Ok(answer) => Ok(Response::new(answer?)),
            Err(error) => {
                tracing::error!(%error, "an admin call did not finish");
                Err(Status::internal("the call failed inside the server; its log tells more"))
            }
        }
    }
}

/// The peer of the connection that a request came over.
fn caller<Q>(request: &Request<Q>) -> Result<Caller, Status> {
    request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred)
        .map(|peer| Caller {
            uid: peer.uid(),
            gid: peer.gid(),
            pid: peer.pid().unwrap_or_default(),
        })
        .ok_or_else(|| Status::unauthenticated("the kernel does not say who is calling"))
}

#[tonic::async_trait]
impl Admin for Service {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.call(request, |api, caller, request| api.create_volume(caller, request)).await
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesReply>, Status> {
        self.call(request, |api, caller, _| {
            Ok(ListVolumesReply { volumes: api.list_volumes(caller)? })
        })
        .await
    }

    async fn get_volume(
        &self,
        request: Request<GetVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.call(request, |api, caller, request| api.volume(caller, request)).await
    }

    async fn resize_volume(
        &self,
        request: Request<ResizeVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.call(request, |api, caller, request| api.resize_volume(caller, request)).await
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeReply>, Status> {
        self.call(request, |api, caller, request| {
            api.delete_volume(caller, request)?;
            Ok(DeleteVolumeReply {})
        })
        .await
    }

    async fn unpark_volume(
        &self,
        request: Request<UnparkVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.call(request, |api, caller, request| api.unpark_volume(caller, request)).await
    }

    async fn abort_volume(
        &self,
        request: Request<AbortVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.call(request, |api, caller, request| api.abort_volume(caller, request)).await
    }

    async fn limit_volume(
        &self,
        request: Request<LimitVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        self.call(request, |api, caller, request| api.limit_volume(caller, request)).await
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<Attachment>, Status> {
        self.call(request, |api, caller, request| api.attach_volume(caller, request)).await
    }

    async fn detach(
        &self,
        request: Request<DetachRequest>,
    ) -> Result<Response<DetachReply>, Status> {
        self.call(request, |api, caller, request| {
            Ok(DetachReply { attachments: api.detach_volume(caller, request)? })
        })
        .await
    }

    async fn list_attachments(
        &self,
        request: Request<ListAttachmentsRequest>,
    ) -> Result<Response<ListAttachmentsReply>, Status> {
        self.call(request, |api, caller, _| {
            Ok(ListAttachmentsReply { attachments: api.attachments(caller)? })
        })
        .await
    }

    async fn start_upgrade(
        &self,
        request: Request<StartUpgradeRequest>,
    ) -> Result<Response<Upgrade>, Status> {
        self.call(request, |api, caller, request| api.start_upgrade(caller, request)).await
    }

    async fn get_upgrade(
        &self,
        request: Request<GetUpgradeRequest>,
    ) -> Result<Response<Upgrade>, Status> {
        self.call(request, |api, caller, _| api.upgrade(caller)).await
    }

    async fn get_status(
        &self,
        request: Request<GetStatusRequest>,
    ) -> Result<Response<ServerStatus>, Status> {
        self.call(request, |api, caller, request| api.status(caller, request)).await
    }
}
