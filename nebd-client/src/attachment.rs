//! One session's connection to whichever server there is. Owned by the control thread.
//!
//! ```text
//!          connect, Hello     Welcome: RegisterMemory × n    Done × n: Attach    Attached
//!  Down ──────────────────► Greeting ─────────────► Greeting ──────────► Attaching ──► Up
//!   ▲  ▲                       │ EOF, error, Failed (retry)                 │           │
//!   │  └── 1 ms, doubling ─────┴────────────────────────────────────────────┘           │
//!   └───────────────────────────── EOF, at once ────────────────────────────────────────┘
//!  any ── Failed (no retry), Detached, answer to Detach ──► Over
//! ```
//!
//! When a session is attached again, its memories are registered *before* it, and the server has
//! taken each: it resumes requests in flight with the attach, and fails those that refer to a
//! memory which it does not have. What was asked and not answered when a connection ends is asked
//! again on the next one, with the same operation id.

mod opening;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use nebd_abi::control::{AttachFlags, Event as ServerEvent, Message, VolumeInfo};
use nebd_abi::layout::{LayoutVersion, PAGE};
use nebd_abi::{Errno, Generation, socket};

use crate::calls::{Answer, Call};
use crate::control::{Admission, connect, hello};
use crate::core::Core;
use crate::error::{OpenError, errno};
use crate::options::Event;
use crate::registered::Entry;
use crate::sync::{Promise, lock, now_ns};
use crate::tell::Role;
use crate::watch::{Sample, Verdict, Watch};

/// The longest time between two tries to connect.
const RETRY_MAX: Duration = Duration::from_millis(100);
/// The first time that is waited after a try has failed.
const RETRY_MIN: Duration = Duration::from_millis(1);
/// When a refused call is asked again.
const CALL_RETRY: Duration = Duration::from_millis(100);
/// When a close looks again whether the last request is done.
const CLOSE_RETRY: Duration = Duration::from_millis(20);

/// The most messages that are taken at once.
const MESSAGES_MAX: usize = 64;

enum Link {
    /// No connection; tried again at this time.
    Down(Instant),
    Greeting(OwnedFd),
    Attaching(OwnedFd),
    Up(OwnedFd),
    Over,
}

/// What a request id stands for.
enum Question {
    Hello,
    Attach,
    Memory(Arc<Entry>),
    Call(Arc<Call>),
}

/// Whether a server knows the session.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// None can.
    No,
    /// An attach was sent to a server that was lost before it answered.
    Maybe,
    /// It was attached.
    Yes,
}

/// Why the server refused, while the session is being opened.
struct Refusal {
    errno: Errno,
    text: String,
}

/// A session on the control thread.
pub(crate) struct Attachment {
    core: Arc<Core>,
    /// Where the opener waits; `None` once it was told.
    opened: Option<Arc<Promise<Result<(), OpenError>>>>,
    open_deadline: Option<Instant>,
    /// What the last try to open met.
    last_error: Option<io::Error>,
    last_refusal: Option<Refusal>,
    link: Link,
    /// Counts connections, from 1.
    link_number: u64,
    retry: Duration,
    questions: HashMap<u64, Question>,
    request_last: u64,
    /// Of the server that attached the session last.
    generation: Generation,
    known: Known,
    /// Of the server that is connected.
    offered: Generation,
    incarnation: u64,
    watch: Watch,
    /// When a close has to look at the rings again.
    close_at: Option<Instant>,
}

impl Attachment {
    pub(crate) fn new(admission: Admission, now: Instant) -> Attachment {
        let options = &admission.core.options;
        Attachment {
            opened: Some(admission.opened),
            open_deadline: now.checked_add(options.connect_timeout),
            last_error: None,
            last_refusal: None,
            link: Link::Down(now),
            link_number: 0,
            retry: Duration::ZERO,
            questions: HashMap::new(),
            request_last: 0,
            generation: Generation::default(),
            known: Known::No,
            offered: Generation::default(),
            incarnation: 0,
            watch: Watch::new(options.stall_after, options.io_timeout),
            close_at: None,
            core: admission.core,
        }
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Whether the control thread is done with the session.
    pub(crate) fn is_over(&self) -> bool {
        // A session that failed stays until the host closes it.
        matches!(self.link, Link::Over) && self.core.is_closing.load(SeqCst)
    }

    /// The socket, to be polled.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Greeting(socket) | Link::Attaching(socket) | Link::Up(socket) => {
                Some(socket.as_fd())
            }
            Link::Down(_) | Link::Over => None,
        }
    }

    /// When this has to be looked at next, if nothing happens before.
    pub(crate) fn due(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Down(at) => Some(*at),
            Link::Up(_) => self.core.calls.retry_at(),
            Link::Greeting(_) | Link::Attaching(_) => None,
            // Neither does the watch tick any more.
            Link::Over => return None,
        };
        let opening = self.opened.as_ref().and(self.open_deadline);
        [link, opening, self.watch.next_at(), self.close_at].into_iter().flatten().min()
    }

    /// Does what is due.
    pub(crate) fn turn(&mut self, now: Instant, knocks: &mut Vec<PathBuf>) {
        if self.opened.is_some() && self.open_deadline.is_some_and(|deadline| deadline <= now) {
            self.give_up_open();
        }
        if matches!(self.link, Link::Down(at) if at <= now)
            && let Err(error) = self.connect()
        {
            self.lose(error, now);
        }
        self.look_after_close(now);
        // One that nobody waits for any more is detached before it is attached.
        let is_given_up = self.opened.is_none() && self.known != Known::Yes;
        if (matches!(self.link, Link::Up(_)) || self.is_attaching() && is_given_up)
            && let Err(error) = self.ask_all(now)
        {
            self.lose(error, now);
        }
        if matches!(self.link, Link::Over) {
            self.answer_all(self.core.failure().unwrap_or(errno::CLOSED));
        }
        self.tick(now, knocks);
    }

    /// Takes what has arrived; the rest of a flood when the other sessions have had their turn.
    pub(crate) fn receive(&mut self, now: Instant) {
        for _ in 0..MESSAGES_MAX {
            let Some(socket) = self.socket() else { return };
            let lost = match socket::receive(socket) {
                Ok(Some(packet)) => match Message::decode(&packet.bytes) {
                    Ok((request, message)) => self.received(request, message, now).err(),
                    // Of a newer server; whatever it tells, it is not asked for.
                    Err(nebd_abi::control::DecodeError::Kind { .. }) => None,
                    Err(error) => Some(io::Error::new(io::ErrorKind::InvalidData, error)),
                },
                Ok(None) => Some(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => Some(error),
            };
            if let Some(error) = lost {
                self.lose(error, now);
            }
        }
    }

    fn is_attaching(&self) -> bool {
        matches!(self.link, Link::Attaching(_))
    }

    fn connect(&mut self) -> io::Result<()> {
        let socket = connect(&self.core.options.socket)?;
        self.link_number += 1;
        self.link = Link::Greeting(socket);
        self.ask(&hello(), &[], Question::Hello)
    }

    /// The connection is gone: what was asked on it is to be asked again.
    fn lose(&mut self, error: io::Error, now: Instant) {
        let core = &self.core;
        core.is_connected.store(false, Relaxed);
        let is_attach = |question: &Question| matches!(question, Question::Attach);
        if self.known == Known::No && self.questions.values().any(is_attach) {
            self.known = Known::Maybe;
        }
        self.questions.clear();
        if matches!(self.link, Link::Over) {
            return;
        }
        self.last_error = Some(error);
        // Not all at once when many sessions lose the same server.
        let jitter = now_ns() % 1024;
        let wait = self.retry / 2 + self.retry.mul_f64(jitter as f64 / 2048.0);
        self.link = Link::Down(now + wait);
        self.retry = (self.retry * 2).clamp(RETRY_MIN, RETRY_MAX);
    }

    fn ask(
        &mut self,
        message: &Message,
        fds: &[BorrowedFd<'_>],
        question: Question,
    ) -> io::Result<()> {
        self.request_last += 1;
        let Some(socket) = self.socket() else { return Ok(()) };
        socket::send(socket, &message.encode(self.request_last), fds)?;
        self.questions.insert(self.request_last, question);
        Ok(())
    }

    /// Asks what was not asked on this connection.
    fn ask_all(&mut self, now: Instant) -> io::Result<()> {
        self.ask_memories()?;
        for call in self.core.calls.to_ask(self.link_number, now) {
            if call.message == Message::Detach && !self.may_detach() {
                continue;
            }
            call.asked_on.store(self.link_number, Relaxed);
            *lock(&call.retry_at) = None;
            self.ask(&call.message, &[], Question::Call(call.clone()))?;
        }
        Ok(())
    }

    fn ask_memories(&mut self) -> io::Result<()> {
        for entry in self.core.memories.entries() {
            if entry.asked_on.swap(self.link_number, Relaxed) != self.link_number {
                self.ask(&entry.message(), &[entry.fd()], Question::Memory(entry.clone()))?;
            }
        }
        Ok(())
    }

    fn received(&mut self, request: u64, message: Message, now: Instant) -> io::Result<()> {
        if let Message::Event(event) = message {
            self.told(event);
            return Ok(());
        }
        if let Message::Attached(info) = &message
            && !is_possible(info)
        {
            // Nothing could be cut to such blocks: not a server to go on with.
            return Err(io::ErrorKind::InvalidData.into());
        }
        match (self.questions.remove(&request), message) {
            (Some(Question::Hello), Message::Welcome { layout, generation, .. }) => {
                self.welcomed(layout, generation)
            }
            (Some(Question::Attach), Message::Attached(info)) => {
                self.attached(info);
                self.ask_all(now)
            }
            (Some(Question::Memory(entry)), Message::Done) => {
                entry.taken();
                entry.call.answered(Answer::Message(Message::Done));
                self.attach_when_registered()
            }
            (Some(Question::Call(call)), Message::Failed { retry: true, .. }) => {
                *lock(&call.retry_at) = Some(now + CALL_RETRY);
                call.asked_on.store(0, Relaxed);
                Ok(())
            }
            (Some(Question::Call(call)), answer) => {
                self.called(&call, answer);
                Ok(())
            }
            (Some(question), Message::Failed { errno, retry, text }) => {
                self.refused(question, Refusal { errno, text }, retry)
            }
            // An answer to nothing, or to something else: not a server to go on with.
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn welcomed(&mut self, layout: u32, generation: Generation) -> io::Result<()> {
        if LayoutVersion::from_bits(layout) != Some(LayoutVersion::CURRENT) {
            self.refuse_open(OpenError::Layout(layout));
            // An attached session waits for a server that speaks its layout.
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.core.meter.saw_generation(&self.core, generation);
        self.offered = generation;
        if self.known == Known::Yes {
            self.ask_memories()?;
        }
        self.attach_when_registered()
    }

    /// Asks for the attach once nothing else is to be answered before.
    fn attach_when_registered(&mut self) -> io::Result<()> {
        if !matches!(self.link, Link::Greeting(_)) || !self.questions.is_empty() {
            return Ok(());
        }
        let core = self.core.clone();
        let mut flags = AttachFlags::default();
        let wanted = [
            (core.options.exclusive, AttachFlags::EXCLUSIVE),
            (core.options.read_only, AttachFlags::READ_ONLY),
            (self.known == Known::Yes, AttachFlags::REATTACH),
        ];
        for (_, flag) in wanted.into_iter().filter(|(is_wanted, _)| *is_wanted) {
            flags = flags | flag;
        }
        let attach = Message::Attach {
            session: core.id,
            flags,
            queue_count: core.options.queues,
            incarnation: self.incarnation,
            volume: core.volume.clone(),
        };
        let kicks = core.queues.iter().map(|queue| queue.kick_doorbell().as_fd());
        let calls = core.queues.iter().map(|queue| queue.call_doorbell().as_fd());
        let region = core.region.memory().fd();
        let fds: Vec<_> = std::iter::once(region).chain(kicks).chain(calls).collect();
        self.ask(&attach, &fds, Question::Attach)?;
        if let Link::Greeting(socket) = std::mem::replace(&mut self.link, Link::Over) {
            self.link = Link::Attaching(socket);
        }
        Ok(())
    }

    fn attached(&mut self, info: VolumeInfo) {
        if let Link::Attaching(socket) = std::mem::replace(&mut self.link, Link::Over) {
            self.link = Link::Up(socket);
        }
        self.retry = Duration::ZERO;
        self.incarnation = info.incarnation;
        let generation = std::mem::replace(&mut self.generation, self.offered);
        let core = &self.core;
        let is_resized = core.learn(info);
        core.generation.store(self.offered.0, Relaxed);
        let opened = self.opened.take();
        if std::mem::replace(&mut self.known, Known::Yes) == Known::Yes {
            core.reconnects.fetch_add(1, Relaxed);
            if generation != self.offered {
                core.emit(Event::ServerChanged { generation: self.offered });
            }
            if is_resized {
                core.emit(Event::Resized { size: info.size });
            }
        }
        // Last, so that who sees it sees the rest.
        core.is_connected.store(true, Release);
        if let Some(opened) = opened {
            opened.keep(Ok(()));
        }
        // The server that is gone may have swallowed a kick, or have died between publishing a
        // completion and calling for it, or have left a counter so full that no ring goes in.
        for queue in &core.queues {
            for doorbell in [queue.kick_doorbell(), queue.call_doorbell()] {
                doorbell.drain();
                doorbell.ring();
            }
        }
    }

    fn told(&mut self, event: ServerEvent) {
        match event {
            ServerEvent::Resized(size) => {
                if self.core.learn_size(size) {
                    self.core.emit(Event::Resized { size });
                }
            }
            ServerEvent::Parked => self.core.emit(Event::Parked),
            ServerEvent::Unparked => self.core.emit(Event::Unparked),
            ServerEvent::Detached(errno) => self.fail(errno),
        }
    }

    fn called(&mut self, call: &Call, answer: Message) {
        match &call.message {
            // Whatever it says: there is nothing more to be done about a session that ends.
            Message::Detach => self.link = Link::Over,
            Message::UnregisterMemory { memory } => self.core.memories.release_id(*memory),
            _ => {}
        }
        if let Message::Attached(info) = &answer
            && self.core.learn(*info)
        {
            self.core.emit(Event::Resized { size: info.size });
        }
        call.answered(match answer {
            Message::Failed { errno, text, .. } => Answer::Refused(errno, text),
            answer => Answer::Message(answer),
        });
    }

    fn refused(&mut self, question: Question, refusal: Refusal, retry: bool) -> io::Result<()> {
        if let Question::Memory(entry) = &question
            && !entry.is_known()
            && !retry
        {
            // New memory that the server does not like is the caller's affair alone.
            entry.call.answered(Answer::Refused(refusal.errno, refusal.text));
            return self.attach_when_registered();
        }
        // What an attached session can wait for is no reason to fail its requests: a server that
        // speaks its layout, or one with room for a memory that others have had room for.
        let can_wait = self.opened.is_none() && !matches!(question, Question::Attach);
        if retry || can_wait {
            self.last_refusal = Some(refusal);
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if self.opened.is_some() {
            let (volume, Refusal { errno, text }) = (self.core.volume.clone(), refusal);
            self.refuse_open(OpenError::Refused { volume, errno, text });
        } else {
            self.fail(refusal.errno);
        }
        Ok(())
    }

    /// The session cannot go on.
    fn fail(&mut self, errno: Errno) {
        if self.opened.is_some() {
            let (volume, text) = (self.core.volume.clone(), "the server let it go".to_owned());
            return self.refuse_open(OpenError::Refused { volume, errno, text });
        }
        self.link = Link::Over;
        self.core.is_connected.store(false, Relaxed);
        if self.known == Known::Yes {
            self.core.fail(errno);
        }
        self.answer_all(errno);
    }

    /// Nobody will be asked any more.
    fn answer_all(&self, errno: Errno) {
        for entry in self.core.memories.entries() {
            entry.call.answered(Answer::Session(errno));
        }
        self.core.calls.answer_all(errno);
    }

    /// Whether the requests in flight let a session go. A host that reaps by itself has let go of
    /// them; the server finishes them in its own mapping.
    fn may_detach(&self) -> bool {
        self.core.is_manual() || self.core.is_idle()
    }

    /// Reaps for a session that nobody else reaps for any more.
    fn look_after_close(&mut self, now: Instant) {
        self.close_at = None;
        if !self.core.is_closing.load(SeqCst) || matches!(self.link, Link::Over) {
            return;
        }
        if !self.may_detach() {
            for queue in &self.core.queues {
                self.core.reap(queue, &mut Role::Other);
            }
            self.close_at = (!self.may_detach()).then_some(now + CLOSE_RETRY);
        }
    }

    fn sample(&self) -> Sample {
        let completed = self.core.queues.iter().map(|queue| queue.completed()).sum();
        Sample { completed, is_waiting: !self.core.is_idle() }
    }

    fn tick(&mut self, now: Instant, knocks: &mut Vec<PathBuf>) {
        if matches!(self.link, Link::Over) {
            return;
        }
        let core = self.core.clone();
        if core.is_watched.load(SeqCst) {
            self.watch.arm(self.sample(), now);
        }
        let sample = self.sample();
        let Some(verdict) = self.watch.tick(now, || sample) else { return };
        if let Some(timeout) = core.options.io_timeout {
            core.expire(timeout, now_ns());
        }
        match verdict {
            Verdict::Quiet => {}
            Verdict::Idle => {
                core.is_watched.store(false, SeqCst);
                // Pairs with the fence in `kicked`: either a submitter sees the watch asleep, or
                // its request is seen here.
                fence(SeqCst);
                if !core.is_idle() {
                    core.is_watched.store(true, SeqCst);
                    self.watch.arm(self.sample(), now);
                }
            }
            Verdict::Stalled => {
                core.emit(Event::Stalled);
                knocks.push(core.options.socket.clone());
            }
            Verdict::StillStalled => knocks.push(core.options.socket.clone()),
            Verdict::Resumed => core.emit(Event::Resumed),
        }
    }
}

/// Whether this client can cut requests for such a volume.
fn is_possible(info: &VolumeInfo) -> bool {
    info.block_size.is_power_of_two() && (512..=PAGE).contains(&info.block_size.into())
}
