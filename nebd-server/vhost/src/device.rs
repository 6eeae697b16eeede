//! What was agreed on with a hypervisor, and what its messages change of it.
//!
//! [`Device::handle`] is a function of state and message: it does no IO. What is to be done in the world
//! (map memory, watch a doorbell, stop a ring) it returns as an [`Action`]. The state goes into the
//! journal with each message, and a successor begins with it.
//!
//! Acting twice on one message comes to the same, for a successor may do so. Hence a region that is
//! added again replaces itself, and one that is removed again is no error.
//!
//! A ring runs once it has a size, addresses, a kick and is enabled ([`Device::ring_setup`]); it stops by
//! `GET_VRING_BASE`, when what it has in flight has ended ([`Device::stopped`]).

use std::os::fd::OwnedFd;

use crate::memory::RegionSpec;
use crate::message::{
    ConfigPiece, InflightDescription, Input, Message, Output, Reply, RingAddresses, RingFd,
    RingState, protocol,
};
use crate::queue::{QUEUE_SIZE_MAX, QueueSetup};
use crate::request::{Agreement, CONFIG_BYTES_MAX, Disk, F_PROTOCOL_FEATURES};

/// Regions of memory that we ask for at most.
pub const MEMORY_SLOTS: u64 = 32;
/// The version of a state's bytes.
const STATE_VERSION: u32 = 1;
/// Queues that a device may have: a ring's index has 8 bits in some messages.
const RINGS_MAX: u32 = 256;
/// Live migration, in the flags of `SET_CONFIG`.
const CONFIG_MIGRATION: u32 = 1;

/// Why a message is refused. It is acknowledged as such, if the hypervisor asked for that; otherwise the
/// connection is to be closed if [`is_fatal`](Refusal::is_fatal).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Features that were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// A ring that the device does not have.
    #[error("there is no ring {0}")]
    Ring(u32),
    /// A size or base that a ring cannot have.
    #[error("a ring cannot have {0:#x} there")]
    RingNumber(u32),
    /// More regions than there are slots.
    #[error("more regions of memory than slots")]
    Slots,
    /// A field of the configuration space that may not be written.
    #[error("the configuration space is not written at {0}")]
    Config(u32),
    /// A message that belongs to a feature which was not offered.
    #[error("message {0} was not agreed on")]
    Message(u32),
}

impl Refusal {
    /// Whether the hypervisor would wait for ever, or go on under a wrong impression.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Refusal::Config(_))
    }
}

/// What a message makes necessary.
#[derive(Debug)]
pub enum Action {
    /// Nothing.
    None,
    /// Say this.
    Reply(Reply),
    /// The guest's memory is now these regions.
    SetMemory(Vec<(RegionSpec, OwnedFd)>),
    /// The guest's memory has one region more.
    AddMemory(RegionSpec, OwnedFd),
    /// The guest's memory has one region less.
    RemoveMemory(RegionSpec),
    /// A ring's doorbell: the kick (which starts it), the call, the error.
    Doorbell(u32, Doorbell, Option<OwnedFd>),
    /// A ring is enabled, or is not.
    Enable(u32, bool),
    /// Stop a ring; when nothing is in flight, [`Device::stopped`] has the reply.
    Stop(u32),
    /// Make an inflight record; [`Device::recorded`] has the reply.
    CreateInflight(InflightDescription),
    /// Use this inflight record.
    SetInflight(InflightDescription, OwnedFd),
    /// The socket for what we have to say.
    SetChannel(OwnedFd),
    /// The guest has chosen how writes are cached.
    Writeback(bool),
    /// All rings have stopped for good: end what is in flight, and forget the inflight record.
    Reset,
}

/// Which doorbell of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// The driver rings it.
    Kick,
    /// We ring it.
    Call,
    /// We ring it over an error.
    Error,
}

/// What is known of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Descriptors.
    pub size: u16,
    /// Where to begin.
    pub base: u32,
    /// User addresses: descriptors, available, used.
    pub addresses: [u64; 3],
    /// Whether the hypervisor wants it to run.
    pub enabled: bool,
    /// Whether it was kicked off.
    pub started: bool,
    /// Which doorbells it has: kick, call, error.
    pub doorbells: [bool; 3],
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Virtio features.
    pub features: u64,
    /// Protocol features.
    pub protocol_features: u64,
    /// Virtio device status.
    pub status: u8,
    /// The guest's choice of caching.
    pub writeback: bool,
    /// Whether there is a socket for what we have to say.
    pub has_channel: bool,
    /// The inflight record.
    pub inflight: Option<InflightDescription>,
    /// The guest's memory.
    pub regions: Vec<RegionSpec>,
    /// The rings.
    pub rings: Vec<Ring>,
}

/// A disk, as one hypervisor uses it.
#[derive(Clone, Debug)]
pub struct Device {
    disk: Disk,
    state: State,
}

impl Device {
    /// A device of which nothing is known yet.
    pub fn new(disk: Disk) -> Device {
        let rings = vec![Ring::default(); disk.queues.into()];
        let state = State {
            features: 0,
            protocol_features: 0,
            status: 0,
            writeback: true,
            has_channel: false,
            inflight: None,
            regions: Vec::new(),
            rings,
        };
        Device { disk, state }
    }

    /// A device as a predecessor left it; an empty state is a new device's. `None` if the state is damaged,
    /// or of another device.
    pub fn restore(disk: Disk, state: &[u8]) -> Option<Device> {
        if state.is_empty() {
            return Some(Device::new(disk));
        }
        let state = State::decode(state)?;
        (state.rings.len() == usize::from(disk.queues)).then_some(Device { disk, state })
    }

    /// What was agreed on.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The disk has another size; the hypervisor is to be told
    /// ([`config_changed`](crate::message::config_changed)) if true.
    pub fn resize(&mut self, size: u64) -> bool {
        self.disk.size = size;
        self.state.has_channel && self.has(protocol::CONFIG)
    }

    /// What requests are subject to.
    pub fn agreement(&self) -> Agreement {
        Agreement { features: self.state.features, writeback: self.state.writeback }
    }

    /// How a ring is to be started; `None` while it is not to run.
    pub fn ring_setup(&self, index: u32) -> Option<QueueSetup> {
        let ring = self.state.rings.get(index as usize)?;
        let [descriptors, available, used] = ring.addresses;
        let is_ready = ring.started && ring.enabled && ring.size > 0 && descriptors != 0;
        is_ready.then_some(QueueSetup {
            size: ring.size,
            descriptors,
            available,
            used,
            base: ring.base,
            features: self.state.features,
        })
    }

    fn has(&self, feature: u64) -> bool {
        self.state.protocol_features & feature != 0
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring, Refusal> {
        self.state.rings.get_mut(index as usize).ok_or(Refusal::Ring(index))
    }

    /// The acknowledgement of a message that has no reply of its own, if one is wanted.
    pub fn acknowledgement(
        &self,
        message: &Message,
        need_reply: bool,
        is_done: bool,
    ) -> Option<Reply> {
        let is_wanted = need_reply && self.has(protocol::REPLY_ACK) && !message.has_reply();
        is_wanted.then_some(Reply::Number(u64::from(!is_done)))
    }

    /// Takes note of a message.
    pub fn handle(&mut self, message: &Message, fds: Vec<OwnedFd>) -> Result<Action, Refusal> {
        let mut fds = fds.into_iter();
        let number = |number| Ok(Action::Reply(Reply::Number(number)));
        match message {
            Message::GetFeatures => number(self.disk.features()),
            Message::GetProtocolFeatures => number(protocol::OFFERED),
            Message::GetQueueNum => number(self.disk.queues.into()),
            Message::GetMaxMemSlots => number(MEMORY_SLOTS),
            Message::GetStatus => number(self.state.status.into()),
            Message::SetOwner | Message::ResetOwner => Ok(Action::None),
            Message::SetFeatures(features) => self.set_features(*features),
            Message::SetProtocolFeatures(features) => self.set_protocol_features(*features),
            Message::SetStatus(status) => {
                self.state.status = *status as u8;
                Ok(Action::None)
            }
            Message::ResetDevice => Ok(self.reset()),
            Message::SetMemTable(regions) => {
                self.state.regions.clone_from(regions);
                Ok(Action::SetMemory(regions.iter().copied().zip(fds).collect()))
            }
            Message::AddMemReg(region) => self.add_region(*region, fds.next()),
            Message::RemMemReg(region) => {
                self.state.regions.retain(|known| !known.is_same_as(region));
                Ok(Action::RemoveMemory(*region))
            }
            Message::SetVringNum(state) => self.set_size(*state),
            Message::SetVringAddr(addresses) => self.set_addresses(addresses),
            Message::SetVringBase(state) => {
                self.ring(state.index)?.base = state.number;
                Ok(Action::None)
            }
            Message::GetVringBase(state) => {
                self.ring(state.index)?;
                Ok(Action::Stop(state.index))
            }
            Message::SetVringKick(ring) => self.set_doorbell(*ring, Doorbell::Kick, fds.next()),
            Message::SetVringCall(ring) => self.set_doorbell(*ring, Doorbell::Call, fds.next()),
            Message::SetVringErr(ring) => self.set_doorbell(*ring, Doorbell::Error, fds.next()),
            Message::SetVringEnable(state) => self.enable(*state),
            Message::GetConfig(piece) => Ok(Action::Reply(Reply::Config(self.config(piece)))),
            Message::SetConfig(piece) => self.set_config(piece),
            Message::GetInflightFd(inflight) => {
                self.check_inflight(inflight)?;
                Ok(Action::CreateInflight(*inflight))
            }
            Message::SetInflightFd(inflight) => {
                self.check_inflight(inflight)?;
                let fd = fds.next().ok_or(Refusal::Message(message.id()))?;
                self.state.inflight = Some(*inflight);
                Ok(Action::SetInflight(*inflight, fd))
            }
            Message::SetBackendReqFd => {
                let fd = fds.next().ok_or(Refusal::Message(message.id()))?;
                self.state.has_channel = true;
                Ok(Action::SetChannel(fd))
            }
            // The dirty log and postcopy were not offered.
            Message::SetLogBase
            | Message::SetLogFd
            | Message::Postcopy(_)
            | Message::Unknown(_) => Err(Refusal::Message(message.id())),
        }
    }

    /// A record has memory for as many queues as are asked for.
    fn check_inflight(&self, inflight: &InflightDescription) -> Result<(), Refusal> {
        if !(1..=self.disk.queues).contains(&inflight.queues) {
            return Err(Refusal::RingNumber(inflight.queues.into()));
        }
        if !(1..=QUEUE_SIZE_MAX).contains(&inflight.queue_size) {
            return Err(Refusal::RingNumber(inflight.queue_size.into()));
        }
        Ok(())
    }

    fn set_features(&mut self, features: u64) -> Result<Action, Refusal> {
        let strange = features & !self.disk.features();
        if strange != 0 {
            return Err(Refusal::Features(strange));
        }
        self.state.features = features;
        Ok(Action::None)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<Action, Refusal> {
        let strange = features & !protocol::OFFERED;
        if strange != 0 {
            return Err(Refusal::Features(strange));
        }
        self.state.protocol_features = features;
        Ok(Action::None)
    }

    fn reset(&mut self) -> Action {
        let rings = vec![Ring::default(); self.state.rings.len()];
        self.state =
            State { status: 0, writeback: true, inflight: None, rings, ..self.state.clone() };
        Action::Reset
    }

    fn add_region(&mut self, region: RegionSpec, fd: Option<OwnedFd>) -> Result<Action, Refusal> {
        let fd = fd.ok_or(Refusal::Slots)?;
        self.state.regions.retain(|known| !known.is_same_as(&region));
        if self.state.regions.len() as u64 >= MEMORY_SLOTS {
            return Err(Refusal::Slots);
        }
        self.state.regions.push(region);
        Ok(Action::AddMemory(region, fd))
    }

    fn set_size(&mut self, state: RingState) -> Result<Action, Refusal> {
        let ring = self.ring(state.index)?;
        let size =
            u16::try_from(state.number).ok().filter(|size| (1..=QUEUE_SIZE_MAX).contains(size));
        ring.size = size.ok_or(Refusal::RingNumber(state.number))?;
        Ok(Action::None)
    }

    fn set_addresses(&mut self, addresses: &RingAddresses) -> Result<Action, Refusal> {
        let ring = self.ring(addresses.index)?;
        ring.addresses = [addresses.descriptors, addresses.available, addresses.used];
        Ok(Action::None)
    }

    fn set_doorbell(
        &mut self,
        ring: RingFd,
        doorbell: Doorbell,
        fd: Option<OwnedFd>,
    ) -> Result<Action, Refusal> {
        let enables = self.state.features & F_PROTOCOL_FEATURES == 0;
        let known = self.ring(ring.index)?;
        known.doorbells[doorbell as usize] = fd.is_some();
        if doorbell == Doorbell::Kick {
            known.started = true;
            known.enabled |= enables;
        }
        Ok(Action::Doorbell(ring.index, doorbell, fd))
    }

    fn enable(&mut self, state: RingState) -> Result<Action, Refusal> {
        if state.number > 1 {
            return Err(Refusal::RingNumber(state.number));
        }
        self.ring(state.index)?.enabled = state.number == 1;
        Ok(Action::Enable(state.index, state.number == 1))
    }

    fn config(&self, piece: &ConfigPiece) -> Option<ConfigPiece> {
        let start = piece.offset as usize;
        let end = start.checked_add(piece.bytes.len()).filter(|end| *end <= CONFIG_BYTES_MAX)?;
        let mut space = [0; CONFIG_BYTES_MAX];
        let config = self.disk.config(self.state.writeback);
        space[..config.len()].copy_from_slice(&config);
        Some(ConfigPiece { bytes: space[start..end].to_vec(), ..*piece })
    }

    fn set_config(&mut self, piece: &ConfigPiece) -> Result<Action, Refusal> {
        if piece.flags == CONFIG_MIGRATION {
            // What arrives there is what a server of ours had sent.
            return Ok(Action::None);
        }
        let writeback = self.disk.config_write(piece.offset, &piece.bytes);
        self.state.writeback = writeback.ok_or(Refusal::Config(piece.offset))?;
        Ok(Action::Writeback(self.state.writeback))
    }

    /// A ring has stopped, nothing of it is in flight, and it would go on at `base`; for one that never
    /// ran, `None`. The reply to `GET_VRING_BASE`.
    pub fn stopped(&mut self, index: u32, base: Option<u32>) -> Reply {
        let number = match self.state.rings.get_mut(index as usize) {
            Some(ring) => {
                ring.started = false;
                ring.doorbells[Doorbell::Kick as usize] = false;
                ring.base = base.unwrap_or(ring.base);
                ring.base
            }
            None => 0,
        };
        Reply::Ring(RingState { index, number })
    }

    /// A ring does not run for now, nothing of it is in flight, and it would go on at `base`.
    pub fn paused(&mut self, index: u32, base: u32) {
        if let Some(ring) = self.state.rings.get_mut(index as usize) {
            ring.base = base;
        }
    }

    /// An inflight record was made. The reply to `GET_INFLIGHT_FD`, to go with its descriptor. It is used
    /// once the hypervisor gives it back.
    pub fn recorded(&self, asked: &InflightDescription, mmap_size: u64) -> Reply {
        Reply::Inflight(InflightDescription { mmap_size, mmap_offset: 0, ..*asked })
    }
}

impl State {
    /// Its bytes, for the journal.
    pub fn encode(&self) -> Vec<u8> {
        let mut output = Output(Vec::with_capacity(256));
        let flags = u32::from(self.writeback)
            | u32::from(self.has_channel) << 1
            | u32::from(self.inflight.is_some()) << 2
            | u32::from(self.status) << 8;
        output.u32(STATE_VERSION).u32(flags).u64(self.features).u64(self.protocol_features);
        let inflight = self.inflight.unwrap_or_default();
        output.u64(inflight.mmap_size).u64(inflight.mmap_offset);
        output.u16(inflight.queues).u16(inflight.queue_size).u32(inflight.is_padded.into());
        output.u32(self.regions.len() as u32).u32(self.rings.len() as u32);
        self.regions.iter().fold(&mut output, Output::region);
        for ring in &self.rings {
            let [kick, call, error] = ring.doorbells.map(u16::from);
            let flags = u16::from(ring.enabled)
                | u16::from(ring.started) << 1
                | kick << 2
                | call << 3
                | error << 4;
            output.u16(ring.size).u16(flags).u32(ring.base);
            ring.addresses.iter().fold(&mut output, |output, address| output.u64(*address));
        }
        output.0
    }

    /// From its bytes; `None` if they are none.
    pub fn decode(bytes: &[u8]) -> Option<State> {
        const HEADER: usize = 56;
        let mut input = Input(bytes);
        if bytes.len() < HEADER || input.u32() != STATE_VERSION {
            return None;
        }
        let flags = input.u32();
        let (features, protocol_features) = (input.u64(), input.u64());
        let inflight = InflightDescription {
            mmap_size: input.u64(),
            mmap_offset: input.u64(),
            queues: input.u16(),
            queue_size: input.u16(),
            is_padded: input.u32() != 0,
        };
        let (regions, rings) = (input.u32(), input.u32());
        let is_whole = u64::from(regions) <= MEMORY_SLOTS
            && rings <= RINGS_MAX
            && bytes.len() == HEADER + 32 * (regions + rings) as usize;
        if !is_whole {
            return None;
        }
        Some(State {
            features,
            protocol_features,
            status: (flags >> 8) as u8,
            writeback: flags & 1 != 0,
            has_channel: flags & 2 != 0,
            inflight: (flags & 4 != 0).then_some(inflight),
            regions: (0..regions).map(|_| input.region()).collect(),
            rings: (0..rings).map(|_| decode_ring(&mut input)).collect(),
        })
    }
}

fn decode_ring(input: &mut Input<'_>) -> Ring {
    let (size, flags) = (input.u16(), input.u16());
    let has = |bit: u16| flags & 1 << bit != 0;
    Ring {
        size,
        enabled: has(0),
        started: has(1),
        doorbells: [has(2), has(3), has(4)],
        base: input.u32(),
        addresses: [input.u64(), input.u64(), input.u64()],
    }
}

#[cfg(test)]
mod tests;
