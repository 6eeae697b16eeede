//! What the operator asks for over the admin socket.

use std::sync::atomic::Ordering::Relaxed;

use nebd_abi::VolumeName;
use nebd_backend::{BackendError, VolumeSpec};
use nebd_rpc::admin;

use super::Server;
use crate::admin::{AdminApi, AdminError, Caller};
use crate::control::Notice;
use crate::quarantine::DEATHS_SUSPECT;
use crate::registry::{Record, RegistryError};
use crate::shard::Command;
use crate::throttle::{BURST_MS_MAX, Limits};

/// Smallest volume.
const VOLUME_BYTES_MIN: u64 = 1 << 20;

pub(crate) fn registry_error(
    volume: &VolumeName,
    action: &'static str,
) -> impl FnOnce(RegistryError) -> AdminError {
    let volume = volume.to_string();
    move |error| {
        let source = match error {
            RegistryError::File { source, .. } => source,
            damaged => std::io::Error::other(damaged),
        };
        AdminError::Registry { volume, action, source }
    }
}

impl Server {
    fn record_for(
        &self,
        caller: &Caller,
        name: &VolumeName,
        action: &'static str,
        write: bool,
    ) -> Result<Record, AdminError> {
        let record = self
            .registry
            .record(name)
            .ok_or_else(|| AdminError::NotFound { volume: name.to_string() })?;
        if !record.permits(caller.uid, caller.gid, write) {
            return Err(AdminError::Denied { volume: name.to_string(), uid: caller.uid, action });
        }
        Ok(record)
    }

    /// Only the owner and root may change what a volume is.
    pub(crate) fn record_as_owner(
        &self,
        caller: &Caller,
        name: &VolumeName,
        action: &'static str,
    ) -> Result<Record, AdminError> {
        let record = self.record_for(caller, name, action, false)?;
        if !caller.is_root() && caller.uid != record.owner_uid {
            return Err(AdminError::Denied { volume: name.to_string(), uid: caller.uid, action });
        }
        Ok(record)
    }

    fn describe(&self, name: &VolumeName, record: &Record) -> admin::Volume {
        let open = self.volumes.open(name);
        let parked = open.as_ref().and_then(|volume| volume.parked());
        admin::Volume {
            name: name.to_string(),
            size_bytes: open.as_ref().map_or(record.size, |volume| volume.size()),
            block_size: record.block_size,
            owner_uid: record.owner_uid,
            owner_gid: record.owner_gid,
            mode: record.mode,
            path: record.path.as_ref().map_or(String::new(), |path| path.display().to_string()),
            sessions: self.session_count(name),
            parked: parked.is_some(),
            parked_reason: parked.unwrap_or_default(),
            epoch: open.map_or(String::new(), |volume| volume.epoch.to_string()),
            iops_limit: record.limits.iops,
            bytes_per_s_limit: record.limits.bytes_per_s,
            burst_ms: record.limits.burst_ms,
            ..admin::Volume::default()
        }
    }

    fn spec_of(&self, request: &admin::CreateVolumeRequest) -> Result<VolumeSpec, AdminError> {
        let name: VolumeName = request.name.parse()?;
        let invalid = |field, value: String, rule| {
            Err(AdminError::Invalid { volume: name.to_string(), field, value, rule })
        };
        let block_size = if request.block_size == 0 { 4096 } else { request.block_size };
        if block_size != 512 && block_size != 4096 {
            return invalid("block size", block_size.to_string(), "it is 512 or 4096");
        }
        let size = request.size_bytes;
        if !size.is_multiple_of(u64::from(block_size)) {
            return invalid("size", size.to_string(), "it is a multiple of the block size");
        }
        if request.path.is_empty() && size < VOLUME_BYTES_MIN {
            return invalid("size", size.to_string(), "it is at least 1 MiB");
        }
        let path = (!request.path.is_empty()).then(|| request.path.clone().into());
        Ok(VolumeSpec { name, size, block_size, path })
    }

    /// Changes a volume's size; repeated with the same operation id it answers as before.
    pub fn resize(
        &self,
        name: &VolumeName,
        operation: &[u8],
        size: u64,
        shrink: bool,
    ) -> Result<u64, AdminError> {
        // One at a time: the answer is remembered before another resize can change it.
        let _turn = self.resize.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut record = self
            .registry
            .record(name)
            .ok_or_else(|| AdminError::NotFound { volume: name.to_string() })?;
        if let Some(answered) = record.resized(operation) {
            return Ok(answered);
        }
        let open = self.volumes.open(name);
        let present = open.as_ref().map_or(record.size, |volume| volume.size());
        if size < present && !shrink {
            let (volume, size_bytes, present_bytes) = (name.clone(), size, present);
            return Err(AdminError::Shrink { volume, size_bytes, present_bytes });
        }
        if size == 0 || !size.is_multiple_of(u64::from(record.block_size)) {
            return Err(AdminError::Invalid {
                volume: name.to_string(),
                field: "size",
                value: size.to_string(),
                rule: "it is a multiple of the block size, and not 0",
            });
        }
        let size = match &open {
            Some(volume) => self.resize_open(volume, size)?,
            None => self.resize_closed(name, &record, size)?,
        };
        crate::failpoint!("resize-before-record");
        record.set_size(operation, size);
        self.registry.put(name, record).map_err(registry_error(name, "write"))?;
        for session in self.sessions_of(name) {
            session.region.header().volume_size.store(size, Relaxed);
            self.notices.send(Notice::Resized(session.id, size));
        }
        Ok(size)
    }

    fn resize_open(
        &self,
        volume: &crate::volume::OpenVolume,
        size: u64,
    ) -> Result<u64, AdminError> {
        // Shrinking: nothing new may start beyond the end before the end moves.
        let before = volume.size.fetch_min(size, Relaxed);
        match volume.volume.resize(size) {
            Ok(size) => {
                volume.size.store(size, Relaxed);
                Ok(size)
            }
            Err(error) => {
                volume.size.store(before, Relaxed);
                Err(error.into())
            }
        }
    }

    fn resize_closed(
        &self,
        name: &VolumeName,
        record: &Record,
        size: u64,
    ) -> Result<u64, AdminError> {
        let backend = self.backend_of(name)?;
        let context = nebd_backend::OpenContext {
            previous_major: None,
            host_major: self.host_major,
            generation: self.tenure.generation(),
            store: self.store.clone(),
        };
        let volume = self.volumes.acquire(name, || {
            let opened = backend.open(&record.spec(name), &context)?;
            let epoch = nebd_abi::Epoch::new(opened.major, self.tenure.generation());
            Ok(crate::volume::OpenVolume::new(
                name.clone(),
                record.block_size,
                epoch,
                opened,
                &record.limits,
            ))
        })?;
        let resized = self.resize_open(&volume, size);
        drop(volume);
        self.volumes.release(name);
        resized
    }

    fn backend_of(&self, name: &VolumeName) -> Result<&dyn nebd_backend::Backend, AdminError> {
        self.backend(name).ok_or_else(|| AdminError::Backend {
            volume: name.clone(),
            known: self.backends.iter().map(|b| b.kind()).collect::<Vec<_>>().join(", "),
        })
    }

    fn unpark(
        &self,
        caller: &Caller,
        name: &str,
        abort: bool,
    ) -> Result<admin::Volume, AdminError> {
        let name: VolumeName = name.parse()?;
        let record = self.record_as_owner(caller, &name, "unpark")?;
        let open = self.volumes.open(&name).filter(|volume| volume.parked().is_some());
        let open = open.ok_or_else(|| AdminError::NotParked { volume: name.clone() })?;
        let suspects = self.quarantine().unpark(&name);
        open.set_parked(None);
        if abort {
            for suspect in suspects {
                let (session, queue, request) = (suspect.session, suspect.queue, suspect.request);
                self.shards[suspect.shard].send(Command::Abort { session, queue, request });
            }
            self.park_sessions(&name, false);
        } else {
            for suspect in &suspects {
                if let Some(session) = self.session(suspect.session) {
                    let depth = session.region.geometry().queue_depth;
                    let slot = suspect.queue * depth + suspect.request.slot;
                    session.ledger.forgive(slot, DEATHS_SUSPECT);
                }
            }
            self.park_sessions(&name, false);
            self.quarantine().admit(suspects);
            self.issue_suspect();
        }
        crate::metrics::alarm::volume_unparked(&name, abort);
        Ok(self.describe(&name, &record))
    }
}

impl AdminApi for Server {
    fn start_upgrade(
        &self,
        caller: &Caller,
        request: admin::StartUpgradeRequest,
    ) -> Result<admin::Upgrade, AdminError> {
        if !caller.is_root() && caller.uid != rustix::process::geteuid().as_raw() {
            return Err(AdminError::RootOnly { uid: caller.uid, action: "replace the server" });
        }
        self.upgrades.start(&request)
    }

    fn upgrade(&self, _: &Caller) -> Result<admin::Upgrade, AdminError> {
        Ok(self.upgrades.last())
    }

    fn create_volume(
        &self,
        caller: &Caller,
        request: admin::CreateVolumeRequest,
    ) -> Result<admin::Volume, AdminError> {
        let _pass = self.gate.enter("a creation");
        let spec = self.spec_of(&request)?;
        let name = spec.name.clone();
        if spec.path.is_some() && !caller.is_root() {
            // The server opens paths with its own rights.
            let (volume, action) = (name.to_string(), "use a path of the host");
            return Err(AdminError::Denied { volume, uid: caller.uid, action });
        }
        let backend = self.backend_of(&name)?;
        let existing = self.registry.record(&name);
        if self.registry.answered(&request.operation_id, "create", &name).is_some()
            && let Some(record) = &existing
        {
            return Ok(self.describe(&name, record));
        }
        if existing.is_some() {
            return Err(AdminError::Exists { volume: name });
        }
        let mut owner = (caller.uid, caller.gid);
        if caller.is_root() {
            owner = (request.owner_uid.unwrap_or(owner.0), request.owner_gid.unwrap_or(owner.1));
        }
        let mode = request.mode.unwrap_or(0o600) & 0o666;
        let created = self.volumes.while_closed(&name, || -> Result<Record, AdminError> {
            let write = |kind| {
                let answered = self.registry.answer(&request.operation_id, kind, &name, spec.size);
                answered.map_err(registry_error(&name, "write"))
            };
            // A predecessor may have died between making the volume and recording it: the same
            // operation then finds what it made.
            let begun = self.registry.answered(&request.operation_id, "creating", &name).is_some();
            write("creating")?;
            let spec = match backend.create(&spec) {
                Err(BackendError::Exists(_)) if begun => {
                    VolumeSpec { size: backend.observe(&spec)?, ..spec.clone() }
                }
                created => created?,
            };
            crate::failpoint!("create-before-record");
            let record = Record::new(&spec, owner.0, owner.1, mode);
            write("create")?;
            self.registry.put(&name, record.clone()).map_err(registry_error(&name, "write"))?;
            Ok(record)
        });
        let record = created.ok_or_else(|| AdminError::Exists { volume: name.clone() })??;
        tracing::info!(volume = %name, size = record.size, uid = caller.uid, "volume created");
        Ok(self.describe(&name, &record))
    }

    fn list_volumes(&self, caller: &Caller) -> Result<Vec<admin::Volume>, AdminError> {
        let records = self.registry.records();
        let visible = records.iter().filter(|(_, r)| r.permits(caller.uid, caller.gid, false));
        Ok(visible.map(|(name, record)| self.describe(name, record)).collect())
    }

    fn volume(
        &self,
        caller: &Caller,
        request: admin::GetVolumeRequest,
    ) -> Result<admin::Volume, AdminError> {
        let name: VolumeName = request.name.parse()?;
        let record = self.record_for(caller, &name, "look at it", false)?;
        Ok(self.describe(&name, &record))
    }

    fn resize_volume(
        &self,
        caller: &Caller,
        request: admin::ResizeVolumeRequest,
    ) -> Result<admin::Volume, AdminError> {
        let _pass = self.gate.enter("a resize");
        let name: VolumeName = request.name.parse()?;
        self.record_as_owner(caller, &name, "resize it")?;
        self.resize(&name, &request.operation_id, request.size_bytes, request.shrink)?;
        let record = self.record_as_owner(caller, &name, "resize it")?;
        Ok(self.describe(&name, &record))
    }

    fn delete_volume(
        &self,
        caller: &Caller,
        request: admin::DeleteVolumeRequest,
    ) -> Result<(), AdminError> {
        let _pass = self.gate.enter("a deletion");
        let name: VolumeName = request.name.parse()?;
        // The answer names the very volume that this operation set out to delete: a newer one of the
        // same name is left alone.
        if let Some(birth) = self.registry.answered(&request.operation_id, "delete", &name)
            && self.registry.record(&name).is_none_or(|record| record.birth != birth)
        {
            return Ok(());
        }
        let record = self.record_as_owner(caller, &name, "delete it")?;
        let backend = self.backend_of(&name)?;
        let _deletion = self.frontends.start_deletion(&name)?;
        let deleted = self.volumes.while_closed(&name, || -> Result<(), AdminError> {
            // A session that has its place but not its volume yet.
            let sessions = self.session_count(&name);
            if sessions > 0 {
                return Err(AdminError::Attached { volume: name.clone(), sessions });
            }
            let begun = self.registry.answer(&request.operation_id, "delete", &name, record.birth);
            begun.map_err(registry_error(&name, "write"))?;
            match backend.delete(&record.spec(&name)) {
                // A predecessor died between the two steps.
                Ok(()) | Err(BackendError::NotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
            self.prepared().remove(&name);
            crate::failpoint!("delete-before-record");
            self.registry.remove(&name).map_err(registry_error(&name, "write"))?;
            crate::metrics::forget(&name);
            Ok(())
        });
        deleted.ok_or_else(|| AdminError::Attached {
            volume: name.clone(),
            sessions: self.session_count(&name),
        })??;
        tracing::info!(volume = %name, uid = caller.uid, "volume deleted");
        Ok(())
    }

    fn unpark_volume(
        &self,
        caller: &Caller,
        request: admin::UnparkVolumeRequest,
    ) -> Result<admin::Volume, AdminError> {
        let _pass = self.gate.enter("an unpark");
        self.unpark(caller, &request.name, false)
    }

    fn abort_volume(
        &self,
        caller: &Caller,
        request: admin::AbortVolumeRequest,
    ) -> Result<admin::Volume, AdminError> {
        let _pass = self.gate.enter("an abort");
        self.unpark(caller, &request.name, true)
    }

    fn limit_volume(
        &self,
        caller: &Caller,
        request: admin::LimitVolumeRequest,
    ) -> Result<admin::Volume, AdminError> {
        let _pass = self.gate.enter("a change of limits");
        let name: VolumeName = request.name.parse()?;
        let action = "limit it";
        // A resize writes the same record.
        let _turn = self.resize.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut record = self.record_for(caller, &name, action, false)?;
        if !caller.is_root() {
            // Its owner may be who is to be limited.
            return Err(AdminError::Denied { volume: name.to_string(), uid: caller.uid, action });
        }
        let Limits { iops, bytes_per_s, burst_ms } = &mut record.limits;
        *iops = request.iops.unwrap_or(*iops);
        *bytes_per_s = request.bytes_per_s.unwrap_or(*bytes_per_s);
        *burst_ms = request.burst_ms.unwrap_or(*burst_ms);
        if *burst_ms > BURST_MS_MAX {
            return Err(AdminError::Invalid {
                volume: name.to_string(),
                field: "burst",
                value: format!("{burst_ms} ms"),
                rule: "it is at most an hour",
            });
        }
        let limits = record.limits;
        self.registry.put(&name, record.clone()).map_err(registry_error(&name, action))?;
        if let Some(open) = self.volumes.open(&name) {
            open.throttle.set(&limits);
            self.shards.iter().for_each(|shard| shard.send(Command::LimitsChanged));
        }
        tracing::info!(volume = %name, ?limits, uid = caller.uid, "volume limited");
        Ok(self.describe(&name, &record))
    }

    fn attach_volume(
        &self,
        caller: &Caller,
        request: admin::AttachRequest,
    ) -> Result<admin::Attachment, AdminError> {
        self.attach_frontend(caller, &request)
    }

    fn detach_volume(
        &self,
        caller: &Caller,
        request: admin::DetachRequest,
    ) -> Result<Vec<admin::Attachment>, AdminError> {
        self.detach_frontend(caller, &request)
    }

    fn attachments(&self, caller: &Caller) -> Result<Vec<admin::Attachment>, AdminError> {
        Ok(self.list_frontends(caller))
    }

    fn status(
        &self,
        caller: &Caller,
        request: admin::GetStatusRequest,
    ) -> Result<admin::Status, AdminError> {
        self.describe_server(caller, &request)
    }
}
