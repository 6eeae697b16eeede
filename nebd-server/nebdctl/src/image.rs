//! `nebdctl volume import` and `export`: disk images in and out, sparse and verified.
//!
//! ```text
//!  import   file, device, pipe ─► chunk ─┬─► runs of data ──write──► volume ─► flush ─► read back ┐
//!           (holes are skipped)          ├─► runs of zeros: nothing, or write-zeroes where        │
//!                                        │   old data may lie                                     │
//!                                        └─► checksum of the chunk ───────── compare ◄────────────┘
//!  export   volume ─read─► chunk ─┬─► file without a name ─► fsync ─► read back ─► name
//!                                 └─► checksum ──────────────────────── compare ◄─┘
//!  qcow2    qemu-img turns it into a raw file without a name, and back
//! ```
//!
//! Chunks are 1 MiB, and many are in flight. A server that dies on the way is not noticed here: the
//! part client waits for its successor. What fails or is interrupted leaves nothing behind that was
//! not there before, except in a volume that was to be overwritten.

pub mod export;
pub mod import;

mod new_file;
mod progress;
mod pump;
mod qcow2;
mod source;
mod sums;

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::cli::OutputArgs;
use crate::failure::Failure;
use crate::units::Size;
use crate::view;
use progress::Progress;
use pump::{CHUNK_BYTES, Pump};
use sums::Sums;

/// The result.
#[derive(Clone, Debug, Serialize)]
struct Report {
    volume: String,
    file: String,
    format: &'static str,
    /// Of the image.
    bytes: u64,
    /// Of these, what was written; the rest is zeros.
    data_bytes: u64,
    /// Of the volume.
    size_bytes: u64,
    seconds: f64,
    mib_per_s: f64,
    /// CRC-32C of the image's bytes, as raw.
    crc32c: String,
    verified: bool,
}

impl Report {
    fn speed(&mut self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64().max(1e-6);
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        self.seconds = round(seconds);
        self.mib_per_s = round(self.bytes as f64 / f64::from(1 << 20) / seconds);
    }

    /// For people, or for programs.
    fn print(&self, verb: &str, output: OutputArgs) -> Result<String, Failure> {
        if output.json {
            return Ok(view::line(self)?);
        }
        let (bytes, data) = (Size(self.bytes), Size(self.data_bytes));
        let verified = if self.verified { "verified" } else { "not verified" };
        Ok(format!(
            "{} {verb} {} ({}): {bytes}, {data} of it data, in {:.1} s, {:.0} MiB/s, {verified}\n",
            self.volume, self.file, self.format, self.seconds, self.mib_per_s
        ))
    }
}

/// Reads the first `size` bytes of the volume, with many requests in flight, and shows them to
/// `visit` chunk by chunk, in order.
fn read_all(
    pump: &mut Pump,
    size: u64,
    progress: &Progress,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let (mut asked, mut seen) = (0, 0);
    while seen < size {
        while asked < size && asked - seen < pump.window_bytes() {
            let length = (size - asked).min(CHUNK_BYTES as u64) as usize;
            pump.read(slot_of(asked, pump), asked, length)?;
            asked += length as u64;
        }
        pump.kick();
        let length = (size - seen).min(CHUNK_BYTES as u64) as usize;
        let slot = slot_of(seen, pump);
        pump.settle(slot)?;
        pump.copy_out(slot, &mut chunk[..length])?;
        visit(seen, &chunk[..length])?;
        seen += length as u64;
        progress.at(seen);
    }
    Ok(())
}

/// Buffers take turns.
fn slot_of(offset: u64, pump: &Pump) -> usize {
    (offset / CHUNK_BYTES as u64) as usize % pump.slot_count()
}

/// Reads the volume back. `None` if it holds what `sums` were made of, else what is wrong.
fn wrong_in_volume(
    pump: &mut Pump,
    sums: &Sums,
    progress: &Progress,
) -> Result<Option<String>, Failure> {
    let mut wrong = Wrong::default();
    let volume = pump.volume().to_owned();
    pump.distrust();
    read_all(pump, sums.bytes(), progress, |offset, bytes| {
        wrong.note(sums, offset, bytes);
        Ok(())
    })?;
    Ok(wrong.told(&format!("volume {volume}")))
}

/// Chunks that are not what they should be.
#[derive(Debug, Default)]
struct Wrong {
    chunks: u64,
    first: Option<u64>,
}

impl Wrong {
    fn note(&mut self, sums: &Sums, offset: u64, bytes: &[u8]) {
        if !sums.matches(offset, bytes) {
            self.chunks += 1;
            self.first.get_or_insert(offset);
        }
    }

    fn told(&self, what: &str) -> Option<String> {
        let first = self.first?;
        let chunks = self.chunks;
        Some(format!(
            "{what} is not what was written: {chunks} of its chunks of 1 MiB differ, the first at \
             byte {first}"
        ))
    }
}

/// The name of a file that stands for a standard stream.
fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}
