//! A part server of a page or two, that dies when told to: what the client is tested against.
//!
//! One thread serves the socket and every ring. Dropping a [`Server`] is its death: the thread ends
//! where it stands, connections close, nothing is answered any more. The [`Host`] outlives it, as a
//! keeper would: listening socket, contents of the volume, and the regions of sessions.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nebd_abi::control::{AttachFlags, Event, Message, VolumeInfo};
use nebd_abi::layout::SessionId;
use nebd_abi::region::{Region, SharedMemory};
use nebd_abi::ring::{Buffer, Request, ServerQueue};
use nebd_abi::{Epoch, Errno, Generation, Op, socket};
use nebd_client::Options;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{SocketAddrUnix, SocketFlags};

pub const BLOCK: usize = 4096;
pub const SIZE: u64 = 64 << 20;

/// What happened, in words that tests look for.
pub type Log = Arc<Mutex<Vec<String>>>;

/// How requests are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    /// Carried out and answered.
    Serve,
    /// Taken from the ring, and nothing else.
    Hold,
    /// Carried out, not answered.
    Swallow,
    /// Carried out and answered, but nobody is called.
    Mute,
}

struct Stored {
    region: Arc<Region>,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    memories: HashMap<u32, Arc<SharedMemory>>,
}

/// What outlives a server.
pub struct Host {
    _folder: tempfile::TempDir,
    pub path: PathBuf,
    listener: OwnedFd,
    pub storage: Mutex<Vec<u8>>,
    generation: AtomicU32,
    pub mode: AtomicU32,
    /// Requests fail with this errno, unless it is zero.
    pub errno: AtomicU32,
    /// Attaches are refused with this: errno, retry.
    pub refusal: Mutex<Option<(Errno, bool)>>,
    /// Sessions are kept for the next server, which resumes them before anybody attaches.
    pub keeps_sessions: AtomicBool,
    /// Of a thousand reads one returns a wrong byte.
    pub lies: AtomicBool,
    store: Mutex<HashMap<SessionId, Stored>>,
    pub size: AtomicU64,
    pub transfer_max: AtomicU64,
    pub log: Log,
    /// Requests taken from rings, by all servers.
    pub taken: AtomicU64,
    /// Flushes, and requests with FUA.
    pub flushes: AtomicU64,
    pub fuas: AtomicU64,
    resizes: Mutex<HashMap<[u8; 16], u64>>,
    /// The next resize is carried out, and the server dies before it answers.
    pub dies_in_resize: AtomicBool,
    /// The next attach is carried out, and the server dies before it answers.
    pub dies_in_attach: AtomicBool,
    /// One resize is refused for now, the next are not answered.
    pub stalls_in_resize: AtomicBool,
    /// Every Hello is refused for good.
    pub is_choosy: AtomicBool,
    /// So is every memory.
    pub refuses_memory: AtomicBool,
    pub block_size: AtomicU32,
    pub layout: AtomicU32,
    /// Flushes stay in the server.
    pub holds_flushes: AtomicBool,
}

impl Host {
    pub fn new() -> Arc<Host> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nebd.sock");
        let listener = socket::seqpacket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 128).unwrap();
        Arc::new(Host {
            _folder: folder,
            path,
            listener,
            storage: Mutex::new(vec![0; SIZE as usize]),
            generation: AtomicU32::new(0),
            mode: AtomicU32::new(Mode::Serve as u32),
            errno: AtomicU32::new(0),
            refusal: Mutex::new(None),
            keeps_sessions: AtomicBool::new(false),
            lies: AtomicBool::new(false),
            store: Mutex::default(),
            size: AtomicU64::new(SIZE),
            transfer_max: AtomicU64::new(1 << 20),
            log: Log::default(),
            taken: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            fuas: AtomicU64::new(0),
            resizes: Mutex::default(),
            dies_in_resize: AtomicBool::new(false),
            dies_in_attach: AtomicBool::new(false),
            stalls_in_resize: AtomicBool::new(false),
            is_choosy: AtomicBool::new(false),
            refuses_memory: AtomicBool::new(false),
            block_size: AtomicU32::new(BLOCK as u32),
            layout: AtomicU32::new(1),
            holds_flushes: AtomicBool::new(false),
        })
    }

    pub fn options(&self) -> Options {
        Options::new().socket(&self.path)
    }

    pub fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u32, SeqCst);
    }

    /// A server of the next generation.
    pub fn start(self: &Arc<Self>) -> Server {
        let generation = Generation(self.generation.fetch_add(1, SeqCst) + 1);
        let stop = eventfd();
        let (host, stopped) = (self.clone(), stop.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            let store = std::mem::take(&mut *host.store.lock().unwrap());
            let mut body = Body { host, generation, peers: Vec::new(), sessions: HashMap::new() };
            for (id, stored) in store {
                body.note(format!("resume {id}"));
                body.adopt(id, stored);
            }
            body.run(&stopped);
            if body.host.keeps_sessions.load(SeqCst) {
                let kept = body.sessions.drain().map(|(id, session)| (id, session.stored));
                body.host.store.lock().unwrap().extend(kept);
            }
        });
        Server { stop, thread: Some(thread), host: self.clone() }
    }

    /// Fills the call doorbells of stored sessions to the brim, as a server might before it dies.
    pub fn flood(&self) {
        for call in self.store.lock().unwrap().values().flat_map(|stored| &stored.calls) {
            let _ = rustix::io::read(call, &mut [0; 8]);
            ring(call, u64::MAX - 1);
        }
    }

    pub fn logged(&self, what: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.contains(what)).count()
    }
}

/// A running server; dropping it is its death.
pub struct Server {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    host: Arc<Host>,
}

impl Server {
    /// Waits until the server has died by itself.
    pub fn wait_for_death(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }

    /// Makes the server tell all its clients.
    pub fn tell(&self, event: &str) {
        self.host.log.lock().unwrap().push(format!("todo {event}"));
        ring(&self.stop, 1);
        eventually(|| self.host.logged("todo") == 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            ring(&self.stop, 1 << 32);
            thread.join().unwrap();
        }
    }
}

/// Waits until something is so; a test that waits for ever is stopped after a minute.
#[track_caller]
pub fn eventually(mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never became so");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn ring(fd: &OwnedFd, value: u64) {
    rustix::io::write(fd, &value.to_ne_bytes()).unwrap();
}

struct Peer {
    socket: OwnedFd,
    memories: HashMap<u32, Arc<SharedMemory>>,
    session: Option<SessionId>,
}

struct Session {
    stored: Stored,
    queues: Vec<(ServerQueue, Vec<Request>)>,
}

struct Body {
    host: Arc<Host>,
    generation: Generation,
    peers: Vec<Peer>,
    sessions: HashMap<SessionId, Session>,
}

impl Body {
    fn note(&self, line: impl Into<String>) {
        self.host.log.lock().unwrap().push(line.into());
    }

    fn run(&mut self, stop: &OwnedFd) {
        loop {
            while self.serve() {}
            let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
            fds.push(PollFd::new(&self.host.listener, PollFlags::IN));
            fds.extend(self.peers.iter().map(|peer| PollFd::new(&peer.socket, PollFlags::IN)));
            let sessions = self.sessions.values();
            let kicks = sessions.flat_map(|session| &session.stored.kicks);
            fds.extend(kicks.map(|kick| PollFd::new(kick, PollFlags::IN)));
            // Modes change without a word, hence the short sleep.
            let timeout = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
            let mut value = [0; 8];
            if rustix::io::read(stop, &mut value).is_ok() {
                if u64::from_ne_bytes(value) >= 1 << 32 {
                    return;
                }
                self.tell();
            }
            for session in self.sessions.values_mut() {
                for (kick, (queue, _)) in session.stored.kicks.iter().zip(&session.queues) {
                    let _ = rustix::io::read(kick, &mut [0; 8]);
                    queue.wake();
                }
            }
            while let Ok(socket) =
                rustix::net::accept_with(&self.host.listener, SocketFlags::CLOEXEC)
            {
                rustix::io::ioctl_fionbio(&socket, true).unwrap();
                self.peers.push(Peer { socket, memories: HashMap::new(), session: None });
            }
            if !self.listen() {
                return;
            }
        }
    }

    fn tell(&mut self) {
        let mut log = self.host.log.lock().unwrap();
        let todo: Vec<String> = log.extract_if(.., |line| line.starts_with("todo")).collect();
        drop(log);
        for line in todo {
            let event = match line.trim_start_matches("todo ") {
                "park" => Event::Parked,
                "unpark" => Event::Unparked,
                "detach" => Event::Detached(Errno::INVAL),
                size => Event::Resized(size.parse().unwrap()),
            };
            for peer in &self.peers {
                let _ = socket::send(&peer.socket, &Message::Event(event).encode(0), &[]);
            }
        }
    }

    /// Reads every message; false if the server is to die.
    fn listen(&mut self) -> bool {
        for mut peer in std::mem::take(&mut self.peers) {
            let keep = loop {
                match socket::receive(&peer.socket) {
                    Ok(Some(packet)) => {
                        let (request, message) = Message::decode(&packet.bytes).unwrap();
                        if matches!(message, Message::Resize { .. })
                            && self.host.stalls_in_resize.load(SeqCst)
                            && self.host.logged("resize") > 0
                        {
                            self.note("resize");
                            continue;
                        }
                        let Some(answer) = self.answer(&mut peer, message, packet.fds) else {
                            return false;
                        };
                        let _ = socket::send(&peer.socket, &answer.encode(request), &[]);
                    }
                    Ok(None) => break false,
                    Err(error) => break error.kind() == std::io::ErrorKind::WouldBlock,
                }
            };
            if keep {
                self.peers.push(peer);
            }
        }
        true
    }

    fn info(&self) -> VolumeInfo {
        VolumeInfo {
            size: self.host.size.load(SeqCst),
            block_size: self.host.block_size.load(SeqCst),
            read_only: false,
            can_discard: true,
            can_write_zeroes: true,
            epoch: Epoch::new(1, self.generation),
            transfer_bytes_max: self.host.transfer_max.load(SeqCst),
            incarnation: 77,
        }
    }

    /// `None` is death.
    fn answer(&mut self, peer: &mut Peer, message: Message, fds: Vec<OwnedFd>) -> Option<Message> {
        let failed = |errno| Message::Failed { errno, retry: false, text: "refused".into() };
        Some(match message {
            Message::Hello { .. } => {
                self.note("hello");
                if self.host.is_choosy.load(SeqCst) {
                    return Some(failed(Errno(93)));
                }
                let (generation, version) = (self.generation, "test".to_owned());
                let layout = self.host.layout.load(SeqCst);
                Message::Welcome { layout, generation, features: 0, pid: 1, version }
            }
            Message::Ping => {
                self.note("ping");
                Message::Done
            }
            Message::RegisterMemory { memory } => {
                let fd = fds.into_iter().next().unwrap();
                let mapped = Arc::new(SharedMemory::map(fd, u64::MAX).unwrap());
                self.note(format!("register {memory}"));
                if self.host.refuses_memory.load(SeqCst) {
                    return Some(failed(Errno::INVAL));
                }
                peer.memories.insert(memory, mapped);
                if let Some(session) = peer.session.and_then(|id| self.sessions.get_mut(&id)) {
                    session.stored.memories = peer.memories.clone();
                }
                Message::Done
            }
            Message::UnregisterMemory { memory } => {
                self.note(format!("unregister {memory}"));
                peer.memories.remove(&memory);
                Message::Done
            }
            Message::Attach { session, flags, queue_count, incarnation, volume } => {
                self.note(format!("attach {volume} {} {incarnation}", flags.0));
                if let Some((errno, retry)) = *self.host.refusal.lock().unwrap() {
                    return Some(Message::Failed { errno, retry, text: "refused".into() });
                }
                peer.session = Some(session);
                let is_again = flags.contains(AttachFlags::REATTACH);
                assert_eq!(incarnation, if is_again { 77 } else { 0 });
                if let Some(known) = self.sessions.get_mut(&session) {
                    known.stored.memories = peer.memories.clone();
                } else {
                    let mut fds = fds.into_iter();
                    let region = Arc::new(Region::open(fds.next().unwrap()).unwrap());
                    let kicks: Vec<_> = fds.by_ref().take(queue_count as usize).collect();
                    let (calls, memories) = (fds.collect(), peer.memories.clone());
                    self.adopt(session, Stored { region, kicks, calls, memories });
                }
                if self.host.dies_in_attach.swap(false, SeqCst) {
                    return None;
                }
                Message::Attached(self.info())
            }
            Message::Resize { operation, size } => {
                self.note("resize");
                if self.host.stalls_in_resize.load(SeqCst) {
                    return Some(Message::Failed {
                        errno: Errno(11),
                        retry: true,
                        text: "not now".into(),
                    });
                }
                let mut done = self.host.resizes.lock().unwrap();
                if done.insert(operation, size).is_none() {
                    self.note("resized");
                    self.host.size.store(size, SeqCst);
                    if self.host.dies_in_resize.swap(false, SeqCst) {
                        return None;
                    }
                }
                Message::Done
            }
            Message::Info => Message::Attached(self.info()),
            Message::Detach => {
                self.note("detach");
                if let Some(session) = peer.session.take() {
                    self.sessions.remove(&session);
                }
                Message::Done
            }
            _ => failed(Errno::NOTSUP),
        })
    }

    fn adopt(&mut self, id: SessionId, stored: Stored) {
        let epoch = Epoch::new(1, self.generation);
        let queues = (0..stored.region.geometry().queue_count)
            .map(|index| ServerQueue::adopt(stored.region.queue(index).unwrap(), epoch))
            .collect();
        self.sessions.insert(id, Session { stored, queues });
    }

    /// One round over all rings; whether there was anything to do.
    fn serve(&mut self) -> bool {
        let host = self.host.clone();
        let mode = host.mode.load(SeqCst);
        let mut is_busy = false;
        for session in self.sessions.values_mut() {
            for (index, (queue, waiting)) in session.queues.iter_mut().enumerate() {
                while let Some(request) = queue.pop().unwrap() {
                    host.taken.fetch_add(1, SeqCst);
                    waiting.push(request);
                }
                let mut count = 0;
                if mode != Mode::Hold as u32 {
                    let is_free = |request: &mut Request| {
                        request.op != Ok(Op::Flush) || !host.holds_flushes.load(SeqCst)
                    };
                    for request in waiting.extract_if(.., is_free) {
                        let result = carry_out(&host, &session.stored, &request);
                        if mode != Mode::Swallow as u32 {
                            queue.publish(request.slot, request.seq, result);
                        }
                        count += 1;
                    }
                }
                if count > 0 && mode != Mode::Mute as u32 && queue.call_needed() {
                    // It may be full; see `flood`.
                    let _ = rustix::io::write(&session.stored.calls[index], &1u64.to_ne_bytes());
                }
                is_busy |= count > 0 || !queue.sleep();
            }
        }
        is_busy
    }
}

fn carry_out(host: &Host, stored: &Stored, request: &Request) -> Result<(), Errno> {
    match host.errno.load(SeqCst) {
        0 => {}
        errno => return Err(Errno(errno as i32)),
    }
    let mut storage = host.storage.lock().unwrap();
    let (start, length) = (request.offset as usize, request.length as usize);
    let op = request.op.unwrap();
    if request.flags.unwrap().contains(nebd_abi::OpFlags::FUA) {
        host.fuas.fetch_add(1, SeqCst);
    }
    if op == Op::Flush {
        host.flushes.fetch_add(1, SeqCst);
        return Ok(());
    }
    let range = storage.get_mut(start..start + length).ok_or(Errno::NOSPC)?;
    if matches!(op, Op::Discard | Op::WriteZeroes) {
        range.fill(0);
        return Ok(());
    }
    assert!(request.length <= host.transfer_max.load(SeqCst), "a transfer too long");
    let mut at = 0;
    for buffer in request.buffers.as_slice() {
        let part = &mut range[at..at + buffer.length as usize];
        let pointer = locate(stored, buffer).ok_or(Errno::INVAL)?;
        // SAFETY: `locate` checked the bounds; client and server copy raw bytes.
        unsafe {
            match op {
                Op::Read => std::ptr::copy(part.as_ptr(), pointer, part.len()),
                _ => std::ptr::copy(pointer, part.as_mut_ptr(), part.len()),
            }
        }
        let is_a_lie = host.lies.load(SeqCst) && host.taken.load(SeqCst).is_multiple_of(1000);
        if op == Op::Read && is_a_lie {
            // SAFETY: as above.
            unsafe { *pointer ^= 1 };
        }
        at += part.len();
    }
    assert_eq!(at, length, "the buffers are as long as the request");
    Ok(())
}

fn locate(stored: &Stored, buffer: &Buffer) -> Option<*mut u8> {
    match buffer.memory {
        0 => stored.region.arena(buffer.offset, buffer.length.into()),
        memory => stored.memories.get(&memory)?.range(buffer.offset, buffer.length.into()),
    }
}

/// Bytes that say where they belong and which round wrote them.
pub fn pattern(block: u64, round: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = (block << 32 | round) ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// A sealed memfd, mapped.
pub fn sealed_memory(size: u64) -> SharedMemory {
    SharedMemory::create("nebd-test", size).unwrap()
}

/// Readable within a minute.
#[track_caller]
pub fn wait_readable(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let timeout = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1), "nobody rang");
}
