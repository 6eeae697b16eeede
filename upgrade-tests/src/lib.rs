//! A harness that proves a block device survives the death and replacement of its server.
//!
//! ```text
//!            script (seed) ─► stream ─► device under test ─► server, killed by the campaign
//!                               │ ▲                            │
//!                      oracle ◄─┘ └── every block read again ◄─┘
//!                         └─► report: block, expected, found, between which events
//! ```
//!
//! To point it at your own backend, implement [`device::Device`], put [`stream::Stream`]s of it under
//! [`load::Load`], do to your server whatever it must survive, and look at the report:
//!
//! ```
//! use nebd_upgrade_tests::memory::{Fault, MemoryDevice};
//! use nebd_upgrade_tests::{load, stream::{Stream, StreamOptions}, timeline::Timeline};
//!
//! let device = MemoryDevice::new(1 << 20, 4096, Fault::None, 1);
//! let options = StreamOptions { steps_max: Some(1000), ..StreamOptions::default() };
//! let load = load::Load::start(vec![Stream::new(device, 0, options, Timeline::shared())], 1);
//! while !load.is_at_rest() {
//!     std::thread::yield_now();
//! }
//! assert!(load::total(&load.sweep()).is_clean());
//! ```

pub mod campaign;
pub mod client_device;
pub mod device;
pub mod drive;
pub mod fence_store;
pub mod file_device;
pub mod growth;
pub mod guests;
pub mod load;
pub mod matrix;
pub mod memory;
pub mod oracle;
pub mod report;
pub mod stream;
pub mod supervisor;
pub mod timeline;
pub mod vhost_device;
pub mod workload;

pub use nebd_guest::stamp;
