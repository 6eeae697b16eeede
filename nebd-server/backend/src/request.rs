//! A request on its way through a backend.

use std::sync::Arc;

use nebd_abi::{Errno, Fence, Op, OpFlags};

use crate::lane::{Done, Lane, Mailbox};

/// A piece of memory that data comes from or goes to; another process may change it at any time.
///
/// It stays mapped until the request it belongs to is completed.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Start.
    pub pointer: *mut u8,
    /// Bytes.
    pub length: usize,
}

// SAFETY: a segment is an address; whoever reads or writes through it does so with raw copies.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// The segments of a request; one is the common case and costs no allocation.
#[derive(Clone, Debug)]
pub enum Segments {
    /// No data.
    None,
    /// One piece.
    One(Segment),
    /// Several pieces.
    Many(Box<[Segment]>),
}

impl Segments {
    /// As a slice.
    pub fn as_slice(&self) -> &[Segment] {
        match self {
            Segments::None => &[],
            Segments::One(segment) => std::slice::from_ref(segment),
            Segments::Many(segments) => segments,
        }
    }
}

/// A request, validated: in range, aligned, permitted, its segments as long as its data.
#[derive(Debug)]
#[must_use = "a request must be completed"]
pub struct Request {
    /// The operation.
    pub op: Op,
    /// Its modifiers.
    pub flags: OpFlags,
    /// Bytes from the start of the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where the data is, for reads and writes.
    pub segments: Segments,
    /// For storage that fences.
    pub fence: Fence,
    tag: u64,
    /// `None` once completed.
    mailbox: Option<Arc<Mailbox>>,
}

impl Request {
    /// A request whose completion comes out of the lane of `mailbox` under `tag`.
    pub fn new(
        op: Op,
        flags: OpFlags,
        offset: u64,
        length: u64,
        mailbox: Arc<Mailbox>,
        tag: u64,
    ) -> Request {
        Request {
            op,
            flags,
            offset,
            length,
            segments: Segments::None,
            fence: Fence::default(),
            tag,
            mailbox: Some(mailbox),
        }
    }

    /// Whether the result must be durable before it is reported.
    pub fn is_fua(&self) -> bool {
        self.flags.contains(OpFlags::FUA)
    }

    /// Answers on the lane's own thread.
    pub fn complete(mut self, lane: &mut Lane, result: Result<(), Errno>) {
        self.mailbox = None;
        lane.push_done(Done { tag: self.tag, result });
    }

    /// Answers from any other thread.
    pub fn complete_remote(mut self, result: Result<(), Errno>) {
        if let Some(mailbox) = self.mailbox.take() {
            mailbox.post(Done { tag: self.tag, result });
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(mailbox) = self.mailbox.take() {
            tracing::error!(op = ?self.op, offset = self.offset, "a backend forgot a request");
            debug_assert!(std::thread::panicking(), "a backend forgot a request");
            mailbox.post(Done { tag: self.tag, result: Err(Errno::IO) });
        }
    }
}
