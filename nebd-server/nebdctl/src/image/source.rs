//! Where an image comes from: a file or block device, whose holes are known, or a pipe.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{SeekFrom, seek};

use crate::demo::process::is_interrupted;
use crate::failure::Failure;
use crate::image::is_dash;
use crate::image::pump::CHUNK_BYTES;

/// Longest hole told at once, so that progress is seen.
const HOLE_BYTES_MAX: u64 = 64 << 20;
/// How long a read of a pipe waits until Ctrl-C is looked for.
const WAIT_MAX: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// What comes next in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes, a whole chunk unless the image ends.
    Data(usize),
    /// Whole chunks of zeros, in bytes.
    Hole(u64),
    /// Nothing.
    End,
}

/// An image that is being read.
#[derive(Debug)]
pub struct Source {
    file: File,
    /// Of a file; what a pipe holds is known when it ends.
    size: Option<u64>,
    position: u64,
    /// The next stretch of data, as far as it is known: it ends at or before `position` if not.
    data: (u64, u64),
    /// What was read of a pipe to look at it.
    ahead: Vec<u8>,
}

impl Source {
    /// Opens a file, device or pipe by name; `-` is standard input.
    pub fn open(path: &Path) -> Result<Source, Failure> {
        let file = match is_dash(path) {
            true => io::stdin().as_fd().try_clone_to_owned().map(File::from),
            false => File::open(path),
        };
        let cannot = || format!("cannot read the image {}", path.display());
        let file = file.with_context(cannot)?;
        let kind = file.metadata().with_context(cannot)?.file_type();
        if kind.is_dir() {
            return Err(anyhow!("{} is a directory", path.display()).into());
        }
        // Standard input is read from where it stands; only its beginning is a whole file.
        let is_file = (kind.is_file() || kind.is_block_device())
            && (!is_dash(path) || seek(&file, SeekFrom::Current(0)).ok() == Some(0));
        match is_file {
            true => Ok(Source::of_file(file).with_context(cannot)?),
            false => Ok(Source::new(file, None)),
        }
    }

    /// An open file or block device, from its beginning.
    pub fn of_file(file: File) -> io::Result<Source> {
        let size = seek(&file, SeekFrom::End(0))?;
        Ok(Source::new(file, Some(size)))
    }

    fn new(file: File, size: Option<u64>) -> Source {
        Source { file, size, position: 0, data: (0, 0), ahead: Vec::new() }
    }

    /// Bytes, if they are known before the end.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The file, if it is one that can be read at any place.
    pub fn seekable(&self) -> Option<&File> {
        self.size.map(|_| &self.file)
    }

    /// The first bytes, as many as there are up to `length`, without taking them.
    pub fn peek(&mut self, length: usize) -> Result<Vec<u8>, Failure> {
        if let Some(size) = self.size {
            let mut bytes = vec![0; length.min(usize::try_from(size).unwrap_or(length))];
            self.file.read_exact_at(&mut bytes, 0).context("cannot read the image")?;
            return Ok(bytes);
        }
        let mut bytes = vec![0; length];
        let count = self.fill(&mut bytes)?;
        bytes.truncate(count);
        self.ahead.clone_from(&bytes);
        Ok(bytes)
    }

    /// Reads on. `chunk` is a whole chunk; a piece of data is put there.
    pub fn next(&mut self, chunk: &mut [u8]) -> Result<Piece, Failure> {
        if is_interrupted() {
            return Err(Failure::Interrupted);
        }
        let piece = match self.size {
            None => match self.fill(chunk)? {
                0 => Piece::End,
                length => Piece::Data(length),
            },
            Some(size) => self.next_of_file(size, chunk).context("cannot read the image")?,
        };
        self.position += match piece {
            Piece::Data(length) => length as u64,
            Piece::Hole(length) => length,
            Piece::End => 0,
        };
        Ok(piece)
    }

    fn next_of_file(&mut self, size: u64, chunk: &mut [u8]) -> io::Result<Piece> {
        let left = size - self.position;
        if left == 0 {
            return Ok(Piece::End);
        }
        if self.data.1 <= self.position {
            self.data = data_after(&self.file, self.position, size)?;
        }
        let hole = self.data.0.saturating_sub(self.position).min(left).min(HOLE_BYTES_MAX);
        let hole = hole - hole % CHUNK_BYTES as u64;
        if hole > 0 {
            return Ok(Piece::Hole(hole));
        }
        let length = left.min(CHUNK_BYTES as u64) as usize;
        self.file.read_exact_at(&mut chunk[..length], self.position)?;
        Ok(Piece::Data(length))
    }

    /// Reads a pipe until `bytes` are full or it ends.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, Failure> {
        let ready = self.ahead.len().min(bytes.len());
        bytes[..ready].copy_from_slice(&self.ahead[..ready]);
        self.ahead.drain(..ready);
        let mut count = ready;
        while count < bytes.len() {
            if is_interrupted() {
                return Err(Failure::Interrupted);
            }
            // A signal does not end a read, but it does end a poll.
            let mut events = [PollFd::new(&self.file, PollFlags::IN)];
            if !matches!(poll(&mut events, Some(&WAIT_MAX)), Ok(1..)) {
                continue;
            }
            match rustix::io::read(&self.file, &mut bytes[count..]) {
                Ok(0) => break,
                Ok(length) => count += length,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(errno) => return Err(anyhow!("cannot read the image: {errno}").into()),
            }
        }
        Ok(count)
    }
}

/// The next stretch of data at or after `position`; past `size` if there is none.
fn data_after(file: &File, position: u64, size: u64) -> io::Result<(u64, u64)> {
    use rustix::io::Errno;
    match seek(file, SeekFrom::Data(position)) {
        Ok(start) => Ok((start, seek(file, SeekFrom::Hole(start))?)),
        Err(Errno::NXIO) => Ok((size, size + 1)),
        // A device, or a file system, that knows nothing of holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => Ok((position, size)),
        Err(errno) => Err(errno.into()),
    }
}
