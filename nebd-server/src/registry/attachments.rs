//! What the registry keeps of attachments: volumes that hypervisors reach without nebd's library.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nebd_abi::VolumeName;
use serde::{Deserialize, Serialize};

use super::{Registry, RegistryError, State, birth, file, hex, remove, write};

/// What an attachment speaks.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentKind {
    /// vhost-user-blk.
    VhostUser,
    /// Network Block Device.
    Nbd,
}

impl AttachmentKind {
    /// All there are.
    pub const ALL: [AttachmentKind; 2] = [AttachmentKind::VhostUser, AttachmentKind::Nbd];

    /// As the operator writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            AttachmentKind::VhostUser => "vhost-user",
            AttachmentKind::Nbd => "nbd",
        }
    }

    /// Whether this file is a record of such an attachment. A later server may have other kinds.
    fn has_file(self, name: &str) -> bool {
        let rest = name.strip_prefix(self.as_str()).and_then(|rest| rest.strip_prefix('.'));
        rest.is_some_and(|rest| rest.ends_with(".toml"))
    }
}

impl std::fmt::Display for AttachmentKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A volume has at most one attachment of each kind.
pub type AttachmentKey = (VolumeName, AttachmentKind);

/// An attachment, as long as nobody detaches it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct AttachmentRecord {
    volume: String,
    /// What it speaks.
    pub kind: AttachmentKind,
    /// Where; absolute.
    pub socket: PathBuf,
    /// Writes are refused.
    pub read_only: bool,
    /// Virtqueues at most.
    pub queues: u32,
    /// Tells this attachment from others that had or will have its key.
    pub birth: u64,
    /// The [birth](super::Record::birth) of the volume: a later one of its name is not attached.
    pub volume_birth: u64,
    operation: String,
}

impl AttachmentRecord {
    /// A record of an attachment that operation `id` makes.
    pub fn new(
        key: &AttachmentKey,
        volume: &super::Record,
        id: &[u8],
        socket: PathBuf,
    ) -> AttachmentRecord {
        AttachmentRecord {
            volume: key.0.to_string(),
            kind: key.1,
            socket,
            read_only: false,
            queues: 1,
            birth: birth(),
            volume_birth: volume.birth,
            operation: hex(id),
        }
    }

    /// Whether operation `id` made it.
    pub fn is_of(&self, id: &[u8]) -> bool {
        !id.is_empty() && self.operation == hex(id)
    }
}

impl Registry {
    /// The record of an attachment.
    pub fn attachment(&self, key: &AttachmentKey) -> Option<AttachmentRecord> {
        self.state().attachments.get(key).cloned()
    }

    /// Every attachment, by volume and kind.
    pub fn attachments(&self) -> BTreeMap<AttachmentKey, AttachmentRecord> {
        self.state().attachments.clone()
    }

    /// Adds a record.
    pub fn put_attachment(
        &self,
        key: &AttachmentKey,
        record: AttachmentRecord,
    ) -> Result<(), RegistryError> {
        let mut state = self.state();
        let path = self.attachment_path(key);
        state.stamps.remove(&path);
        write(&path, &record)?;
        state.attachments.insert(key.clone(), record);
        Ok(())
    }

    /// Removes a record.
    pub fn remove_attachment(&self, key: &AttachmentKey) -> Result<(), RegistryError> {
        let mut state = self.state();
        remove(&self.attachment_path(key))?;
        state.attachments.remove(key);
        Ok(())
    }

    fn attachment_path(&self, key: &AttachmentKey) -> PathBuf {
        self.attachments_dir.join(file_name(key))
    }
}

/// No kind of storage has a dot in its name: the file is this attachment's alone.
fn file_name((volume, kind): &AttachmentKey) -> String {
    format!("{kind}.{}.{}.toml", volume.backend(), volume.name())
}

impl State {
    pub(super) fn read_attachments(
        &self,
        fresh: &mut State,
        dir: &Path,
    ) -> Result<(), RegistryError> {
        let known: BTreeMap<String, &AttachmentRecord> =
            self.attachments.iter().map(|(key, record)| (file_name(key), record)).collect();
        for entry in fs::read_dir(dir).map_err(file("list", dir))? {
            let path = entry.map_err(file("list", dir))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if !AttachmentKind::ALL.iter().any(|kind| kind.has_file(name)) {
                continue;
            }
            let known = known.get(name).copied();
            let Some(record) = self.read_if_changed(fresh, path.clone(), known)? else { continue };
            match record.volume.parse() {
                Ok(volume) => _ = fresh.attachments.insert((volume, record.kind), record),
                Err(error) => tracing::error!(path = %path.display(), %error, "no attachment"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Record;
    use nebd_backend::VolumeSpec;

    #[test]
    fn attachments_are_found_again_and_those_of_a_later_server_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(dir.path()).unwrap();
        let name: VolumeName = "file:disk1".parse().unwrap();
        let spec = VolumeSpec { name: name.clone(), size: 4096, block_size: 512, path: None };
        let volume = Record::new(&spec, 1000, 100, 0o640);
        let keys = AttachmentKind::ALL.map(|kind| (name.clone(), kind));
        for key in &keys {
            let record = AttachmentRecord::new(key, &volume, b"id", "/run/s".into());
            registry.put_attachment(key, record).unwrap();
        }
        let theirs = dir.path().join("attachments/ublk.file.disk1.toml");
        fs::write(&theirs, "of a later server").unwrap();
        let again = Registry::load(dir.path()).unwrap();
        assert_eq!(again.attachments(), registry.attachments());
        let record = again.attachment(&keys[1]).unwrap();
        assert!(record.is_of(b"id") && !record.is_of(b"other"));
        assert_eq!((record.kind, record.volume_birth), (AttachmentKind::Nbd, volume.birth));
        again.remove_attachment(&keys[0]).unwrap();
        again.remove_attachment(&keys[0]).unwrap();
        registry.reload().unwrap();
        assert_eq!(registry.attachments().into_keys().collect::<Vec<_>>(), [keys[1].clone()]);
        assert!(theirs.exists());
    }
}
