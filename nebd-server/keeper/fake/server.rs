//! The server: one thread, and one that watches the keeper.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
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

struct Server {
    client: OwnedFd,
    admin: OwnedFd,
    probe: OwnedFd,
    page: HostPage,
    store: Mutex<BTreeMap<String, OwnedFd>>,
    notifier: Arc<Notifier>,
    /// How the server before ended, and where this one came from.
    cause: DeathCause,
    generation: Generation,
    standby: bool,
    had_predecessor: bool,
    state_dir: PathBuf,
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
    let seen = page.generation();
    let generation = page.claim(seen).unwrap();
    page.announce_probes(1);
    let server = Arc::new(Server {
        client: inherited.client.unwrap(),
        admin: inherited.admin.unwrap(),
        probe: inherited.probe.unwrap(),
        cause: page.death_of(seen),
        page,
        generation,
        store: Mutex::new(inherited.store),
        notifier: notifier.clone(),
        standby,
        had_predecessor: inherited.predecessor.is_some(),
        state_dir,
    });
    let life = inherited.life.unwrap();
    let watched = server.clone();
    std::thread::spawn(move || {
        let (never, _held) = rustix::pipe::pipe().unwrap();
        Reregister::new(notifier, life).run(never.as_fd(), &*watched).unwrap();
    });
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
    fn serve(&self) -> ExitCode {
        loop {
            let mut fds = [
                PollFd::new(&self.admin, PollFlags::IN),
                PollFd::new(&self.client, PollFlags::IN),
                PollFd::new(&self.probe, PollFlags::IN),
            ];
            rustix::event::poll(&mut fds, None).unwrap();
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[2] {
                let _nothing = rustix::io::read(&self.probe, &mut [0_u8; 8]);
                self.page.pong(0);
            }
            if ready[1] {
                let _closed_at_once = rustix::net::accept_with(&self.client, SocketFlags::CLOEXEC);
            }
            if ready[0]
                && let Ok(connection) = rustix::net::accept_with(&self.admin, SocketFlags::CLOEXEC)
            {
                let mut stream = UnixStream::from(connection);
                let mut line = String::new();
                if BufReader::new(&stream).read_line(&mut line).is_ok() {
                    let reply = self.obey(line.trim());
                    let _gone = stream.write_all(reply.as_bytes());
                }
            }
        }
    }

    fn obey(&self, line: &str) -> String {
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
            ["stop"] => self.die(Signal::STOP),
            ["hang"] => loop {
                std::hint::spin_loop();
            },
            ["fds"] => list_fds(),
            _ => format!("what is {line}?"),
        }
    }

    fn info(&self) -> String {
        let mut text = format!(
            "pid={} generation={} cause={:?} standby={} predecessor={}",
            std::process::id(),
            self.generation.0,
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

    fn barrier(&self) -> String {
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
