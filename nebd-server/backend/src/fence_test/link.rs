//! A volume's line to the fence-store: two threads, and what is pending between them.
//!
//! `unsafe` lives here: data is copied between frames and the segments of requests.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::{Errno, Op, OpFlags, VolumeName};
use nebd_rpc::frame::{self, Header, Kind};

use crate::Request;

/// Pause before the store is asked again, be it for a connection or because it is crowded.
const RETRY_PAUSE: Duration = Duration::from_millis(2);

const EAGAIN: i32 = 11;
const ESTALE: i32 = 116;

/// A volume's line to the store.
pub(super) struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    socket: PathBuf,
    name: VolumeName,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// By id, which is also the order of submission.
    pending: BTreeMap<u64, Pending>,
    to_send: VecDeque<u64>,
    next_id: u64,
    /// The present connection, for whoever wants to end it.
    connection: Option<UnixStream>,
    /// Grows with each connection.
    connection_number: u64,
    is_broken: bool,
    is_closing: bool,
    /// The memory of requests is a successor's: it may have answered them, and clients used it anew.
    is_relinquished: bool,
    /// The store has told us that we were replaced. Our requests are our successor's now: to answer
    /// them would be to lie to the client.
    fenced: Vec<Request>,
}

struct Pending {
    request: Request,
    header: Header,
}

impl Link {
    /// Connects in the background, again and again.
    pub(super) fn start(socket: PathBuf, name: VolumeName) -> io::Result<Link> {
        let shared = Arc::new(Shared {
            socket,
            name,
            state: Mutex::new(State { is_broken: true, ..State::default() }),
            changed: Condvar::new(),
        });
        let sender = shared.clone();
        let thread = std::thread::Builder::new().name("fence-test-send".into());
        thread.stack_size(256 * 1024).spawn(move || sender.send_all())?;
        Ok(Link { shared })
    }

    /// From when this returns on, no memory of a request is touched.
    pub(super) fn relinquish(&self) {
        self.shared.lock().is_relinquished = true;
    }

    /// Takes a request; never blocks for longer than a copy.
    pub(super) fn submit(&self, request: Request, drop_fua: bool) {
        let kind = match request.op {
            Op::Read => Kind::Read,
            Op::Write => Kind::Write,
            Op::Flush => Kind::Flush,
            Op::Discard => Kind::Discard,
            Op::WriteZeroes => Kind::WriteZeroes,
        };
        let mut state = self.shared.lock();
        state.next_id += 1;
        let id = state.next_id;
        let mut flags = request.flags.bits();
        if drop_fua {
            flags &= !OpFlags::FUA.bits();
        }
        let header = Header {
            fence: request.fence,
            offset: request.offset,
            length: request.length,
            flags: flags.into(),
            ..Header::new(kind, id)
        };
        state.pending.insert(id, Pending { request, header });
        state.to_send.push_back(id);
        self.shared.changed.notify_all();
    }

    /// Ends the threads once nothing is pending.
    pub(super) fn close(&self) {
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sender's thread.
    fn send_all(self: Arc<Self>) {
        let mut out = None;
        loop {
            let mut state = self.lock();
            while !state.is_broken && state.to_send.is_empty() && !state.is_over() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.is_over() {
                state.hang_up();
                return;
            }
            if state.is_broken {
                drop(state);
                out = self.connect();
                continue;
            }
            let Some(bytes) = state.next_frame() else { continue };
            drop(state);
            let sent = out.as_mut().map(|stream: &mut UnixStream| stream.write_all(&bytes));
            if !matches!(sent, Some(Ok(()))) {
                self.lock().is_broken = true;
            }
        }
    }

    /// Connects, and makes everything pending be sent again under the same seqs.
    fn connect(self: &Arc<Self>) -> Option<UnixStream> {
        self.lock().hang_up();
        let connected = UnixStream::connect(&self.socket)
            .and_then(|stream| Ok((stream.try_clone()?, stream.try_clone()?, stream)));
        let Ok((input, kept, out)) = connected else {
            std::thread::sleep(RETRY_PAUSE);
            return None;
        };
        let mut state = self.lock();
        state.connection = Some(kept);
        state.connection_number += 1;
        let number = state.connection_number;
        let receiver = self.clone();
        let thread = std::thread::Builder::new().name("fence-test-receive".into());
        let spawned =
            thread.stack_size(256 * 1024).spawn(move || receiver.receive_all(input, number));
        if let Err(error) = spawned {
            tracing::error!(volume = %self.name, %error, "cannot start a thread");
            drop(state);
            std::thread::sleep(RETRY_PAUSE);
            return None;
        }
        state.to_send = state.pending.keys().copied().collect();
        state.is_broken = false;
        Some(out)
    }

    /// The receiver's thread, one for each connection.
    fn receive_all(self: Arc<Self>, input: UnixStream, number: u64) {
        let mut input = BufReader::with_capacity(256 * 1024, input);
        while let Ok(Some((answer, payload))) = frame::read(&mut input) {
            self.answered(&answer, &payload);
        }
        let mut state = self.lock();
        if state.connection_number == number {
            state.is_broken = true;
            self.changed.notify_all();
        }
    }

    fn answered(&self, answer: &Header, payload: &[u8]) {
        let mut state = self.lock();
        // Not pending: a second answer, to a copy of a request that was answered already.
        let Some(Pending { request, header }) = state.pending.remove(&answer.request) else {
            return;
        };
        match answer.result as i32 {
            EAGAIN => {
                state.pending.insert(answer.request, Pending { request, header });
                state.to_send.push_back(answer.request);
                drop(state);
                std::thread::sleep(RETRY_PAUSE);
                self.changed.notify_all();
            }
            ESTALE => {
                if state.fenced.is_empty() {
                    tracing::error!(volume = %self.name, epoch = %header.fence.epoch,
                        "the storage has a later owner; this server answers no more requests of it");
                }
                state.fenced.push(request);
            }
            // No fence keeps an answer of earlier from the memory that it was meant for.
            0 if state.is_relinquished => state.fenced.push(request),
            0 => {
                // Under the lock: nothing is being copied when `relinquish` returns.
                let is_whole = request.op != Op::Read || fill(&request, payload);
                drop(state);
                request.complete_remote(if is_whole { Ok(()) } else { Err(Errno::IO) });
            }
            errno => {
                drop(state);
                tracing::warn!(volume = %self.name, ?header, errno, "the storage refused a request");
                request.complete_remote(Err(Errno(errno)));
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Neither completed nor forgotten: they belong to the successor.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(std::mem::take(&mut state.fenced));
    }
}

impl State {
    fn is_over(&self) -> bool {
        self.is_closing && self.pending.is_empty()
    }

    fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            // It fails only if the other side was first.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// The bytes of the next request to be sent. Copied under the lock, so that the request cannot
    /// be completed, and its memory unmapped, by an answer to an earlier copy meanwhile.
    fn next_frame(&mut self) -> Option<Vec<u8>> {
        let id = self.to_send.pop_front()?;
        let Pending { request, header } = self.pending.get(&id)?;
        let mut bytes = vec![0; frame::HEADER_BYTES];
        if request.op == Op::Write {
            gather(request, &mut bytes);
        }
        // The checksum is of our own copy: the guest may change its buffer in flight.
        let (head, payload) = bytes.split_at_mut(frame::HEADER_BYTES);
        head.copy_from_slice(&header.encode(payload));
        Some(bytes)
    }
}

/// Appends the data of a write.
fn gather(request: &Request, bytes: &mut Vec<u8>) {
    for segment in request.segments.as_slice() {
        let at = bytes.len();
        bytes.resize(at + segment.length, 0);
        // SAFETY: the segment stays mapped while the request is not completed, which our caller
        // prevents by holding the lock; the other side may write to it meanwhile, hence a raw copy.
        unsafe { segment.pointer.copy_to_nonoverlapping(bytes[at..].as_mut_ptr(), segment.length) };
    }
}

/// Fills the buffers of a read; false if the payload is not as long as they are.
fn fill(request: &Request, payload: &[u8]) -> bool {
    let segments = request.segments.as_slice();
    if segments.iter().map(|segment| segment.length).sum::<usize>() != payload.len() {
        return false;
    }
    let mut rest = payload;
    for segment in segments {
        let (piece, after) = rest.split_at(segment.length);
        // SAFETY: the segment is mapped until the request, which we own, is completed; the lengths
        // were compared above.
        unsafe { segment.pointer.copy_from_nonoverlapping(piece.as_ptr(), segment.length) };
        rest = after;
    }
    true
}
