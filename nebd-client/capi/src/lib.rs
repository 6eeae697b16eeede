//! libnebd: the C API of the part client. `nebd.h` is its contract and its documentation.
//!
//! ```text
//!   C program ── nebd.h ──► exports, exports_io     pointers in, negative errno out, no panic
//!                               │
//!                               ▼
//!                           volume, options         no pointers
//!                               │
//!                               ▼
//!                           nebd_client::Session
//! ```
//!
//! `curve` is the same for programs written for Curve (`libnebd.h`), beside it and in the same library.
//! `raw` holds what the exported functions need to turn C's values into Rust's and back.

pub mod curve;
pub mod exports;
pub mod exports_io;
mod failure;
mod options;
mod raw;
mod volume;

pub use options::Options;
pub use raw::{Callback, EventCallback, RawEvent, RawInfo, RawStats};
pub use volume::Volume;
