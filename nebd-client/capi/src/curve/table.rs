//! What Curve's interface keeps for the process: whether it is initialized, and what is open.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::io::Write;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError, RwLock};

use nebd_client::{Errno, Options};

use crate::curve::config::{Config, ConfigError, DEFAULT_PATH};
use crate::curve::disk::{Disk, Hold};
use crate::curve::name::volume_of;
use crate::failure::{InCallback, explain};

/// What initialization has found; `None` before it and after the end.
static CONFIG: Mutex<Option<Config>> = Mutex::new(None);
static TABLE: RwLock<Table> = RwLock::new(Table { disks: BTreeMap::new(), last: 0 });
/// Names of volumes that nobody can find any more and that are not closed yet.
static CLOSING: (Mutex<Vec<String>>, Condvar) = (Mutex::new(Vec::new()), Condvar::new());

struct Table {
    disks: BTreeMap<c_int, Hold>,
    last: c_int,
}

impl Table {
    /// The next number, so that one that was closed means nothing for a long time.
    fn add(&mut self, disk: Hold) -> c_int {
        loop {
            self.last = self.last.checked_add(1).unwrap_or(1);
            if !self.disks.contains_key(&self.last) {
                self.disks.insert(self.last, disk);
                return self.last;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics half way through a change under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Initializes the library, once; from the default file without a path.
pub fn init(path: Option<&Path>) -> Result<(), Errno> {
    let mut present = lock(&CONFIG);
    if present.is_some() {
        return Ok(());
    }
    let read = path.map_or_else(Config::read_default, Config::read);
    let path = path.unwrap_or(Path::new(DEFAULT_PATH));
    let config = read.map_err(|error| {
        say(format_args!("{}: {error}", path.display()));
        explain(&error);
        match error {
            ConfigError::Read(error) => Errno::from_io(&error),
            ConfigError::Line(_) | ConfigError::NoAddress => Errno::INVAL,
        }
    })?;
    static SAID: Once = Once::new();
    if !config.ignored.is_empty() {
        let keys = config.ignored.join(", ");
        SAID.call_once(|| {
            say(format_args!("{}: without a meaning here: {keys}", path.display()));
        });
    }
    *present = Some(config);
    Ok(())
}

/// Closes everything.
pub fn uninit() {
    if lock(&CONFIG).take().is_some() {
        while let Some(fd) = any_open() {
            close(fd);
        }
    }
}

fn any_open() -> Option<c_int> {
    let table = TABLE.read().unwrap_or_else(PoisonError::into_inner);
    table.disks.keys().next().copied()
}

/// Opens a volume; returns its number.
pub fn open(file_name: &str, exclusive: bool) -> Result<c_int, Errno> {
    let config = lock(&CONFIG).clone().ok_or(Errno::INVAL)?;
    let name = volume_of(file_name)?;
    if InCallback::refuse().is_ok() {
        wait_until_closed(&name);
    }
    let mut options = Options::new().exclusive(exclusive);
    if let Some(socket) = config.socket {
        options = options.socket(socket);
    }
    let disk = Disk::open(&name, options, closed).map_err(|error| {
        explain(&error);
        say(format_args!("{file_name}: {}", crate::failure::explanation()));
        error.errno()
    })?;
    Ok(TABLE.write().unwrap_or_else(PoisonError::into_inner).add(disk))
}

/// The volume with a number.
pub fn find(fd: c_int) -> Result<Hold, Errno> {
    let table = TABLE.read().unwrap_or_else(PoisonError::into_inner);
    table.disks.get(&fd).cloned().ok_or(crate::failure::BADF)
}

/// Closes a volume, if there is one with that number.
pub fn close(fd: c_int) {
    let disk = {
        let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
        let disk = table.disks.remove(&fd);
        // In one step, so that an open that follows finds one or the other.
        if let Some(disk) = &disk {
            lock(&CLOSING.0).push(disk.name().to_owned());
        }
        disk
    };
    // Outside the lock: it may wait for callbacks that need it.
    if let Some(disk) = disk {
        disk.close();
    }
}

fn wait_until_closed(name: &str) {
    let mut closing = lock(&CLOSING.0);
    while closing.iter().any(|other| other == name) {
        closing = CLOSING.1.wait(closing).unwrap_or_else(PoisonError::into_inner);
    }
}

/// A volume is closed.
fn closed(name: &str) {
    let mut closing = lock(&CLOSING.0);
    if let Some(index) = closing.iter().position(|other| other == name) {
        closing.remove(index);
    }
    CLOSING.1.notify_all();
}

/// One line on the standard error output, if there is one.
fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "libnebd: {text}");
}
