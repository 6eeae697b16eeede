//! `file`: a volume is a raw image or a block device.
//!
//! ```text
//!   submit ─► Task ─► engine ┬─ io_uring of the lane ─► drain ─┐
//!                            └─ the volume's threads ─► mailbox┴─► answered
//!             flush, FUA ──► Syncs ─ a witness is owed? ─► the volume's threads
//! ```
//!
//! | invariant | where |
//! | --- | --- |
//! | one owner: `flock` on a description of its own, pinned by requests in flight | `own`, `open_file` |
//! | an `fdatasync` for each FLUSH and each FUA (a write, then the sync) | `task`, `engine` |
//! | a failed flush whose report died is reported | `syncs`, `witness` |
//! | the guest never sees `EINVAL`, `EINTR`, `EAGAIN` or a short transfer | `task` |
//!
//! Images that nebd makes are `<dir>/<name>.img`. An existing file or device is used in place; it
//! is never resized (a device), extended by `create`, or deleted.

mod buffer;
mod engine;
#[cfg(feature = "test-hooks")]
pub mod hooks;
mod image;
mod open_file;
mod own;
mod pool;
mod syncs;
mod system;
mod task;
mod witness;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use nebd_abi::VolumeName;

use crate::lane::{UringRefusal, uring_refusal};
use crate::{
    Backend, BackendError, Capabilities, FdStore, Lane, OpenContext, Opened, PrepareContext,
    PreparedVolume, Request, Volume, VolumeSpec,
};
use open_file::{OpenFile, OpenOptionsOfBackend, system_error};
use own::{Examined, Seen};
use system::Kind;
pub(crate) use task::Task;

/// Which engine the `file` backend is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileEngineChoice {
    /// io_uring where the kernel allows it, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or none.
    IoUring,
    /// Threads.
    Threads,
}

/// The engine in use, for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileEngine {
    /// io_uring.
    IoUring,
    /// Threads, and why.
    Threads(UringRefusal),
}

impl fmt::Display for FileEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileEngine::IoUring => f.write_str("io_uring"),
            FileEngine::Threads(UringRefusal::NotWanted) => f.write_str("threads (as configured)"),
            FileEngine::Threads(refusal) => write!(f, "threads ({refusal})"),
        }
    }
}

/// How the `file` backend is set up.
#[derive(Clone, Debug)]
pub struct FileConfig {
    /// Where the images that nebd makes are.
    pub dir: PathBuf,
    /// Which engine.
    pub engine: FileEngineChoice,
    /// Most threads of one volume, where it uses threads.
    pub pool_threads: usize,
    /// Whether to go past the page cache where the file allows it.
    pub direct: bool,
}

impl FileConfig {
    /// The defaults, with images in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> FileConfig {
        FileConfig {
            dir: dir.into(),
            engine: FileEngineChoice::Auto,
            pool_threads: 8,
            direct: true,
        }
    }
}

/// Volumes in files and on block devices.
#[derive(Clone)]
pub struct FileBackend {
    config: FileConfig,
    engine: FileEngine,
    /// Seen at an open: a delete needs it to forget what a crash left there.
    store: Arc<Mutex<Option<Arc<dyn FdStore>>>>,
}

impl FileBackend {
    /// A backend; fails only if io_uring is demanded and refused.
    pub fn new(config: FileConfig) -> Result<FileBackend, UringRefusal> {
        let engine = match (config.engine, uring_refusal()) {
            (FileEngineChoice::Threads, _) => FileEngine::Threads(UringRefusal::NotWanted),
            (_, None) => FileEngine::IoUring,
            (FileEngineChoice::Auto, Some(refusal)) => FileEngine::Threads(refusal),
            (FileEngineChoice::IoUring, Some(refusal)) => return Err(refusal),
        };
        Ok(FileBackend { config, engine, store: Arc::default() })
    }

    /// The engine in use.
    pub fn engine(&self) -> FileEngine {
        self.engine
    }

    fn path(&self, spec: &VolumeSpec) -> PathBuf {
        spec.path
            .clone()
            .unwrap_or_else(|| self.config.dir.join(format!("{}.img", spec.name.name())))
    }

    /// Size of what is there now, in bytes.
    fn present_size(&self, spec: &VolumeSpec) -> Result<u64, BackendError> {
        let failed = system_error(&spec.name, "examine its file");
        // Without O_NONBLOCK a FIFO at this path would hang the caller.
        image::open_to_look(&self.path(spec))
            .and_then(|file| system::size(&file, system::kind(&file)?))
            .map_err(failed)
    }

    fn open_with(
        &self,
        spec: &VolumeSpec,
        context: &OpenContext,
        prepared: Option<Seen>,
    ) -> Result<Opened, BackendError> {
        *self.store.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.store.clone());
        let options = OpenOptionsOfBackend {
            direct: self.config.direct,
            uring: self.engine == FileEngine::IoUring,
            pool_threads: self.config.pool_threads,
        };
        let path = self.path(spec);
        let file = OpenFile::open(&spec.name, path, spec.block_size, options, context, prepared)?;
        let size = usable_size(spec, file.file(), file.kind())?;
        Ok(Opened {
            volume: Arc::new(FileVolume {
                name: spec.name.clone(),
                block_size: spec.block_size,
                size: AtomicU64::new(size),
                was_cut: AtomicBool::new(false),
                file,
            }),
            major: context.previous_major.unwrap_or(context.host_major),
            volume_id: 0,
            incarnation: 0,
        })
    }
}

/// The volume's size, if its file can have it.
fn usable_size(spec: &VolumeSpec, file: &File, kind: Kind) -> Result<u64, BackendError> {
    let present = system::size(file, kind).map_err(system_error(&spec.name, "examine its file"))?;
    let size = if spec.size == 0 { present } else { spec.size };
    if size > present && kind == Kind::BlockDevice {
        let detail = format!("the volume has {size} bytes, its device only {present}");
        return Err(BackendError::Size { volume: spec.name.clone(), detail });
    }
    check_size(&spec.name, size, spec.block_size)?;
    Ok(size)
}

impl Backend for FileBackend {
    fn kind(&self) -> &'static str {
        "file"
    }

    /// Makes a sparse image of `spec.size` bytes, or takes the file or device at `spec.path` as it
    /// is: `spec.size` is then zero, for all of it, or what it has.
    fn create(&self, spec: &VolumeSpec) -> Result<VolumeSpec, BackendError> {
        let size = match &spec.path {
            Some(_) => {
                let present = self.present_size(spec)?;
                if spec.size != 0 && spec.size != present {
                    let detail =
                        format!("{} bytes were asked for, the file has {present}", spec.size);
                    return Err(BackendError::Size { volume: spec.name.clone(), detail });
                }
                present
            }
            None => spec.size,
        };
        check_size(&spec.name, size, spec.block_size)?;
        if spec.path.is_none() {
            image::create(&self.path(spec), size).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => BackendError::Exists(spec.name.clone()),
                _ => system_error(&spec.name, "create its image")(error),
            })?;
        }
        Ok(VolumeSpec { size, ..spec.clone() })
    }

    fn delete(&self, spec: &VolumeSpec) -> Result<(), BackendError> {
        if spec.path.is_none() {
            let busy = || BackendError::Busy {
                volume: spec.name.clone(),
                detail: "its image is locked".to_owned(),
            };
            image::delete(&self.path(spec)).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => busy(),
                _ => system_error(&spec.name, "delete its image")(error),
            })?;
        }
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match store.map_or(Ok(()), |store| witness::forget(&*store, spec.name.name())) {
            Ok(()) => Ok(()),
            Err(source) => Err(system_error(&spec.name, "forget its flush witnesses")(source)),
        }
    }

    fn observe(&self, spec: &VolumeSpec) -> Result<u64, BackendError> {
        self.present_size(spec)
    }

    fn open(&self, spec: &VolumeSpec, context: &OpenContext) -> Result<Opened, BackendError> {
        self.open_with(spec, context, None)
    }

    /// Opens the file, reads a block of it, and closes it: kept open, it would keep a deleted image's
    /// blocks, a device or a mount, and owe again each error that its owner was told of meanwhile.
    fn prepare(
        &self,
        spec: &VolumeSpec,
        context: &PrepareContext,
    ) -> Result<Box<dyn PreparedVolume>, BackendError> {
        let path = self.path(spec);
        let mut examined =
            Examined::observe(&spec.name, &path, spec.block_size, self.config.direct)?;
        usable_size(spec, &examined.file, examined.kind)?;
        examined.witnesses = witness::known(&*context.store, spec.name.name(), examined.identity);
        let block_size = spec.block_size;
        let seen = examined.into();
        Ok(Box::new(Prepared { backend: self.clone(), path, block_size, seen }))
    }
}

/// A file that another process owns.
struct Prepared {
    backend: FileBackend,
    path: PathBuf,
    block_size: u32,
    seen: Seen,
}

impl PreparedVolume for Prepared {
    fn open(
        self: Box<Self>,
        spec: &VolumeSpec,
        context: &OpenContext,
    ) -> Result<Opened, BackendError> {
        let Prepared { backend, path, block_size, seen } = *self;
        // Otherwise it is another volume of this name.
        let same = path == backend.path(spec) && block_size == spec.block_size;
        backend.open_with(spec, context, same.then_some(seen))
    }
}

fn check_size(name: &VolumeName, size: u64, block_size: u32) -> Result<(), BackendError> {
    let detail = if size == 0 {
        "a volume has at least one block".to_owned()
    } else if !size.is_multiple_of(u64::from(block_size.max(1))) {
        format!("{size} bytes are no multiple of the block size {block_size}")
    } else if i64::try_from(size).is_err() {
        format!("{size} bytes are more than a file can have")
    } else {
        return Ok(());
    };
    Err(BackendError::Size { volume: name.clone(), detail })
}

struct FileVolume {
    name: VolumeName,
    block_size: u32,
    size: AtomicU64,
    /// The image was cut; a write that had started by then may have made it longer again.
    was_cut: AtomicBool,
    file: Arc<OpenFile>,
}

impl Volume for FileVolume {
    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { discard: true, write_zeroes: true, fences: false }
    }

    fn submit(&self, lane: &mut Lane, request: Request) {
        Task::new(request, self.file.clone(), lane.mailbox().clone()).drive(lane);
    }

    /// Grows or shrinks an image. What is beyond a smaller size is gone.
    fn resize(&self, size: u64) -> Result<u64, BackendError> {
        if self.file.kind() == Kind::BlockDevice {
            let what = "resize of a block device";
            return Err(BackendError::Unsupported { volume: self.name.clone(), what });
        }
        check_size(&self.name, size, self.block_size)?;
        let failed = system_error(&self.name, "resize its image");
        let before = self.size.load(SeqCst);
        if size > before && self.was_cut.load(SeqCst) {
            self.file.file().set_len(before).map_err(&failed)?;
        }
        self.was_cut.fetch_or(size < before, SeqCst);
        image::resize(self.file.file(), size).map_err(&failed)?;
        self.size.store(size, SeqCst);
        Ok(size)
    }

    fn close(&self) {
        self.file.close();
    }

    fn relinquish(&self) {
        self.file.relinquish();
    }
}
