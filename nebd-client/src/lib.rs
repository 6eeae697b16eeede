//! The part client: block IO from inside a hypervisor to a part server that can be replaced, or
//! die, at any time.
//!
//! (Skeleton: the signatures are settled, the bodies are being filled in.)

mod arena;
mod error;
mod future;
mod io;
mod options;
mod poll;
mod session;

pub use arena::Buffer;
pub use error::{CallError, OpenError, SubmitError, errno};
pub use future::IoFuture;
pub use io::{DataRange, Io};
pub use nebd_abi::control::VolumeInfo;
pub use nebd_abi::layout::SessionId;
pub use nebd_abi::{Epoch, Errno, Generation, Op, OpFlags, VolumeName};
pub use options::{CompletionMode, Event, EventCallback, Options, SOCKET_DEFAULT, SOCKET_ENV};
pub use poll::Queue;
pub use session::{Memory, RawIovec, Session, Stats};
