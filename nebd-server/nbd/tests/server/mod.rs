//! A server of disks in memory, a thread for each connection: the library's smallest integration.

mod disk;

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use nebd_nbd::negotiate::{CloseReason, Refusal};
use nebd_nbd::{
    Command, CommandFlags, ConnectionState, Event, Negotiated, Negotiation, Policy, Replies,
    ReplyError, Request, Requests, Step,
};

pub use disk::Disk;

/// What has been seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub reads: AtomicU64,
    pub holes_sent: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub trims: AtomicU64,
    pub zeroes: AtomicU64,
    pub no_holes: AtomicU64,
    pub fast_zeroes: AtomicU64,
    pub caches: AtomicU64,
    pub statuses: AtomicU64,
    pub fuas: AtomicU64,
    pub handovers: AtomicU64,
    pub transmissions: AtomicU64,
    pub open: AtomicU64,
    pub open_max: AtomicU64,
    pub closed: Mutex<Vec<CloseReason>>,
}

/// How to serve.
pub struct Setup {
    pub policy: Policy,
    pub disks: Vec<Disk>,
    /// Hand each connection over to a successor after so many events.
    pub hand_over_every: Option<u64>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            policy: Policy::default(),
            disks: vec![Disk::new("disk", 8 << 20)],
            hand_over_every: None,
        }
    }
}

struct Shared {
    setup: Setup,
    seen: Seen,
    ending: AtomicBool,
}

/// A server on a Unix socket; ends when dropped.
pub struct Server {
    folder: tempfile::TempDir,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(setup: Setup) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("nbd.sock")).unwrap();
        let ending = AtomicBool::new(false);
        let shared = Arc::new(Shared { setup, seen: Seen::default(), ending });
        let context = Arc::clone(&shared);
        let listener = std::thread::spawn(move || listen(&listener, &context));
        Server { folder, shared, listener: Some(listener) }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// For files of the test.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub fn seen(&self) -> &Seen {
        &self.shared.seen
    }

    pub fn disk(&self, name: &str) -> &Disk {
        self.shared.disk(name).unwrap()
    }

    /// Why negotiations ended without an export, so far.
    pub fn closed(&self) -> Vec<CloseReason> {
        self.seen().closed.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ending.store(true, SeqCst);
        let _ = UnixStream::connect(self.socket());
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

fn listen(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut connections = Vec::new();
    for stream in listener.incoming() {
        if shared.ending.load(SeqCst) {
            break;
        }
        let (Ok(stream), shared) = (stream, Arc::clone(shared)) else { continue };
        connections.push(std::thread::spawn(move || {
            // A client that goes without a word is no error.
            let _ = Connection { stream, shared: &shared, input: Vec::new() }.serve();
        }));
    }
    for connection in connections {
        connection.join().unwrap();
    }
}

impl Shared {
    fn disk(&self, name: &str) -> Option<&Disk> {
        self.setup.disks.iter().find(|disk| disk.export.name == name)
    }
}

struct Connection<'a> {
    stream: UnixStream,
    shared: &'a Shared,
    /// Read and not yet taken.
    input: Vec<u8>,
}

impl Connection<'_> {
    fn serve(mut self) -> io::Result<()> {
        let Some(negotiated) = self.negotiate()? else { return Ok(()) };
        let result = self.transmit(negotiated);
        self.shared.seen.open.fetch_sub(1, SeqCst);
        result
    }

    fn read_more(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => {
                self.input.extend_from_slice(&bytes[..count]);
                Ok(())
            }
        }
    }

    fn negotiate(&mut self) -> io::Result<Option<Negotiated>> {
        let mut out = Vec::new();
        let mut negotiation = Negotiation::new(self.shared.setup.policy, Instant::now(), &mut out);
        loop {
            let (taken, mut step) = negotiation.advance(&self.input, &mut out);
            self.input.drain(..taken);
            loop {
                step = match step {
                    Step::List(question) => {
                        let exports = self.shared.setup.disks.iter();
                        let exports = exports.map(|disk| (&disk.export.name, "in memory"));
                        negotiation.answer_list(question, exports, &mut out)
                    }
                    Step::Export(question) => {
                        let disk = self.shared.disk(question.name());
                        let answer = disk.map(|d| d.export.clone()).ok_or(Refusal::Unknown);
                        negotiation.answer_export(question, answer, &mut out)
                    }
                    step => {
                        // Counted before the client can know.
                        let seen = &self.shared.seen;
                        if matches!(step, Step::Transmission(_)) {
                            seen.transmissions.fetch_add(1, SeqCst);
                            seen.open_max.fetch_max(seen.open.fetch_add(1, SeqCst) + 1, SeqCst);
                        }
                        self.stream.write_all(&out)?;
                        out.clear();
                        match step {
                            Step::Input => self.read_more()?,
                            Step::Sent => {}
                            Step::Transmission(negotiated) => return Ok(Some(negotiated)),
                            Step::Close(reason) => {
                                seen.closed.lock().unwrap().push(reason);
                                return Ok(None);
                            }
                            step => panic!("{step:?} without TLS"),
                        }
                        break;
                    }
                };
            }
        }
    }

    fn transmit(&mut self, negotiated: Negotiated) -> io::Result<()> {
        let mut requests = Requests::new(negotiated.terms);
        let mut events = 0;
        loop {
            let (taken, event) = requests.advance(&self.input);
            self.input.drain(..taken);
            let replies = Replies::new(requests.terms());
            let event = event.map_err(io::Error::other)?;
            match event {
                Event::Input => self.read_more()?,
                Event::Disconnect => return Ok(()),
                Event::Payload(left) => panic!("{left} bytes of a payload were forgotten"),
                Event::Answer(answer) => {
                    let mut out = Vec::new();
                    replies.answer(&answer, &mut out);
                    self.stream.write_all(&out)?;
                }
                Event::Request(request) => self.request(&negotiated, &replies, &request)?,
                Event::Write(request) => {
                    let payload = self.payload(&mut requests, request.length)?;
                    self.write(&negotiated, &replies, &request, &payload)?;
                }
            }
            events += 1;
            if self.shared.setup.hand_over_every.is_some_and(|every| events % every == 0) {
                requests = self.hand_over(&negotiated, &requests);
            }
        }
    }

    /// What a server and its successor do.
    fn hand_over(&mut self, negotiated: &Negotiated, requests: &Requests) -> Requests {
        let negotiated = Negotiated { terms: *requests.terms(), ..negotiated.clone() };
        let mut state = ConnectionState { negotiated, unread: Vec::new(), unsent: Vec::new() };
        match requests.append_unread(&[], &mut state.unread) {
            Ok(()) => state.unread.append(&mut self.input),
            Err(skipping) => panic!("{skipping}"),
        }
        let state = ConnectionState::decode(&state.encode().unwrap()).unwrap();
        self.input = state.unread;
        self.shared.seen.handovers.fetch_add(1, SeqCst);
        Requests::new(state.negotiated.terms)
    }

    /// What has come with the headers first, then straight from the socket.
    fn payload(&mut self, requests: &mut Requests, length: u32) -> io::Result<Vec<u8>> {
        let mut payload = vec![0; length as usize];
        let ready = requests.payload_arrived(self.input.len());
        payload[..ready].copy_from_slice(&self.input[..ready]);
        self.input.drain(..ready);
        let mut at = ready;
        while requests.payload_left() > 0 {
            let count = self.stream.read(&mut payload[at..])?;
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            at += requests.payload_arrived(count);
        }
        Ok(payload)
    }

    fn write(
        &mut self,
        negotiated: &Negotiated,
        replies: &Replies,
        request: &Request,
        payload: &[u8],
    ) -> io::Result<()> {
        let Some(disk) = self.shared.disk(&negotiated.export) else { return Ok(()) };
        self.shared.seen.writes.fetch_add(1, SeqCst);
        self.count_fua(request);
        disk.write(request.offset, payload);
        self.stream.write_all(&replies.done(request))
    }

    fn count_fua(&self, request: &Request) {
        self.shared.seen.fuas.fetch_add(u64::from(request.is_fua()), SeqCst);
    }

    fn request(
        &mut self,
        negotiated: &Negotiated,
        replies: &Replies,
        request: &Request,
    ) -> io::Result<()> {
        let Some(disk) = self.shared.disk(&negotiated.export) else { return Ok(()) };
        let seen = &self.shared.seen;
        let mut out = Vec::new();
        match request.command {
            Command::Read => return self.read(disk, replies, request),
            Command::Write => panic!("a write without its event"),
            Command::Flush => seen.flushes.fetch_add(1, SeqCst),
            Command::Cache => seen.caches.fetch_add(1, SeqCst),
            Command::Trim => {
                self.count_fua(request);
                disk.trim(request.offset, request.length);
                seen.trims.fetch_add(1, SeqCst)
            }
            Command::WriteZeroes => {
                self.count_fua(request);
                let is_fast = request.flags.contains(CommandFlags::FAST_ZERO);
                let no_hole = request.flags.contains(CommandFlags::NO_HOLE);
                seen.fast_zeroes.fetch_add(u64::from(is_fast), SeqCst);
                seen.no_holes.fetch_add(u64::from(no_hole), SeqCst);
                // To keep the range allocated is to write it: not fast.
                if is_fast && no_hole {
                    let error = ReplyError::from_errno(95, request);
                    return self.stream.write_all(&replies.error(request, error));
                }
                disk.zero(request.offset, request.length, no_hole);
                seen.zeroes.fetch_add(1, SeqCst)
            }
            Command::BlockStatus => {
                seen.statuses.fetch_add(1, SeqCst);
                replies.block_status(request, disk.extents(request), &mut out);
                return self.stream.write_all(&out);
            }
        };
        self.stream.write_all(&replies.done(request))
    }

    fn read(&mut self, disk: &Disk, replies: &Replies, request: &Request) -> io::Result<()> {
        self.shared.seen.reads.fetch_add(1, SeqCst);
        let data = disk.read(request.offset, request.length);
        let Some(data) = data else {
            let (error, bad) = (ReplyError::Io, disk.bad.unwrap_or(0));
            return self.stream.write_all(&replies.error_at(request, error, bad));
        };
        let spans = disk.spans(request);
        let pieces: Vec<_> = replies.pieces(request, &spans).collect();
        let holes = pieces.iter().filter(|piece| piece.data.is_empty()).count();
        self.shared.seen.holes_sent.fetch_add(holes as u64, SeqCst);
        for piece in pieces {
            let data = &data[piece.data];
            let mut slices = [IoSlice::new(&piece.head), IoSlice::new(data)];
            let mut slices = &mut slices[..];
            while slices.iter().any(|slice| !slice.is_empty()) {
                let count = self.stream.write_vectored(slices)?;
                IoSlice::advance_slices(&mut slices, count);
            }
        }
        Ok(())
    }
}
