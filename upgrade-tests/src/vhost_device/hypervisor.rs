//! The hypervisor's half: a thread with the connection, which knows nothing of requests.
//!
//! ```text
//!  connect ─► features, config ─► record ─► memory, rings ─► kicks ─► waits ─► controls
//!     ▲                             given back if there is one          │
//!     └──────────── closed by the server, or by us ◄────────────────────┘
//! ```
//!
//! After a lost connection a split ring begins at its used index, as QEMU has it; of a packed ring
//! nobody knows, so it is given the last base that the device told, and the record must know better.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, SeqCst};
use std::time::{Duration, Instant};

use nebd_abi::region::SharedMemory;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::control::Control;
use super::guest::Plan;
use super::memory::{Memory, Region};
use super::message::{self, MessageError, Payload, Socket, id, number};
use super::ring::Kind;
use super::shared::{Command, Shared};
use super::{DriverError, Options};
use crate::stamp::Dice;

/// Bits of features.
pub(super) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const PACKED: u64 = 1 << 34;
    /// What every driver wants.
    pub const WANTED: u64 =
        SEG_MAX | BLK_SIZE | FLUSH | MQ | DISCARD | WRITE_ZEROES | PROTOCOL | VERSION_1;
}

mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const MEM_SLOTS: u64 = 1 << 15;
}

const CONFIG_BYTES: u32 = 60;
/// Of a packed ring that never ran: both indices are 0, both wrap counters 1.
const PACKED_START: u32 = 0x8000_8000;
/// A region that no request uses.
const SPARE: Region = Region {
    guest_address: 0x8_0000_0000,
    size: 2 << 20,
    user_address: 0x7d00_0000_0000,
    mmap_offset: 0,
};
/// By then a server listens, and answers.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(30);
/// Between two controls, at most.
const CHURN_PAUSE_MS_MAX: u64 = 4;

/// What a server offers, and the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) features: u64,
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
}

/// The inflight record, as the server made it.
struct Record {
    fd: OwnedFd,
    description: [u64; 2],
}

/// Everything that is there before the connection is.
struct Rings {
    memory: Arc<Memory>,
    plan: Plan,
    kind: Kind,
}

pub(super) struct Hypervisor {
    options: Options,
    shared: Arc<Shared>,
    socket: Option<Socket>,
    channel: Option<UnixStream>,
    protocol: u64,
    features: u64,
    rings: Option<Rings>,
    record: Option<Record>,
    /// Where packed rings begin, as far as we were told.
    bases: Vec<u32>,
    spare: SharedMemory,
    has_spare: bool,
    churn: Option<Dice>,
}

impl Hypervisor {
    pub(super) fn new(options: Options, shared: Arc<Shared>) -> Result<Hypervisor, DriverError> {
        let spare = SharedMemory::create("vhost-spare", SPARE.size)?;
        Ok(Hypervisor {
            bases: vec![PACKED_START; options.queues],
            options,
            shared,
            socket: None,
            channel: None,
            protocol: 0,
            features: 0,
            rings: None,
            record: None,
            spare,
            has_spare: false,
            churn: None,
        })
    }

    /// The first connection: what the server offers. Rings are made for it, and started by
    /// [`start`](Self::start).
    pub(super) fn probe(&mut self) -> Result<Offer, DriverError> {
        let deadline = Instant::now() + CONNECT_TIME_MAX;
        loop {
            match self.introduce() {
                Err(MessageError::Closed | MessageError::System { .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                offer => return Ok(offer?),
            }
        }
    }

    /// The rings run from now on.
    pub(super) fn start(
        &mut self,
        memory: Arc<Memory>,
        plan: Plan,
        kind: Kind,
    ) -> Result<(), DriverError> {
        self.rings = Some(Rings { memory, plan, kind });
        match self.set_up() {
            Err(MessageError::Closed) => Ok(self.connect_again()?),
            result => Ok(result?),
        }
    }

    fn socket(&self) -> Result<&Socket, MessageError> {
        self.socket.as_ref().ok_or(MessageError::Closed)
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    /// A message that is only to be done.
    fn tell(
        &self,
        request: u32,
        payload: &Payload,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MessageError> {
        let is_acknowledged = self.has(protocol::REPLY_ACK);
        let socket = self.socket()?;
        socket.say(request, is_acknowledged, payload, fds)?;
        if !is_acknowledged {
            return Ok(());
        }
        match number(&socket.answer(request)?.0)? {
            0 => Ok(()),
            error => Err(MessageError::Wrong(format!("message {request} is refused: {error}"))),
        }
    }

    /// What was told has been acted on, acknowledged or not.
    fn settle(&self) -> Result<(), MessageError> {
        self.ask_number(id::GET_FEATURES).map(|_| ())
    }

    fn ask(
        &self,
        request: u32,
        payload: &Payload,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), MessageError> {
        let socket = self.socket()?;
        socket.say(request, false, payload, &[])?;
        socket.answer(request)
    }

    fn ask_number(&self, request: u32) -> Result<u64, MessageError> {
        number(&self.ask(request, &Payload::default())?.0)
    }

    /// A connection, features, the configuration: what QEMU does when its socket is connected.
    fn introduce(&mut self) -> Result<Offer, MessageError> {
        self.protocol = 0;
        (self.socket, self.channel) = (None, None);
        let connected = Socket::connect(&self.options.socket);
        let system = |action| move |source| MessageError::System { action, source };
        self.socket = Some(connected.map_err(system("connect"))?);
        let features = self.ask_number(id::GET_FEATURES)?;
        let offered = self.ask_number(id::GET_PROTOCOL_FEATURES)?;
        let mut wanted = protocol::MQ
            | protocol::BACKEND_REQ
            | protocol::CONFIG
            | protocol::INFLIGHT_SHMFD
            | protocol::MEM_SLOTS;
        if self.options.acknowledged {
            wanted |= protocol::REPLY_ACK;
        }
        let agreed = offered & wanted;
        self.tell(id::SET_PROTOCOL_FEATURES, &Payload::default().u64(agreed), &[])?;
        self.protocol = agreed;
        if self.has(protocol::MQ) {
            let queues = self.ask_number(id::GET_QUEUE_NUM)?;
            if queues < self.options.queues as u64 {
                return Err(MessageError::Wrong(format!("it has {queues} queues only")));
            }
        }
        self.tell(id::SET_OWNER, &Payload::default(), &[])?;
        if self.has(protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair().map_err(system("make a pair of"))?;
            ours.set_nonblocking(true).map_err(system("prepare"))?;
            self.tell(id::SET_BACKEND_REQ_FD, &Payload::default(), &[theirs.as_fd()])?;
            self.channel = Some(ours);
        }
        if self.has(protocol::MEM_SLOTS) && self.ask_number(id::GET_MAX_MEM_SLOTS)? < 3 {
            return Err(MessageError::Wrong("it has fewer than 3 memory slots".into()));
        }
        let (size_bytes, block_bytes) = self.look()?;
        Ok(Offer { features, size_bytes, block_bytes })
    }

    /// Reads the configuration space: the disk's size, and a block's.
    fn look(&self) -> Result<(u64, u32), MessageError> {
        let mut asked = Payload::default().u32(0).u32(CONFIG_BYTES).u32(0);
        asked.0.resize(asked.0.len() + CONFIG_BYTES as usize, 0);
        let (reply, _) = self.ask(id::GET_CONFIG, &asked)?;
        let short = || MessageError::Wrong("the configuration space is too short".into());
        let config = reply.get(12..).filter(|bytes| bytes.len() == CONFIG_BYTES as usize);
        let config = config.ok_or_else(short)?;
        let block = config[20..].first_chunk().map_or(512, |bytes| u32::from_le_bytes(*bytes));
        let size_bytes = number(config)? * 512;
        self.shared.counters.size_bytes.store(size_bytes, SeqCst);
        Ok((size_bytes, block))
    }

    /// Memory, record and rings: what QEMU does when the guest's driver is ready.
    fn set_up(&mut self) -> Result<(), MessageError> {
        let Some(rings) = &self.rings else { return Ok(()) };
        let kind = rings.kind;
        let optional = [
            (kind.indirect, feature::INDIRECT),
            (kind.event_idx, feature::EVENT_IDX),
            (kind.is_packed, feature::PACKED),
        ];
        let optional: u64 = optional.iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum();
        let offered = self.ask_number(id::GET_FEATURES)?;
        self.features = offered & feature::WANTED | optional;
        self.tell(id::SET_FEATURES, &Payload::default().u64(self.features), &[])?;
        if self.has(protocol::INFLIGHT_SHMFD) {
            self.set_record()?;
        }
        self.set_memory()?;
        for ring in 0..self.options.queues {
            let base = self.base_after_loss(ring);
            self.start_ring(ring, base)?;
        }
        Ok(())
    }

    fn set_record(&mut self) -> Result<(), MessageError> {
        let Some(rings) = &self.rings else { return Ok(()) };
        let (queues, size) = (self.options.queues as u16, rings.kind.size);
        let numbers = |description: [u64; 2]| {
            let [bytes, offset] = description;
            // As QEMU sends it, with the structure's padding.
            Payload::default().u64(bytes).u64(offset).u16(queues).u16(size).u32(0)
        };
        if self.record.is_none() {
            let (reply, fd) = self.ask(id::GET_INFLIGHT_FD, &numbers([0, 0]))?;
            let fd = fd.ok_or_else(|| MessageError::Wrong("no inflight record came".into()))?;
            let offset = number(reply.get(8..).unwrap_or_default())?;
            self.record = Some(Record { fd, description: [number(&reply)?, offset] });
        }
        let Some(record) = &self.record else { return Ok(()) };
        self.tell(id::SET_INFLIGHT_FD, &numbers(record.description), &[record.fd.as_fd()])
    }

    fn set_memory(&self) -> Result<(), MessageError> {
        let Some(rings) = &self.rings else { return Ok(()) };
        let mut regions = rings.memory.regions().to_vec();
        let mut fds = vec![rings.memory.fd(); regions.len()];
        if self.has_spare {
            regions.push(SPARE);
            fds.push(self.spare.fd());
        }
        let table = Payload::default().u32(regions.len() as u32).u32(0);
        let table = regions.iter().fold(table, Payload::region);
        self.tell(id::SET_MEM_TABLE, &table, &fds)
    }

    fn base_after_loss(&self, ring: usize) -> u32 {
        match &self.rings {
            Some(rings) if !rings.kind.is_packed => {
                rings.memory.load_u16(rings.plan.rings[ring].used + 2, Acquire).into()
            }
            _ => self.bases[ring],
        }
    }

    fn start_ring(&self, ring: usize, base: u32) -> Result<(), MessageError> {
        let Some(Rings { memory, plan, kind }) = &self.rings else { return Ok(()) };
        let index = ring as u32;
        let state = |number: u32| Payload::default().u32(index).u32(number);
        let place = plan.rings[ring];
        let addresses = Payload::default()
            .u32(index)
            .u32(0)
            .u64(memory.user_address(place.descriptors))
            .u64(memory.user_address(place.used))
            .u64(memory.user_address(place.available))
            .u64(0);
        let doorbells = self.shared.doorbells(ring);
        let (kick, call) = doorbells
            .map_err(|source| MessageError::System { action: "find doorbells for", source })?;
        self.tell(id::SET_VRING_NUM, &state(kind.size.into()), &[])?;
        self.tell(id::SET_VRING_BASE, &state(base), &[])?;
        self.tell(id::SET_VRING_ADDR, &addresses, &[])?;
        let number = Payload::default().u64(index.into());
        self.tell(id::SET_VRING_CALL, &number, &[call.as_fd()])?;
        self.tell(id::SET_VRING_KICK, &number, &[kick.as_fd()])?;
        self.tell(id::SET_VRING_ENABLE, &state(1), &[])
    }

    /// The connection is lost: as often as it takes.
    fn connect_again(&mut self) -> Result<(), MessageError> {
        let deadline = Instant::now() + CONNECT_TIME_MAX;
        loop {
            self.shared.counters.reconnects.fetch_add(1, SeqCst);
            match self.introduce().and_then(|_| self.set_up()) {
                Err(MessageError::Closed | MessageError::System { .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }

    /// Until it is told to end, or the device is of no use.
    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            self.shared.fail(format!("hypervisor: {error}"));
        }
    }

    fn serve(&mut self) -> Result<(), MessageError> {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(MessageError::Closed) => {
                    self.shared.counters.losses.fetch_add(1, SeqCst);
                    self.connect_again()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits, and does one thing; false at the end.
    fn turn(&mut self) -> Result<bool, MessageError> {
        let pause = self.churn.as_mut().map(|dice| Timespec {
            tv_sec: 0,
            tv_nsec: dice.below(CHURN_PAUSE_MS_MAX * 1_000_000) as i64,
        });
        let [is_commanded, is_said, is_told] = self.wait(pause.as_ref());
        if is_said {
            // Nothing is ever said of its own accord, but that it is over.
            let mut byte = [0; 1];
            let (count, _) = message::receive(self.socket()?.as_fd(), &mut byte)?;
            return match count {
                0 => Err(MessageError::Closed),
                _ => Err(MessageError::Wrong("an answer to nothing came".into())),
            };
        }
        if is_told {
            self.hear()?;
        }
        if is_commanded {
            return self.obey();
        }
        if !is_told && let Some(dice) = &mut self.churn {
            let control = Control::draw(dice, self.options.queues);
            self.perform(control)?;
        }
        Ok(true)
    }

    fn wait(&self, pause: Option<&Timespec>) -> [bool; 3] {
        let mut polled = vec![PollFd::from_borrowed_fd(self.shared.commanded(), PollFlags::IN)];
        let fds = [self.socket.as_ref().map(AsFd::as_fd), self.channel.as_ref().map(AsFd::as_fd)];
        polled.extend(fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        let _ = rustix::event::poll(&mut polled, pause);
        let is_ready = |at: usize| polled.get(at).is_some_and(|fd| !fd.revents().is_empty());
        [is_ready(0), is_ready(1), is_ready(2)]
    }

    /// The server says something of its own accord.
    fn hear(&mut self) -> Result<(), MessageError> {
        let Some(channel) = &self.channel else { return Ok(()) };
        let mut header = [0; 12];
        match message::receive(channel.as_fd(), &mut header) {
            // All holders of the other end are gone: so will be the connection.
            Ok((0, _)) | Err(MessageError::Closed) => {
                self.channel = None;
                Ok(())
            }
            Ok((12, _)) if header[..4] == id::CONFIG_CHANGE.to_le_bytes() => {
                self.look()?;
                self.shared.counters.config_changes.fetch_add(1, SeqCst);
                Ok(())
            }
            Ok(_) => Err(MessageError::Wrong(format!("the channel says {header:?}"))),
            Err(error) => Err(error),
        }
    }

    fn obey(&mut self) -> Result<bool, MessageError> {
        match self.shared.next_command() {
            None => {}
            Some(Command::End) => return Ok(false),
            Some(Command::Churn(seed)) => self.churn = seed.map(Dice::new),
            Some(Command::Perform(control, done)) => {
                let result = self.perform(control);
                // One that broke off with its connection is done by the next one's beginning.
                if matches!(result, Err(MessageError::Closed)) {
                    self.shared.counters.losses.fetch_add(1, SeqCst);
                    self.connect_again()?;
                } else {
                    result?;
                }
                let _ = done.send(());
            }
        }
        Ok(true)
    }

    fn perform(&mut self, control: Control) -> Result<(), MessageError> {
        match control {
            Control::RestartRing(ring) => {
                let base = self.stop_ring(ring)?;
                self.start_ring(ring, base)?;
            }
            Control::PauseRing(ring) => {
                let state = |number| Payload::default().u32(ring as u32).u32(number);
                self.tell(id::SET_VRING_ENABLE, &state(0), &[])?;
                self.tell(id::SET_VRING_ENABLE, &state(1), &[])?;
            }
            Control::ReplaceKick(ring) => {
                let number = Payload::default().u64(ring as u64);
                self.shared.replace_kick(ring, |fd| {
                    self.tell(id::SET_VRING_KICK, &number, &[fd])?;
                    self.settle()
                })?;
            }
            Control::ReplaceCall(ring) => {
                let number = Payload::default().u64(ring as u64);
                self.shared.replace_call(ring, |fd| {
                    self.tell(id::SET_VRING_CALL, &number, &[fd])?;
                    self.settle()
                })?;
            }
            Control::SetMemory => self.set_memory()?,
            Control::AddRegion if !self.has_spare && self.has(protocol::MEM_SLOTS) => {
                self.has_spare = true;
                let region = Payload::default().u64(0).region(&SPARE);
                self.tell(id::ADD_MEM_REG, &region, &[self.spare.fd()])?;
            }
            Control::RemoveRegion if self.has_spare && self.has(protocol::MEM_SLOTS) => {
                self.has_spare = false;
                self.tell(id::REM_MEM_REG, &Payload::default().u64(0).region(&SPARE), &[])?;
            }
            Control::AddRegion | Control::RemoveRegion => {}
            Control::Look => _ = (self.look()?, self.settle()?),
            Control::Reconnect => {
                self.socket = None;
                self.connect_again()?;
            }
        }
        self.shared.counters.controls.fetch_add(1, SeqCst);
        Ok(())
    }

    /// Where it stopped. Nothing is in flight then: what was taken is answered.
    fn stop_ring(&mut self, ring: usize) -> Result<u32, MessageError> {
        let asked = Payload::default().u32(ring as u32).u32(0);
        let (reply, _) = self.ask(id::GET_VRING_BASE, &asked)?;
        let base = (number(&reply)? >> 32) as u32;
        let Some(rings) = &self.rings else { return Ok(base) };
        let used = match rings.kind.is_packed {
            true => base >> 16,
            false => rings.memory.load_u16(rings.plan.rings[ring].used + 2, Acquire).into(),
        };
        if base & 0xffff != used {
            let what = format!("ring {ring} stopped at {base:#x} with {used:#x} answered");
            return Err(MessageError::Wrong(what));
        }
        self.bases[ring] = base;
        Ok(base)
    }
}

impl From<io::Error> for MessageError {
    fn from(source: io::Error) -> MessageError {
        MessageError::System { action: "make a doorbell for", source }
    }
}
