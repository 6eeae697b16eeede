//! The server's side of the NBD protocol: bytes in, events out. No thread, no socket, no clock,
//! no storage; whoever holds the connection owns all of these.
//!
//! ```text
//!  connect ─► Negotiation ──── Step::Transmission(Negotiated) ─► Requests, Replies
//!              │  ▲   │                                           │          ▲
//!    List,     │  │   │ Close: send what is left, then close      │ Event    │ heads and data
//!    Export,   ▼  │   ▼                                           ▼          │
//!    StartTls  caller                                            backend ─────┘
//!
//!  planned takeover: ConnectionState::encode ─► bytes ─► ConnectionState::decode ─► Requests::new …
//! ```
//!
//! What a client sends is never trusted: lengths, counts and times are bounded by
//! [`Limits`](negotiate::Limits), and what cannot be answered closes its own connection alone.
//!
//! A handshake, as a caller drives it:
//!
//! ```
//! use std::time::Instant;
//! use nebd_nbd::negotiate::Refusal;
//! use nebd_nbd::{Negotiated, Negotiation, Policy, Step};
//!
//! # fn connect(mut read: impl FnMut(&mut Vec<u8>), mut send: impl FnMut(&mut Vec<u8>)) -> Option<Negotiated> {
//! let (mut input, mut out) = (Vec::new(), Vec::new());
//! let mut negotiation = Negotiation::new(Policy::default(), Instant::now(), &mut out);
//! loop {
//!     let (taken, mut step) = negotiation.advance(&input, &mut out);
//!     input.drain(..taken);
//!     step = match step {
//!         Step::List(question) => negotiation.answer_list(question, [("disk", "")], &mut out),
//!         Step::Export(question) => {
//!             negotiation.answer_export(question, Err(Refusal::Unknown), &mut out)
//!         }
//!         step => step,
//!     };
//!     send(&mut out);
//!     match step {
//!         Step::Input => read(&mut input),
//!         Step::Transmission(negotiated) => return Some(negotiated), // `input` is requests
//!         Step::Close(_) => return None,
//!         _ => {}
//!     }
//! }
//! # }
//! ```
//!
//! The protocol is that of `doc/proto.md` of the NBD project: fixed newstyle, structured replies,
//! metadata contexts, without the experimental extensions.

#![forbid(unsafe_code)]

pub mod error;
pub mod export;
pub mod negotiate;
pub mod reply;
pub mod request;
pub mod state;
pub mod wire;

pub use error::ReplyError;
pub use export::{Export, ExportFlags, Negotiated, Sizes, Terms};
pub use negotiate::{Negotiation, Policy, Step, TlsPolicy};
pub use reply::{Extent, Head, Replies, Span};
pub use request::{Command, CommandFlags, Event, Request, Requests};
pub use state::ConnectionState;
