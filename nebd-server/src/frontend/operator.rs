//! What the operator asks for.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nebd_abi::VolumeName;
use nebd_backend::FdStore;
use nebd_rpc::admin;

use super::{Attachment, Frontends, ListenError, listener};
use crate::admin::{AdminError, Caller};
use crate::control::Notice;
use crate::registry::{AttachmentKey, AttachmentKind, AttachmentRecord, Record};
use crate::server::Server;
use crate::server::operator::registry_error;

/// Virtqueues at most, as a session has queues.
const QUEUES_MAX: u32 = 64;
/// How long a detach waits for requests in flight; then the caller tries again.
const END_TIME_MAX: Duration = Duration::from_secs(2);

/// Held while a volume is being deleted: it cannot be attached meanwhile.
pub struct Deletion<'a> {
    frontends: &'a Frontends,
    volume: VolumeName,
}

impl Drop for Deletion<'_> {
    fn drop(&mut self) {
        self.frontends.state().deletions.remove(&self.volume);
    }
}

impl Server {
    /// Serves a volume at a socket from now on; repeated with the same operation id it answers as
    /// before.
    pub(crate) fn attach_frontend(
        &self,
        caller: &Caller,
        request: &admin::AttachRequest,
    ) -> Result<admin::Attachment, AdminError> {
        let _pass = self.gate.enter("an attachment's beginning");
        let volume: VolumeName = request.volume.parse()?;
        let _turn = self.frontends.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let record = self.record_as_owner(caller, &volume, "attach it")?;
        let key = (volume, kind_of(request)?);
        if let Some(known) = self.registry.attachment(&key) {
            return match known.is_of(&request.operation_id) {
                true => Ok(self.describe_attachment(&key, &known)),
                false => Err(AdminError::HasAttachment { volume: key.0, kind: key.1 }),
            };
        }
        let wanted = self.wanted(caller, &key, &record, request)?;
        let frontends = &self.frontends;
        if frontends.state().deletions.contains(&key.0) {
            return Err(AdminError::NotFound { volume: key.0.to_string() });
        }
        let socket = wanted.socket.clone();
        let is_shared = frontends.state().listener_at(&socket).is_some();
        if !is_shared {
            // What cannot be made needs no record.
            listener::clear(&socket)?;
        }
        let written = self.registry.put_attachment(&key, wanted.clone());
        written.map_err(registry_error(&key.0, "write"))?;
        crate::failpoint!("frontend-attach-recorded");
        let attachment = Arc::new(Attachment::new(key.0.clone(), wanted.clone()));
        frontends.state().attachments.insert(key.clone(), attachment);
        if let Err(error) = self.reach(&socket, is_shared) {
            frontends.state().attachments.remove(&key);
            if !is_shared {
                frontends.close(&self.store, &socket);
            }
            let removed = self.registry.remove_attachment(&key);
            removed.map_err(registry_error(&key.0, "write"))?;
            return Err(error.into());
        }
        let (volume, kind) = &key;
        tracing::info!(%volume, %kind, socket = %socket.display(), uid = caller.uid, "attached");
        Ok(self.describe_attachment(&key, &wanted))
    }

    /// A socket that outlives this process.
    fn reach(&self, socket: &Path, is_there: bool) -> Result<(), ListenError> {
        if !is_there {
            self.frontends.listen(&self.store, socket)?;
        }
        self.store.barrier().map_err(ListenError::system("store", socket))
    }

    /// The record of what is asked for, if it is possible.
    fn wanted(
        &self,
        caller: &Caller,
        key: &AttachmentKey,
        volume: &Record,
        request: &admin::AttachRequest,
    ) -> Result<AttachmentRecord, AdminError> {
        let invalid = |field, value: String, rule| {
            Err(AdminError::Invalid { volume: key.0.to_string(), field, value, rule })
        };
        let socket = match request.socket.as_str() {
            "" => self.frontends.places.default_socket(&key.0, key.1),
            path => {
                if !caller.is_root() && caller.uid != rustix::process::geteuid().as_raw() {
                    // The server makes it with its own rights.
                    let (volume, action) = (key.0.to_string(), "use a path of the host");
                    return Err(AdminError::Denied { volume, uid: caller.uid, action });
                }
                PathBuf::from(path)
            }
        };
        if !socket.is_absolute() {
            return invalid("socket", request.socket.clone(), "it is an absolute path");
        }
        for (other, record) in self.registry.attachments() {
            let is_shareable = (key.1, other.1) == (AttachmentKind::Nbd, AttachmentKind::Nbd);
            if record.socket == socket && !is_shareable {
                let (volume, kind) = other;
                return Err(AdminError::SocketTaken { socket, volume, kind });
            }
        }
        let queues = request.queues.max(1);
        match key.1 {
            AttachmentKind::VhostUser if queues > QUEUES_MAX => {
                return invalid("queues", queues.to_string(), "there are 1 to 64");
            }
            AttachmentKind::Nbd if queues > 1 => {
                return invalid("queues", queues.to_string(), "NBD has connections instead");
            }
            _ => {}
        }
        let mut wanted = AttachmentRecord::new(key, volume, &request.operation_id, socket);
        (wanted.read_only, wanted.queues) = (request.read_only, queues);
        Ok(wanted)
    }

    /// Ends attachments of a volume; returns what they were. Repeated with the same operation id it
    /// goes on where its predecessor died.
    pub(crate) fn detach_frontend(
        &self,
        caller: &Caller,
        request: &admin::DetachRequest,
    ) -> Result<Vec<admin::Attachment>, AdminError> {
        let _pass = self.gate.enter("an attachment's end");
        let volume: VolumeName = request.volume.parse()?;
        self.record_as_owner(caller, &volume, "detach it")?;
        let asked = asked_kind(request.kind());
        let _turn = self.frontends.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut detached, mut is_repeated) = (Vec::new(), false);
        for kind in AttachmentKind::ALL.into_iter().filter(|kind| asked.is_none_or(|k| k == *kind))
        {
            let key = (volume.clone(), kind);
            let operation = format!("detach {kind}");
            let begun = self.registry.answered(&request.operation_id, &operation, &volume);
            is_repeated |= begun.is_some();
            let Some(record) = self.registry.attachment(&key) else { continue };
            match begun {
                // Another one, made since then.
                Some(birth) if birth != record.birth => continue,
                Some(_) => {}
                None => {
                    let id = &request.operation_id;
                    let noted = self.registry.answer(id, &operation, &volume, record.birth);
                    noted.map_err(registry_error(&volume, "write"))?;
                }
            }
            let told = self.describe_attachment(&key, &record);
            self.detach_one(&key, &record)?;
            tracing::info!(%volume, %kind, uid = caller.uid, "detached");
            detached.push(told);
        }
        if detached.is_empty() && !is_repeated {
            return Err(AdminError::NotAttached { volume });
        }
        Ok(detached)
    }

    fn detach_one(&self, key: &AttachmentKey, record: &AttachmentRecord) -> Result<(), AdminError> {
        let frontends = &self.frontends;
        if let Some(attachment) = frontends.attachment(key) {
            attachment.start_ending();
            self.notices.send(Notice::Detached(attachment.clone()));
            if !attachment.ends_within(END_TIME_MAX) {
                let (volume, reason) =
                    (key.0.to_string(), "requests of its hypervisor are in flight");
                return Err(AdminError::NotYet { volume, reason });
            }
        }
        frontends.state().attachments.remove(key);
        if frontends.state().attachments.values().all(|other| other.record.socket != record.socket)
        {
            frontends.close(&self.store, &record.socket);
        }
        crate::failpoint!("frontend-detach-closed");
        let removed = self.registry.remove_attachment(key);
        removed.map_err(registry_error(&key.0, "write"))
    }

    /// The attachments of volumes that the caller may see.
    pub(crate) fn list_frontends(&self, caller: &Caller) -> Vec<admin::Attachment> {
        let is_visible = |key: &AttachmentKey| {
            let volume = self.registry.record(&key.0);
            volume.is_some_and(|volume| volume.permits(caller.uid, caller.gid, false))
        };
        let records = self.registry.attachments();
        let visible = records.iter().filter(|(key, _)| is_visible(key));
        visible.map(|(key, record)| self.describe_attachment(key, record)).collect()
    }

    fn describe_attachment(
        &self,
        key: &AttachmentKey,
        record: &AttachmentRecord,
    ) -> admin::Attachment {
        let state = self.frontends.state();
        let attachment = state.attachments.get(key);
        let problem = match attachment {
            Some(attachment) => {
                let unreachable = state.problems.get(&record.socket).cloned();
                let refused = || attachment.last_refusal().filter(|_| attachment.connected() == 0);
                unreachable.or_else(refused).unwrap_or_default()
            }
            None => "the volume that was attached is gone".to_owned(),
        };
        admin::Attachment {
            volume: key.0.to_string(),
            kind: match key.1 {
                AttachmentKind::VhostUser => admin::AttachmentKind::VhostUser,
                AttachmentKind::Nbd => admin::AttachmentKind::Nbd,
            }
            .into(),
            socket: record.socket.display().to_string(),
            read_only: record.read_only,
            queues: record.queues,
            connected: attachment.map_or(0, |attachment| attachment.connected()),
            problem,
        }
    }
}

impl Frontends {
    /// A volume is about to be deleted: that needs that it is not attached, and does not become so.
    pub(crate) fn start_deletion(&self, volume: &VolumeName) -> Result<Deletion<'_>, AdminError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if let Some(((_, kind), _)) = state.attachments.iter().find(|((name, _), _)| name == volume)
        {
            return Err(AdminError::HasAttachment { volume: volume.clone(), kind: *kind });
        }
        state.deletions.insert(volume.clone());
        Ok(Deletion { frontends: self, volume: volume.clone() })
    }
}

fn kind_of(request: &admin::AttachRequest) -> Result<AttachmentKind, AdminError> {
    asked_kind(request.kind()).ok_or_else(|| AdminError::Invalid {
        volume: request.volume.clone(),
        field: "kind",
        value: request.kind.to_string(),
        rule: "this server has vhost-user and nbd",
    })
}

fn asked_kind(kind: admin::AttachmentKind) -> Option<AttachmentKind> {
    match kind {
        admin::AttachmentKind::Unspecified => None,
        admin::AttachmentKind::VhostUser => Some(AttachmentKind::VhostUser),
        admin::AttachmentKind::Nbd => Some(AttachmentKind::Nbd),
    }
}
