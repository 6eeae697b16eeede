//! The server: one thread, and one that watches the keeper.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nebd_abi::Generation;
use nebd_abi::host::{DeathCause, HostPage};
use nebd_keeper::inherit::{Inherited, inherit};
use nebd_keeper::names;
use nebd_keeper::notify::{Holdings, Notifier, Reregister};
use nebd_keeper::standby::{StandbyChannel, StandbyMessage};
use rustix::event::{PollFd, PollFlags};
use rustix::net::SocketFlags;
use rustix::process::{Pid, Resource, Rlimit, Signal};

pub struct Server {
    pub client: OwnedFd,
    pub admin: OwnedFd,
    pub probe: OwnedFd,
    pub life: OwnedFd,
    pub page: HostPage,
    pub store: Mutex<BTreeMap<String, OwnedFd>>,
    pub notifier: Arc<Notifier>,
    /// How the server before ended, and where this one came from.
    pub cause: DeathCause,
    pub generation: AtomicU32,
    pub standby: bool,
    pub had_predecessor: bool,
    pub state_dir: PathBuf,
    pub child: Mutex<Option<Child>>,
    /// For the test alone; the admin socket may be another's.
    pub private: UnixListener,
    /// Serves nobody (any more, or yet).
    pub frozen: AtomicBool,
}

/// Whoever served, or was a candidate, must be dead by the time a server of the keeper's claims.
fn note_rivals(state_dir: &Path) {
    for entry in std::fs::read_dir(state_dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension() != Some("sock".as_ref()) || path.ends_with("notify.sock") {
            continue;
        }
        let pid = path.file_stem().unwrap().to_str().unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.rsplit(')').next().is_some_and(|s| !s.is_empty() && !s.starts_with(" Z")) {
            write_whole(state_dir, "rivals", &format!("{} met {pid}", std::process::id()));
        }
    }
}

pub fn listen_privately(state_dir: &Path) -> UnixListener {
    UnixListener::bind(state_dir.join(format!("{}.sock", std::process::id()))).unwrap()
}

impl Holdings for Server {
    fn each(&self, send: &mut dyn FnMut(&str, BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
        let store = self.store.lock().unwrap();
        send(names::CLIENT, self.client.as_fd())?;
        send(names::ADMIN, self.admin.as_fd())?;
        send(names::HOST, self.page.fd())?;
        send(names::PROBE, self.probe.as_fd())?;
        store.iter().try_for_each(|(name, fd)| send(name, fd.as_fd()))
    }
}

pub fn run(state_dir: PathBuf, standby: bool) -> ExitCode {
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, no_core).unwrap();
    let mut inherited = inherit().unwrap();
    let notifier = Arc::new(Notifier::from_env().unwrap());
    match std::fs::read_to_string(state_dir.join("fail")).unwrap_or_default().trim() {
        "exit" => return ExitCode::from(3),
        "hang" => {
            write_whole(&state_dir, "hanging", &std::process::id().to_string());
            std::thread::sleep(Duration::from_secs(600));
        }
        "standby" if standby => return ExitCode::from(4),
        _ => {}
    }
    if standby && !stand_by(&mut inherited, &state_dir) {
        return ExitCode::SUCCESS;
    }
    let page = HostPage::open(inherited.host.take().unwrap()).unwrap();
    if let Some(predecessor) = &inherited.predecessor {
        let mut fds = [PollFd::new(predecessor, PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
    }
    note_rivals(&state_dir);
    let seen = page.generation();
    let generation = page.claim(seen).unwrap();
    page.announce_probes(1);
    let server = Arc::new(Server {
        client: inherited.client.unwrap(),
        admin: inherited.admin.unwrap(),
        probe: inherited.probe.unwrap(),
        life: inherited.life.unwrap(),
        cause: page.death_of(seen),
        page,
        generation: generation.0.into(),
        store: Mutex::new(inherited.store),
        notifier,
        standby,
        had_predecessor: inherited.predecessor.is_some(),
        private: listen_privately(&state_dir),
        state_dir,
        child: Mutex::new(None),
        frozen: false.into(),
    });
    server.watch_keeper();
    server.notifier.ready();
    server.notifier.status("serving");
    server.serve()
}

fn write_whole(state_dir: &Path, name: &str, contents: &str) {
    let draft = state_dir.join(format!("{name}.{}", std::process::id()));
    std::fs::write(&draft, contents).unwrap();
    std::fs::rename(draft, state_dir.join(name)).unwrap();
}

/// False if the keeper is gone.
fn stand_by(inherited: &mut Inherited, state_dir: &Path) -> bool {
    let channel = StandbyChannel::new(inherited.standby.take().unwrap());
    loop {
        match channel.recv().unwrap() {
            None => return false,
            Some(StandbyMessage::Store(name, fd)) => drop(inherited.store.insert(name, fd)),
            Some(StandbyMessage::Remove(name)) => drop(inherited.store.remove(&name)),
            Some(StandbyMessage::Sync) => {
                let synced = format!("{} {}", std::process::id(), inherited.store.len());
                write_whole(state_dir, "synced", &synced);
            }
            Some(StandbyMessage::Activate) => {
                if state_dir.join("fail-activation").exists() {
                    std::process::exit(5);
                }
                return true;
            }
        }
    }
}

impl Server {
    pub fn watch_keeper(self: &Arc<Server>) {
        let watched = self.clone();
        let watch = Reregister::new(self.notifier.clone(), self.life.try_clone().unwrap());
        std::thread::spawn(move || {
            let (never, _held) = rustix::pipe::pipe().unwrap();
            watch.run(never.as_fd(), &*watched).unwrap();
        });
    }

    pub fn serve(self: &Arc<Server>) -> ExitCode {
        loop {
            let mut fds = vec![PollFd::new(&self.private, PollFlags::IN)];
            if !self.frozen.load(SeqCst) {
                fds.push(PollFd::new(&self.admin, PollFlags::IN));
                fds.push(PollFd::new(&self.client, PollFlags::IN));
                fds.push(PollFd::new(&self.probe, PollFlags::IN));
            }
            rustix::event::poll(&mut fds, None).unwrap();
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            if ready(3) {
                let _nothing = rustix::io::read(&self.probe, &mut [0_u8; 8]);
                self.page.pong(0);
            }
            if ready(2) {
                let _closed_at_once = rustix::net::accept_with(&self.client, SocketFlags::CLOEXEC);
            }
            if ready(0) {
                self.answer(self.private.accept().unwrap().0);
            }
            if ready(1)
                && let Ok(connection) = rustix::net::accept_with(&self.admin, SocketFlags::CLOEXEC)
            {
                self.answer(UnixStream::from(connection));
            }
        }
    }

    fn answer(self: &Arc<Server>, mut stream: UnixStream) {
        let mut line = String::new();
        if BufReader::new(&stream).read_line(&mut line).is_ok() {
            let reply = self.obey(line.trim());
            let _gone = stream.write_all(reply.as_bytes());
        }
    }

    fn obey(self: &Arc<Server>, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["info"] => self.info(),
            ["store", name, contents] => {
                self.store(name, contents);
                self.barrier()
            }
            ["remove", name] => {
                self.store.lock().unwrap().remove(name);
                self.notifier.remove(name).unwrap();
                self.barrier()
            }
            ["store_many", prefix, count] => {
                for index in 0..count.parse().unwrap() {
                    self.store(&format!("{prefix}{index}"), &format!("{index}"));
                }
                self.barrier()
            }
            // No barrier: the last datagrams are in the socket when it dies.
            ["store_and_die", name, count] => {
                for index in 0..count.parse().unwrap() {
                    self.store(name, &format!("{index}"));
                }
                self.die(Signal::KILL)
            }
            ["die", "exit"] => std::process::exit(7),
            ["die", "segv"] => {
                // The first one finds the handler of Rust's runtime, which steps aside.
                self.die(Signal::SEGV);
                self.die(Signal::SEGV)
            }
            ["die", "kill"] => self.die(Signal::KILL),
            ["die", "abort"] => std::process::abort(),
            // To a process that outlives this one; it serves nobody, but dies like a server.
            ["hand_over"] => {
                let successor = std::process::Command::new("sleep").arg("600").spawn().unwrap();
                self.notifier.main_pid(successor.id());
                self.barrier();
                std::process::exit(0)
            }
            ["candidate"] => self.start_candidate(&std::env::current_exe().unwrap()),
            ["candidate", program] => self.start_candidate(Path::new(program)),
            ["withdraw"] => {
                let mut child = self.child.lock().unwrap().take().unwrap();
                child.kill().unwrap();
                child.wait().unwrap();
                self.notifier.candidate(0);
                self.barrier()
            }
            ["binary", path] => {
                self.notifier.binary(Path::new(path));
                self.barrier()
            }
            ["freeze"] => {
                self.frozen.store(true, SeqCst);
                "ok".to_owned()
            }
            ["claim"] => match self.page.claim(Generation(self.generation.load(SeqCst))) {
                Some(generation) => {
                    self.generation.store(generation.0, SeqCst);
                    "ok".to_owned()
                }
                None => "lost".to_owned(),
            },
            ["main_pid"] => {
                self.notifier.main_pid(std::process::id());
                self.barrier()
            }
            ["main_pid_and_die"] => {
                self.notifier.main_pid(std::process::id());
                self.die(Signal::KILL)
            }
            ["serve"] => {
                self.page.announce_probes(1);
                self.watch_keeper();
                self.frozen.store(false, SeqCst);
                "ok".to_owned()
            }
            ["stop"] => self.die(Signal::STOP),
            ["work"] => {
                if self.page.take_up_work() {
                    self.notifier.work();
                }
                "ok".to_owned()
            }
            ["hang"] => loop {
                std::hint::spin_loop();
            },
            ["fds"] => list_fds(),
            _ => format!("what is {line}?"),
        }
    }

    /// A child that is given all that this one has, once the keeper knows of it.
    fn start_candidate(&self, program: &Path) -> String {
        let kind = rustix::net::SocketType::SEQPACKET;
        let family = rustix::net::AddressFamily::UNIX;
        let (ours, theirs) =
            rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        let child = std::process::Command::new(program)
            .arg("server")
            .arg(&self.state_dir)
            .arg("--candidate")
            .stdin(theirs)
            .spawn()
            .unwrap();
        let pid = child.id();
        *self.child.lock().unwrap() = Some(child);
        self.notifier.candidate(pid);
        let answered = self.barrier();
        if answered != "ok" {
            return answered;
        }
        let held = [&self.client, &self.admin, &self.probe, &self.life].map(AsFd::as_fd);
        let fds: Vec<_> = held.into_iter().chain([self.page.fd()]).collect();
        let mut sent = nebd_abi::socket::send(&ours, b"held", &fds);
        for (name, fd) in &*self.store.lock().unwrap() {
            sent =
                sent.and_then(|()| nebd_abi::socket::send(&ours, name.as_bytes(), &[fd.as_fd()]));
        }
        if let Err(error) = sent {
            eprintln!("the candidate has gone: {error}");
        }
        pid.to_string()
    }

    fn info(&self) -> String {
        let mut text = format!(
            "pid={} generation={} cause={:?} standby={} predecessor={}",
            std::process::id(),
            self.generation.load(SeqCst),
            self.cause,
            self.standby,
            self.had_predecessor,
        );
        for (name, fd) in &*self.store.lock().unwrap() {
            let mut file = File::from(fd.try_clone().unwrap());
            let mut contents = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut contents).unwrap();
            text.push_str(&format!(" {name}:{contents}"));
        }
        text.push_str(&format!(" directory={}", self.state_dir.is_dir()));
        text
    }

    pub fn barrier(&self) -> String {
        match self.notifier.barrier(Duration::from_secs(20)) {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("barrier: {error}"),
        }
    }

    fn store(&self, name: &str, contents: &str) {
        let fd = rustix::fs::memfd_create("fake", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(contents.as_bytes()).unwrap();
        let fd = OwnedFd::from(file);
        // First into the map, so that a registration with another keeper does not miss it.
        let mut store = self.store.lock().unwrap();
        store.insert(name.to_owned(), fd);
        if let Err(error) = self.notifier.store(name, store[name].as_fd()) {
            eprintln!("no keeper at the moment: {error}");
        }
    }

    fn die(&self, signal: Signal) -> String {
        rustix::process::kill_process(Pid::from_raw(std::process::id() as i32).unwrap(), signal)
            .unwrap();
        // Stopped and continued.
        "ok".to_owned()
    }
}

fn list_fds() -> String {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    let link = |e: io::Result<std::fs::DirEntry>| std::fs::read_link(e.unwrap().path()).ok();
    let targets: Vec<String> =
        entries.filter_map(link).map(|t| t.to_string_lossy().replace(' ', "_")).collect();
    targets.join(" ")
}
