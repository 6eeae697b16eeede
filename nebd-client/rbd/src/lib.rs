//! librbd for nebd: an unpatched QEMU or fio that was built for Ceph attaches nebd volumes.
//!
//! ```text
//!  QEMU's block-rbd.so, fio ── rbd_*, rados_* ──► exports_rados, exports_image, exports_aio
//!                                                     │   handles in, negative errnos out, no panic
//!                                                     ▼
//!        config ◄── pool, image, conf ──────────── image ──► admin    create, remove: nebdctl
//!                                                     │
//!            ┌────────────────────────────────────────┤
//!            ▼ whole blocks                           ▼ parts of blocks
//!   claims ─ Session::submit_raw            claims ─ job: read, change, write back
//!            ▲
//!   guest_memory: guest RAM that is a sealed memfd is registered, and not copied
//! ```
//!
//! Requests complete on nebd-client's `nebd-complete` thread; this crate has no thread of its own.
//! Names: the pool is the backend's kind, the image the volume's name, so `pool=file,image=disk1` is
//! `file:disk1`. What nebd does not have (snapshots, namespaces, encryption) answers `EOPNOTSUPP`.
//! docs/hypervisors.md is the user's side of all this.

#![deny(missing_docs)]

mod admin;
mod claims;
mod completion;
mod config;
mod exports_aio;
mod exports_image;
mod exports_rados;
mod failure;
mod guest_memory;
mod image;
mod job;
mod raw;
