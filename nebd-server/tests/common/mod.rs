//! A server as a process, and a client that is nothing but the shared bytes.
#![allow(dead_code, missing_docs, reason = "each test file uses a part")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::control::{AttachFlags, Message, VolumeInfo};
use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, ServerState, SessionId};
use nebd_abi::region::Region;
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, Completion, Submission};
use nebd_abi::{Errno, Op, OpFlags, socket};
use nebd_rpc::admin::admin_client::AdminClient;
use nebd_rpc::admin::{CreateVolumeRequest, GetStatusRequest, Status};
use rustix::event::EventfdFlags;

const LIMIT: Duration = Duration::from_secs(20);

pub struct Server {
    pub dir: tempfile::TempDir,
    pub child: Child,
}

impl Server {
    pub fn start(command: &str) -> Server {
        Server::start_with(command, "")
    }

    /// With a configuration file of this text.
    pub fn start_with(command: &str, config: &str) -> Server {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("nebd.toml"), config).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_nebd-server"))
            .arg(command)
            .arg("--config")
            .arg(dir.path().join("nebd.toml"))
            .arg("--socket")
            .arg(dir.path().join("nebd.sock"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { dir, child };
        until(|| socket::connect(&server.socket()).is_ok().then_some(()));
        let admin = server.dir.path().join("nebd.sock.admin");
        until(|| std::os::unix::net::UnixStream::connect(&admin).is_ok().then_some(()));
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nebd.sock")
    }

    pub fn server_pid(&self) -> i32 {
        let path = self.dir.path().join("state/server.pid");
        until(|| std::fs::read_to_string(&path).ok()?.lines().next()?.parse().ok())
    }

    pub fn kill_server(&self) {
        let pid = rustix::process::Pid::from_raw(self.server_pid()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    pub fn admin<T>(
        &self,
        call: impl AsyncFnOnce(AdminClient<tonic::transport::Channel>) -> T,
    ) -> T {
        let path = self.dir.path().join("nebd.sock.admin");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let connect = tower::service_fn(move |_| {
                let path = path.clone();
                async move {
                    let stream = tokio::net::UnixStream::connect(path).await?;
                    io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
                }
            });
            let endpoint = tonic::transport::Endpoint::from_static("http://nebd");
            call(AdminClient::new(endpoint.connect_with_connector(connect).await.unwrap())).await
        })
    }

    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    pub fn create(&self, name: &str) {
        let request =
            CreateVolumeRequest { name: name.into(), size_bytes: 1 << 20, ..Default::default() };
        self.admin(async |mut client| client.create_volume(request).await).unwrap();
    }

    /// Kills the server of a keeper, and waits for its successor.
    pub fn replace_server(&self) {
        let old = self.server_pid();
        self.kill_server();
        until(|| (self.server_pid() != old).then_some(()));
    }

    pub fn status(&self) -> Status {
        self.admin(async |mut client| client.get_status(GetStatusRequest::default()).await)
            .unwrap()
            .into_inner()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

pub fn until<T>(mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub struct Client {
    pub region: Arc<Region>,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub socket: OwnedFd,
    pub submit: ClientSubmit,
    pub reap: ClientReap,
    pub info: VolumeInfo,
}

pub fn ask(socket: &OwnedFd, message: &Message, fds: &[&OwnedFd]) -> Message {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    socket::send(socket, &message.encode(1), &fds).unwrap();
    answer(socket)
}

/// The answer to the last request; events are passed over.
fn answer(socket: &OwnedFd) -> Message {
    loop {
        let packet = socket::receive(socket).unwrap().expect("an answer");
        let (request, message) = Message::decode(&packet.bytes).unwrap();
        if request == 1 {
            return message;
        }
    }
}

pub fn hello(path: &Path) -> OwnedFd {
    let socket = socket::connect(path).unwrap();
    let hello =
        Message::Hello { layout_min: 1, layout_max: 1, features: 0, pid: 1, version: "raw".into() };
    assert!(matches!(ask(&socket, &hello, &[]), Message::Welcome { .. }));
    socket
}

impl Client {
    /// Greeted, not attached.
    pub fn new(server: &Server, volume: &str, id: u8) -> Client {
        Client::with_arena(server, volume, id, 1 << 16)
    }

    /// The same, with so many bytes for data.
    pub fn with_arena(server: &Server, volume: &str, id: u8, arena_size: u64) -> Client {
        let geometry = Geometry { queue_count: 1, queue_depth: 8, iovecs_per_slot: 4, arena_size };
        let region = Region::create(RegionParams {
            version: LayoutVersion::CURRENT,
            session: SessionId([id; 16]),
            geometry,
            volume: volume.parse().unwrap(),
            client_pid: std::process::id(),
            client_version: "raw".into(),
        });
        let region = Arc::new(region.unwrap());
        let eventfd = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let memory = region.queue(0).unwrap();
        Client {
            kick: eventfd(),
            call: eventfd(),
            socket: hello(&server.socket()),
            submit: ClientSubmit::new(memory.clone()),
            reap: ClientReap::new(memory),
            region,
            info: VolumeInfo {
                size: 0,
                block_size: 0,
                read_only: false,
                can_discard: false,
                can_write_zeroes: false,
                epoch: nebd_abi::Epoch::default(),
                transfer_bytes_max: 0,
                incarnation: 0,
            },
        }
    }

    pub fn attach(
        server: &Server,
        volume: &str,
        id: u8,
        flags: AttachFlags,
    ) -> Result<Client, Message> {
        let mut client = Client::new(server, volume, id);
        client.info = client.present(flags)?;
        Ok(client)
    }

    /// Sends Attach without waiting for the answer.
    pub fn ask_attach(&self, flags: AttachFlags) {
        let params = self.region.params();
        let attach = Message::Attach {
            session: params.session,
            flags,
            queue_count: 1,
            incarnation: self.info.incarnation,
            volume: params.volume.clone(),
        };
        let fds = [self.region.memory().fd(), self.kick.as_fd(), self.call.as_fd()];
        socket::send(&self.socket, &attach.encode(1), &fds).unwrap();
    }

    pub fn present(&self, flags: AttachFlags) -> Result<VolumeInfo, Message> {
        self.ask_attach(flags);
        match answer(&self.socket) {
            Message::Attached(info) => Ok(info),
            other => Err(other),
        }
    }

    pub fn submit(&mut self, slot: u32, op: Op, offset: u64, length: u32) -> u64 {
        let buffers = [Buffer { memory: 0, length, offset: u64::from(slot) * 4096 }];
        let buffers = if op.has_data() { &buffers[..] } else { &[] };
        let (flags, length) = (OpFlags::NONE, u64::from(length));
        let seq = self.submit.submit(slot, &Submission { op, flags, offset, length, buffers });
        if self.submit.kick_needed() {
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
        seq
    }

    pub fn reap(&mut self) -> Completion {
        until(|| self.reap.reap())
    }

    pub fn io(&mut self, op: Op, offset: u64, length: u32) -> Result<(), Errno> {
        let seq = self.submit(0, op, offset, length);
        let completion = self.reap();
        assert_eq!(completion.seq, seq);
        completion.result
    }

    pub fn state(&self) -> ServerState {
        let state = &self.region.header().server_state;
        ServerState::from_bits(state.load(std::sync::atomic::Ordering::Acquire))
    }
}
