//! The service against a daemon that is none.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Mutex;

use nebd_rpc::ERRNO_METADATA;
use nebd_rpc::admin::admin_client::AdminClient;
use nebd_rpc::admin::{GetStatusRequest, ListVolumesRequest};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::*;

/// Volumes in a list, and everyone who called.
#[derive(Default)]
struct Fake {
    volumes: Mutex<Vec<Volume>>,
    callers: Mutex<Vec<Caller>>,
}

impl Fake {
    fn find(&self, name: &str) -> Result<Volume, AdminError> {
        let volumes = self.volumes.lock().unwrap();
        let found = volumes.iter().find(|volume| volume.name == name);
        found.cloned().ok_or_else(|| AdminError::NotFound { volume: name.into() })
    }
}

impl AdminApi for Fake {
    fn start_upgrade(&self, _: &Caller, _: StartUpgradeRequest) -> Result<Upgrade, AdminError> {
        Ok(Upgrade::default())
    }

    fn upgrade(&self, _: &Caller) -> Result<Upgrade, AdminError> {
        Ok(Upgrade::default())
    }

    fn create_volume(
        &self,
        caller: &Caller,
        request: CreateVolumeRequest,
    ) -> Result<Volume, AdminError> {
        self.callers.lock().unwrap().push(*caller);
        let name: nebd_abi::VolumeName = request.name.parse()?;
        if self.find(&request.name).is_ok() {
            return Err(AdminError::Exists { volume: name });
        }
        let volume =
            Volume { name: request.name, size_bytes: request.size_bytes, ..Volume::default() };
        self.volumes.lock().unwrap().push(volume.clone());
        Ok(volume)
    }

    fn list_volumes(&self, _: &Caller) -> Result<Vec<Volume>, AdminError> {
        Ok(self.volumes.lock().unwrap().clone())
    }

    fn volume(&self, _: &Caller, request: GetVolumeRequest) -> Result<Volume, AdminError> {
        self.find(&request.name)
    }

    fn resize_volume(&self, _: &Caller, _: ResizeVolumeRequest) -> Result<Volume, AdminError> {
        panic!("a call that panics must not take the service down")
    }

    fn delete_volume(&self, _: &Caller, request: DeleteVolumeRequest) -> Result<(), AdminError> {
        self.find(&request.name)?;
        self.volumes.lock().unwrap().retain(|volume| volume.name != request.name);
        Ok(())
    }

    fn unpark_volume(
        &self,
        _: &Caller,
        request: UnparkVolumeRequest,
    ) -> Result<Volume, AdminError> {
        let volume = request.name.parse()?;
        Err(AdminError::NotParked { volume })
    }

    fn abort_volume(
        &self,
        caller: &Caller,
        request: AbortVolumeRequest,
    ) -> Result<Volume, AdminError> {
        Err(AdminError::Denied { volume: request.name, uid: caller.uid, action: "abort it" })
    }

    fn limit_volume(&self, _: &Caller, request: LimitVolumeRequest) -> Result<Volume, AdminError> {
        self.find(&request.name)
    }

    fn attach_volume(&self, _: &Caller, request: AttachRequest) -> Result<Attachment, AdminError> {
        self.find(&request.volume)?;
        Ok(Attachment { volume: request.volume, ..Attachment::default() })
    }

    fn detach_volume(
        &self,
        _: &Caller,
        request: DetachRequest,
    ) -> Result<Vec<Attachment>, AdminError> {
        let volume = request.volume.parse()?;
        Err(AdminError::NotAttached { volume })
    }

    fn attachments(&self, _: &Caller) -> Result<Vec<Attachment>, AdminError> {
        Ok(Vec::new())
    }

    fn status(&self, _: &Caller, _: GetStatusRequest) -> Result<Status, AdminError> {
        Ok(Status { pid: std::process::id(), ..Status::default() })
    }
}

struct Bench {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    api: Arc<Fake>,
    handle: AdminHandle,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s.admin");
        let api = Arc::new(Fake::default());
        let handle = spawn(UnixListener::bind(&socket).unwrap(), api.clone()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Bench { _directory: directory, socket, api, handle, runtime }
    }

    fn client(&self) -> AdminClient<Channel> {
        let endpoint = Endpoint::try_from(format!("unix:{}", self.socket.display())).unwrap();
        AdminClient::new(self.runtime.block_on(endpoint.connect()).unwrap())
    }
}

fn errno(status: &tonic::Status) -> i32 {
    status.metadata().get(ERRNO_METADATA).unwrap().to_str().unwrap().parse().unwrap()
}

#[test]
fn calls_reach_the_api_with_the_callers_credentials() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.runtime.block_on(async {
        let request = CreateVolumeRequest {
            name: "file:disk1".into(),
            size_bytes: 1 << 20,
            ..CreateVolumeRequest::default()
        };
        let made = client.create_volume(request.clone()).await.unwrap().into_inner();
        assert_eq!((made.name.as_str(), made.size_bytes), ("file:disk1", 1 << 20));
        let again = client.create_volume(request).await.unwrap_err();
        assert_eq!((again.code(), errno(&again)), (Code::AlreadyExists, libc::EEXIST));
        assert!(again.message().contains("file:disk1"));
        let list = client.list_volumes(ListVolumesRequest {}).await.unwrap().into_inner();
        assert_eq!(list.volumes.len(), 1);
        let status = client.get_status(GetStatusRequest::default()).await.unwrap().into_inner();
        assert_eq!(status.pid, std::process::id());
        let name = "file:disk1".to_owned();
        let delete = DeleteVolumeRequest { name, ..DeleteVolumeRequest::default() };
        client.delete_volume(delete).await.unwrap();
    });
    let caller = bench.api.callers.lock().unwrap()[0];
    assert_eq!(caller.pid as u32, std::process::id());
    assert_eq!(caller.uid, rustix::process::geteuid().as_raw());
    assert_eq!(caller.gid, rustix::process::getegid().as_raw());
    bench.handle.stop();
}

#[test]
fn errors_keep_code_errno_and_message() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.runtime.block_on(async {
        let name = || "mem:none".to_owned();
        let status = client.get_volume(GetVolumeRequest { name: name() }).await.unwrap_err();
        assert_eq!((status.code(), errno(&status)), (Code::NotFound, libc::ENOENT));
        assert!(status.message().contains("mem:none"));
        let status = client.unpark_volume(UnparkVolumeRequest { name: name() }).await.unwrap_err();
        assert_eq!((status.code(), errno(&status)), (Code::FailedPrecondition, libc::EINVAL));
        let status = client.abort_volume(AbortVolumeRequest { name: name() }).await.unwrap_err();
        assert_eq!((status.code(), errno(&status)), (Code::PermissionDenied, libc::EACCES));
        let bad = CreateVolumeRequest { name: "../x".into(), ..CreateVolumeRequest::default() };
        let status = client.create_volume(bad).await.unwrap_err();
        assert_eq!((status.code(), errno(&status)), (Code::InvalidArgument, libc::EINVAL));
    });
    bench.handle.stop();
}

#[test]
fn a_panicking_call_does_not_end_the_service() {
    let bench = Bench::new();
    let mut client = bench.client();
    bench.runtime.block_on(async {
        let status = client.resize_volume(ResizeVolumeRequest::default()).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        client.get_status(GetStatusRequest::default()).await.unwrap();
    });
    bench.handle.stop();
}

#[test]
fn stop_ends_it_though_a_client_is_connected_and_a_successor_takes_the_listener() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s.admin");
    let listener = UnixListener::bind(&socket).unwrap();
    let first = spawn(listener.try_clone().unwrap(), Arc::new(Fake::default())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoint = Endpoint::try_from(format!("unix:{}", socket.display())).unwrap();
    let mut client = AdminClient::new(runtime.block_on(endpoint.connect()).unwrap());
    runtime.block_on(client.get_status(GetStatusRequest::default())).unwrap();
    first.stop();
    let second = spawn(listener, Arc::new(Fake::default())).unwrap();
    let mut fresh = AdminClient::new(runtime.block_on(endpoint.connect()).unwrap());
    runtime.block_on(fresh.get_status(GetStatusRequest::default())).unwrap();
    second.stop();
}
