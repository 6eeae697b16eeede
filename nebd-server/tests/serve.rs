//! The server as a process, driven by a client that is nothing but the shared bytes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::control::{AttachFlags, Event, Message, VolumeInfo};
use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams, ServerState, SessionId};
use nebd_abi::region::Region;
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, Completion, Submission};
use nebd_abi::{Errno, Op, OpFlags, socket};
use nebd_rpc::admin::admin_client::AdminClient;
use nebd_rpc::admin::{CreateVolumeRequest, GetStatusRequest, Status};
use rustix::event::EventfdFlags;

const LIMIT: Duration = Duration::from_secs(20);

struct Server {
    dir: tempfile::TempDir,
    child: Child,
}

impl Server {
    fn start(command: &str) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_nebd-server"))
            .arg(command)
            .arg("--socket")
            .arg(dir.path().join("nebd.sock"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { dir, child };
        until(|| socket::connect(&server.socket()).is_ok().then_some(()));
        server
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nebd.sock")
    }

    fn server_pid(&self) -> i32 {
        let path = self.dir.path().join("state/server.pid");
        until(|| std::fs::read_to_string(&path).ok()?.lines().next()?.parse().ok())
    }

    fn kill_server(&self) {
        let pid = rustix::process::Pid::from_raw(self.server_pid()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
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

    fn status(&self) -> Status {
        self.admin(async |mut client| client.get_status(GetStatusRequest {}).await)
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

fn until<T>(mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Client {
    region: Arc<Region>,
    kick: OwnedFd,
    call: OwnedFd,
    socket: OwnedFd,
    submit: ClientSubmit,
    reap: ClientReap,
    info: VolumeInfo,
}

fn ask(socket: &OwnedFd, message: &Message, fds: &[&OwnedFd]) -> Message {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    socket::send(socket, &message.encode(1), &fds).unwrap();
    loop {
        let packet = socket::receive(socket).unwrap().expect("an answer");
        let (request, message) = Message::decode(&packet.bytes).unwrap();
        if request == 1 {
            return message;
        }
    }
}

fn hello(path: &Path) -> OwnedFd {
    let socket = socket::connect(path).unwrap();
    let hello =
        Message::Hello { layout_min: 1, layout_max: 1, features: 0, pid: 1, version: "raw".into() };
    assert!(matches!(ask(&socket, &hello, &[]), Message::Welcome { .. }));
    socket
}

impl Client {
    fn attach(
        server: &Server,
        volume: &str,
        id: u8,
        flags: AttachFlags,
    ) -> Result<Client, Message> {
        let geometry =
            Geometry { queue_count: 1, queue_depth: 8, iovecs_per_slot: 4, arena_size: 1 << 16 };
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
        let mut client = Client {
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
        };
        client.info = client.present(flags)?;
        Ok(client)
    }

    fn present(&self, flags: AttachFlags) -> Result<VolumeInfo, Message> {
        let params = self.region.params();
        let attach = Message::Attach {
            session: params.session,
            flags,
            queue_count: 1,
            incarnation: self.info.incarnation,
            volume: params.volume.clone(),
        };
        let region = self.region.memory().fd().try_clone_to_owned().unwrap();
        match ask(&self.socket, &attach, &[&region, &self.kick, &self.call]) {
            Message::Attached(info) => Ok(info),
            other => Err(other),
        }
    }

    fn submit(&mut self, slot: u32, op: Op, offset: u64, length: u32) -> u64 {
        let buffers = [Buffer { memory: 0, length, offset: u64::from(slot) * 4096 }];
        let buffers = if op.has_data() { &buffers[..] } else { &[] };
        let (flags, length) = (OpFlags::NONE, u64::from(length));
        let seq = self.submit.submit(slot, &Submission { op, flags, offset, length, buffers });
        if self.submit.kick_needed() {
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
        seq
    }

    fn reap(&mut self) -> Completion {
        until(|| self.reap.reap())
    }

    fn io(&mut self, op: Op, offset: u64, length: u32) -> Result<(), Errno> {
        let seq = self.submit(0, op, offset, length);
        let completion = self.reap();
        assert_eq!(completion.seq, seq);
        completion.result
    }

    fn state(&self) -> ServerState {
        let state = &self.region.header().server_state;
        ServerState::from_bits(state.load(std::sync::atomic::Ordering::Acquire))
    }
}

#[test]
fn requests_are_served_and_rules_are_kept() {
    let server = Server::start("run");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    assert_eq!((client.info.size, client.info.block_size), (1 << 20, 4096));
    for op in Op::ALL {
        assert_eq!(client.io(op, 4096, 4096), Ok(()), "{op:?}");
    }
    assert_eq!(client.io(Op::Read, 1 << 20, 4096), Err(Errno::INVAL));
    assert_eq!(client.io(Op::Write, 1 << 20, 4096), Err(Errno::NOSPC));
    assert_eq!(client.io(Op::Write, 512, 4096), Err(Errno::INVAL));
    assert_eq!(client.io(Op::Write, u64::MAX - 4095, 4096), Err(Errno::NOSPC));
    let beyond = [Buffer { memory: 0, length: 4096, offset: 1 << 16 }];
    let foreign = [Buffer { memory: 3, length: 4096, offset: 0 }];
    for buffers in [&beyond[..], &foreign[..]] {
        let (op, flags) = (Op::Write, OpFlags::FUA);
        client.submit.submit(0, &Submission { op, flags, offset: 0, length: 4096, buffers });
        rustix::io::write(&client.kick, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(client.reap().result, Err(Errno(14)));
    }
    let taken = Client::attach(&server, "null:a", 2, AttachFlags::default());
    assert!(matches!(taken, Err(Message::Failed { errno: Errno(16), retry: false, .. })));
    assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
    let mut reader = Client::attach(&server, "null:a", 3, AttachFlags::READ_ONLY).unwrap();
    assert_eq!(reader.io(Op::Write, 0, 4096), Err(Errno::ROFS));
    assert_eq!(reader.io(Op::Read, 0, 4096), Ok(()));
}

#[test]
fn nonsense_costs_its_own_session() {
    let server = Server::start("run");
    server.create("null:a");
    server.create("null:b");
    let mut honest = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    let hostile = Client::attach(&server, "null:b", 2, AttachFlags::EXCLUSIVE).unwrap();
    let memory = hostile.region.queue(0).unwrap();
    memory.header().sq_tail.word.store(12345, std::sync::atomic::Ordering::Release);
    rustix::io::write(&hostile.kick, &1u64.to_ne_bytes()).unwrap();
    until(|| (hostile.state() == ServerState::Detached).then_some(()));
    let packet = socket::receive(&hostile.socket).unwrap().unwrap();
    let (_, message) = Message::decode(&packet.bytes).unwrap();
    assert_eq!(message, Message::Event(Event::Detached(Errno::INVAL)));
    assert_eq!(honest.io(Op::Write, 0, 4096), Ok(()));
    // Its volume is free again.
    until(|| Client::attach(&server, "null:b", 3, AttachFlags::EXCLUSIVE).ok());
    assert_eq!(server.status().sessions.len(), 2);
}

#[test]
fn what_follows_an_attach_finds_the_session() {
    let server = Server::start("run");
    server.create("null:a");
    for id in 0..200 {
        let mut client = Client::attach(&server, "null:a", id, AttachFlags::EXCLUSIVE).unwrap();
        let memory = nebd_abi::region::SharedMemory::create("guest", 4096).unwrap();
        let fd = memory.fd().try_clone_to_owned().unwrap();
        let register = Message::RegisterMemory { memory: 1 };
        assert_eq!(ask(&client.socket, &register, &[&fd]), Message::Done);
        let buffers = [Buffer { memory: 1, length: 4096, offset: 0 }];
        let (op, flags) = (Op::Write, OpFlags::NONE);
        client
            .submit
            .submit(0, &Submission { op, flags, offset: 0, length: 4096, buffers: &buffers });
        rustix::io::write(&client.kick, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(client.reap().result, Ok(()), "attach {id}");
        assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
    }
}

#[test]
fn a_doorbell_that_could_block_is_refused() {
    let server = Server::start("run");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::default()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    client.socket = hello(&server.socket());
    (client.kick, client.call) = (reader, writer);
    let refused = client.present(AttachFlags::REATTACH);
    assert!(matches!(refused, Err(Message::Failed { errno: Errno::INVAL, .. })));
}

#[test]
fn a_killed_server_is_replaced_under_a_client_that_only_looks_at_its_ring() {
    let server = Server::start("keeper");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    for round in 0..10 {
        assert_eq!(client.io(Op::Write, 0, 4096), Ok(()));
        let before = server.server_pid();
        server.kill_server();
        // Submitted to nobody: the successor finds it in the region it has from the keeper.
        assert_eq!(client.io(Op::Write, 4096, 4096), Ok(()), "round {round}");
        until(|| (server.server_pid() != before).then_some(()));
        client.socket = hello(&server.socket());
        let info = until(|| client.present(AttachFlags::REATTACH).ok());
        assert_eq!(info.epoch.minor, round + 2);
    }
    assert_eq!(server.status().sessions.len(), 1);
}

#[test]
fn an_idle_server_does_not_wake_up() {
    let server = Server::start("keeper");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    assert_eq!(client.io(Op::Write, 0, 4096), Ok(()));
    let pid = server.server_pid();
    // Name and voluntary context switches of each thread.
    let switches = || -> Vec<(String, String)> {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let statuses =
            tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")));
        let word = |status: &str, key| {
            let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
            line.split_whitespace().nth(1).unwrap_or_default().to_owned()
        };
        statuses
            .map(|status| status.unwrap_or_default())
            .map(|status| (word(&status, "Name:"), word(&status, "voluntary")))
            .collect()
    };
    // Threads that had work go to sleep, or end, soon after; from then on nothing moves.
    let mut last = switches();
    until(|| {
        std::thread::sleep(Duration::from_millis(1500));
        let now = switches();
        let settled = now == last;
        last = now;
        settled.then_some(())
    });
}
