//! The process: connections, volumes, and the faults between them.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::{Epoch, OpFlags};
use nebd_rpc::frame::{self, Header, Kind};

use super::control::Stats;
use super::disk::{Disk, OutOfRange};
use super::faults::{DelayQueue, Faults, Frame, History, Stale};
use super::fence::{Grant, Verdict, VolumeFence};
use crate::stamp::Dice;

/// Errnos as they stand in answers.
pub mod errno {
    /// No such volume.
    pub const NOENT: u32 = 2;
    /// Ask again later.
    pub const AGAIN: u32 = 11;
    /// The volume exists already.
    pub const EXIST: u32 = 17;
    /// The frame makes no sense.
    pub const INVAL: u32 = 22;
    /// The operation was answered long ago.
    pub const ALREADY: u32 = 114;
    /// The owner was replaced.
    pub const STALE: u32 = 116;
}

/// How a store is set up.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where to listen.
    pub socket: PathBuf,
    /// What goes wrong.
    pub faults: Faults,
    /// Lets everything through, to prove that tests would notice.
    pub fence_is_off: bool,
    /// Power cuts lose what was not flushed.
    pub is_volatile: bool,
    /// Seed of the faults.
    pub seed: u64,
}

struct Volume {
    id: u64,
    fence: VolumeFence,
    grant: Grant,
    disk: Disk,
    stale: Stale,
}

struct Connection {
    out: Mutex<UnixStream>,
    is_dead: AtomicBool,
}

struct Delayed {
    frame: Frame,
    connection: Arc<Connection>,
}

/// The store.
pub struct Store {
    config: StoreConfig,
    volumes: Mutex<BTreeMap<String, u64>>,
    by_id: Mutex<BTreeMap<u64, Arc<Mutex<Volume>>>>,
    delayed: DelayQueue<Delayed>,
    /// Faults can be switched off at run time.
    pub(super) is_calm: AtomicBool,
    next_id: AtomicU64,
    pub(super) stats: Stats,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// A store without volumes.
    pub fn new(config: StoreConfig) -> Arc<Store> {
        Arc::new(Store {
            config,
            volumes: Mutex::default(),
            by_id: Mutex::default(),
            delayed: DelayQueue::default(),
            is_calm: AtomicBool::new(false),
            next_id: AtomicU64::new(1),
            stats: Stats::default(),
        })
    }

    /// Listens, and serves until the process ends. Beside the socket, with `.ctl` appended, is the
    /// [control socket](super::control).
    pub fn serve(self: Arc<Self>) -> io::Result<()> {
        let path = &self.config.socket;
        let mut control = path.clone().into_os_string();
        control.push(".ctl");
        let control = UnixListener::bind(control)?;
        let listener = UnixListener::bind(path)?;
        let store = self.clone();
        std::thread::spawn(move || super::control::serve(&store, &control));
        let store = self.clone();
        std::thread::spawn(move || store.serve_delayed());
        for (index, stream) in listener.incoming().enumerate() {
            let (store, stream) = (self.clone(), stream?);
            std::thread::spawn(move || store.serve_connection(stream, index as u64));
        }
        Ok(())
    }

    /// Cuts the power of every disk. Returns how many sectors were lost.
    pub fn cut_power(&self, seed: u64) -> usize {
        let volumes: Vec<_> = lock(&self.by_id).values().cloned().collect();
        volumes.iter().map(|volume| lock(volume).disk.cut_power(seed)).sum()
    }

    fn faults(&self) -> Faults {
        if self.is_calm.load(SeqCst) { Faults::NONE } else { self.config.faults }
    }

    fn serve_connection(self: Arc<Self>, stream: UnixStream, index: u64) {
        let Ok(out) = stream.try_clone() else { return };
        let connection = Arc::new(Connection { out: Mutex::new(out), is_dead: false.into() });
        let mut dice = Dice::new(self.config.seed ^ index << 32);
        let mut history = History::default();
        let mut input = BufReader::with_capacity(256 * 1024, stream);
        // A damaged frame ends the connection as its end does: the peer sends again on a new one.
        while let Ok(Some((header, payload))) = frame::read(&mut input) {
            let frame = Frame { header, payload: payload.into() };
            if !self.receive(frame, &connection, &mut history, &mut dice) {
                break;
            }
        }
        connection.is_dead.store(true, SeqCst);
        let _ = input.get_ref().shutdown(std::net::Shutdown::Both);
        self.bury(history, &mut dice);
    }

    /// What came over a dead connection is delivered again later.
    fn bury(&self, history: History, dice: &mut Dice) {
        let times = self.faults().redeliver;
        for frame in history.into_frames() {
            let Some(volume) = self.volume(frame.header.fence.volume) else { continue };
            lock(&volume).stale.push(frame, 1 + dice.below(u64::from(times)) as u32);
        }
    }

    /// Handles a frame now, later, or twice; false to cut the line.
    fn receive(
        &self,
        frame: Frame,
        connection: &Arc<Connection>,
        history: &mut History,
        dice: &mut Dice,
    ) -> bool {
        if !matches!(
            frame.header.kind,
            Kind::Read | Kind::Write | Kind::Flush | Kind::Discard | Kind::WriteZeroes
        ) {
            let answer = self.manage(&frame);
            return self.answer(connection, &answer, &[]);
        }
        let faults = self.faults();
        if faults.redeliver > 0 && is_change(frame.header.kind) {
            history.push(frame.clone());
        }
        if dice.per_million(faults.cut_per_million) {
            self.stats.cut.fetch_add(1, SeqCst);
            // Half of the frames that met a cut line were carried out all the same.
            if dice.percent(50) {
                self.execute(&frame);
            }
            return false;
        }
        let delay = |dice: &mut Dice| Duration::from_micros(dice.below(faults.delay_ms_max * 1000));
        if dice.per_million(faults.duplicate * 1000) {
            self.stats.duplicated.fetch_add(1, SeqCst);
            let (frame, connection) = (frame.clone(), connection.clone());
            self.delayed.push(delay(dice), Delayed { frame, connection });
        }
        if dice.per_million(faults.delay * 1000) {
            self.stats.delayed.fetch_add(1, SeqCst);
            let connection = connection.clone();
            self.delayed.push(delay(dice), Delayed { frame, connection });
            return true;
        }
        self.execute_and_answer(&frame, connection)
    }

    fn serve_delayed(self: Arc<Self>) {
        let mut dice = Dice::new(!self.config.seed);
        loop {
            let Delayed { frame, connection } = self.delayed.wait();
            if connection.is_dead.load(SeqCst) && is_change(frame.header.kind) && dice.percent(50) {
                // It gets stuck on the way until the successor has written.
                if let Some(volume) = self.volume(frame.header.fence.volume) {
                    lock(&volume).stale.push(frame, self.faults().redeliver);
                }
                continue;
            }
            self.execute_and_answer(&frame, &connection);
        }
    }

    fn execute_and_answer(&self, frame: &Frame, connection: &Connection) -> bool {
        let (answer, payload) = self.execute(frame);
        self.answer(connection, &answer, &payload)
    }

    fn answer(&self, connection: &Connection, answer: &Header, payload: &[u8]) -> bool {
        let mut bytes = Vec::with_capacity(frame::HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&answer.encode(payload));
        bytes.extend_from_slice(payload);
        // The writer may be gone; then its successor asks again.
        lock(&connection.out).write_all(&bytes).is_ok()
    }

    fn volume(&self, id: u64) -> Option<Arc<Mutex<Volume>>> {
        lock(&self.by_id).get(&id).cloned()
    }

    /// Carries out a data operation, and then whatever is to be delivered late after it.
    fn execute(&self, frame: &Frame) -> (Header, Vec<u8>) {
        let mut answer = Header::new(Kind::Answer, frame.header.request);
        let Some(volume) = self.volume(frame.header.fence.volume) else {
            answer.result = errno::NOENT;
            return (answer, Vec::new());
        };
        let mut volume = lock(&volume);
        let (result, payload) = self.apply(&mut volume, frame);
        answer.result = result;
        if result == 0 && is_change(frame.header.kind) {
            let mut dice = Dice::new(self.config.seed ^ frame.header.fence.seq << 20);
            for late in volume.stale.after(&frame.header, &mut dice) {
                self.stats.redelivered.fetch_add(1, SeqCst);
                self.apply(&mut volume, &late);
            }
        }
        (answer, payload)
    }

    fn apply(&self, volume: &mut Volume, frame: &Frame) -> (u32, Vec<u8>) {
        let header = &frame.header;
        let stats = &self.stats;
        match volume.fence.admit(&header.fence, is_change(header.kind)) {
            Verdict::Apply => {}
            Verdict::Again => {
                stats.again.fetch_add(1, SeqCst);
                return (0, Vec::new());
            }
            Verdict::Stale => {
                stats.stale.fetch_add(1, SeqCst);
                return (errno::STALE, Vec::new());
            }
            Verdict::Answered => {
                stats.answered.fetch_add(1, SeqCst);
                return (errno::ALREADY, Vec::new());
            }
            Verdict::Crowded => return (errno::AGAIN, Vec::new()),
        }
        stats.applied.fetch_add(1, SeqCst);
        let fua = header.flags & u32::from(OpFlags::FUA.bits()) != 0;
        stats.fua.fetch_add(u64::from(fua), SeqCst);
        let disk = &mut volume.disk;
        let done: Result<(), OutOfRange> = match header.kind {
            Kind::Read => match disk.read(header.offset, header.length) {
                Ok(bytes) => return (0, bytes.to_vec()),
                Err(error) => Err(error),
            },
            Kind::Write => disk.write(header.offset, &frame.payload, fua),
            Kind::Discard | Kind::WriteZeroes => disk.zero(header.offset, header.length, fua),
            _ => {
                stats.flushes.fetch_add(1, SeqCst);
                disk.flush();
                Ok(())
            }
        };
        (done.map_or(errno::INVAL, |()| 0), Vec::new())
    }

    /// Creates, deletes, resizes, opens.
    fn manage(&self, frame: &Frame) -> Header {
        let mut answer = Header::new(Kind::Answer, frame.header.request);
        let name = String::from_utf8_lossy(&frame.payload).into_owned();
        let mut volumes = lock(&self.volumes);
        if frame.header.kind == Kind::Create {
            if volumes.contains_key(&name) {
                answer.result = errno::EXIST;
                return answer;
            }
            let id = self.next_id.fetch_add(1, SeqCst);
            let volume = Volume {
                id,
                fence: VolumeFence::new(self.config.fence_is_off),
                grant: Grant::default(),
                disk: Disk::new(frame.header.length, self.config.is_volatile),
                stale: Stale::default(),
            };
            volumes.insert(name, id);
            lock(&self.by_id).insert(id, Arc::new(Mutex::new(volume)));
            answer.length = frame.header.length;
            return answer;
        }
        let Some(volume) = volumes.get(&name).and_then(|id| self.volume(*id)) else {
            answer.result = errno::NOENT;
            return answer;
        };
        if frame.header.kind == Kind::Delete {
            let id = volumes.remove(&name);
            id.map(|id| lock(&self.by_id).remove(&id));
            return answer;
        }
        manage_volume(&mut lock(&volume), &frame.header, &mut answer);
        answer
    }
}

fn manage_volume(volume: &mut Volume, asked: &Header, answer: &mut Header) {
    match asked.kind {
        Kind::Open => match volume.grant.open(asked.fence.epoch) {
            Some(major) => {
                answer.fence.epoch = Epoch { major, minor: asked.fence.epoch.minor };
            }
            None => answer.result = errno::STALE,
        },
        Kind::Resize => volume.disk.resize(asked.length),
        Kind::Observe => {}
        _ => answer.result = errno::INVAL,
    }
    answer.fence.volume = volume.id;
    answer.length = volume.disk.size_bytes();
}

fn is_change(kind: Kind) -> bool {
    matches!(kind, Kind::Write | Kind::Discard | Kind::WriteZeroes)
}
