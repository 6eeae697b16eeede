//! Curve's interface over a real server: every function, requests of any offset and length beside each
//! other, callbacks that do as they like, and a server that is killed.

use std::collections::BTreeSet;
use std::ffi::{CString, c_int};
use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nebd::curve::*;

const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// The library is initialized for the process, so tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// A keeper with its server, and this process initialized for it.
struct Stage {
    directory: tempfile::TempDir,
    keeper: Child,
    nebdctl: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// A program of the workspace; built by `cargo xtask ci` before the tests.
fn program(name: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().parent().unwrap().join(name);
    if !program.is_file() {
        println!("SKIPPED: {} is not built", program.display());
        return None;
    }
    Some(program)
}

impl Stage {
    fn start() -> Option<Stage> {
        let (server, nebdctl) = (program("nebd-server")?, program("nebdctl")?);
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::Builder::new().prefix("nebd-curve-").tempdir_in("/tmp").unwrap();
        let at = directory.path();
        fs::write(at.join("nebd.toml"), "log = \"error\"\n[keeper]\nbackoff_min_ms = 1\n").unwrap();
        fs::create_dir(at.join("state")).unwrap();
        let keeper = Command::new(server)
            .args(["keeper", "--config", "nebd.toml", "--socket", "s", "--state-dir", "state"])
            .current_dir(at)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let conf = at.join("nebd-client.conf");
        let address = at.join("s");
        fs::write(&conf, format!("nebdserver.serverAddress={}\n", address.display())).unwrap();
        let conf = CString::new(conf.to_str().unwrap()).unwrap();
        // SAFETY: a C string that lives through the call.
        assert_eq!(unsafe { nebd_lib_init_with_conf(conf.as_ptr()) }, 0);
        let stage = Stage { directory, keeper, nebdctl, _turn: turn };
        until("a server", || {
            stage.server_pid().is_some() && at_socket(stage.directory.path()).exists()
        });
        Some(stage)
    }

    fn create(&self, volume: &str, size: &str) {
        let done = Command::new(&self.nebdctl)
            .arg("--socket")
            .arg(self.directory.path().join("s"))
            .args(["volume", "create", volume, "--size", size])
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(done.success());
    }

    fn server_pid(&self) -> Option<u32> {
        let file = self.directory.path().join("state/server.pid");
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    fn kill_server(&self) {
        let victim = self.server_pid().unwrap();
        let killed = Command::new("kill").args(["-KILL", &victim.to_string()]).status().unwrap();
        assert!(killed.success());
        until("another server", || self.server_pid().is_some_and(|pid| pid != victim));
    }
}

fn at_socket(directory: &Path) -> PathBuf {
    directory.join("s.admin")
}

impl Drop for Stage {
    fn drop(&mut self) {
        nebd_lib_uninit();
        let _ = Command::new("kill").arg(self.keeper.id().to_string()).status();
        let _ = self.keeper.wait();
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn open(name: &str) -> c_int {
    let name = CString::new(name).unwrap();
    // SAFETY: a C string that lives through the call.
    unsafe { nebd_lib_open(name.as_ptr()) }
}

fn open_shared(name: &str) -> c_int {
    let name = CString::new(name).unwrap();
    let flags = OpenFlags { exclusive: 0 };
    // SAFETY: both live through the call.
    unsafe { nebd_lib_open_with_flags(name.as_ptr(), &flags) }
}

fn pread(fd: c_int, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    // SAFETY: the vector is that long.
    let result = unsafe { nebd_lib_pread(fd, bytes.as_mut_ptr().cast(), offset as i64, length) };
    assert_eq!(result, 0, "read of {length} at {offset}");
    bytes
}

fn pwrite(fd: c_int, offset: usize, bytes: &[u8]) {
    // SAFETY: the slice lives through the call.
    let result = unsafe { nebd_lib_pwrite(fd, bytes.as_ptr().cast(), offset as i64, bytes.len()) };
    assert_eq!(result, 0, "write of {} at {offset}", bytes.len());
}

type Start = unsafe extern "C" fn(c_int, *mut AioContext) -> c_int;
type Then = Box<dyn FnOnce(c_int, Vec<u8>) + Send>;

/// A context with what belongs to it; the context comes first, so that one is the other's address.
#[repr(C)]
struct Request {
    context: AioContext,
    bytes: Vec<u8>,
    then: Option<Then>,
}

unsafe extern "C" fn on_done(context: *mut AioContext) {
    // SAFETY: `start` made it, and it comes back once.
    let request = *unsafe { Box::from_raw(context.cast::<Request>()) };
    let Request { context, bytes, then } = request;
    // The context is gone. A failed assertion drops its sender, which whoever waits notices.
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
        assert_eq!(context.retry_count, 77);
        then.unwrap()(context.ret, bytes);
    }));
}

/// Starts a request on `bytes`; `then` gets its result and the bytes, in the callback.
fn start(
    fd: c_int,
    function: Start,
    offset: i64,
    mut bytes: Vec<u8>,
    then: impl FnOnce(c_int, Vec<u8>) + Send + 'static,
) {
    let context = AioContext {
        offset,
        length: bytes.len(),
        ret: 99,
        op: 0,
        cb: Some(on_done),
        buf: bytes.as_mut_ptr().cast(),
        retry_count: 77,
    };
    let request = Box::into_raw(Box::new(Request { context, bytes, then: Some(Box::new(then)) }));
    // SAFETY: the request lives until its callback.
    let started = unsafe { function(fd, request.cast()) };
    assert_eq!(started, 0);
}

/// Starts a request and waits for its callback.
fn run(fd: c_int, function: Start, offset: i64, bytes: Vec<u8>) -> (c_int, Vec<u8>) {
    let (sender, receiver) = channel();
    start(fd, function, offset, bytes, move |ret, bytes| sender.send((ret, bytes)).unwrap());
    receiver.recv_timeout(PATIENCE).expect("a callback")
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..length).map(|_| random.below(256) as u8).collect()
}

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % below as u64) as usize
    }
}

#[test]
fn every_function_does_what_it_says() {
    let Some(stage) = Stage::start() else { return };
    for volume in ["file:a", "mem:a"] {
        stage.create(volume, "1MiB");
        let fd = open(volume);
        assert!(fd > 0, "{volume}");
        assert_eq!(nebd_lib_filesize(fd), 1 << 20);
        assert_eq!(nebd_lib_getinfo(fd), 1 << 20);
        assert_eq!(nebd_lib_blocksize(fd), 4096);
        assert_eq!(nebd_lib_invalidcache(fd), 0);

        let data = pattern(1, 2 * BLOCK);
        assert_eq!(run(fd, nebd_lib_aio_pwrite, 8192, data.clone()).0, 0);
        assert_eq!(run(fd, nebd_lib_aio_pread, 8192, vec![0; 2 * BLOCK]), (0, data.clone()));
        assert_eq!(run(fd, nebd_lib_aio_pread, 8190, vec![1; 4]).1, [0, 0, data[0], data[1]]);
        assert_eq!(run(fd, nebd_lib_flush, 0, Vec::new()).0, 0);
        assert_eq!(nebd_lib_sync(fd), 0);
        pwrite(fd, 8193, b"xyz");
        assert_eq!(pread(fd, 8192, 5), [data[0], b'x', b'y', b'z', data[4]]);
        // The second of the two blocks alone lies in the range whole.
        assert_eq!(run(fd, nebd_lib_discard, 8193, vec![0; 2 * BLOCK - 1]).0, 0);
        assert_eq!(pread(fd, 8192, BLOCK)[4..], data[4..BLOCK]);
        assert_eq!(pread(fd, 8192 + BLOCK, BLOCK), [0; BLOCK]);
        assert_eq!(run(fd, nebd_lib_discard, 8193, vec![0; 100]).0, 0);
        assert_eq!(pread(fd, 8192, BLOCK)[4..], data[4..BLOCK]);

        assert_eq!(nebd_lib_resize(fd, 2 << 20), 0, "{volume}");
        assert_eq!(nebd_lib_filesize(fd), 2 << 20);
        assert_eq!(nebd_lib_resize(fd, -1), -1);
        assert_eq!(nebd_lib_resize(fd, 4097), -1);
        pwrite(fd, (2 << 20) - 3, b"end");
        assert_eq!(pread(fd, (2 << 20) - 4, 4), *b"\0end");

        assert_eq!(nebd_lib_close(fd), 0);
        assert_eq!(nebd_lib_filesize(fd), -1);
        assert_eq!(nebd_lib_close(fd), 0, "as in Curve");
        let again = open(volume);
        assert!(again > 0 && again != fd);
        assert_eq!(pread(again, (2 << 20) - 3, 3), *b"end");
        assert_eq!(nebd_lib_close(again), 0);
    }
}

#[test]
fn what_cannot_be_done_fails_in_the_callback() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    let fd = open("mem:a");
    for (offset, length) in
        [(-1, 1), (1 << 20, 1), ((1 << 20) - 1, 2), ((1 << 20) - 4096, 8192), (i64::MAX, 4096)]
    {
        for function in [nebd_lib_aio_pread as Start, nebd_lib_aio_pwrite, nebd_lib_discard] {
            assert_eq!(run(fd, function, offset, vec![0; length]).0, -1, "{length} at {offset}");
        }
        let mut bytes = vec![0; length];
        // SAFETY: the vector is that long.
        unsafe {
            assert_eq!(nebd_lib_pread(fd, bytes.as_mut_ptr().cast(), offset, length), -1);
            assert_eq!(nebd_lib_pwrite(fd, bytes.as_ptr().cast(), offset, length), -1);
        }
    }
    assert_eq!(pread(fd, 0, 1 << 20), vec![0; 1 << 20]);
    for function in [nebd_lib_aio_pread as Start, nebd_lib_aio_pwrite, nebd_lib_discard] {
        assert_eq!(run(fd, function, 5, Vec::new()).0, 0, "nothing is no failure");
    }
    let mut no_buffer = AioContext {
        offset: 0,
        length: 1,
        ret: 0,
        op: 0,
        cb: Some(on_done),
        buf: std::ptr::null_mut(),
        retry_count: 77,
    };
    // SAFETY: nothing is started.
    unsafe {
        assert_eq!(nebd_lib_aio_pread(fd, &mut no_buffer), -1);
        assert_eq!(nebd_lib_aio_pwrite(fd, &mut no_buffer), -1);
    }
}

#[test]
fn names_and_flags_choose_who_may_open_what() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    let refused = [
        "mem:none",
        "nonsense",
        "",
        "mem:",
        "disk:a",
        "core:path",
        "cbd:pool//path_user_:/etc/curve/client.conf",
        "cbd:pool//path",
    ];
    for name in refused {
        let begin = Instant::now();
        assert_eq!(open(name), -1, "{name}");
        assert!(begin.elapsed() < PATIENCE / 2, "{name} was waited for");
    }
    assert_eq!(open(&format!("mem:{}", "a".repeat(2000))), -1);
    let alone = open("mem:a");
    assert!(alone > 0);
    assert_eq!((open("mem:a"), open_shared("mem:a")), (-1, -1));
    assert_eq!(nebd_lib_close(alone), 0);
    let (one, two) = (open_shared("mem:a"), open_shared("mem:a"));
    assert!(one > 0 && two > 0 && one != two);
    pwrite(one, 5, b"both");
    assert_eq!(pread(two, 4, 6), *b"\0both\0");
    assert_eq!(open("mem:a"), -1);
    // What is open is closed at the end.
    assert_eq!(nebd_lib_uninit(), 0);
    assert_eq!(nebd_lib_filesize(one), -1);
    assert_eq!(open("mem:a"), -1, "no longer initialized");
}

/// A piece of the volume that one writer has for itself, in blocks that it shares with others.
struct Lane {
    offset: usize,
    bytes: Vec<u8>,
}

/// Writes parts of its lane one after the other, and reads the lane back now and then; at least
/// `rounds` times, and until it is over.
fn torture(fd: c_int, mut lane: Lane, mut random: Random, rounds: u32, end: End) {
    if rounds == 0 && end.is_over.load(SeqCst) {
        return end.done.send(lane).unwrap();
    }
    let at = random.below(lane.bytes.len());
    let length = 1 + random.below(lane.bytes.len() - at);
    let data = pattern(random.0, length);
    lane.bytes[at..at + length].copy_from_slice(&data);
    let rounds = rounds.saturating_sub(1);
    start(fd, nebd_lib_aio_pwrite, (lane.offset + at) as i64, data, move |ret, _| {
        assert_eq!(ret, 0);
        if random.below(3) > 0 {
            return torture(fd, lane, random, rounds, end);
        }
        let place = lane.offset as i64;
        let buffer = vec![0xdd; lane.bytes.len()];
        start(fd, nebd_lib_aio_pread, place, buffer, move |ret, bytes| {
            assert_eq!(ret, 0);
            assert!(bytes == lane.bytes, "lane at {}, {rounds} rounds to go", lane.offset);
            torture(fd, lane, random, rounds, end);
        });
    });
}

/// When a torture ends, and who is told.
#[derive(Clone)]
struct End {
    is_over: Arc<AtomicBool>,
    done: Sender<Lane>,
}

/// Lanes of odd lengths, some within a block, some over several, wall to wall.
fn lanes(size: usize) -> Vec<Lane> {
    let mut offset = 0;
    [100, 1, 3000, 9000, 511, 4096, 700, 12_288, 13, 5000, 2]
        .iter()
        .cycle()
        .map_while(|length| {
            let lane = Lane { offset, bytes: vec![0; *length] };
            offset += length;
            (offset <= size).then_some(lane)
        })
        .collect()
}

/// A torture of every lane, in turns on `fds`, while something goes on beside it.
fn torture_lanes(fds: &[c_int], size: usize, rounds: u32, meanwhile: impl FnOnce()) {
    let (done, receiver) = channel();
    let end = End { is_over: Arc::default(), done };
    let lanes = lanes(size);
    let count = lanes.len();
    for (index, lane) in lanes.into_iter().enumerate() {
        torture(fds[index % fds.len()], lane, Random(index as u64 + 1), rounds, end.clone());
    }
    meanwhile();
    end.is_over.store(true, SeqCst);
    drop(end);
    let mut expected = vec![0; size];
    for _ in 0..count {
        let lane = receiver.recv_timeout(PATIENCE).expect("every lane ends");
        expected[lane.offset..lane.offset + lane.bytes.len()].copy_from_slice(&lane.bytes);
    }
    assert!(pread(fds[0], 0, size) == expected);
}

#[test]
fn writes_of_parts_of_blocks_lose_nothing_of_their_neighbours() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    let size = 256 << 10;
    // Two fds of one volume mind each other too.
    let fds = [open_shared("mem:a"), open_shared("mem:a")];
    torture_lanes(&fds, size, 60, || ());
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let ours: Vec<String> = names.filter(|name| name.starts_with("nebd-co")).collect();
    assert!(ours.len() <= 2, "{ours:?}");
}

#[test]
fn writes_of_parts_of_blocks_survive_servers() {
    let Some(stage) = Stage::start() else { return };
    stage.create("file:a", "1MiB");
    let size = 128 << 10;
    let fd = open("file:a");
    torture_lanes(&[fd], size, 1, || {
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(100));
            stage.kill_server();
        }
    });
}

#[test]
fn blocking_writes_take_part() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    let fd = open("mem:a");
    let size = 64 << 10;
    let threads: Vec<_> = lanes(size)
        .into_iter()
        .take(12)
        .map(|mut lane| {
            std::thread::spawn(move || {
                let mut random = Random(lane.offset as u64);
                for round in 0..40 {
                    let at = random.below(lane.bytes.len());
                    let length = 1 + random.below(lane.bytes.len() - at);
                    let data = pattern(round, length);
                    pwrite(fd, lane.offset + at, &data);
                    lane.bytes[at..at + length].copy_from_slice(&data);
                    assert!(pread(fd, lane.offset, lane.bytes.len()) == lane.bytes);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_whole_block_is_not_lost_to_a_part_of_it() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    let mut fd = open("mem:a");
    for round in 0..300u64 {
        if round >= 100 {
            // The first write of a part since the open finds others under way.
            nebd_lib_close(fd);
            fd = open("mem:a");
        }
        let whole = vec![round as u8; BLOCK];
        let part = vec![!round as u8; 100];
        let (sender, receiver) = channel();
        let start = |function, offset, bytes: Vec<u8>| {
            let sender = sender.clone();
            start(fd, function, offset, bytes, move |ret, _| sender.send(ret).unwrap());
        };
        if round % 2 == 0 {
            start(nebd_lib_aio_pwrite, 1000, part.clone());
            start(nebd_lib_aio_pwrite, 0, whole);
        } else {
            start(nebd_lib_aio_pwrite, 0, whole);
            start(nebd_lib_aio_pwrite, 1000, part.clone());
        }
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok(0));
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok(0));
        let found = pread(fd, 0, BLOCK);
        let values: BTreeSet<u8> = found[1000..1100].iter().copied().collect();
        assert_eq!(values.len(), 1, "round {round}: the part is torn");
        assert!(found[..1000].iter().chain(&found[1100..]).all(|byte| *byte == round as u8));
    }
}

/// Writes again in each callback; the last one closes.
fn chain(fd: c_int, left: u32, done: Sender<()>) {
    start(fd, nebd_lib_aio_pwrite, i64::from(left) * 100, vec![7; 100], move |ret, _| {
        assert_eq!(ret, 0);
        if left > 0 {
            return chain(fd, left - 1, done);
        }
        assert_eq!(nebd_lib_close(fd), 0);
        assert_eq!(nebd_lib_filesize(fd), -1);
        done.send(()).unwrap();
    });
}

#[test]
fn a_callback_may_start_the_next_and_close() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    for _ in 0..20 {
        let fd = open("mem:a");
        assert!(fd > 0, "an exclusive open waits for the close before it");
        let (sender, receiver) = channel();
        chain(fd, 50, sender);
        receiver.recv_timeout(PATIENCE).unwrap();
    }
    let fd = open("mem:a");
    assert_eq!(pread(fd, 0, 5100), [7; 5100]);
    // One volume's callback closes another that is busy, and itself.
    stage.create("mem:b", "1MiB");
    let other = open("mem:b");
    let told = Arc::new(AtomicU32::new(0));
    for index in 0..50 {
        let told = told.clone();
        start(other, nebd_lib_aio_pwrite, index * 333, vec![1; 333], move |ret, _| {
            assert_eq!(ret, 0);
            told.fetch_add(1, SeqCst);
        });
    }
    let (sender, receiver) = channel();
    start(fd, nebd_lib_aio_pread, 0, vec![0; 1], move |_, _| {
        assert_eq!((nebd_lib_close(other), nebd_lib_close(fd)), (0, 0));
        sender.send(()).unwrap();
    });
    receiver.recv_timeout(PATIENCE).unwrap();
    let again = open("mem:b");
    assert!(again > 0);
    assert_eq!(told.load(SeqCst), 50, "everything was told before it was closed");
}

#[test]
fn a_close_waits_for_everything() {
    let Some(stage) = Stage::start() else { return };
    stage.create("file:a", "1MiB");
    for round in 0..6 {
        let fd = open("file:a");
        let told = Arc::new(AtomicU32::new(0));
        let is_closed = Arc::new(AtomicBool::new(false));
        for index in 0..100 {
            let (told, is_closed) = (told.clone(), is_closed.clone());
            // Parts of blocks, of which many wait in line.
            let length = if index % 3 == 0 { BLOCK } else { 1000 };
            let offset = if index % 3 == 0 { index * BLOCK as i64 } else { index * 700 };
            start(fd, nebd_lib_aio_pwrite, offset, vec![2; length], move |ret, _| {
                assert_eq!(ret, 0);
                assert!(!is_closed.load(SeqCst));
                told.fetch_add(1, SeqCst);
            });
        }
        if round % 2 == 1 {
            stage.kill_server();
        }
        assert_eq!(nebd_lib_close(fd), 0);
        is_closed.store(true, SeqCst);
        assert_eq!(told.load(SeqCst), 100);
    }
}

#[test]
fn threads_may_do_anything_at_any_time() {
    let Some(stage) = Stage::start() else { return };
    stage.create("mem:a", "1MiB");
    let is_over = Arc::new(AtomicBool::new(false));
    let present = Arc::new(std::sync::atomic::AtomicI32::new(open_shared("mem:a")));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (is_over, present) = (is_over.clone(), present.clone());
            std::thread::spawn(move || {
                let mut bytes = [0u8; 700];
                let mut good = 0;
                while !is_over.load(SeqCst) || good == 0 {
                    let fd = present.load(SeqCst);
                    // SAFETY: the array is that long. The fd may be closed by now.
                    let read = unsafe { nebd_lib_pread(fd, bytes.as_mut_ptr().cast(), 333, 700) };
                    // SAFETY: as above.
                    let wrote = unsafe { nebd_lib_pwrite(fd, bytes.as_ptr().cast(), 333, 700) };
                    good += u32::from(read == 0 && wrote == 0);
                    let _ = (nebd_lib_sync(fd), nebd_lib_filesize(fd));
                }
            })
        })
        .collect();
    for _ in 0..100 {
        let next = open_shared("mem:a");
        assert!(next > 0);
        assert_eq!(nebd_lib_close(present.swap(next, SeqCst)), 0);
    }
    is_over.store(true, SeqCst);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
