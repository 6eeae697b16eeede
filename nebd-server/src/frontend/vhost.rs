//! vhost-user-blk: see [`crate::vhost`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Attachment;
use crate::control::Control;

/// A hypervisor has connected.
pub(super) fn accept(control: &mut Control, attachment: &Arc<Attachment>, connection: OwnedFd) {
    control.accept_hypervisor(attachment, connection);
}

/// The attachment is being detached.
pub(super) fn end(control: &mut Control, attachment: &Arc<Attachment>) {
    control.end_hypervisor(&attachment.volume);
}
