//! What the library does to the process it lives in: threads, descriptors, wakeups, forks.
//!
//! These tests look at the whole process, so they take turns.

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{BLOCK, Host, eventually, pattern, sealed_memory};
use nebd_client::{CallError, CompletionMode, Io, OpFlags, OpenError, Session, SubmitError, errno};

static TURN: Mutex<()> = Mutex::new(());

fn my_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Thread ids and names of the library's threads.
fn threads() -> Vec<(String, String)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut threads: Vec<_> = tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?.trim().to_owned();
            let id = path.file_name()?.to_str()?.to_owned();
            name.starts_with("nebd-").then_some((name, id))
        })
        .collect();
    threads.sort();
    threads
}

fn names() -> Vec<String> {
    threads().into_iter().map(|(name, _)| name).collect()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn threads_and_descriptors_come_and_go_with_sessions() {
    let _turn = my_turn();
    let host = Host::new();
    let _server = host.start();
    let before = descriptors();
    for _ in 0..10 {
        let sessions: Vec<_> = (0..4)
            .map(|index| {
                let options = host.options().queues(1 + index % 2).on_event(|_| ());
                Session::open("mem:a", options).unwrap()
            })
            .collect();
        assert_eq!(names(), ["nebd-control"]);
        let memory = sealed_memory(4096);
        let registered = sessions[0].register_memory(memory.fd(), 4096).unwrap();
        sessions[0].run(Io::write(0, registered.range(0, 4096))).unwrap();
        sessions[1].write_at(&pattern(0, 0), 0, OpFlags::NONE).unwrap();
        // Blocking calls do without the second thread.
        assert_eq!(names(), ["nebd-control"]);
        let (tell, told) = mpsc::channel();
        for session in &sessions {
            let tell = tell.clone();
            let done = Box::new(move |result| tell.send(result).unwrap());
            session.submit(Io::flush(), done).unwrap();
        }
        told.iter().take(4).for_each(|result| result.unwrap());
        assert_eq!(names(), ["nebd-complete", "nebd-control"]);
        drop(registered);
        for session in sessions {
            session.close().unwrap();
        }
        // A joined thread stays in /proc for a moment.
        eventually(|| threads().is_empty());
        drop(memory);
        // The server learns of the closed sockets in its own time.
        eventually(|| descriptors() == before);
    }
}

#[test]
fn dropped_sessions_leave_nothing_behind() {
    let _turn = my_turn();
    let host = Host::new();
    let _server = host.start();
    let before = descriptors();
    for _ in 0..5 {
        let session = Session::open("mem:a", host.options()).unwrap();
        let (tell, told) = mpsc::channel();
        let done = Box::new(move |result| tell.send(result).unwrap());
        session.submit(Io::flush(), done).unwrap();
        drop(session);
        told.recv().unwrap().unwrap();
        eventually(|| threads().is_empty() && descriptors() == before);
    }
    assert_eq!(host.logged("detach"), 5);
    // One that was never attached.
    *host.refusal.lock().unwrap() = Some((nebd_client::Errno(13), false));
    assert!(matches!(Session::open("mem:a", host.options()), Err(OpenError::Refused { .. })));
    assert!(threads().is_empty());
    eventually(|| descriptors() == before);
}

#[test]
fn a_callback_may_close_the_last_session() {
    let _turn = my_turn();
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Mutex::new(Some(Session::open("mem:a", host.options()).unwrap())));
    let (tell, told) = mpsc::channel();
    let inner = session.clone();
    let done = Box::new(move |_| {
        let session = inner.lock().unwrap().take().unwrap();
        tell.send(session.close()).unwrap();
    });
    session.lock().unwrap().as_ref().unwrap().submit(Io::flush(), done).unwrap();
    told.recv().unwrap().unwrap();
    eventually(|| threads().is_empty());
}

fn switches() -> Vec<(String, u64)> {
    let count = |id: &str| {
        let status = std::fs::read_to_string(format!("/proc/self/task/{id}/status")).unwrap();
        let numbers = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        numbers.map(|(_, number)| number.trim().parse::<u64>().unwrap()).sum()
    };
    threads().into_iter().map(|(name, id)| (name, count(&id))).collect()
}

#[test]
fn idle_threads_never_wake_up() {
    let _turn = my_turn();
    let host = Host::new();
    let _server = host.start();
    let sessions: Vec<_> =
        (0..3).map(|_| Session::open("mem:a", host.options()).unwrap()).collect();
    for session in &sessions {
        let (tell, told) = mpsc::channel();
        let done = Box::new(move |result| tell.send(result).unwrap());
        session.submit(Io::flush(), done).unwrap();
        told.recv().unwrap().unwrap();
        session.flush().unwrap();
    }
    // The stall watch ticks once more after the last request; then there is silence, for good.
    eventually(|| {
        let before = switches();
        std::thread::sleep(Duration::from_millis(1500));
        before.len() == 2 && before == switches()
    });
    drop(sessions);
    eventually(|| threads().is_empty());
}

/// Waits until the control thread uses no processor time any more.
#[track_caller]
fn the_control_thread_sleeps() {
    let used_ns = || {
        let (_, id) = threads().into_iter().find(|(name, _)| name == "nebd-control").unwrap();
        let schedstat = std::fs::read_to_string(format!("/proc/self/task/{id}/schedstat")).unwrap();
        schedstat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    eventually(|| {
        let before_ns = used_ns();
        std::thread::sleep(Duration::from_millis(300));
        used_ns() - before_ns < 30_000_000
    });
}

#[test]
fn a_failed_session_costs_no_time() {
    let _turn = my_turn();
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    host.set_mode(common::Mode::Hold);
    let (tell, told) = mpsc::channel();
    session.submit(Io::flush(), Box::new(move |result| tell.send(result).unwrap())).unwrap();
    eventually(|| host.taken.load(SeqCst) == 1);
    server.tell("detach");
    assert!(told.recv().unwrap().is_err());
    // The host has not noticed yet; it may take its time.
    the_control_thread_sleeps();
    session.close().unwrap();
}

#[test]
fn a_call_that_was_asked_again_costs_no_time() {
    let _turn = my_turn();
    let host = Host::new();
    let server = host.start();
    let session = Arc::new(Session::open("mem:a", host.options()).unwrap());
    host.stalls_in_resize.store(true, SeqCst);
    let resizing = {
        let session = session.clone();
        std::thread::spawn(move || session.resize(32 << 20))
    };
    eventually(|| host.logged("resize") == 2);
    the_control_thread_sleeps();
    host.stalls_in_resize.store(false, SeqCst);
    drop(server);
    let _server = host.start();
    resizing.join().unwrap().unwrap();
    Arc::into_inner(session).unwrap().close().unwrap();
}

#[test]
fn a_callback_that_blocks_stops_neither_reconnects_nor_others() {
    let _turn = my_turn();
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    let (release, released) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |result| {
        released.recv().unwrap();
        tell.send(result).unwrap();
    });
    session.submit(Io::flush(), done).unwrap();
    drop(server);
    let _server = host.start();
    eventually(|| session.stats().reconnects == 1);
    session.write_at(&pattern(1, 1), 0, OpFlags::NONE).unwrap();
    assert!(told.try_recv().is_err());
    release.send(()).unwrap();
    told.recv().unwrap().unwrap();
    session.close().unwrap();
}

/// What the child of a fork meets; every number is a different surprise.
fn in_the_child(
    session: Session,
    manual: Session,
    mut buffer: nebd_client::Buffer,
    socket: &std::path::Path,
) -> u8 {
    let mut bytes = vec![0; BLOCK];
    let queue = manual.queue(0);
    let future = session.start(Io::read(0, &buffer));
    let polled = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
    let called = Arc::new(AtomicU32::new(0));
    let count = called.clone();
    let done = Box::new(move |_| {
        count.fetch_add(1, SeqCst);
    });
    let forked = Err(errno::FORKED);
    let checks = [
        session.read_at(&mut bytes, 0) == forked,
        session.write_at(&bytes, 0, OpFlags::FUA) == forked,
        session.flush() == forked,
        session.discard(0, BLOCK as u64) == forked,
        session.submit(Io::flush(), done) == forked,
        polled == Poll::Ready(forked),
        session.alloc(BLOCK).is_err(),
        !buffer.read(0, &mut bytes) && !buffer.write(0, &bytes),
        session.stats() == nebd_client::Stats::default(),
        session.info().size == 0,
        matches!(session.resize(0), Err(CallError::Session { errno: errno::FORKED, .. })),
        matches!(session.refresh(), Err(CallError::Session { errno: errno::FORKED, .. })),
        queue.as_ref().is_some_and(|queue| {
            queue.kick();
            queue.submit(Io::flush(), 1) == Err(SubmitError::Errno(errno::FORKED))
                && queue.reap(|_, _| ()) == 0
                && !queue.wait(None)
                && queue.failure() == Some(errno::FORKED)
        }),
        matches!(
            Session::open("mem:a", nebd_client::Options::new().socket(socket)),
            Err(OpenError::Forked)
        ),
        matches!(session.close(), Err(CallError::Session { errno: errno::FORKED, .. })),
        called.load(SeqCst) == 0,
    ];
    drop((manual, queue, buffer));
    checks.iter().position(|is_so| !is_so).map_or(0, |index| index as u8 + 1)
}

#[test]
fn a_forked_child_fails_cleanly_and_its_parent_goes_on() {
    let _turn = my_turn();
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Session::open("mem:a", host.options()).unwrap());
    let manual = host.options().completion(CompletionMode::Manual);
    let is_over = Arc::new(AtomicBool::new(false));
    // Another thread holds locks of the library most of the time.
    let busy = {
        let (session, is_over) = (session.clone(), is_over.clone());
        std::thread::spawn(move || {
            let mut round = 0;
            while !is_over.load(SeqCst) {
                round += 1;
                session.write_at(&pattern(0, round), 0, OpFlags::NONE).unwrap();
                drop(session.alloc(BLOCK).unwrap());
            }
            round
        })
    };
    for _ in 0..20 {
        let manual = Session::open("mem:b", manual.clone()).unwrap();
        let own = Session::open("mem:c", host.options()).unwrap();
        let buffer = own.alloc(BLOCK).unwrap();
        // SAFETY: the child runs this library's checks and leaves by `_exit`; glibc's allocator can
        // be used after a fork.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let check = || in_the_child(own, manual, buffer, &host.path);
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
            // SAFETY: ends the child without running anything of its parent's.
            unsafe { libc::_exit(code.map_or(99, i32::from)) };
        }
        assert!(child > 0);
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "the child was killed: {status}");
        assert_eq!(libc::WEXITSTATUS(status), 0, "which check failed, from 1");
        own.flush().unwrap();
        drop(buffer);
        own.close().unwrap();
        manual.close().unwrap();
    }
    is_over.store(true, SeqCst);
    assert!(busy.join().unwrap() > 0);
    Arc::into_inner(session).unwrap().close().unwrap();
}
