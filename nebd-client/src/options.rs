//! How a session is to be opened, and what it tells its host.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nebd_abi::layout::{Geometry, PAGE};
use nebd_abi::{Errno, Generation};

/// Environment variable that names the server's client socket.
pub const SOCKET_ENV: &str = "NEBD_SOCKET";
/// The client socket where the environment names none.
pub const SOCKET_DEFAULT: &str = "/run/nebd/nebd.sock";

/// Who reaps completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionMode {
    /// A thread of the library, shared by all sessions of the process, runs callbacks and wakes
    /// futures. It is started with the first callback or future. Blocking calls do without it.
    #[default]
    Threaded,
    /// The host: [`Queue::reap`](crate::Queue::reap), called from its own event loop or busy loop.
    Manual,
}

/// What happened to a session, told through [`Options::on_event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The volume has another size.
    Resized {
        /// In bytes.
        size: u64,
    },
    /// Another server serves the session now.
    ServerChanged {
        /// The new server's generation.
        generation: Generation,
    },
    /// Requests wait, and none was completed for [`Options::stall_after`].
    Stalled,
    /// Requests are completed again after [`Event::Stalled`].
    Resumed,
    /// The volume is parked: requests wait for the operator.
    Parked,
    /// The volume is served again.
    Unparked,
    /// The session is over: its requests have failed with this errno, later ones fail too.
    Detached {
        /// Why.
        errno: Errno,
    },
}

/// Receives events on the `nebd-complete` thread. It may block, but then it delays callbacks.
pub type EventCallback = Arc<dyn Fn(Event) + Send + Sync>;

/// How a session is to be opened. The defaults suit a virtual disk.
#[derive(Clone)]
pub struct Options {
    pub(crate) socket: PathBuf,
    pub(crate) queues: u32,
    pub(crate) depth: u32,
    pub(crate) iovecs_per_slot: u32,
    pub(crate) arena_bytes: u64,
    pub(crate) exclusive: bool,
    pub(crate) read_only: bool,
    pub(crate) completion: CompletionMode,
    pub(crate) stall_after: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) io_timeout: Option<Duration>,
    pub(crate) spin: Duration,
    pub(crate) on_event: Option<EventCallback>,
}

impl Default for Options {
    fn default() -> Options {
        let socket = std::env::var_os(SOCKET_ENV).filter(|path| !path.is_empty());
        Options {
            socket: socket.map_or_else(|| PathBuf::from(SOCKET_DEFAULT), PathBuf::from),
            queues: 1,
            depth: 128,
            iovecs_per_slot: 16,
            arena_bytes: 16 << 20,
            exclusive: false,
            read_only: false,
            completion: CompletionMode::Threaded,
            stall_after: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(10),
            io_timeout: None,
            spin: Duration::from_micros(100),
            on_event: None,
        }
    }
}

impl Options {
    /// The defaults: the socket of `NEBD_SOCKET` or `/run/nebd/nebd.sock`, one queue of 128
    /// requests, 16 MiB of arena, completions on the library's thread, no limit to waiting.
    pub fn new() -> Options {
        Options::default()
    }

    /// The server's client socket.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Options {
        self.socket = path.into();
        self
    }

    /// Queues, 1 to 64; a host thread that submits much wants one of its own.
    pub fn queues(mut self, count: u32) -> Options {
        self.queues = count;
        self
    }

    /// Requests a queue can have in flight: a power of two up to 4096.
    pub fn depth(mut self, depth: u32) -> Options {
        self.depth = depth;
        self
    }

    /// Buffers a request can have before it is split, 1 to 1024.
    pub fn iovecs_per_slot(mut self, count: u32) -> Options {
        self.iovecs_per_slot = count;
        self
    }

    /// Size of the arena, which holds [`Buffer`](crate::Buffer)s and copies of caller memory;
    /// rounded up to whole pages. Its memory is used only as far as it is touched.
    pub fn arena_bytes(mut self, bytes: u64) -> Options {
        self.arena_bytes = bytes;
        self
    }

    /// No other session may hold the volume.
    pub fn exclusive(mut self, exclusive: bool) -> Options {
        self.exclusive = exclusive;
        self
    }

    /// Mutations are refused with `EROFS`.
    pub fn read_only(mut self, read_only: bool) -> Options {
        self.read_only = read_only;
        self
    }

    /// Who reaps completions.
    pub fn completion(mut self, mode: CompletionMode) -> Options {
        self.completion = mode;
        self
    }

    /// How long requests wait without any completion before [`Event::Stalled`], and between two
    /// knocks at the server's door.
    pub fn stall_after(mut self, duration: Duration) -> Options {
        self.stall_after = duration;
        self
    }

    /// How long [`Session::open`](crate::Session::open) waits for a server, and
    /// [`Session::close`](crate::Session::close) for one to say goodbye to. An attached session
    /// waits for a new server without limit.
    pub fn connect_timeout(mut self, duration: Duration) -> Options {
        self.connect_timeout = duration;
        self
    }

    /// How long a request or call may take before it fails with `ETIMEDOUT`; `None` waits without
    /// limit. A write that timed out may still be carried out later, with what memory that is used in
    /// place ([`Buffer`](crate::Buffer), [`Memory`](crate::Memory)) holds then; a read may still
    /// change such memory.
    pub fn io_timeout(mut self, duration: Option<Duration>) -> Options {
        self.io_timeout = duration;
        self
    }

    /// The most that a waiting call spins before it sleeps. The spin adapts: it shrinks while it
    /// does not pay. Zero never spins, a huge value busy-polls.
    pub fn spin(mut self, duration: Duration) -> Options {
        self.spin = duration;
        self
    }

    /// Is told what happens to the session.
    pub fn on_event(mut self, callback: impl Fn(Event) + Send + Sync + 'static) -> Options {
        self.on_event = Some(Arc::new(callback));
        self
    }
}

impl Options {
    /// The region's sizes; the region's constructor checks them.
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            queue_count: self.queues,
            queue_depth: self.depth,
            iovecs_per_slot: self.iovecs_per_slot,
            arena_size: self.arena_bytes.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("socket", &self.socket)
            .field("queues", &self.queues)
            .field("depth", &self.depth)
            .field("iovecs_per_slot", &self.iovecs_per_slot)
            .field("arena_bytes", &self.arena_bytes)
            .field("exclusive", &self.exclusive)
            .field("read_only", &self.read_only)
            .field("completion", &self.completion)
            .field("stall_after", &self.stall_after)
            .field("connect_timeout", &self.connect_timeout)
            .field("io_timeout", &self.io_timeout)
            .field("spin", &self.spin)
            .finish_non_exhaustive()
    }
}
