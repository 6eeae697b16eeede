//! Why an admin call fails, and how that travels: a gRPC code, a message for a person, an errno
//! in the metadata for a program.

use std::path::PathBuf;

use nebd_abi::name::VolumeNameError;
use nebd_abi::{Errno, VolumeName};
use nebd_backend::BackendError;
use nebd_rpc::ERRNO_METADATA;
use tonic::{Code, Status};

use crate::frontend::ListenError;
use crate::registry::AttachmentKind;

/// Why an admin call failed. Each message tells what happened, to which volume, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No volume has this name.
    #[error("volume {volume} does not exist; `nebdctl volume list` shows those that do")]
    NotFound {
        /// As asked for.
        volume: String,
    },
    /// The name is taken.
    #[error("volume {volume} exists already; choose another name or delete it first")]
    Exists {
        /// Its name.
        volume: VolumeName,
    },
    /// Sessions have the volume attached.
    #[error(
        "volume {volume} is attached by {sessions} session(s); detach them first \
         (`nebdctl status` shows their processes)"
    )]
    Attached {
        /// Which volume.
        volume: VolumeName,
        /// How many.
        sessions: u32,
    },
    /// It is attached for hypervisors.
    #[error("volume {volume} is attached as {kind}; `nebdctl detach {volume}` ends that")]
    HasAttachment {
        /// Which volume.
        volume: VolumeName,
        /// As what.
        kind: AttachmentKind,
    },
    /// It is not attached for hypervisors.
    #[error("volume {volume} is not attached like that; `nebdctl attachments` shows what is")]
    NotAttached {
        /// Which volume.
        volume: VolumeName,
    },
    /// Another attachment has the socket.
    #[error(
        "socket {} is that of volume {volume}, attached as {kind}; only attachments as nbd share \
         one", socket.display()
    )]
    SocketTaken {
        /// Where.
        socket: PathBuf,
        /// Whose it is.
        volume: VolumeName,
        /// As what.
        kind: AttachmentKind,
    },
    /// Nobody can listen there.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The caller lacks the right.
    #[error("volume {volume}: user {uid} may not {action}; ask its owner or root")]
    Denied {
        /// Which volume.
        volume: String,
        /// Who asked.
        uid: u32,
        /// What was asked, as a verb.
        action: &'static str,
    },
    /// The name is none.
    #[error(transparent)]
    Name(#[from] VolumeNameError),
    /// No backend has this kind.
    #[error(
        "volume {volume}: this server has no backend {:?}; it has {known}",
        volume.backend()
    )]
    Backend {
        /// Which volume.
        volume: VolumeName,
        /// The kinds there are, separated by commas.
        known: String,
    },
    /// A field of the request has an impossible value.
    #[error("volume {volume}: {field} {value} is not possible: {rule}")]
    Invalid {
        /// Which volume.
        volume: String,
        /// Which field.
        field: &'static str,
        /// Its value, as text.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// A smaller size without consent.
    #[error(
        "volume {volume}: {size_bytes} bytes is less than its {present_bytes}; what lies beyond \
         would be lost. Say --shrink if that is meant"
    )]
    Shrink {
        /// Which volume.
        volume: VolumeName,
        /// As asked for.
        size_bytes: u64,
        /// As it is.
        present_bytes: u64,
    },
    /// Only a parked volume can be unparked or aborted.
    #[error("volume {volume} is not parked; nothing was done")]
    NotParked {
        /// Which volume.
        volume: VolumeName,
    },
    /// The operation id was used for another request.
    #[error("volume {volume}: the operation id belongs to another request; use a new one")]
    Operation {
        /// Which volume.
        volume: String,
    },
    /// The server cannot do this now, but can soon (it is starting, or a takeover runs).
    #[error("volume {volume}: {reason}; try again")]
    NotYet {
        /// Which volume.
        volume: String,
        /// Why.
        reason: &'static str,
    },
    /// The registry of volumes could not be read or written.
    #[error(
        "volume {volume}: cannot {action} the volume registry: {source}; check the state directory"
    )]
    Registry {
        /// Which volume.
        volume: String,
        /// What was tried, as a verb.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Only root may.
    #[error("user {uid} may not {action}; ask root")]
    RootOnly {
        /// Who asked.
        uid: u32,
        /// What was asked, as a verb.
        action: &'static str,
    },
    /// Another planned takeover is under way.
    #[error("another upgrade is under way; `nebdctl status` shows it")]
    UpgradeRunning,
    /// The present server has not proved itself yet.
    #[error("the present server is on probation; wait for its end, or roll back")]
    OnProbation,
    /// There is nothing to go back to.
    #[error("no other binary has served before this one: name one with `nebdctl upgrade --binary`")]
    NoPrevious,
    /// The backend refused or failed.
    #[error(transparent)]
    Storage(#[from] BackendError),
}

impl AdminError {
    /// As an errno, for a program.
    pub fn errno(&self) -> Errno {
        match self {
            AdminError::NotFound { .. } | AdminError::NoPrevious => Errno(libc::ENOENT),
            AdminError::RootOnly { .. } => Errno(libc::EPERM),
            AdminError::UpgradeRunning | AdminError::OnProbation => Errno(libc::EBUSY),
            AdminError::Exists { .. } => Errno(libc::EEXIST),
            AdminError::Attached { .. } | AdminError::HasAttachment { .. } => Errno(libc::EBUSY),
            AdminError::NotAttached { .. } => Errno(libc::ENOENT),
            AdminError::SocketTaken { .. } => Errno(libc::EADDRINUSE),
            AdminError::Listen(error) => error.errno(),
            AdminError::Denied { .. } => Errno(libc::EACCES),
            AdminError::Name(_)
            | AdminError::Invalid { .. }
            | AdminError::Shrink { .. }
            | AdminError::NotParked { .. }
            | AdminError::Operation { .. } => Errno(libc::EINVAL),
            AdminError::Backend { .. } => Errno(libc::EOPNOTSUPP),
            AdminError::NotYet { .. } => Errno(libc::EAGAIN),
            AdminError::Registry { source, .. } => Errno::from_io(source),
            AdminError::Storage(error) => error.errno(),
        }
    }

    fn code(&self) -> Code {
        match self {
            AdminError::Attached { .. }
            | AdminError::Shrink { .. }
            | AdminError::NotParked { .. } => Code::FailedPrecondition,
            AdminError::Operation { .. } => Code::AlreadyExists,
            _ => match self.errno().0 {
                libc::ENOENT => Code::NotFound,
                libc::EEXIST => Code::AlreadyExists,
                libc::EACCES | libc::EPERM => Code::PermissionDenied,
                libc::EINVAL | libc::ENAMETOOLONG => Code::InvalidArgument,
                libc::EOPNOTSUPP => Code::Unimplemented,
                libc::EBUSY | libc::EADDRINUSE => Code::FailedPrecondition,
                libc::EAGAIN => Code::Unavailable,
                libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM => {
                    Code::ResourceExhausted
                }
                libc::ESTALE => Code::DataLoss,
                _ => Code::Internal,
            },
        }
    }
}

impl From<AdminError> for Status {
    fn from(error: AdminError) -> Status {
        let mut status = Status::new(error.code(), error.to_string());
        status.metadata_mut().insert(ERRNO_METADATA, error.errno().0.into());
        status
    }
}
