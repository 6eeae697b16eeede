//! Messages that come late, early or twice. Each of these tests failed when it was written.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::control::{AttachFlags, Message};
use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, SessionId};
use nebd_abi::region::{Region, SharedMemory};
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, Submission};
use nebd_abi::{Op, OpFlags, socket};
use nebd_rpc::admin::admin_client::AdminClient;
use nebd_rpc::admin::{CreateVolumeRequest, DeleteVolumeRequest, GetVolumeRequest};
use rustix::event::EventfdFlags;
use rustix::fs::OFlags;

const LIMIT: Duration = Duration::from_secs(20);

struct Server {
    dir: tempfile::TempDir,
    child: Child,
}

impl Server {
    fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.toml");
        std::fs::write(&config, "shards = 1\n").unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_nebd-server"))
            .args(["run", "--config"])
            .arg(config)
            .arg("--socket")
            .arg(dir.path().join("nebd.sock"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { dir, child };
        until(|| socket::connect(&server.dir.path().join("nebd.sock")).is_ok().then_some(()));
        server
    }

    fn admin<T>(&self, call: impl AsyncFnOnce(AdminClient<tonic::transport::Channel>) -> T) -> T {
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

    fn create(&self, name: &str) {
        let request =
            CreateVolumeRequest { name: name.into(), size_bytes: 1 << 20, ..Default::default() };
        self.admin(async |mut client| client.create_volume(request).await).unwrap();
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until<T>(check: impl FnMut() -> Option<T>) -> T {
    within(LIMIT, check).expect("it did not happen")
}

fn within<T>(limit: Duration, mut check: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(found) = check() {
            return Some(found);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
}

fn send(socket: &OwnedFd, request: u64, message: &Message, fds: &[&OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    socket::send(socket, &message.encode(request), &fds).unwrap();
}

fn answer(socket: &OwnedFd, request: u64) -> Message {
    loop {
        let packet = socket::receive(socket).unwrap().expect("an answer");
        match Message::decode(&packet.bytes).unwrap() {
            (id, message) if id == request => return message,
            _ => {}
        }
    }
}

struct Client {
    region: Arc<Region>,
    kick: OwnedFd,
    call: OwnedFd,
    socket: OwnedFd,
    submit: ClientSubmit,
    reap: ClientReap,
}

impl Client {
    /// Greeted, not attached.
    fn new(server: &Server, volume: &str, id: u8) -> Client {
        let geometry =
            Geometry { queue_count: 1, queue_depth: 8, iovecs_per_slot: 4, arena_size: 1 << 16 };
        let region = Arc::new(
            Region::create(RegionParams {
                version: LayoutVersion::CURRENT,
                session: SessionId([id; 16]),
                geometry,
                volume: volume.parse().unwrap(),
                client_pid: std::process::id(),
                client_version: "raw".into(),
            })
            .unwrap(),
        );
        let eventfd = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let memory = region.queue(0).unwrap();
        let socket = socket::connect(&server.dir.path().join("nebd.sock")).unwrap();
        let version = "raw".into();
        let hello = Message::Hello { layout_min: 1, layout_max: 1, features: 0, pid: 1, version };
        send(&socket, 1, &hello, &[]);
        assert!(matches!(answer(&socket, 1), Message::Welcome { .. }));
        Client {
            kick: eventfd(),
            call: eventfd(),
            socket,
            submit: ClientSubmit::new(memory.clone()),
            reap: ClientReap::new(memory),
            region,
        }
    }

    fn ask_attach(&self) {
        let params = self.region.params();
        let attach = Message::Attach {
            session: params.session,
            flags: AttachFlags::EXCLUSIVE,
            queue_count: 1,
            incarnation: 0,
            volume: params.volume.clone(),
        };
        let region = self.region.memory().fd().try_clone_to_owned().unwrap();
        send(&self.socket, 2, &attach, &[&region, &self.kick, &self.call]);
    }

    fn attach(&self) -> Message {
        self.ask_attach();
        answer(&self.socket, 2)
    }

    fn submit(&mut self) -> u64 {
        let buffers = [Buffer { memory: 0, length: 4096, offset: 0 }];
        let (op, flags) = (Op::Read, OpFlags::NONE);
        let request = Submission { op, flags, offset: 0, length: 4096, buffers: &buffers };
        let seq = self.submit.submit(0, &request);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        seq
    }
}

fn set_nonblocking(fd: &OwnedFd, nonblocking: bool) {
    let flags = rustix::fs::fcntl_getfl(fd).unwrap() - OFlags::NONBLOCK;
    let wanted = if nonblocking { OFlags::NONBLOCK } else { OFlags::empty() };
    rustix::fs::fcntl_setfl(fd, flags | wanted).unwrap();
}

/// `O_NONBLOCK` belongs to the open file description, which the client shares.
#[test]
fn a_detach_right_behind_its_attach_leaves_no_session() {
    let server = Server::start();
    for round in 0..10 {
        let volume = format!("null:v{round}");
        server.create(&volume);
        let gone = Client::new(&server, &volume, 2 * round);
        gone.ask_attach();
        send(&gone.socket, 3, &Message::Detach, &[]);
        drop(gone.socket);
        // This process, the first client's too, lives on.
        let next = within(Duration::from_secs(5), || {
            let next = Client::new(&server, &volume, 2 * round + 1);
            matches!(next.attach(), Message::Attached(_)).then_some(())
        });
        assert!(next.is_some(), "round {round}: the session stays, and with it the volume");
    }
}

#[test]
fn a_memory_that_comes_after_the_end_of_its_session_is_not_kept() {
    let server = Server::start();
    server.create("null:a");
    let mut before = 0;
    for round in 0..12 {
        let client = Client::new(&server, "null:a", round + 1);
        until(|| matches!(client.attach(), Message::Attached(_)).then_some(()));
        send(&client.socket, 3, &Message::Detach, &[]);
        assert_eq!(answer(&client.socket, 3), Message::Done);
        for memory in 1..=8 {
            let shared = SharedMemory::create("late", 4096).unwrap();
            let fd = shared.fd().try_clone_to_owned().unwrap();
            send(&client.socket, 4, &Message::RegisterMemory { memory }, &[&fd]);
            answer(&client.socket, 4);
        }
        drop(client);
        if round == 1 {
            before = server.descriptors();
        }
    }
    let settled =
        within(Duration::from_secs(5), || (server.descriptors() <= before + 20).then_some(()));
    assert!(settled.is_some(), "{before} descriptors became {}", server.descriptors());
}

/// Invariant 9: a repeated operation answers as before, and does nothing.
#[test]
fn a_repeated_delete_leaves_a_newer_volume_alone() {
    let server = Server::start();
    let delete = || DeleteVolumeRequest { operation_id: "once".into(), name: "file:a".into() };
    server.create("file:a");
    server.admin(async |mut client| client.delete_volume(delete()).await).unwrap();
    server.create("file:a");
    // Its sender did not hear the first answer.
    server.admin(async |mut client| client.delete_volume(delete()).await).unwrap();
    let request = GetVolumeRequest { name: "file:a".into() };
    let found = server.admin(async |mut client| client.get_volume(request).await);
    assert!(found.is_ok(), "the newer volume was deleted: {found:?}");
}
