//! The first program of a guest: keeps requests in flight on every disk, compares what it reads with
//! what was acknowledged, and tells the host by the board, and on the console what went wrong.
//!
//! ```text
//!  boot ─► board ─► disks ─► compare (if not the first boot) ─► work ─► compare ─► fsck ─► rest
//!                                                                │ reset
//!  boot ◄────────────────────────────────────────────────────────┘
//! ```

mod blocks;
mod files;
mod memory;
mod meter;
mod raw;
mod system;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nebd_guest::board::{Board, Command, Common, Kind, OfDisk, State};
use nebd_guest::stamp::mix;

use crate::files::FileDisk;
use crate::memory::Mapping;
use crate::meter::Meter;
use crate::raw::RawDisk;

/// Between two looks for a command.
const LOOK: Duration = Duration::from_millis(20);
/// Between two lines on the console.
const LINE: Duration = Duration::from_secs(1);

fn main() {
    if let Err(error) = run() {
        println!("GUEST-FAILED {error:#}");
        system::power_off();
    }
}

fn run() -> Result<()> {
    let start = Instant::now();
    system::prepare()?;
    system::load_modules()?;
    let board = system::board()?;
    let stop = Arc::new(AtomicBool::new(false));
    let disks = 0..board.get(Common::Disks) as usize;
    let disks = disks.map(|disk| Disk::prepare(board, disk, start, &stop));
    let mut disks = disks.collect::<Result<Vec<Disk>>>()?;
    println!("GUEST works, boot {}", board.get(Common::Boots));
    for disk in &mut disks {
        disk.start();
    }
    board.set(Common::State, State::Works as u64);
    let mut next_line = Instant::now();
    loop {
        board.set(Common::Beat, board.get(Common::Beat) + 1);
        if Instant::now() >= next_line {
            next_line += LINE;
            tell(board, start);
        }
        let word = board.get(Common::Command);
        if word == board.get(Common::Answered) {
            thread::sleep(LOOK);
            continue;
        }
        match Command::from_word(word & 0xff) {
            Some(Command::Rest) => rest(board, &stop, &mut disks)?,
            Some(Command::Reboot) => {
                stop.store(true, SeqCst);
                for disk in &mut disks {
                    disk.leave()?;
                }
                board.set(Common::Answered, word);
                board.set(Common::State, State::Absent as u64);
                system::boot_again();
            }
            Some(Command::PowerOff) => system::power_off(),
            None => println!("GUEST-FAILED command {word:#x}"),
        }
        board.set(Common::Answered, word);
    }
}

fn rest(board: Board<Mapping>, stop: &AtomicBool, disks: &mut [Disk]) -> Result<()> {
    board.set(Common::State, State::Compares as u64);
    stop.store(true, SeqCst);
    for disk in disks {
        disk.rest()?;
    }
    board.set(Common::State, State::Rests as u64);
    println!("GUEST rests");
    Ok(())
}

fn tell(board: Board<Mapping>, start: Instant) {
    let mut line = format!("GUEST t={:.1}", start.elapsed().as_secs_f64());
    for disk in 0..board.get(Common::Disks) as usize {
        let [requests, errors, mismatches, checked, gap] =
            [OfDisk::Requests, OfDisk::Errors, OfDisk::Mismatches, OfDisk::Checked, OfDisk::GapMax]
                .map(|field| board.of_disk(disk, field));
        line += &format!(
            " | {disk}: requests={requests} checked={checked} errors={errors} \
             mismatches={mismatches} gap-max-ms={:.1}",
            gap as f64 / 1e3
        );
    }
    println!("{line}");
}

enum Content {
    Raw(RawDisk),
    Files(FileDisk),
}

/// A disk, and the threads that work on it.
struct Disk {
    content: Arc<Content>,
    depth: u64,
    rest: Duration,
    seed: u64,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Disk {
    fn prepare(
        board: Board<Mapping>,
        disk: usize,
        start: Instant,
        stop: &Arc<AtomicBool>,
    ) -> Result<Disk> {
        let word = |field| board.of_disk(disk, field);
        let device = system::disk(disk, word(OfDisk::Bytes))?;
        let (queues, is_packed) = system::virtqueues(&device)?;
        board.set_of_disk(disk, OfDisk::Queues, queues as u64);
        board.set_of_disk(disk, OfDisk::Packed, if is_packed { 1 } else { 2 });
        let meter = Arc::new(Meter::new(board, disk, start));
        let (depth, boots) = (word(OfDisk::Depth), board.get(Common::Boots));
        let kind = Kind::from_word(word(OfDisk::Kind)).context("what is on the disk")?;
        let content = match kind {
            Kind::Raw => Content::Raw(RawDisk::open(&device, board, disk, meter)?),
            kind => Content::Files(FileDisk::mount(&device, kind, board, disk, meter)?),
        };
        let disk = Disk {
            content: Arc::new(content),
            depth,
            rest: Duration::from_millis(word(OfDisk::Rest)),
            seed: mix(disk as u64 ^ mix(boots)),
            stop: stop.clone(),
            threads: Vec::new(),
        };
        // On a new disk there is nothing yet.
        if boots > 1 {
            disk.compare();
        }
        Ok(disk)
    }

    fn start(&mut self) {
        for thread in 0..self.depth {
            let (content, stop) = (self.content.clone(), self.stop.clone());
            let (depth, rest, seed) = (self.depth, self.rest, mix(self.seed ^ mix(thread)));
            self.threads.push(thread::spawn(move || match &*content {
                Content::Raw(raw) => {
                    let share = raw.blocks() / depth;
                    raw.work(thread * share..(thread + 1) * share, seed, rest, &stop);
                }
                Content::Files(files) => files.work(thread, seed, rest, &stop),
            }));
        }
    }

    fn compare(&self) {
        match &*self.content {
            Content::Raw(raw) => raw.compare(),
            Content::Files(files) => files.compare(self.depth),
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                println!("GUEST-FAILED a thread panicked");
            }
        }
    }

    /// As an orderly guest does before it boots again.
    fn leave(&mut self) -> Result<()> {
        self.join();
        match &*self.content {
            Content::Files(files) => files.unmount(),
            Content::Raw(_) => Ok(()),
        }
    }

    fn rest(&mut self) -> Result<()> {
        self.join();
        self.compare();
        match &*self.content {
            Content::Files(files) => files.unmount_and_check(),
            Content::Raw(_) => Ok(()),
        }
    }
}
