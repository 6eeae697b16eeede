//! `nebdctl volume import`

use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use nebd_rpc::admin::{CreateVolumeRequest, GetVolumeRequest};

use crate::cli::{ImportArgs, SourceFormat};
use crate::connection::Connection;
use crate::demo::process::watch_interrupts;
use crate::failure::Failure;
use crate::image::new_file::{NewFile, path_of};
use crate::image::progress::Progress;
use crate::image::pump::{CHUNK_BYTES, Pump};
use crate::image::qcow2::{self, Header};
use crate::image::source::{Piece, Source};
use crate::image::sums::{Sums, runs};
use crate::image::{Report, read_all, wrong_in_volume};
use crate::units::Size;
use crate::volume;

/// Zeros are looked for in pieces of this size: less is not worth a request of its own.
const GRAIN_BYTES: usize = 64 << 10;
/// Most zeros that one request writes.
const ZEROS_BYTES_MAX: u64 = 64 << 20;
/// Size of a volume for a pipe whose length nobody knows, at first.
const FIRST_BYTES: u64 = 64 << 20;
/// Most that such a volume grows at a time.
const GROWTH_BYTES_MAX: u64 = 1 << 30;

/// The volume that the image goes to.
struct Target<'a> {
    connection: &'a Connection,
    name: &'a str,
    /// Made by this command, and removed with its failure.
    is_made: bool,
    /// As large as the image, which is to be found out.
    grows: bool,
    size: u64,
}

/// Imports, and returns what to print.
pub fn run(socket: &Path, connection: &Connection, args: &ImportArgs) -> Result<String, Failure> {
    watch_interrupts().context("cannot catch Ctrl-C")?;
    let mut source = Source::open(&args.file)?;
    let head = source.peek(qcow2::HEADER_BYTES)?;
    let is_qcow2 = match args.format {
        SourceFormat::Auto => qcow2::is_qcow2(&head),
        SourceFormat::Raw => false,
        SourceFormat::Qcow2 => true,
    };
    let size = match is_qcow2 {
        true => {
            qcow2::require()?;
            Some(Header::parse(&head).with_context(|| cannot_import(args))?.size)
        }
        false => source.size(),
    };
    if size == Some(0) || head.is_empty() {
        return Err(anyhow!("the image {} is empty", args.file.display()).into());
    }
    let target = Target::find_or_make(connection, args, size)?;
    let is_made = target.is_made;
    let imported = import(socket, args, source, is_qcow2, target);
    if imported.is_err() && is_made {
        discard_made(connection, args.name.as_str());
    }
    imported?.print("imported from", args.output)
}

fn cannot_import(args: &ImportArgs) -> String {
    format!("cannot import {}", args.file.display())
}

impl<'a> Target<'a> {
    /// The volume, made if it does not exist.
    fn find_or_make(
        connection: &'a Connection,
        args: &'a ImportArgs,
        size: Option<u64>,
    ) -> Result<Target<'a>, Failure> {
        let name = args.name.as_str();
        let least = size.unwrap_or(0).max(args.size.map_or(0, |size| size.0));
        match volume::ask(connection, &GetVolumeRequest { name: name.to_owned() }) {
            Ok(volume) if volume.size_bytes < least => Err(anyhow!(
                "volume {name} has {}, less than the {} that are needed; nothing was changed. \
                 `nebdctl volume resize {name} --size {least}` makes it larger",
                Size(volume.size_bytes),
                Size(least)
            )
            .into()),
            Ok(volume) => {
                let size = volume.size_bytes;
                Ok(Target { connection, name, is_made: false, grows: false, size })
            }
            Err(Failure::Refused { errno: Some(libc::ENOENT), .. }) => {
                Target::make(connection, args, size)
            }
            Err(failure) => Err(failure),
        }
    }

    fn make(
        connection: &'a Connection,
        args: &'a ImportArgs,
        image_size: Option<u64>,
    ) -> Result<Target<'a>, Failure> {
        let name = args.name.as_str();
        let size = match (args.size.map(|size| size.0), image_size) {
            (Some(asked), Some(image)) if asked < image => {
                return Err(Failure::Usage(format!(
                    "--size {} is less than the {} of the image",
                    Size(asked),
                    Size(image)
                )));
            }
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => FIRST_BYTES,
        };
        let request = CreateVolumeRequest {
            operation_id: volume::new_operation()?.into(),
            name: name.to_owned(),
            size_bytes: size
                .checked_next_multiple_of(args.block_size.into())
                .ok_or_else(|| Failure::Usage("the image is too large".into()))?,
            block_size: args.block_size,
            path: String::new(),
            owner_uid: args.owner.map(|owner| owner.uid),
            owner_gid: args.owner.map(|owner| owner.gid),
            mode: args.mode.map(|mode| mode.0),
        };
        let size = volume::make(connection, &request)?.size_bytes;
        let grows = args.size.is_none() && image_size.is_none();
        Ok(Target { connection, name, is_made: true, grows, size })
    }

    /// Makes room up to `end`.
    fn reach(&mut self, end: u64) -> Result<(), Failure> {
        if end <= self.size {
            return Ok(());
        }
        if !self.grows {
            let (name, size) = (self.name, Size(self.size));
            let part = match self.is_made {
                true => "",
                false => ", which holds a part of it now",
            };
            return Err(
                anyhow!("the image is larger than the {size} of volume {name}{part}").into()
            );
        }
        let size = end.max(self.size + self.size.min(GROWTH_BYTES_MAX));
        self.size = volume::resize(self.connection, self.name, size, false)?.size_bytes;
        Ok(())
    }

    /// The image ends here.
    fn end_at(&mut self, end: u64) -> Result<(), Failure> {
        if self.grows && end < self.size {
            self.size = volume::resize(self.connection, self.name, end, true)?.size_bytes;
        }
        Ok(())
    }
}

/// Removes what a failed import has made; what cannot be removed is told.
fn discard_made(connection: &Connection, name: &str) {
    if let Err(failure) = volume::delete(connection, name) {
        eprintln!("nebdctl: volume {name} was made and holds a part of the image: {failure}");
    }
}

fn import(
    socket: &Path,
    args: &ImportArgs,
    source: Source,
    is_qcow2: bool,
    target: Target<'_>,
) -> Result<Report, Failure> {
    let mut pump = Pump::open(socket, args.name.as_str(), args.iodepth, true)?;
    let imported = import_to(&mut pump, args, source, is_qcow2, target);
    pump.close();
    imported
}

fn import_to(
    pump: &mut Pump,
    args: &ImportArgs,
    source: Source,
    is_qcow2: bool,
    target: Target<'_>,
) -> Result<Report, Failure> {
    let may_hold_data = !target.is_made && args.overwrite;
    if !target.is_made && !args.overwrite {
        refuse_data(pump)?;
    }
    let begun = Instant::now();
    // Kept until the volume is verified: without a name, it goes with this process.
    let (mut source, _raw) = match is_qcow2 {
        true => {
            let (source, raw) = unpacked(source, args)?;
            (source, Some(raw))
        }
        false => (source, None),
    };
    let progress = Progress::new("importing", source.size());
    let writer = Writer {
        block_size: u64::from(pump.block_size()),
        pump,
        target,
        may_hold_data,
        sums: Sums::default(),
        data_bytes: 0,
        turn: 0,
    };
    let is_made = writer.target.is_made;
    let copied = writer.copy(&mut source, &progress).inspect_err(|_| {
        if !is_made {
            eprintln!("nebdctl: volume {} may hold a part of the image now", args.name);
        }
    });
    let (bytes, data_bytes, sums) = copied?;
    let elapsed = begun.elapsed();
    drop(progress);
    let mut report = Report {
        volume: args.name.to_string(),
        file: args.file.display().to_string(),
        format: if is_qcow2 { "qcow2" } else { "raw" },
        bytes,
        data_bytes,
        size_bytes: sums.bytes(),
        seconds: 0.0,
        mib_per_s: 0.0,
        crc32c: sums.image(),
        verified: false,
    };
    report.speed(elapsed);
    if !args.no_verify {
        let progress = Progress::new("verifying", Some(sums.bytes()));
        if let Some(message) = wrong_in_volume(pump, &sums, &progress)? {
            return Err(Failure::Wrong {
                report: report.print("imported from", args.output)?,
                message,
            });
        }
        report.verified = true;
    }
    Ok(report)
}

/// Refuses a volume that holds anything.
fn refuse_data(pump: &mut Pump) -> Result<(), Failure> {
    let (name, size) = (pump.volume().to_owned(), pump.size());
    let progress = Progress::new("looking for data", Some(size));
    read_all(pump, size, &progress, |offset, bytes| {
        match bytes.iter().position(|byte| *byte != 0) {
            None => Ok(()),
            Some(at) => Err(anyhow!(
                "volume {name} holds data, at byte {} for one; nothing was changed. --overwrite \
                 replaces all it holds",
                offset + at as u64
            )
            .into()),
        }
    })
}

/// The raw image that is in a qcow2.
fn unpacked(mut source: Source, args: &ImportArgs) -> Result<(Source, NewFile), Failure> {
    let cannot = "cannot make a temporary file; TMPDIR names the directory for it";
    let spooled = match source.seekable() {
        Some(_) => None,
        None => Some(spool(&mut source)?),
    };
    let packed = source.seekable().or(spooled.as_ref().map(NewFile::file));
    let packed = packed.with_context(|| cannot_import(args))?;
    // Once more, of the very file that is read now.
    Header::of_file(packed)?;
    let raw = NewFile::temporary().context(cannot)?;
    qcow2::convert(("qcow2", &path_of(packed)), ("raw", &raw.path()))?;
    if !args.no_verify {
        qcow2::compare(&path_of(packed), &raw.path())?;
    }
    let file = raw.file().try_clone().context("cannot duplicate a descriptor")?;
    Ok((Source::of_file(file).context("cannot read the unpacked image")?, raw))
}

/// A file of what comes through a pipe.
fn spool(source: &mut Source) -> Result<NewFile, Failure> {
    let cannot = "cannot write a temporary file; TMPDIR names the directory for it";
    let spooled = NewFile::temporary().context(cannot)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Piece::Data(length) = source.next(&mut chunk)? {
        spooled.file().write_all(&chunk[..length]).context(cannot)?;
    }
    Ok(spooled)
}

/// Writes an image to a volume.
struct Writer<'a, 'b> {
    pump: &'a mut Pump,
    target: Target<'b>,
    block_size: u64,
    may_hold_data: bool,
    sums: Sums,
    data_bytes: u64,
    turn: usize,
}

impl Writer<'_, '_> {
    /// All of it; returns the bytes of the image, how many of them were written, and the sums.
    fn copy(
        mut self,
        source: &mut Source,
        progress: &Progress,
    ) -> Result<(u64, u64, Sums), Failure> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut end = 0;
        loop {
            end += match source.next(&mut chunk)? {
                Piece::End => break,
                Piece::Data(length) => self.data(end, &mut chunk, length)?,
                Piece::Hole(length) => {
                    self.target.reach(end + length)?;
                    self.zeros(end, length, true)?
                }
            };
            progress.at(end);
        }
        self.target.end_at(end.next_multiple_of(self.block_size))?;
        let done = self.sums.bytes();
        self.zeros(done, self.target.size - done, false)?;
        self.pump.flush()?;
        Ok((end, self.data_bytes, self.sums))
    }

    /// A chunk, or the last `length` bytes of the image, at `offset`; returns `length`.
    fn data(&mut self, offset: u64, chunk: &mut [u8], length: usize) -> Result<u64, Failure> {
        let blocks = (length as u64).next_multiple_of(self.block_size);
        self.target.reach(offset + blocks)?;
        // Beyond the image all is zeros, up to the end of the chunk or of the volume.
        let padded = match self.target.grows {
            true => blocks,
            false => (self.target.size - offset).min(CHUNK_BYTES as u64),
        };
        chunk[length..padded as usize].fill(0);
        let chunk = &chunk[..padded as usize];
        self.sums.push(chunk, length);
        let slot = self.turn % self.pump.slot_count();
        self.turn += 1;
        self.pump.settle(slot)?;
        self.pump.copy_in(slot, chunk)?;
        for run in runs(chunk, GRAIN_BYTES) {
            let at = offset + run.range.start as u64;
            if !run.is_zero {
                self.data_bytes += run.range.len() as u64;
                self.pump.write(slot, at, run.range)?;
            } else if self.may_hold_data {
                self.pump.write_zeroes(at, run.range.len() as u64)?;
            }
        }
        self.pump.kick();
        Ok(length as u64)
    }

    /// Zeros, of the image or beyond it; returns `length`.
    fn zeros(&mut self, offset: u64, length: u64, are_of_image: bool) -> Result<u64, Failure> {
        self.sums.push_zeros(length, are_of_image);
        let mut at = offset;
        while self.may_hold_data && at < offset + length {
            let part = (offset + length - at).min(ZEROS_BYTES_MAX);
            self.pump.write_zeroes(at, part)?;
            self.pump.kick();
            at += part;
        }
        Ok(length)
    }
}
