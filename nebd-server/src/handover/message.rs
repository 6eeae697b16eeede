//! What two servers say to each other; `docs/formats.md` has the numbers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nebd_abi::Generation;
use nebd_abi::layout::SessionId;

use super::wire::{self, Fields, REQUIRED, WireError};

/// The version of the handover that this server speaks.
pub const VERSION: u32 = 1;
/// The oldest that it still speaks: one release back.
pub const VERSION_MIN: u32 = 1;

/// What a candidate is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To take over.
    Takeover = 1,
    /// To come as far as READY, and go.
    DryRun = 2,
    /// To say whether it supports who is attached.
    Check = 3,
}

/// A client that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its session.
    pub session: SessionId,
    /// Its volume.
    pub volume: String,
    /// Its process.
    pub pid: u32,
    /// Version of its library.
    pub version: String,
    /// Layout of its region.
    pub layout: u32,
    /// Features that a server must know to serve it.
    pub features_required: u64,
}

/// The first message, the owner's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions of the handover that it speaks.
    pub versions: (u32, u32),
    /// What the candidate is for.
    pub purpose: Purpose,
    /// The owner's generation.
    pub generation: Generation,
    /// The owner's process.
    pub pid: u32,
    /// The owner's version, for people.
    pub build: String,
    /// The owner's binary.
    pub binary: String,
    /// Whether a keeper or service manager holds what is stored.
    pub has_store: bool,
    /// A volume that the candidate reads more of; empty for none.
    pub canary: String,
    /// Who is attached.
    pub clients: Vec<Client>,
}

/// The candidate can do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version to be spoken.
    pub version: u32,
    /// The candidate's version, for people.
    pub build: String,
    /// The sessions that it cannot serve, and why.
    pub unsupported: Vec<(SessionId, String)>,
}

/// Entries of the store, each with its descriptor, and names that are gone.
#[derive(Debug, Default)]
pub struct Offer {
    /// Name and descriptor.
    pub entries: Vec<(String, OwnedFd)>,
    /// Offered before, and not there any more.
    pub removed: Vec<String>,
}

/// What the candidate has prepared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Volumes that were opened as an observer and read.
    pub volumes: u32,
    /// Sessions that are mapped.
    pub sessions: u32,
    /// Volumes or sessions that cannot be had, and why.
    pub failures: Vec<(String, String)>,
}

/// The owner does nothing any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// The report so far: `nebd.admin.v1.Upgrade`.
    pub report: Vec<u8>,
    /// The last completion of each session, by the monotonic clock, in nanoseconds.
    pub last_ns: Vec<(SessionId, u64)>,
    /// Sessions that still have requests at their storage: the locks of their volumes come later.
    pub left: Vec<SessionId>,
    /// How long the new server is on probation, in milliseconds.
    pub probation_ms: u64,
}

/// A message.
#[derive(Debug)]
pub enum Message {
    /// Owner.
    Hello(Hello),
    /// Candidate.
    Welcome(Welcome),
    /// Candidate, in place of [`Message::Welcome`]: it cannot.
    Refused(String),
    /// Owner; more may follow.
    Offer(Offer),
    /// Owner: all has been offered; prepare.
    Prepare,
    /// Candidate.
    Prepared(Prepared),
    /// Owner. The candidate claims the generation.
    Frozen(Frozen),
    /// Candidate: the claim is made; the owner unlocks.
    Fenced(Generation),
    /// Owner, before [`Message::Frozen`]: connections of clients, each with the session that it
    /// speaks for. A candidate that does not know it closes them, and the clients connect again.
    Connections(Vec<(SessionId, OwnedFd)>),
    /// Owner: it has unlocked what had nothing at its storage any more.
    Released,
    /// Candidate: what can be served is served.
    Resumed,
    /// Candidate, after [`Message::Resumed`]: the service manager knows it, the owner may exit.
    Settled,
    /// Owner: the candidate is to exit.
    Dismissed(String),
}

const fn kind(number: u16) -> u16 {
    REQUIRED | number
}

const HELLO: u16 = kind(1);
const WELCOME: u16 = kind(2);
const REFUSED: u16 = kind(3);
const OFFER: u16 = kind(4);
const PREPARE: u16 = kind(5);
const PREPARED: u16 = kind(6);
const FROZEN: u16 = kind(7);
const FENCED: u16 = kind(8);
const RESUMED: u16 = kind(9);
const DISMISSED: u16 = kind(10);
const RELEASED: u16 = kind(11);
/// Optional.
const CONNECTIONS: u16 = 12;
const SETTLED: u16 = 13;

/// Tags. Those of different messages do not overlap, so that a field has one meaning.
mod tag {
    use super::REQUIRED;

    pub(super) const VERSION_MIN: u16 = REQUIRED | 1;
    pub(super) const VERSION: u16 = REQUIRED | 2;
    pub(super) const PURPOSE: u16 = REQUIRED | 3;
    pub(super) const GENERATION: u16 = REQUIRED | 4;
    pub(super) const PID: u16 = 5;
    pub(super) const BUILD: u16 = 6;
    pub(super) const BINARY: u16 = 7;
    pub(super) const HAS_STORE: u16 = REQUIRED | 8;
    pub(super) const CANARY: u16 = 9;
    pub(super) const CLIENT: u16 = REQUIRED | 10;
    pub(super) const UNSUPPORTED: u16 = REQUIRED | 11;
    pub(super) const REASON: u16 = 12;
    pub(super) const NAME: u16 = REQUIRED | 13;
    pub(super) const REMOVED: u16 = REQUIRED | 14;
    pub(super) const MANIFEST: u16 = REQUIRED | 15;
    pub(super) const VOLUMES: u16 = 16;
    pub(super) const SESSIONS: u16 = 17;
    pub(super) const FAILURE: u16 = REQUIRED | 18;
    pub(super) const REPORT: u16 = 19;
    pub(super) const LAST: u16 = 20;
    pub(super) const PROBATION: u16 = 21;
    pub(super) const LEFT: u16 = 22;
    pub(super) const SPEAKS_FOR: u16 = REQUIRED | 23;
    /// Within CLIENT, UNSUPPORTED, FAILURE and LAST.
    pub(super) const SESSION: u16 = REQUIRED | 32;
    pub(super) const VOLUME: u16 = REQUIRED | 33;
    pub(super) const CLIENT_PID: u16 = 34;
    pub(super) const CLIENT_VERSION: u16 = 35;
    pub(super) const LAYOUT: u16 = REQUIRED | 36;
    pub(super) const FEATURES: u16 = REQUIRED | 37;
    pub(super) const WHY: u16 = 38;
    pub(super) const TIME: u16 = REQUIRED | 39;
}

impl Message {
    /// Sends it until `deadline`.
    pub fn send(&self, socket: impl AsFd, deadline: Instant) -> Result<(), WireError> {
        let (kind, fields) = self.encode();
        let fds: Vec<BorrowedFd<'_>> = match self {
            Message::Offer(offer) => offer.entries.iter().map(|(_, fd)| fd.as_fd()).collect(),
            Message::Connections(entries) => entries.iter().map(|(_, fd)| fd.as_fd()).collect(),
            _ => Vec::new(),
        };
        wire::send(socket, kind, fields.bytes(), &fds, deadline)
    }

    /// Receives one until `deadline`; optional kinds of a later version are skipped.
    pub fn receive(socket: impl AsFd, deadline: Instant) -> Result<Message, WireError> {
        let start = Instant::now();
        loop {
            let received = wire::receive(&socket, deadline)?;
            match Message::decode(received.kind, &received.body, received.fds) {
                Err(WireError::Unknown { what: "message", number }) if number & REQUIRED == 0 => {}
                result => return result,
            }
            // The next may be there already, and the one after it: that must come to an end.
            if Instant::now() >= deadline {
                return Err(WireError::Late(start.elapsed()));
            }
        }
    }

    /// Its kind and fields; descriptors travel beside them.
    pub fn encode(&self) -> (u16, Fields) {
        let fields = Fields::new();
        match self {
            Message::Hello(hello) => (HELLO, hello.encode()),
            Message::Welcome(welcome) => {
                let mut fields = fields
                    .with(tag::VERSION, welcome.version.to_le_bytes())
                    .with(tag::BUILD, &welcome.build);
                for (session, why) in &welcome.unsupported {
                    let inner = Fields::new().with(tag::SESSION, session.0).with(tag::WHY, why);
                    fields.push(tag::UNSUPPORTED, inner.bytes());
                }
                (WELCOME, fields)
            }
            Message::Refused(reason) => (REFUSED, fields.with(tag::REASON, reason)),
            Message::Offer(offer) => {
                let names: Vec<&str> = offer.entries.iter().map(|(name, _)| &**name).collect();
                (OFFER, encode_offer(&names, &offer.removed))
            }
            Message::Prepare => (PREPARE, fields),
            Message::Prepared(prepared) => {
                let mut fields = fields
                    .with(tag::VOLUMES, prepared.volumes.to_le_bytes())
                    .with(tag::SESSIONS, prepared.sessions.to_le_bytes());
                for (what, why) in &prepared.failures {
                    let inner = Fields::new().with(tag::VOLUME, what).with(tag::WHY, why);
                    fields.push(tag::FAILURE, inner.bytes());
                }
                (PREPARED, fields)
            }
            Message::Frozen(frozen) => {
                let mut fields = fields
                    .with(tag::REPORT, &frozen.report)
                    .with(tag::PROBATION, frozen.probation_ms.to_le_bytes());
                for (session, ns) in &frozen.last_ns {
                    let inner = Fields::new();
                    let inner =
                        inner.with(tag::SESSION, session.0).with(tag::TIME, ns.to_le_bytes());
                    fields.push(tag::LAST, inner.bytes());
                }
                for session in &frozen.left {
                    fields.push(tag::LEFT, session.0);
                }
                (FROZEN, fields)
            }
            Message::Fenced(generation) => {
                (FENCED, fields.with(tag::GENERATION, generation.0.to_le_bytes()))
            }
            Message::Connections(entries) => {
                let mut fields = fields;
                for (session, _) in entries {
                    fields.push(tag::SPEAKS_FOR, session.0);
                }
                (CONNECTIONS, fields)
            }
            Message::Released => (RELEASED, fields),
            Message::Resumed => (RESUMED, fields),
            Message::Settled => (SETTLED, fields),
            Message::Dismissed(reason) => (DISMISSED, fields.with(tag::REASON, reason)),
        }
    }

    /// Reads a message. Never trusts a number in it.
    pub fn decode(kind: u16, body: &[u8], fds: Vec<OwnedFd>) -> Result<Message, WireError> {
        match kind {
            HELLO => Hello::decode(body).map(Message::Hello),
            WELCOME => decode_welcome(body).map(Message::Welcome),
            REFUSED => reason(body).map(Message::Refused),
            OFFER => decode_offer(body, fds).map(Message::Offer),
            PREPARE => wire::parse(body, &[]).map(|_| Message::Prepare),
            PREPARED => decode_prepared(body).map(Message::Prepared),
            FROZEN => decode_frozen(body).map(Message::Frozen),
            FENCED => {
                let fields = wire::parse(body, &[tag::GENERATION])?;
                Ok(Message::Fenced(Generation(short(find(&fields, tag::GENERATION)?)?)))
            }
            CONNECTIONS => {
                let fields = wire::parse(body, &[tag::SPEAKS_FOR])?;
                let sessions = fields.iter().map(|(_, value)| session(value));
                let sessions = sessions.collect::<Result<Vec<_>, _>>()?;
                if sessions.len() != fds.len() {
                    return Err(WireError::Damaged("there are not as many connections as names"));
                }
                Ok(Message::Connections(sessions.into_iter().zip(fds).collect()))
            }
            RELEASED => wire::parse(body, &[]).map(|_| Message::Released),
            SETTLED => wire::parse(body, &[]).map(|_| Message::Settled),
            RESUMED => wire::parse(body, &[]).map(|_| Message::Resumed),
            DISMISSED => reason(body).map(Message::Dismissed),
            number => Err(WireError::Unknown { what: "message", number }),
        }
    }
}

impl Hello {
    fn encode(&self) -> Fields {
        let mut fields = Fields::new()
            .with(tag::VERSION_MIN, self.versions.0.to_le_bytes())
            .with(tag::VERSION, self.versions.1.to_le_bytes())
            .with(tag::PURPOSE, [self.purpose as u8])
            .with(tag::GENERATION, self.generation.0.to_le_bytes())
            .with(tag::PID, self.pid.to_le_bytes())
            .with(tag::BUILD, &self.build)
            .with(tag::BINARY, &self.binary)
            .with(tag::HAS_STORE, [u8::from(self.has_store)])
            .with(tag::CANARY, &self.canary);
        for client in &self.clients {
            let inner = Fields::new()
                .with(tag::SESSION, client.session.0)
                .with(tag::VOLUME, &client.volume)
                .with(tag::CLIENT_PID, client.pid.to_le_bytes())
                .with(tag::CLIENT_VERSION, &client.version)
                .with(tag::LAYOUT, client.layout.to_le_bytes())
                .with(tag::FEATURES, client.features_required.to_le_bytes());
            fields.push(tag::CLIENT, inner.bytes());
        }
        fields
    }

    fn decode(body: &[u8]) -> Result<Hello, WireError> {
        use tag::{
            BINARY, BUILD, CANARY, CLIENT, GENERATION, HAS_STORE, PID, PURPOSE, VERSION,
            VERSION_MIN,
        };
        // The versions come first: a peer that is too far apart is refused for that, not for a
        // field that it had good reason to send.
        let versions = versions(body)?;
        let known = [
            VERSION_MIN,
            VERSION,
            PURPOSE,
            GENERATION,
            PID,
            BUILD,
            BINARY,
            HAS_STORE,
            CANARY,
            CLIENT,
        ];
        let fields = wire::parse(body, &known)?;
        let optional = |tag| find(&fields, tag).unwrap_or_default();
        let clients = fields.iter().filter(|(tag, _)| *tag == CLIENT);
        Ok(Hello {
            versions,
            purpose: match wire::number(find(&fields, PURPOSE)?)? {
                1 => Purpose::Takeover,
                2 => Purpose::DryRun,
                3 => Purpose::Check,
                _ => return Err(WireError::Damaged("a purpose that is none")),
            },
            generation: owned(short(find(&fields, GENERATION)?)?)?,
            pid: process(short(optional(PID))?)?,
            build: wire::text(optional(BUILD))?,
            binary: wire::text(optional(BINARY))?,
            has_store: wire::number(find(&fields, HAS_STORE)?)? != 0,
            canary: wire::text(optional(CANARY))?,
            clients: clients.map(|(_, value)| decode_client(value)).collect::<Result<_, _>>()?,
        })
    }
}

/// The versions that a Hello names, whatever else is in it.
fn versions(body: &[u8]) -> Result<(u32, u32), WireError> {
    let mut rest = body;
    let mut found = (None, None);
    while let Some((header, tail)) = rest.split_at_checked(8) {
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let (value, tail) = tail
            .split_at_checked(length)
            .ok_or(WireError::Damaged("a field beyond its message"))?;
        rest = tail;
        match u16::from_le_bytes([header[0], header[1]]) {
            tag::VERSION_MIN => found.0 = Some(short(value)?),
            tag::VERSION => found.1 = Some(short(value)?),
            _ => {}
        }
    }
    let oldest = found.0.ok_or(WireError::Missing(tag::VERSION_MIN))?;
    let newest = found.1.ok_or(WireError::Missing(tag::VERSION))?;
    if newest < VERSION_MIN || oldest > VERSION {
        return Err(WireError::Versions { theirs: (oldest, newest) });
    }
    Ok((oldest, newest))
}

/// The fields of an offer, and a checksum over its names: a descriptor under a wrong name would be
/// somebody else's disk.
pub fn encode_offer(names: &[&str], removed: &[String]) -> Fields {
    let mut fields = Fields::new();
    for name in names {
        fields.push(tag::NAME, name);
    }
    for name in removed {
        fields.push(tag::REMOVED, name);
    }
    fields.with(tag::MANIFEST, manifest(names).to_le_bytes())
}

/// The checksum of an offer's names.
fn manifest(names: &[impl AsRef<str>]) -> u32 {
    names.iter().fold(0, |checksum, name| {
        let checksum = crc32c::crc32c_append(checksum, name.as_ref().as_bytes());
        crc32c::crc32c_append(checksum, b"\n")
    })
}

/// Sends entries of the store without a duplicate of each descriptor.
pub fn send_offer(
    socket: impl AsFd,
    entries: &[(&str, BorrowedFd<'_>)],
    removed: &[String],
    deadline: Instant,
) -> Result<(), WireError> {
    let names: Vec<&str> = entries.iter().map(|(name, _)| *name).collect();
    let fds: Vec<BorrowedFd<'_>> = entries.iter().map(|(_, fd)| *fd).collect();
    wire::send(socket, OFFER, encode_offer(&names, removed).bytes(), &fds, deadline)
}

fn decode_offer(body: &[u8], fds: Vec<OwnedFd>) -> Result<Offer, WireError> {
    let fields = wire::parse(body, &[tag::NAME, tag::REMOVED, tag::MANIFEST])?;
    let texts = |wanted| {
        let values = fields.iter().filter(move |(tag, _)| *tag == wanted);
        values.map(|(_, value)| wire::text(value)).collect::<Result<Vec<String>, _>>()
    };
    let names = texts(tag::NAME)?;
    if short(find(&fields, tag::MANIFEST)?)? != manifest(&names) {
        return Err(WireError::Damaged("the manifest's checksum does not match"));
    }
    if names.len() != fds.len() {
        return Err(WireError::Damaged("there are not as many descriptors as names"));
    }
    Ok(Offer { entries: names.into_iter().zip(fds).collect(), removed: texts(tag::REMOVED)? })
}

fn decode_client(value: &[u8]) -> Result<Client, WireError> {
    use tag::{CLIENT_PID, CLIENT_VERSION, FEATURES, LAYOUT, SESSION, VOLUME};
    let known = [SESSION, VOLUME, CLIENT_PID, CLIENT_VERSION, LAYOUT, FEATURES];
    let fields = wire::parse(value, &known)?;
    Ok(Client {
        session: session(find(&fields, SESSION)?)?,
        volume: wire::text(find(&fields, VOLUME)?)?,
        pid: short(find(&fields, CLIENT_PID).unwrap_or_default())?,
        version: wire::text(find(&fields, CLIENT_VERSION).unwrap_or_default())?,
        layout: short(find(&fields, LAYOUT)?)?,
        features_required: wire::number(find(&fields, FEATURES)?)?,
    })
}

fn decode_welcome(body: &[u8]) -> Result<Welcome, WireError> {
    let fields = wire::parse(body, &[tag::VERSION, tag::BUILD, tag::UNSUPPORTED])?;
    let unsupported = fields.iter().filter(|(tag, _)| *tag == tag::UNSUPPORTED);
    let unsupported = unsupported.map(|(_, value)| {
        let inner = wire::parse(value, &[tag::SESSION, tag::WHY])?;
        let why = wire::text(find(&inner, tag::WHY).unwrap_or_default())?;
        Ok((session(find(&inner, tag::SESSION)?)?, why))
    });
    Ok(Welcome {
        version: short(find(&fields, tag::VERSION)?)?,
        build: wire::text(find(&fields, tag::BUILD).unwrap_or_default())?,
        unsupported: unsupported.collect::<Result<_, WireError>>()?,
    })
}

fn decode_prepared(body: &[u8]) -> Result<Prepared, WireError> {
    let fields = wire::parse(body, &[tag::VOLUMES, tag::SESSIONS, tag::FAILURE])?;
    let failures = fields.iter().filter(|(tag, _)| *tag == tag::FAILURE).map(|(_, value)| {
        let inner = wire::parse(value, &[tag::VOLUME, tag::WHY])?;
        let why = wire::text(find(&inner, tag::WHY).unwrap_or_default())?;
        Ok((wire::text(find(&inner, tag::VOLUME)?)?, why))
    });
    Ok(Prepared {
        volumes: short(find(&fields, tag::VOLUMES).unwrap_or_default())?,
        sessions: short(find(&fields, tag::SESSIONS).unwrap_or_default())?,
        failures: failures.collect::<Result<_, WireError>>()?,
    })
}

fn decode_frozen(body: &[u8]) -> Result<Frozen, WireError> {
    let fields = wire::parse(body, &[tag::REPORT, tag::PROBATION, tag::LAST, tag::LEFT])?;
    let left = fields.iter().filter(|(tag, _)| *tag == tag::LEFT);
    let last_ns = fields.iter().filter(|(tag, _)| *tag == tag::LAST).map(|(_, value)| {
        let inner = wire::parse(value, &[tag::SESSION, tag::TIME])?;
        let ns = wire::number(find(&inner, tag::TIME)?)?;
        Ok((session(find(&inner, tag::SESSION)?)?, ns))
    });
    Ok(Frozen {
        report: find(&fields, tag::REPORT).unwrap_or_default().to_vec(),
        last_ns: last_ns.collect::<Result<_, WireError>>()?,
        left: left.map(|(_, value)| session(value)).collect::<Result<_, _>>()?,
        probation_ms: wire::number(find(&fields, tag::PROBATION).unwrap_or_default())?,
    })
}

fn reason(body: &[u8]) -> Result<String, WireError> {
    let fields = wire::parse(body, &[tag::REASON])?;
    wire::text(find(&fields, tag::REASON).unwrap_or_default())
}

fn find<'a>(fields: &[(u16, &'a [u8])], wanted: u16) -> Result<&'a [u8], WireError> {
    let found = fields.iter().find(|(tag, _)| *tag == wanted);
    found.map(|(_, value)| *value).ok_or(WireError::Missing(wanted))
}

fn short(value: &[u8]) -> Result<u32, WireError> {
    wire::number(value)?.try_into().map_err(|_| WireError::Damaged("a number too large"))
}

/// A generation that can be followed by another.
fn owned(number: u32) -> Result<Generation, WireError> {
    let is_last = number == u32::MAX;
    (!is_last)
        .then_some(Generation(number))
        .ok_or(WireError::Damaged("a generation without a next"))
}

/// A process id, or zero for none.
fn process(number: u32) -> Result<u32, WireError> {
    let is_one = i32::try_from(number).is_ok();
    is_one.then_some(number).ok_or(WireError::Damaged("a process id that is none"))
}

fn session(value: &[u8]) -> Result<SessionId, WireError> {
    value.try_into().map(SessionId).map_err(|_| WireError::Damaged("a session id that is none"))
}
