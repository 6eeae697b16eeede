//! vhost-user-blk.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Attachment;
use crate::control::Control;

/// A hypervisor has connected.
pub(super) fn accept(_: &mut Control, attachment: &Arc<Attachment>, connection: OwnedFd) {
    let Some(_connected) = attachment.connect() else { return };
    tracing::warn!(
        volume = %attachment.volume,
        "this server does not speak vhost-user yet: a hypervisor is turned away"
    );
    drop(connection);
}

/// The attachment is being detached. No connection is kept, so there is none to end.
pub(super) fn end(_: &mut Control, _: &Arc<Attachment>) {}
