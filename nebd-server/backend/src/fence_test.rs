//! `fence-test`: volumes kept by a process of its own that checks the fence of every operation.
//!
//! ```text
//!  shard ── submit ──► pending, to_send ──► sender ──► socket ──► fence-store
//!                        │ (by id)                                   │
//!  shard ◄─ mailbox ─── complete ◄──────── receiver ◄─ socket ◄──────┘
//!
//!  the line breaks: connect again, send everything pending again under the same seq
//!  the store refuses the epoch: we were replaced; the request is kept and never answered
//! ```
//!
//! For tests alone. `upgrade-tests` has the other end, `fence-store`, which delays, duplicates and
//! re-delivers: with it, epoch and seq are proven before any real storage depends on them.

mod link;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nebd_abi::{Epoch, Errno, VolumeName};
use nebd_rpc::frame::{self, FrameError, Header, Kind};

use crate::{
    Backend, BackendError, Capabilities, Lane, OpenContext, Opened, PrepareContext, PreparedVolume,
    Request, Volume, VolumeSpec,
};
use link::Link;

/// Environment variable that names the socket of the fence-store.
pub const STORE_ENV: &str = "NEBD_FENCE_STORE";
/// Set to `1`: flushes are answered at once and FUA is dropped, to prove that tests would notice.
pub const FLUSH_OFF_ENV: &str = "NEBD_TEST_FLUSH_OFF";

/// Volumes at a fence-store.
#[derive(Clone, Debug)]
pub struct FenceTestBackend {
    socket: PathBuf,
    flush_is_off: bool,
}

impl FenceTestBackend {
    /// Volumes at the store behind `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> FenceTestBackend {
        FenceTestBackend { socket: socket.into(), flush_is_off: false }
    }

    /// As the environment says; `None` if it names no store.
    pub fn from_env() -> Option<FenceTestBackend> {
        let socket = std::env::var_os(STORE_ENV).filter(|path| !path.is_empty())?;
        let flush_is_off = std::env::var_os(FLUSH_OFF_ENV).is_some_and(|value| value == "1");
        Some(FenceTestBackend { socket: socket.into(), flush_is_off })
    }

    fn ask(
        &self,
        name: &VolumeName,
        action: &'static str,
        header: Header,
    ) -> Result<Header, BackendError> {
        let system = |source| BackendError::System { volume: name.clone(), action, source };
        let answer = call(&self.socket, &header, name.name().as_bytes()).map_err(system)?;
        match answer.result as i32 {
            0 => Ok(answer),
            2 => Err(BackendError::NotFound(name.clone())),
            17 => Err(BackendError::Exists(name.clone())),
            116 => {
                let detail = "the storage granted it to a later owner".to_owned();
                Err(BackendError::Busy { volume: name.clone(), detail })
            }
            errno => Err(system(std::io::Error::from_raw_os_error(errno))),
        }
    }
}

/// One question on a connection of its own.
fn call(socket: &Path, header: &Header, payload: &[u8]) -> std::io::Result<Header> {
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    let broken = |error| match error {
        FrameError::Io(error) => error,
        other => std::io::Error::new(std::io::ErrorKind::InvalidData, other),
    };
    frame::write(&mut stream, header, payload).map_err(broken)?;
    let answer = frame::read(&mut stream).map_err(broken)?;
    answer.map(|(header, _)| header).ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

impl Backend for FenceTestBackend {
    fn kind(&self) -> &'static str {
        "fence-test"
    }

    fn create(&self, spec: &VolumeSpec) -> Result<VolumeSpec, BackendError> {
        let header = Header { length: spec.size, ..Header::new(Kind::Create, 1) };
        self.ask(&spec.name, "create it", header)?;
        Ok(spec.clone())
    }

    fn delete(&self, spec: &VolumeSpec) -> Result<(), BackendError> {
        self.ask(&spec.name, "delete it", Header::new(Kind::Delete, 1))?;
        Ok(())
    }

    fn observe(&self, spec: &VolumeSpec) -> Result<u64, BackendError> {
        Ok(self.ask(&spec.name, "observe it", Header::new(Kind::Observe, 1))?.length)
    }

    fn open(&self, spec: &VolumeSpec, context: &OpenContext) -> Result<Opened, BackendError> {
        let mut header = Header::new(Kind::Open, 1);
        header.fence.epoch = Epoch::new(context.previous_major.unwrap_or(0), context.generation);
        let answer = self.ask(&spec.name, "open it", header)?;
        let link = Link::start(self.socket.clone(), spec.name.clone()).map_err(|source| {
            BackendError::System { volume: spec.name.clone(), action: "start its threads", source }
        })?;
        let volume = FenceTestVolume {
            backend: self.clone(),
            name: spec.name.clone(),
            size: answer.length.into(),
            link,
        };
        Ok(Opened {
            volume: Arc::new(volume),
            major: answer.fence.epoch.major,
            volume_id: answer.fence.volume,
            incarnation: 0,
        })
    }

    fn prepare(
        &self,
        spec: &VolumeSpec,
        _context: &PrepareContext,
    ) -> Result<Box<dyn PreparedVolume>, BackendError> {
        self.observe(spec)?;
        Ok(Box::new(Prepared(self.clone())))
    }
}

/// The store answered for it.
struct Prepared(FenceTestBackend);

impl PreparedVolume for Prepared {
    fn open(
        self: Box<Self>,
        spec: &VolumeSpec,
        context: &OpenContext,
    ) -> Result<Opened, BackendError> {
        self.0.open(spec, context)
    }
}

struct FenceTestVolume {
    backend: FenceTestBackend,
    name: VolumeName,
    size: std::sync::atomic::AtomicU64,
    link: Link,
}

impl Volume for FenceTestVolume {
    fn size(&self) -> u64 {
        self.size.load(std::sync::atomic::Ordering::SeqCst)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { discard: true, write_zeroes: true, fences: true }
    }

    fn submit(&self, lane: &mut Lane, request: Request) {
        if self.backend.flush_is_off && request.op == nebd_abi::Op::Flush {
            return request.complete(lane, Ok(()));
        }
        if request.length > u64::from(frame::PAYLOAD_BYTES_MAX) && request.op.has_data() {
            return request.complete(lane, Err(Errno::INVAL));
        }
        self.link.submit(request, self.backend.flush_is_off);
    }

    fn resize(&self, size: u64) -> Result<u64, BackendError> {
        let header = Header { length: size, ..Header::new(Kind::Resize, 1) };
        let size = self.backend.ask(&self.name, "resize it", header)?.length;
        self.size.store(size, std::sync::atomic::Ordering::SeqCst);
        Ok(size)
    }

    fn close(&self) {
        self.link.close();
    }

    /// The store refuses what we send from now on; what it has answered already must not reach the
    /// memory of clients.
    fn relinquish(&self) {
        self.link.relinquish();
    }
}
