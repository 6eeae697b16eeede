//! Any block device or file, through the operating system: for testing what is not nebd.
//!
//! Worker threads read and write with O_DIRECT where the file system allows it, so that what is
//! read again comes from the device and not from the page cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;

use crate::device::{Device, DeviceGone, Done, Geometry, Io, Op};

const TRANSFER_BYTES_MAX: usize = 64 * 1024;
const ALIGNMENT: usize = 4096;

/// A block device or file.
pub struct FileDevice {
    geometry: Geometry,
    submit: Sender<(u64, Io)>,
    done: Receiver<Done>,
}

impl FileDevice {
    /// Opens it; it keeps its size, rounded down to whole blocks.
    pub fn open(path: &Path, depth: usize) -> io::Result<FileDevice> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32);
        let mut file = options.open(path).or_else(|_| {
            OpenOptions::new().read(true).write(true).open(path) // no O_DIRECT there (tmpfs)
        })?;
        let size_bytes = file.seek(io::SeekFrom::End(0))? & !4095;
        if size_bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the device is empty"));
        }
        let (submit, submitted) = channel();
        let (finished, done) = channel();
        let (file, submitted) = (Arc::new(file), Arc::new(Mutex::new(submitted)));
        for _ in 0..depth {
            let (file, submitted, finished) = (file.clone(), submitted.clone(), finished.clone());
            std::thread::spawn(move || work(&file, &submitted, &finished));
        }
        let geometry = Geometry {
            size_bytes,
            block_bytes: 4096,
            depth,
            iovecs_max: 8,
            transfer_bytes_max: TRANSFER_BYTES_MAX as u64,
            can_discard: false,
            can_write_zeroes: false,
        };
        Ok(FileDevice { geometry, submit, done })
    }
}

impl Device for FileDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u64, io: Io) -> Result<(), DeviceGone> {
        self.submit.send((tag, io)).map_err(|_| DeviceGone("its threads have ended".into()))
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> Result<(), DeviceGone> {
        out.extend(self.done.try_iter());
        Ok(())
    }
}

fn work(file: &File, submitted: &Mutex<Receiver<(u64, Io)>>, finished: &Sender<Done>) {
    let mut memory = vec![0; TRANSFER_BYTES_MAX + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let aligned = &mut memory[start..start + TRANSFER_BYTES_MAX];
    loop {
        let next = submitted.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((tag, mut io)) = next else { return };
        let result = carry_out(file, &mut io, aligned);
        let errno = result.err().map_or(0, |error| error.raw_os_error().unwrap_or(5));
        if finished.send(Done { tag, errno, buffers: io.buffers }).is_err() {
            return;
        }
    }
}

fn carry_out(file: &File, io: &mut Io, aligned: &mut [u8]) -> io::Result<()> {
    let data = &mut aligned[..io.length as usize];
    match io.op {
        Op::Read => {
            file.read_exact_at(data, io.offset)?;
            let mut rest = &*data;
            for buffer in &mut io.buffers {
                let (piece, after) = rest.split_at(buffer.len());
                buffer.copy_from_slice(piece);
                rest = after;
            }
        }
        Op::Write => {
            let mut at = 0;
            for buffer in &io.buffers {
                data[at..at + buffer.len()].copy_from_slice(buffer);
                at += buffer.len();
            }
            file.write_all_at(data, io.offset)?;
            if io.fua {
                file.sync_data()?;
            }
        }
        Op::Flush => file.sync_data()?,
        Op::Discard | Op::WriteZeroes => return Err(io::ErrorKind::Unsupported.into()),
    }
    Ok(())
}
