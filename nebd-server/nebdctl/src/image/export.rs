//! `nebdctl volume export`

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use nebd_rpc::admin::GetVolumeRequest;
use rustix::fs::Advice;

use crate::cli::{ExportArgs, TargetFormat};
use crate::connection::Connection;
use crate::demo::process::{is_interrupted, watch_interrupts};
use crate::failure::Failure;
use crate::image::new_file::{NewFile, directory_of};
use crate::image::progress::Progress;
use crate::image::pump::{CHUNK_BYTES, Pump};
use crate::image::sums::{Sums, runs};
use crate::image::{Report, Wrong, is_dash, qcow2, read_all};
use crate::volume;

/// Zeros become holes in pieces of this size, a block of most file systems.
const GRAIN_BYTES: usize = 4096;

/// Where the image goes.
enum Target {
    /// A file that appears in the end.
    File { path: PathBuf, replaces: bool },
    /// Standard output, a pipe, a terminal.
    Stream(File),
}

/// Exports, and returns what to print.
pub fn run(socket: &Path, connection: &Connection, args: &ExportArgs) -> Result<String, Failure> {
    watch_interrupts().context("cannot catch Ctrl-C")?;
    let target = Target::find(args)?;
    if args.format == TargetFormat::Qcow2 {
        qcow2::require()?;
    }
    warn_if_attached(connection, args)?;
    let mut pump = Pump::open(socket, args.name.as_str(), args.iodepth, false)?;
    let exported = export(&mut pump, args, &target);
    pump.close();
    let text = exported?.print("exported to", args.output)?;
    Ok(match target {
        Target::File { .. } => text,
        // Standard output may be the image.
        Target::Stream(_) => {
            eprint!("{text}");
            String::new()
        }
    })
}

impl Target {
    fn find(args: &ExportArgs) -> Result<Target, Failure> {
        let path = &args.file;
        let cannot = || format!("cannot write the image {}", path.display());
        if is_dash(path) {
            if io::stdout().is_terminal() {
                let message = "standard output is a terminal; send it to a file or a pipe";
                return Err(Failure::Usage(message.into()));
            }
            let stdout = io::stdout().as_fd().try_clone_to_owned().with_context(cannot)?;
            return Ok(Target::Stream(stdout.into()));
        }
        let replaces = args.overwrite;
        let kind = match fs::metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Target::File { path: path.clone(), replaces });
            }
            Err(error) => return Err(anyhow::Error::new(error).context(cannot()).into()),
        };
        if kind.is_file() {
            if !replaces {
                let path = path.display();
                return Err(anyhow!("{path} exists; --overwrite replaces it").into());
            }
            // Not the symbolic link that may lead to it.
            let path = fs::canonicalize(path).with_context(cannot)?;
            return Ok(Target::File { path, replaces });
        }
        if is_streamed(kind) {
            let file = File::options().write(true).open(path).with_context(cannot)?;
            return Ok(Target::Stream(file));
        }
        let path = path.display();
        Err(anyhow!("{path} is no file; export to - and write that to a device").into())
    }

    /// The directory that temporary files of the export go to.
    fn new_file(&self) -> Result<NewFile, Failure> {
        let (made, place) = match self {
            Target::File { path, .. } => {
                let directory = directory_of(path);
                (NewFile::new(directory), directory.display().to_string())
            }
            Target::Stream(_) => (NewFile::temporary(), "TMPDIR".into()),
        };
        Ok(made.with_context(|| format!("cannot make a file in {place}"))?)
    }
}

fn is_streamed(kind: fs::FileType) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    kind.is_fifo() || kind.is_char_device()
}

/// What others write meanwhile may be in the image, or not.
fn warn_if_attached(connection: &Connection, args: &ExportArgs) -> Result<(), Failure> {
    let request = GetVolumeRequest { name: args.name.to_string() };
    let volume = volume::ask(connection, &request)?;
    if volume.sessions > 0 {
        let (name, sessions) = (&volume.name, volume.sessions);
        eprintln!(
            "nebdctl: volume {name} is attached by {sessions} session(s): what they write from here \
             on is in the image or is not, block by block"
        );
    }
    Ok(())
}

fn export(pump: &mut Pump, args: &ExportArgs, target: &Target) -> Result<Report, Failure> {
    let begun = Instant::now();
    let verifies = !args.no_verify;
    let mut report = Report {
        volume: args.name.to_string(),
        file: args.file.display().to_string(),
        format: "raw",
        bytes: pump.size(),
        data_bytes: 0,
        size_bytes: pump.size(),
        seconds: 0.0,
        mib_per_s: 0.0,
        crc32c: String::new(),
        verified: false,
    };
    if let (TargetFormat::Raw, Target::Stream(stream)) = (args.format, target) {
        write_stream(pump, stream, &mut report)?;
        report.speed(begun.elapsed());
        return Ok(report);
    }
    let raw = target.new_file()?;
    let sums = write_sparse(pump, raw.file(), &mut report)?;
    let copied = begun.elapsed();
    if verifies {
        verify(raw.file(), &sums, args, &report)?;
    }
    let begun = Instant::now();
    let complete = match args.format {
        TargetFormat::Raw => raw,
        TargetFormat::Qcow2 => {
            report.format = "qcow2";
            let packed = target.new_file()?;
            qcow2::convert(("raw", &raw.path()), ("qcow2", &packed.path()))?;
            if verifies {
                qcow2::compare(&packed.path(), &raw.path())?;
            }
            packed
        }
    };
    report.speed(copied + begun.elapsed());
    match target {
        Target::File { path, replaces } => publish(complete, path, *replaces)?,
        Target::Stream(stream) => send(complete.file(), stream)?,
    }
    // What goes down a pipe is out of sight.
    report.verified = verifies && matches!(target, Target::File { .. });
    Ok(report)
}

fn publish(complete: NewFile, path: &Path, replaces: bool) -> Result<(), Failure> {
    if is_interrupted() {
        return Err(Failure::Interrupted);
    }
    complete.publish(path, replaces).map_err(|error| {
        let path = path.display();
        match error.kind() {
            io::ErrorKind::AlreadyExists => anyhow!("{path} exists; --overwrite replaces it"),
            _ => anyhow::Error::new(error).context(format!("cannot make {path}")),
        }
        .into()
    })
}

/// The volume as a sparse file, durable.
fn write_sparse(pump: &mut Pump, file: &File, report: &mut Report) -> Result<Sums, Failure> {
    let cannot = "cannot write the image";
    let mut sums = Sums::default();
    file.set_len(report.bytes).context(cannot)?;
    let progress = Progress::new("exporting", Some(report.bytes));
    read_all(pump, report.bytes, &progress, |offset, bytes| {
        sums.push(bytes, bytes.len());
        for run in runs(bytes, GRAIN_BYTES).into_iter().filter(|run| !run.is_zero) {
            report.data_bytes += run.range.len() as u64;
            let at = offset + run.range.start as u64;
            file.write_all_at(&bytes[run.range], at).context(cannot)?;
        }
        Ok(())
    })?;
    file.sync_all().context(cannot)?;
    report.crc32c = sums.image();
    Ok(sums)
}

/// The volume, all of it, one byte after the other.
fn write_stream(pump: &mut Pump, mut stream: &File, report: &mut Report) -> Result<(), Failure> {
    let mut sums = Sums::default();
    let progress = Progress::new("exporting", Some(report.bytes));
    read_all(pump, report.bytes, &progress, |_, bytes| {
        sums.push(bytes, bytes.len());
        let data = runs(bytes, GRAIN_BYTES).into_iter().filter(|run| !run.is_zero);
        report.data_bytes += data.map(|run| run.range.len() as u64).sum::<u64>();
        Ok(stream.write_all(bytes).context("cannot write the image")?)
    })?;
    report.crc32c = sums.image();
    Ok(())
}

/// Reads the file back, from the disk as far as the system can be talked into it.
fn verify(file: &File, sums: &Sums, args: &ExportArgs, report: &Report) -> Result<(), Failure> {
    // Advice that is not taken costs nothing.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    let progress = Progress::new("verifying", Some(sums.bytes()));
    let mut wrong = Wrong::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < sums.bytes() {
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        let length = (sums.bytes() - at).min(CHUNK_BYTES as u64) as usize;
        file.read_exact_at(&mut chunk[..length], at).context("cannot read the image back")?;
        wrong.note(sums, at, &chunk[..length]);
        at += length as u64;
        progress.at(at);
    }
    match wrong.told(&format!("the image {}", args.file.display())) {
        None => Ok(()),
        Some(message) => {
            let report = match &args.file {
                file if is_dash(file) => String::new(),
                _ => report.print("exported to", args.output)?,
            };
            Err(Failure::Wrong { report, message: format!("{message}; it was not kept") })
        }
    }
}

/// A finished file down a pipe.
fn send(file: &File, mut stream: &File) -> Result<(), Failure> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    loop {
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        let length = file.read_at(&mut chunk, at).context("cannot read the image back")?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&chunk[..length]).context("cannot write the image")?;
        at += length as u64;
    }
}
