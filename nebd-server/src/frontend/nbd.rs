//! Network Block Device.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::Attachment;
use crate::control::Control;

/// A client has connected; it says later which of the volumes at this socket it wants.
pub(super) fn accept(_: &mut Control, path: &Path, connection: OwnedFd) {
    tracing::warn!(
        path = %path.display(),
        "this server does not speak NBD yet: a client is turned away"
    );
    drop(connection);
}

/// The attachment is being detached. No connection is kept, so there is none to end.
pub(super) fn end(_: &mut Control, _: &Arc<Attachment>) {}
