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
