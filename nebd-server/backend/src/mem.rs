//! `mem`: a volume in memory that outlives the server.
//!
//! ```text
//!   memfd, m.<name> in the store
//!   0        8            16                4096
//!   ┌────────┬────────────┬── zeros ────────┬───────────────────┐
//!   │ magic  │ incarnation│                 │ the volume's data │
//!   └────────┴────────────┴─────────────────┴───────────────────┘
//! ```
//!
//! Sealed against shrinking, so that a mapping never faults, and against further seals; growing
//! stays possible, for `resize`. A volume that shrinks keeps its address space and gives back the
//! memory. The store holds the descriptor before the first request is served; contents live as long
//! as the store keeps it, whether the volume is open or not, until it is deleted.

mod copy;
mod map;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use nebd_abi::{Errno, Op, VolumeName};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::{
    Backend, BackendError, Capabilities, FdStore, Lane, OpenContext, Opened, PrepareContext,
    PreparedVolume, Request, Volume, VolumeSpec,
};
use map::Map;

const MAGIC: u64 = u64::from_le_bytes(*b"nebd-mem");
const HEADER_BYTES: u64 = 4096;

/// Volumes in memory.
#[derive(Clone)]
pub struct MemBackend {
    store: Arc<dyn FdStore>,
    /// Those that were open once, until they are deleted: a mapping whose pages are mapped is worth
    /// keeping.
    mapped: Arc<Mutex<HashMap<VolumeName, Arc<MemVolume>>>>,
}

impl MemBackend {
    /// A backend whose memory `store` keeps.
    pub fn new(store: Arc<dyn FdStore>) -> MemBackend {
        MemBackend { store, mapped: Arc::default() }
    }

    fn open_with(
        &self,
        spec: &VolumeSpec,
        context: &OpenContext,
        prepared: Option<Prepared>,
    ) -> Result<Opened, BackendError> {
        check_size(&spec.name, spec.size)?;
        let failed = system_error(&spec.name, "keep its memory");
        let name = entry(&spec.name);
        let (file, incarnation) = match context.store.fetch(&name) {
            Some(fd) => adopt(&spec.name, fd, spec.size)?,
            None if context.previous_major.is_some() => {
                return Err(BackendError::Lost(spec.name.clone()));
            }
            None => {
                let (file, incarnation) = make(spec.size).map_err(&failed)?;
                context.store.put(&name, file.as_fd()).map_err(&failed)?;
                context.store.barrier().map_err(&failed)?;
                (file, incarnation)
            }
        };
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let volume = match mapped.get(&spec.name) {
            Some(volume) if volume.incarnation == incarnation => volume.clone(),
            _ => {
                // It may have grown since it was mapped.
                let present = file.metadata().map_err(&failed)?.len();
                let fits = |prepared: &Prepared| {
                    prepared.incarnation == incarnation
                        && HEADER_BYTES + prepared.map.bytes() == present
                };
                let map = match prepared.filter(fits) {
                    Some(prepared) => prepared.map,
                    None => Map::new(&file, HEADER_BYTES).map_err(&failed)?,
                };
                let (name, size) = (spec.name.clone(), AtomicU64::new(spec.size));
                let map = RwLock::new(map);
                let volume = Arc::new(MemVolume { name, incarnation, size, file, map });
                mapped.insert(spec.name.clone(), volume.clone());
                volume
            }
        };
        drop(mapped);
        // The registry may have it larger: a resize that was not finished.
        if volume.size() != spec.size {
            volume.resize(spec.size)?;
        }
        Ok(Opened {
            volume,
            major: context.previous_major.unwrap_or(context.host_major),
            volume_id: 0,
            incarnation,
        })
    }
}

fn entry(name: &VolumeName) -> String {
    format!("m.{}", name.name())
}

fn system_error(name: &VolumeName, action: &'static str) -> impl Fn(io::Error) -> BackendError {
    let volume = name.clone();
    move |source| BackendError::System { volume: volume.clone(), action, source }
}

fn check_size(name: &VolumeName, size: u64) -> Result<(), BackendError> {
    // Half of what a file could have leaves room for every sum below.
    if size == 0 || size > (i64::MAX / 2) as u64 {
        let detail = format!("{size} bytes cannot be had in memory");
        return Err(BackendError::Size { volume: name.clone(), detail });
    }
    Ok(())
}

impl Backend for MemBackend {
    fn kind(&self) -> &'static str {
        "mem"
    }

    /// The memory comes with the first open.
    fn create(&self, spec: &VolumeSpec) -> Result<VolumeSpec, BackendError> {
        check_size(&spec.name, spec.size)?;
        Ok(spec.clone())
    }

    fn delete(&self, spec: &VolumeSpec) -> Result<(), BackendError> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).remove(&spec.name);
        self.store
            .remove(&entry(&spec.name))
            .and_then(|()| self.store.barrier())
            .map_err(system_error(&spec.name, "remove its memory from the store"))
    }

    fn observe(&self, spec: &VolumeSpec) -> Result<u64, BackendError> {
        Ok(spec.size)
    }

    fn open(&self, spec: &VolumeSpec, context: &OpenContext) -> Result<Opened, BackendError> {
        self.open_with(spec, context, None)
    }

    /// Maps what the store has. No page of it is touched, so none is allocated.
    fn prepare(
        &self,
        spec: &VolumeSpec,
        context: &PrepareContext,
    ) -> Result<Box<dyn PreparedVolume>, BackendError> {
        check_size(&spec.name, spec.size)?;
        // Its owner stored it before it served the first request.
        let lost = || BackendError::Lost(spec.name.clone());
        let fd = context.store.fetch(&entry(&spec.name)).ok_or_else(lost)?;
        let (file, incarnation) = identify(&spec.name, fd)?;
        let failed = system_error(&spec.name, "map its memory");
        let map = Map::new(&file, HEADER_BYTES).map_err(&failed)?;
        Ok(Box::new(Prepared { backend: self.clone(), incarnation, map }))
    }
}

/// The memory of another process's volume, mapped. How large the volume is, its owner may change
/// until it is opened.
struct Prepared {
    backend: MemBackend,
    incarnation: u64,
    map: Map,
}

impl PreparedVolume for Prepared {
    fn open(
        self: Box<Self>,
        spec: &VolumeSpec,
        context: &OpenContext,
    ) -> Result<Opened, BackendError> {
        let backend = self.backend.clone();
        backend.open_with(spec, context, Some(*self))
    }
}

/// New memory, and its identity.
fn make(size: u64) -> io::Result<(File, u64)> {
    use std::os::unix::fs::FileExt;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("nebd-mem", flags)?);
    file.set_len(HEADER_BYTES + size)?;
    let incarnation = loop {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // Zero means that contents cannot be lost.
        match u64::from_ne_bytes(bytes) {
            0 => {}
            incarnation => break incarnation,
        }
    };
    file.write_all_at(&incarnation.to_le_bytes(), 8)?;
    file.write_all_at(&MAGIC.to_le_bytes(), 0)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok((file, incarnation))
}

/// Memory that a predecessor made, at least as large as the volume.
fn adopt(name: &VolumeName, fd: OwnedFd, size: u64) -> Result<(File, u64), BackendError> {
    let failed = system_error(name, "adopt its memory");
    let (file, incarnation) = identify(name, fd)?;
    let present = file.metadata().map_err(&failed)?.len();
    // A resize that grew the registry's entry and not the memory.
    if present < HEADER_BYTES + size {
        file.set_len(HEADER_BYTES + size).map_err(&failed)?;
    }
    Ok((file, incarnation))
}

/// Which memory it is.
fn identify(name: &VolumeName, fd: OwnedFd) -> Result<(File, u64), BackendError> {
    use std::os::unix::fs::FileExt;
    let failed = system_error(name, "identify its memory");
    let file = File::from(fd);
    let mut header = [0; 16];
    let seals = rustix::fs::fcntl_get_seals(&file).map_err(|errno| failed(errno.into()))?;
    file.read_exact_at(&mut header, 0).map_err(&failed)?;
    let (magic, incarnation) = header.split_at(8);
    if magic != MAGIC.to_le_bytes() || !seals.contains(SealFlags::SHRINK) {
        return Err(BackendError::Lost(name.clone()));
    }
    let incarnation = incarnation.try_into().map(u64::from_le_bytes);
    Ok((file, incarnation.map_err(|_| BackendError::Lost(name.clone()))?))
}

struct MemVolume {
    name: VolumeName,
    incarnation: u64,
    size: AtomicU64,
    file: File,
    /// Replaced when the volume grows; held for reading while data is copied.
    map: RwLock<Map>,
}

impl MemVolume {
    fn apply(&self, request: &Request) -> Result<(), Errno> {
        let (offset, length) = (request.offset, request.length);
        match request.op {
            Op::Flush => Ok(()),
            Op::Discard | Op::WriteZeroes if length == 0 => Ok(()),
            Op::Discard | Op::WriteZeroes => {
                self.punch(offset, length)?;
                let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
                map.forget(offset, length);
                Ok(())
            }
            Op::Read | Op::Write => {
                let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
                let segments = request.segments.as_slice();
                let copied = match request.op {
                    Op::Write => map.write(offset, segments),
                    _ => map.read(&self.file, offset, segments),
                };
                copied.ok_or(Errno::IO)
            }
        }
    }

    /// Gives memory back; what is not a whole page of it is zeroed in place.
    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, mode, HEADER_BYTES + offset, length) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Errno(errno.raw_os_error())),
            }
        }
    }
}

impl Volume for MemVolume {
    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { discard: true, write_zeroes: true, fences: false }
    }

    fn submit(&self, lane: &mut Lane, request: Request) {
        let result = self.apply(&request);
        request.complete(lane, result);
    }

    fn resize(&self, size: u64) -> Result<u64, BackendError> {
        check_size(&self.name, size)?;
        let failed = system_error(&self.name, "resize its memory");
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let capacity = map.bytes();
        // What lies beyond the end, now and before: a write that had started when the end moved may
        // have come after it.
        let end = size.min(self.size.load(SeqCst));
        if end < capacity {
            self.punch(end, capacity - end).map_err(|errno| failed(errno.into()))?;
        }
        if size > capacity {
            self.file.set_len(HEADER_BYTES + size).map_err(&failed)?;
            *map = Map::new(&self.file, HEADER_BYTES).map_err(&failed)?;
        }
        self.size.store(size, SeqCst);
        Ok(size)
    }

    /// Memory stays in the store until the volume is deleted.
    fn close(&self) {}

    fn relinquish(&self) {}
}
