//! The store's control socket: one command a line, one line of answer.
//!
//! `stats` answers JSON, `power-cut SEED` the number of sectors lost, `calm` stops the faults.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use serde::{Deserialize, Serialize};

use super::server::Store;

/// What the store has done, as it counts.
#[derive(Debug, Default)]
pub(super) struct Stats {
    pub applied: AtomicU64,
    pub again: AtomicU64,
    pub stale: AtomicU64,
    pub answered: AtomicU64,
    pub delayed: AtomicU64,
    pub duplicated: AtomicU64,
    pub redelivered: AtomicU64,
    pub cut: AtomicU64,
    pub flushes: AtomicU64,
    pub fua: AtomicU64,
}

/// What the store has done.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct StoreStats {
    /// Operations carried out.
    pub applied: u64,
    /// Copies of applied operations, acknowledged again.
    pub again: u64,
    /// Operations of replaced owners, refused.
    pub stale: u64,
    /// Operations below the watermark, refused.
    pub answered: u64,
    /// Operations that were delayed.
    pub delayed: u64,
    /// Operations that were delivered twice.
    pub duplicated: u64,
    /// Operations of dead connections, delivered again.
    pub redelivered: u64,
    /// Connections that were cut.
    pub cut: u64,
    /// Flushes carried out.
    pub flushes: u64,
    /// Operations with FUA carried out.
    pub fua: u64,
}

impl Stats {
    fn snapshot(&self) -> StoreStats {
        let load = |counter: &AtomicU64| counter.load(SeqCst);
        StoreStats {
            applied: load(&self.applied),
            again: load(&self.again),
            stale: load(&self.stale),
            answered: load(&self.answered),
            delayed: load(&self.delayed),
            duplicated: load(&self.duplicated),
            redelivered: load(&self.redelivered),
            cut: load(&self.cut),
            flushes: load(&self.flushes),
            fua: load(&self.fua),
        }
    }
}

pub(super) fn serve(store: &Arc<Store>, listener: &UnixListener) {
    for stream in listener.incoming().flatten() {
        let store = store.clone();
        // A caller that goes away in the middle of a line concerns nobody else.
        std::thread::spawn(move || drop(answer(&store, stream)));
    }
}

fn answer(store: &Store, mut stream: UnixStream) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(line) = lines.next().transpose()? {
        let mut words = line.split_whitespace();
        let text = match (words.next(), words.next()) {
            (Some("stats"), None) => serde_json::to_string(&store.stats.snapshot())?,
            (Some("calm"), None) => {
                store.is_calm.store(true, SeqCst);
                "ok".to_owned()
            }
            (Some("power-cut"), Some(seed)) => match seed.parse() {
                Ok(seed) => store.cut_power(seed).to_string(),
                Err(_) => "error: the seed is no number".to_owned(),
            },
            _ => "error: stats, calm or power-cut SEED".to_owned(),
        };
        writeln!(stream, "{text}")?;
    }
    Ok(())
}

/// Sends one command to the store behind `socket`.
pub fn ask(socket: &Path, command: &str) -> io::Result<String> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".ctl");
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "{command}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// What the store behind `socket` has done.
pub fn stats(socket: &Path) -> io::Result<StoreStats> {
    Ok(serde_json::from_str(&ask(socket, "stats")?)?)
}
