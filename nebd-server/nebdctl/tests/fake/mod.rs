//! An admin server that keeps volumes in a list, and tells of takeovers what a test has written.

#![allow(dead_code, reason = "not every test needs all of it")]

mod breakable;

use std::collections::VecDeque;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use breakable::{Break, Breakable};

use nebd_rpc::admin::admin_server::{Admin, AdminServer};
use nebd_rpc::admin::{
    AbortVolumeRequest, AttachRequest, Attachment, CreateVolumeRequest, DeleteVolumeReply,
    DeleteVolumeRequest, DetachReply, DetachRequest, GetStatusRequest, GetUpgradeRequest,
    GetVolumeRequest, LimitVolumeRequest, ListAttachmentsReply, ListAttachmentsRequest,
    ListVolumesReply, ListVolumesRequest, ResizeVolumeRequest, StartUpgradeRequest,
    Status as ServerStatus, UnparkVolumeRequest, Upgrade, Volume,
};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

type Answer<A> = Result<Response<A>, Status>;

/// What the server does when it is asked for the takeover; the last one again and again.
#[derive(Clone)]
pub enum Scene {
    /// Tells this, as of the takeover that was asked for.
    Tells(Upgrade),
    /// Tells this as it is.
    Knows(Upgrade),
    /// The connection breaks in the middle of the call.
    Breaks,
    /// The same, and for a while nobody listens.
    Away(Duration),
    /// Does not know the call.
    IsOld,
}

#[derive(Default)]
struct State {
    scenes: Mutex<VecDeque<Scene>>,
    refusal: Mutex<Option<Status>>,
    started: Mutex<Vec<StartUpgradeRequest>>,
    admin: PathBuf,
    volumes: Mutex<Vec<Volume>>,
    operations: Mutex<Vec<Vec<u8>>>,
    refusals: AtomicU32,
}

/// The server; it ends with the test's process.
pub struct Fake {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    state: Arc<State>,
}

impl Fake {
    /// One that works.
    pub fn start() -> Fake {
        Fake::start_with(0, 0)
    }

    /// The first connections are closed without a word, as by a server that is killed.
    pub fn start_after_broken_connections(count: u32) -> Fake {
        Fake::start_with(count, 0)
    }

    /// The first calls are answered with "not now".
    pub fn start_refusing_first_calls(count: u32) -> Fake {
        Fake::start_with(0, count)
    }

    fn start_with(broken: u32, refusals: u32) -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let admin = directory.path().join("s.admin");
        let listener = UnixListener::bind(&admin).unwrap();
        let refusals = AtomicU32::new(refusals);
        let state = Arc::new(State { refusals, admin, ..State::default() });
        let service = AdminServer::new(Service(state.clone()));
        std::thread::spawn(move || {
            for _ in 0..broken {
                drop(listener.accept().unwrap());
            }
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            listener.set_nonblocking(true).unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let incoming =
                    UnixListenerStream::new(listener).map(|stream| stream.map(Breakable::from));
                let server = tonic::transport::Server::builder().add_service(service);
                server.serve_with_incoming(incoming).await.unwrap();
            });
        });
        Fake { _directory: directory, socket, state }
    }

    /// One that is asked for takeovers, and plays these scenes.
    pub fn start_playing(scenes: impl IntoIterator<Item = Scene>) -> Fake {
        let fake = Fake::start();
        *fake.state.scenes.lock().unwrap() = scenes.into_iter().collect();
        fake
    }

    /// One that refuses each takeover with this error.
    pub fn start_refusing_takeovers(refusal: Status) -> Fake {
        let fake = Fake::start();
        *fake.state.refusal.lock().unwrap() = Some(refusal);
        fake
    }

    /// The takeovers that were asked for.
    pub fn started(&self) -> Vec<StartUpgradeRequest> {
        self.state.started.lock().unwrap().clone()
    }

    /// What to give to `--socket`.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Operation ids of the create calls, in order.
    pub fn operations(&self) -> Vec<Vec<u8>> {
        self.state.operations.lock().unwrap().clone()
    }
}

impl State {
    fn play(&self, breaks: &Break) -> Answer<Upgrade> {
        let mut scenes = self.scenes.lock().unwrap();
        let scene = match scenes.len() {
            0 => Scene::Knows(Upgrade::default()),
            1 => scenes[0].clone(),
            _ => scenes.pop_front().unwrap(),
        };
        match scene {
            Scene::Tells(mut upgrade) => {
                let started = self.started.lock().unwrap();
                let request = started.last().expect("a takeover was asked for");
                upgrade.operation_id = request.operation_id.clone();
                upgrade.kind = request.kind;
                Ok(Response::new(upgrade))
            }
            Scene::Knows(upgrade) => Ok(Response::new(upgrade)),
            Scene::IsOld => Err(Status::unimplemented("")),
            Scene::Breaks => {
                breaks.now();
                Err(Status::internal("nobody hears this"))
            }
            Scene::Away(span) => {
                breaks.now();
                let (from, aside) = (self.admin.clone(), self.admin.with_extension("aside"));
                std::fs::rename(&from, &aside).unwrap();
                std::thread::spawn(move || {
                    std::thread::sleep(span);
                    std::fs::rename(&aside, &from).unwrap();
                });
                Err(Status::internal("nobody hears this"))
            }
        }
    }
}

struct Service(Arc<State>);

impl Service {
    fn change<A>(&self, name: &str, change: impl FnOnce(&mut Volume) -> A) -> Result<A, Status> {
        let mut volumes = self.0.volumes.lock().unwrap();
        let volume = volumes.iter_mut().find(|volume| volume.name == name);
        volume.map(change).ok_or_else(|| Status::not_found(format!("volume {name} is not there")))
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Answer<Volume> {
        let request = request.into_inner();
        self.0.operations.lock().unwrap().push(request.operation_id.to_vec());
        if self.0.refusals.load(SeqCst) > 0 {
            self.0.refusals.fetch_sub(1, SeqCst);
            return Err(Status::unavailable("not now"));
        }
        if self.change(&request.name, |_| ()).is_ok() {
            return Err(Status::already_exists(format!("volume {} exists", request.name)));
        }
        let volume = Volume {
            name: request.name,
            size_bytes: request.size_bytes,
            block_size: request.block_size,
            owner_uid: request.owner_uid.unwrap_or(0),
            owner_gid: request.owner_gid.unwrap_or(0),
            mode: request.mode.unwrap_or(0o600),
            path: request.path,
            ..Volume::default()
        };
        self.0.volumes.lock().unwrap().push(volume.clone());
        Ok(Response::new(volume))
    }

    async fn list_volumes(&self, _: Request<ListVolumesRequest>) -> Answer<ListVolumesReply> {
        let volumes = self.0.volumes.lock().unwrap().clone();
        Ok(Response::new(ListVolumesReply { volumes }))
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Answer<Volume> {
        self.change(&request.into_inner().name, |volume| volume.clone()).map(Response::new)
    }

    async fn resize_volume(&self, request: Request<ResizeVolumeRequest>) -> Answer<Volume> {
        let request = request.into_inner();
        let resize = |volume: &mut Volume| {
            volume.size_bytes = request.size_bytes;
            volume.clone()
        };
        self.change(&request.name, resize).map(Response::new)
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Answer<DeleteVolumeReply> {
        let name = request.into_inner().name;
        self.change(&name, |_| ())?;
        self.0.volumes.lock().unwrap().retain(|volume| volume.name != name);
        Ok(Response::new(DeleteVolumeReply {}))
    }

    async fn unpark_volume(&self, request: Request<UnparkVolumeRequest>) -> Answer<Volume> {
        self.change(&request.into_inner().name, |volume| volume.clone()).map(Response::new)
    }

    async fn abort_volume(&self, request: Request<AbortVolumeRequest>) -> Answer<Volume> {
        self.change(&request.into_inner().name, |volume| volume.clone()).map(Response::new)
    }

    async fn limit_volume(&self, request: Request<LimitVolumeRequest>) -> Answer<Volume> {
        let request = request.into_inner();
        self.change(&request.name, |volume| {
            volume.iops_limit = request.iops.unwrap_or(volume.iops_limit);
            volume.bytes_per_s_limit = request.bytes_per_s.unwrap_or(volume.bytes_per_s_limit);
            volume.burst_ms = request.burst_ms.unwrap_or(volume.burst_ms);
            volume.clone()
        })
        .map(Response::new)
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<Attachment> {
        let request = request.into_inner();
        Ok(Response::new(Attachment {
            volume: request.volume,
            kind: request.kind,
            socket: request.socket,
            read_only: request.read_only,
            queues: request.queues,
            ..Attachment::default()
        }))
    }

    async fn detach(&self, request: Request<DetachRequest>) -> Answer<DetachReply> {
        let volume = request.into_inner().volume;
        Err(Status::not_found(format!("volume {volume} is not attached")))
    }

    async fn list_attachments(
        &self,
        _: Request<ListAttachmentsRequest>,
    ) -> Answer<ListAttachmentsReply> {
        Ok(Response::new(ListAttachmentsReply::default()))
    }

    async fn start_upgrade(&self, request: Request<StartUpgradeRequest>) -> Answer<Upgrade> {
        let (breaks, request) = (Break::of(&request), request.into_inner());
        self.0.started.lock().unwrap().push(request);
        if let Some(refusal) = self.0.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        self.0.play(&breaks)
    }

    async fn get_upgrade(&self, request: Request<GetUpgradeRequest>) -> Answer<Upgrade> {
        self.0.play(&Break::of(&request))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<ServerStatus> {
        Ok(Response::new(ServerStatus { pid: std::process::id(), ..ServerStatus::default() }))
    }
}
