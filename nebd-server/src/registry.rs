//! The volume registry: which volumes exist, whose they are, and which calls were answered.
//!
//! One small TOML file a volume under `<state-dir>/volumes/`, one of recent operations, and one an
//! attachment under `<state-dir>/attachments/`. A file is replaced by writing another beside it,
//! syncing it, renaming it, and syncing the directory: after a crash at any instruction it is the
//! old or the new one.

mod attachments;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nebd_abi::VolumeName;
use nebd_backend::VolumeSpec;
use serde::{Deserialize, Serialize};

use crate::throttle::Limits;
pub use attachments::{AttachmentKey, AttachmentKind, AttachmentRecord};

/// Operations whose answers are remembered.
const OPERATIONS_MAX: usize = 1024;

/// What the registry keeps of a volume.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Record {
    name: String,
    /// Bytes.
    pub size: u64,
    /// 512 or 4096.
    pub block_size: u32,
    /// Backing file or device, where the backend has one by path.
    pub path: Option<PathBuf>,
    /// Owning user.
    pub owner_uid: u32,
    /// Owning group.
    pub owner_gid: u32,
    /// Who may attach: read and write bits as for a file.
    pub mode: u32,
    /// Tells this volume from others that had or will have its name.
    #[serde(default)]
    pub birth: u64,
    /// What it may have of the host's storage.
    #[serde(default)]
    pub limits: Limits,
    /// The last resizes, newest last: what they answered is durable with the size itself.
    #[serde(default)]
    resizes: Vec<Resize>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Resize {
    id: String,
    size: u64,
}

/// Resizes of a volume that are remembered.
const RESIZES_MAX: usize = 16;

impl Record {
    /// A record of a volume.
    pub fn new(spec: &VolumeSpec, owner_uid: u32, owner_gid: u32, mode: u32) -> Record {
        Record {
            name: spec.name.to_string(),
            size: spec.size,
            block_size: spec.block_size,
            path: spec.path.clone(),
            owner_uid,
            owner_gid,
            mode,
            birth: birth(),
            limits: Limits::default(),
            resizes: Vec::new(),
        }
    }

    /// The size that resize `id` answered with, if it was answered.
    pub fn resized(&self, id: &[u8]) -> Option<u64> {
        let id = hex(id);
        self.resizes.iter().find(|resize| resize.id == id).map(|resize| resize.size)
    }

    /// The volume has a new size, by resize `id`.
    pub fn set_size(&mut self, id: &[u8], size: u64) {
        self.size = size;
        if !id.is_empty() {
            self.resizes.push(Resize { id: hex(id), size });
            let excess = self.resizes.len().saturating_sub(RESIZES_MAX);
            self.resizes.drain(..excess);
        }
    }

    /// For the backend.
    pub fn spec(&self, name: &VolumeName) -> VolumeSpec {
        VolumeSpec {
            name: name.clone(),
            size: self.size,
            block_size: self.block_size,
            path: self.path.clone(),
        }
    }

    /// Whether this user may read (and write, if asked), as the kernel would decide for a file.
    pub fn permits(&self, uid: u32, gid: u32, write: bool) -> bool {
        let wanted = if write { 0o6 } else { 0o4 };
        let granted = match (uid, gid) {
            (0, _) => 0o7,
            (uid, _) if uid == self.owner_uid => self.mode >> 6,
            (_, gid) if gid == self.owner_gid => self.mode >> 3,
            _ => self.mode,
        };
        granted & wanted == wanted
    }
}

/// What a call that is not idempotent did, told again if it is repeated.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Operation {
    id: String,
    volume: String,
    kind: String,
    size: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct Operations {
    #[serde(default)]
    operation: Vec<Operation>,
}

/// Why the registry cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file holds something else than the registry wrote.
    #[error("{path} is damaged: {source}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: Box<toml::de::Error>,
    },
}

/// The registry; every change is durable before it is visible.
pub struct Registry {
    dir: PathBuf,
    attachments_dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    volumes: BTreeMap<VolumeName, Record>,
    operations: Operations,
    attachments: BTreeMap<AttachmentKey, AttachmentRecord>,
    /// What the files were when they were read; nothing of those that this process wrote.
    stamps: HashMap<PathBuf, Stamp>,
}

/// Tells a file from the one that replaced it.
#[derive(Clone, Copy, PartialEq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified_ns: i128,
}

/// Within this time after its last change, a file may change again and look the same.
const STAMP_AGE_MIN: Duration = Duration::from_secs(1);

impl Stamp {
    /// `None` if the file is too young for its stamp to tell it from its successor.
    fn of(file: &fs::Metadata) -> Option<Stamp> {
        let age = SystemTime::now().duration_since(file.modified().ok()?).ok()?;
        let modified_ns = i128::from(file.mtime()) * 1_000_000_000 + i128::from(file.mtime_nsec());
        let stamp = Stamp { inode: file.ino(), size: file.len(), modified_ns };
        (age >= STAMP_AGE_MIN).then_some(stamp)
    }
}

impl Registry {
    /// Reads what is there.
    pub fn load(state_dir: &Path) -> Result<Registry, RegistryError> {
        let dir = state_dir.join("volumes");
        fs::create_dir_all(&dir).map_err(file("create", &dir))?;
        let attachments_dir = state_dir.join("attachments");
        fs::create_dir_all(&attachments_dir).map_err(file("create", &attachments_dir))?;
        let registry = Registry { dir, attachments_dir, state: Mutex::default() };
        registry.reload()?;
        Ok(registry)
    }

    /// Reads again what another process may have changed: a look at each file, and a read of those
    /// that are not what they were. What fails changes nothing.
    pub fn reload(&self) -> Result<(), RegistryError> {
        let dir = &self.dir;
        let mut state = self.state();
        let mut fresh = State::default();
        for entry in fs::read_dir(dir).map_err(file("list", dir))? {
            let path = entry.map_err(file("list", dir))?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()?.parse::<VolumeName>().ok());
            let is_record = path.extension().is_some_and(|extension| extension == "toml");
            let Some(name) = name.filter(|_| is_record) else { continue };
            let known = state.volumes.get(&name);
            if let Some(record) = state.read_if_changed(&mut fresh, path, known)? {
                fresh.volumes.insert(name, record);
            }
        }
        let known = Some(&state.operations);
        let operations = state.read_if_changed(&mut fresh, dir.join(OPERATIONS), known)?;
        fresh.operations = operations.unwrap_or_default();
        state.read_attachments(&mut fresh, &self.attachments_dir)?;
        *state = fresh;
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A volume's record.
    pub fn record(&self, name: &VolumeName) -> Option<Record> {
        self.state().volumes.get(name).cloned()
    }

    /// Every volume, by name.
    pub fn records(&self) -> Vec<(VolumeName, Record)> {
        self.state().volumes.iter().map(|(name, record)| (name.clone(), record.clone())).collect()
    }

    /// The size that operation `id` answered with, if it was answered for this volume and kind.
    pub fn answered(&self, id: &[u8], kind: &str, name: &VolumeName) -> Option<u64> {
        let id = hex(id);
        let state = self.state();
        let mut operations = state.operations.operation.iter();
        operations
            .find(|op| op.id == id && op.kind == kind && op.volume == name.as_str())
            .map(|op| op.size)
    }

    /// Remembers an answer. It is written before the change it tells of becomes visible.
    pub fn answer(
        &self,
        id: &[u8],
        kind: &str,
        name: &VolumeName,
        size: u64,
    ) -> Result<(), RegistryError> {
        if id.is_empty() {
            return Ok(());
        }
        let mut state = self.state();
        let operation =
            Operation { id: hex(id), volume: name.to_string(), kind: kind.to_owned(), size };
        let operations = &mut state.operations.operation;
        operations.push(operation);
        let excess = operations.len().saturating_sub(OPERATIONS_MAX);
        operations.drain(..excess);
        state.stamps.remove(&self.dir.join(OPERATIONS));
        write(&self.dir.join(OPERATIONS), &state.operations)
    }

    /// Adds or replaces a record.
    pub fn put(&self, name: &VolumeName, record: Record) -> Result<(), RegistryError> {
        let mut state = self.state();
        state.stamps.remove(&self.path(name));
        write(&self.path(name), &record)?;
        state.volumes.insert(name.clone(), record);
        Ok(())
    }

    /// Removes a record.
    pub fn remove(&self, name: &VolumeName) -> Result<(), RegistryError> {
        let mut state = self.state();
        remove(&self.path(name))?;
        state.volumes.remove(name);
        Ok(())
    }

    fn path(&self, name: &VolumeName) -> PathBuf {
        self.dir.join(format!("{name}.toml"))
    }
}

impl State {
    /// What the file holds, `None` if it is not there; `known` if that is what it was read as.
    fn read_if_changed<T: Clone + for<'de> Deserialize<'de>>(
        &self,
        fresh: &mut State,
        path: PathBuf,
        known: Option<&T>,
    ) -> Result<Option<T>, RegistryError> {
        let stamp = match fs::metadata(&path) {
            Ok(file) => Stamp::of(&file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file("look at", &path)(error)),
        };
        let value = match known {
            Some(value) if stamp.is_some() && self.stamps.get(&path) == stamp.as_ref() => {
                value.clone()
            }
            _ => match read(&path) {
                // Removed in between.
                Err(RegistryError::File { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    return Ok(None);
                }
                result => result?,
            },
        };
        if let Some(stamp) = stamp {
            fresh.stamps.insert(path, stamp);
        }
        Ok(Some(value))
    }
}

const OPERATIONS: &str = "operations";

/// The number that grows with each boot of the host (or restart of a server without keeper): the
/// major epoch where storage grants none. `fresh` raises it, durably.
pub fn host_major(state_dir: &Path, fresh: bool) -> Result<u32, RegistryError> {
    let path = state_dir.join("major");
    let present = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(file("read", &path)(error)),
    };
    if !fresh && present > 0 {
        return Ok(present);
    }
    replace(&path, (present + 1).to_string().as_bytes())?;
    Ok(present + 1)
}

fn file<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> RegistryError + use<'a> {
    move |source| RegistryError::File { action, path: path.into(), source }
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, RegistryError> {
    let text = fs::read_to_string(path).map_err(file("read", path))?;
    toml::from_str(&text)
        .map_err(|source| RegistryError::Damaged { path: path.into(), source: source.into() })
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), RegistryError> {
    let text =
        toml::to_string(value).map_err(|error| file("encode", path)(io::Error::other(error)))?;
    replace(path, text.as_bytes())
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), RegistryError> {
    let temporary = path.with_extension("tmp");
    let mut out = File::create(&temporary).map_err(file("create", &temporary))?;
    out.write_all(bytes).map_err(file("write", &temporary))?;
    out.sync_all().map_err(file("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(file("rename", path))?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// No error if it is not there.
fn remove(path: &Path) -> Result<(), RegistryError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", path)(error)),
        _ => sync_dir(path.parent().unwrap_or(Path::new("."))),
    }
}

fn sync_dir(dir: &Path) -> Result<(), RegistryError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(file("sync", dir))
}

/// Random; 63 bits, since TOML has no more.
fn birth() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() >> 1
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> (VolumeName, Record) {
        let name: VolumeName = name.parse().unwrap();
        let spec = VolumeSpec { name: name.clone(), size: 4096, block_size: 512, path: None };
        let record = Record::new(&spec, 1000, 100, 0o640);
        (name, record)
    }

    #[test]
    fn records_and_answers_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(dir.path()).unwrap();
        let (name, record) = record("file:disk1");
        registry.put(&name, record.clone()).unwrap();
        registry.answer(b"id", "resize", &name, 9).unwrap();
        let again = Registry::load(dir.path()).unwrap();
        assert_eq!(again.record(&name), Some(record.clone()));
        let mut resized = record;
        for size in 0..20 {
            resized.set_size(&[size as u8], size);
        }
        again.put(&name, resized).unwrap();
        let resized = Registry::load(dir.path()).unwrap().record(&name).unwrap();
        assert_eq!(
            (resized.size, resized.resized(&[19]), resized.resized(&[0])),
            (19, Some(19), None)
        );
        assert_eq!(again.answered(b"id", "resize", &name), Some(9));
        assert_eq!(again.answered(b"id", "create", &name), None);
        again.remove(&name).unwrap();
        assert!(Registry::load(dir.path()).unwrap().records().is_empty());
    }

    #[test]
    fn what_another_process_changed_is_read_again_and_the_rest_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) =
            (Registry::load(dir.path()).unwrap(), Registry::load(dir.path()).unwrap());
        let (name, mut changed) = record("file:disk1");
        let (other, untouched) = record("file:disk2");
        ours.put(&name, changed.clone()).unwrap();
        ours.put(&other, untouched.clone()).unwrap();
        let path = ours.path(&other);
        let old = SystemTime::now() - 2 * STAMP_AGE_MIN;
        File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        theirs.reload().unwrap();
        assert!(theirs.state().stamps.contains_key(&path), "old enough to be known again");
        assert!(!theirs.state().stamps.contains_key(&ours.path(&name)));
        // The same stamp with other contents: proves that it is not read.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("4096", "8192")).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        changed.set_size(b"x", 3 * 4096);
        ours.put(&name, changed.clone()).unwrap();
        theirs.reload().unwrap();
        assert_eq!(theirs.record(&name), Some(changed));
        assert_eq!(theirs.record(&other), Some(untouched));
        ours.remove(&other).unwrap();
        theirs.reload().unwrap();
        assert_eq!(theirs.record(&other), None);
    }

    #[test]
    fn a_reload_that_fails_leaves_what_was_known() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(dir.path()).unwrap();
        let names: Vec<_> = (0..16).map(|i| record(&format!("file:disk{i}"))).collect();
        for (name, record) in &names {
            registry.put(name, record.clone()).unwrap();
        }
        registry.answer(b"id", "resize", &names[0].0, 9).unwrap();
        fs::write(registry.path(&names[7].0), "an editor was here").unwrap();
        registry.reload().unwrap_err();
        assert_eq!(registry.records().len(), 16);
        assert_eq!(registry.answered(b"id", "resize", &names[0].0), Some(9));
    }

    #[test]
    fn permission_is_by_owner_group_and_mode() {
        let (_, record) = record("file:disk1");
        assert!(record.permits(0, 0, true) && record.permits(1000, 1, true));
        assert!(record.permits(1, 100, false) && !record.permits(1, 100, true));
        assert!(!record.permits(1, 1, false));
    }

    #[test]
    fn the_major_grows_when_fresh_and_stays_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(host_major(dir.path(), false).unwrap(), 1);
        assert_eq!(host_major(dir.path(), false).unwrap(), 1);
        assert_eq!(host_major(dir.path(), true).unwrap(), 2);
    }
}
