//! The handshake: fixed newstyle, up to the option that ends it.
//!
//! ```text
//!          greeting sent
//!   ClientFlags ─► Header ─► Data ─► answered ─────────► Header        Step::Sent
//!                    │  ▲     ├────► Asked ─ answer_* ─► Header        Step::List, Step::Export
//!        too long or │  │     │        └─ GO, EXPORT_NAME ─► Over      Step::Transmission
//!        not known   ▼  │     └────► Tls ─ tls_started ─► Header       Step::StartTls
//!                   Skip ┘
//!   anything that has no answer, ABORT, a limit ─► Over                Step::Close
//! ```
//!
//! One option is answered at a time: what a caller must hold for a client that does not read is the
//! reply to one option.

mod answer;
mod option;

use std::time::{Duration, Instant};

use crate::export::Negotiated;
use crate::wire::{self, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, OPTION_HEADER_BYTES};
use option::{Infos, Meta};

/// Whether TLS is to be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsPolicy {
    /// `STARTTLS` is refused.
    #[default]
    Off,
    /// A client may start it; an export may insist, see [`Refusal::TlsRequired`].
    Allowed,
    /// Nothing else is answered before it.
    Required,
}

/// What a client may cost before it has chosen an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest data of an option; what is longer is skipped and refused.
    pub option_bytes_max: u32,
    /// Number of options. Some clients ask twice for each export of a list.
    pub options_max: u32,
    /// All that it sends.
    pub bytes_max: u64,
    /// From the connect to the transmission, TLS included.
    pub time_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            option_bytes_max: 16 << 10,
            options_max: 8192,
            bytes_max: 4 << 20,
            time_max: Duration::from_secs(30),
        }
    }
}

/// What a server wants of its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// TLS.
    pub tls: TlsPolicy,
    /// Whether `LIST` is answered.
    pub list: bool,
    /// The largest minimum block size of an export that a client may use without having asked for
    /// its size constraints. Requests of such a client that are not aligned are refused one by one.
    pub unasked_minimum_max: u32,
    /// Limits.
    pub limits: Limits,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            tls: TlsPolicy::Off,
            list: true,
            unasked_minimum_max: 1 << 16,
            limits: Limits::default(),
        }
    }
}

/// Why an export is not given to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is none of that name.
    #[error("there is no such export")]
    Unknown,
    /// It is for clients under TLS. Under TLS this is taken for [`Refusal::Unknown`].
    #[error("the export requires TLS")]
    TlsRequired,
    /// It exists and cannot be had, now or by this client.
    #[error("the export is not available")]
    Policy,
    /// The server is going.
    #[error("the server is shutting down")]
    Shutdown,
}

/// Why a negotiation ended without an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client gave up, as it may.
    #[error("the client gave up the negotiation")]
    Aborted,
    /// Client flags that no server offered.
    #[error("the client set unknown flags: {0:#x}")]
    ClientFlags(u32),
    /// No option where one was due.
    #[error("the client sent no option: {0:#x}")]
    Magic(u64),
    /// An option that an oldish client cannot see refused.
    #[error("the client sent option {0} without fixed newstyle")]
    NotFixed(u32),
    /// `EXPORT_NAME` before the TLS that is required.
    #[error("the client chose an export without TLS")]
    TlsRequired,
    /// `EXPORT_NAME` with a name that cannot be one.
    #[error("the client chose an export by a name that is none")]
    Name,
    /// `EXPORT_NAME` of an export whose block size the client should have asked for.
    #[error("the client did not ask for the size constraints")]
    SizesRequired,
    /// `EXPORT_NAME` of an export that it does not get.
    #[error("the client's choice: {0}")]
    Refused(#[source] Refusal),
    /// More options than [`Limits::options_max`].
    #[error("the client sent too many options")]
    TooManyOptions,
    /// More than [`Limits::bytes_max`].
    #[error("the client sent too much")]
    TooManyBytes,
    /// Longer than [`Limits::time_max`].
    #[error("the client took too long")]
    TooLate,
}

/// What the caller is to do. What has come into `out` by then is to be sent first, always.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// All input was taken; wait for more.
    Input,
    /// An option was answered; send, then go on with what is left of the input.
    Sent,
    /// Call [`Negotiation::answer_list`].
    List(ListQuestion),
    /// Call [`Negotiation::answer_export`].
    Export(ExportQuestion),
    /// Send, begin TLS as its server with the bytes not taken yet, then call
    /// [`Negotiation::tls_started`] and go on with what comes out of TLS.
    StartTls,
    /// A question is open, TLS has not begun, or the negotiation is over; nothing was taken.
    Waiting,
    /// The rest of the input is [`Requests`](crate::Requests).
    Transmission(Negotiated),
    /// Send, then close.
    Close(CloseReason),
}

/// The client wants a list. Answered once, whenever the answer is known.
#[derive(Debug, PartialEq, Eq)]
pub struct ListQuestion(());

/// The client wants to know about an export, or to have it. Answered once.
#[derive(Debug, PartialEq, Eq)]
pub struct ExportQuestion {
    name: String,
    purpose: Purpose,
}

#[derive(Debug, PartialEq, Eq)]
enum Purpose {
    ExportName,
    Info { go: bool, infos: Infos },
    Meta(Meta),
}

impl ExportQuestion {
    /// As the client wrote it; empty for the default export, if there is one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a positive answer ends the negotiation, so that the export must be open by then.
    pub fn enters_transmission(&self) -> bool {
        matches!(self.purpose, Purpose::ExportName | Purpose::Info { go: true, .. })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    ClientFlags,
    Header,
    Data {
        option: u32,
        bytes: usize,
    },
    /// Data that is not looked at, and the answer after it.
    Skip {
        option: u32,
        left: u32,
        answer: u32,
    },
    Asked,
    Tls,
    Over(Option<CloseReason>),
}

/// The server's side of a handshake.
#[derive(Debug)]
pub struct Negotiation {
    policy: Policy,
    deadline: Instant,
    phase: Phase,
    /// What has come of the piece that the phase waits for.
    held: Vec<u8>,
    options: u32,
    bytes: u64,
    /// Whether the client knows options other than `EXPORT_NAME`.
    fixed: bool,
    /// Whether it wants zeroes after the answer to that one.
    zeroes: bool,
    shutting_down: bool,
    tls: bool,
    structured: bool,
    /// The export that `base:allocation` is selected for.
    allocation_of: Option<String>,
}

impl Negotiation {
    /// Greets a client that has just connected.
    pub fn new(policy: Policy, now: Instant, out: &mut Vec<u8>) -> Negotiation {
        out.extend(wire::INIT_MAGIC.to_be_bytes());
        out.extend(wire::OPTION_MAGIC.to_be_bytes());
        out.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Negotiation {
            policy,
            deadline: now + policy.limits.time_max,
            phase: Phase::ClientFlags,
            held: Vec::new(),
            options: 0,
            bytes: 0,
            fixed: false,
            zeroes: true,
            shutting_down: false,
            tls: false,
            structured: false,
            allocation_of: None,
        }
    }

    /// When the client's time is over.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Closes the connection if the client's time is over.
    pub fn check_time(&mut self, now: Instant) -> Option<Step> {
        (now >= self.deadline).then(|| self.close(CloseReason::TooLate))
    }

    /// From now on every option but `ABORT` is refused, for the server is going.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Takes bytes from the front of `input`, as many as the next step needs, and says how many.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
        let mut taken = 0;
        loop {
            let rest = &input[taken..];
            let wanted = match self.phase {
                Phase::ClientFlags => 4,
                Phase::Header => OPTION_HEADER_BYTES,
                Phase::Data { bytes, .. } => bytes,
                Phase::Skip { option, left, answer } => {
                    let skipped = rest.len().min(left as usize);
                    taken += skipped;
                    let left = left - skipped as u32;
                    if left > 0 {
                        self.phase = Phase::Skip { option, left, answer };
                        return (taken, Step::Input);
                    }
                    self.phase = Phase::Header;
                    return (taken, self.finish(option, answer, out));
                }
                Phase::Over(Some(reason)) => return (taken, Step::Close(reason)),
                Phase::Asked | Phase::Tls | Phase::Over(None) => return (taken, Step::Waiting),
            };
            let more = rest.len().min(wanted - self.held.len());
            self.held.extend_from_slice(&rest[..more]);
            taken += more;
            if self.held.len() < wanted {
                return (taken, Step::Input);
            }
            let piece = std::mem::take(&mut self.held);
            if let Some(step) = self.piece(&piece, out) {
                return (taken, step);
            }
        }
    }

    /// A piece is complete: the flags, a header, or an option's data.
    fn piece(&mut self, piece: &[u8], out: &mut Vec<u8>) -> Option<Step> {
        match self.phase {
            Phase::ClientFlags => self.client_flags(piece),
            Phase::Header => self.option_header(piece),
            Phase::Data { option, .. } => Some(self.option(option, piece, out)),
            Phase::Skip { .. } | Phase::Asked | Phase::Tls | Phase::Over(_) => Some(Step::Waiting),
        }
    }

    fn client_flags(&mut self, piece: &[u8]) -> Option<Step> {
        let flags = wire::Cursor(piece).u32()?;
        let is_set = |flag: u16| flags & u32::from(flag) != 0;
        if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
            return Some(self.close(CloseReason::ClientFlags(flags)));
        }
        self.fixed = is_set(FLAG_FIXED_NEWSTYLE);
        self.zeroes = !is_set(FLAG_NO_ZEROES);
        self.phase = Phase::Header;
        None
    }

    fn option_header(&mut self, piece: &[u8]) -> Option<Step> {
        let mut cursor = wire::Cursor(piece);
        let (magic, option, bytes) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
        if magic != wire::OPTION_MAGIC {
            return Some(self.close(CloseReason::Magic(magic)));
        }
        self.options += 1;
        self.bytes += (OPTION_HEADER_BYTES as u64) + u64::from(bytes);
        let limits = self.policy.limits;
        if self.options > limits.options_max {
            return Some(self.close(CloseReason::TooManyOptions));
        }
        if self.bytes > limits.bytes_max {
            return Some(self.close(CloseReason::TooManyBytes));
        }
        if option == wire::option::SET_META_CONTEXT {
            // It replaces what was selected, even if it fails.
            self.allocation_of = None;
        }
        if let Some(reason) = self.unanswerable(option, bytes) {
            return Some(self.close(reason));
        }
        self.phase = match self.refused_unread(option, bytes) {
            Some(answer) => Phase::Skip { option, left: bytes, answer },
            None => Phase::Data { option, bytes: bytes as usize },
        };
        None
    }

    fn close(&mut self, reason: CloseReason) -> Step {
        self.phase = Phase::Over(Some(reason));
        Step::Close(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_option_costs_little_memory() {
        for (option, bytes) in [(6u32, u32::MAX >> 12), (77, 1 << 20), (7, 16 << 10), (1, 4096)] {
            let mut out = Vec::new();
            let mut negotiation = Negotiation::new(Policy::default(), Instant::now(), &mut out);
            let mut input = 3u32.to_be_bytes().to_vec();
            input.extend(wire::OPTION_MAGIC.to_be_bytes());
            input.extend(option.to_be_bytes());
            input.extend(bytes.to_be_bytes());
            assert_eq!(negotiation.advance(&input, &mut out), (20, Step::Input));
            // Nothing is set aside for what was only announced.
            assert!(negotiation.held.capacity() <= 64, "{}", negotiation.held.capacity());
            let data = vec![0; bytes as usize - 1];
            assert_eq!(negotiation.advance(&data, &mut out), (data.len(), Step::Input));
            assert!(negotiation.held.capacity() <= 32 << 10, "{}", negotiation.held.capacity());
            assert!(out.len() < 256);
        }
    }
}
