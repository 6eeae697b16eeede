//! Hosts as they are: blocking calls beside an event loop, callbacks that block, panics, deadlines.

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use common::{BLOCK, Host, Mode, eventually, sealed_memory, wait_readable};
use nebd_client::{CompletionMode, Io, Op, OpFlags, RawIovec, Session, errno};

/// So long that a test has failed.
const LONG: Duration = Duration::from_secs(20);

fn manual(host: &Host) -> nebd_client::Options {
    host.options().completion(CompletionMode::Manual).spin(Duration::ZERO)
}

#[test]
fn a_host_that_reaps_and_sleeps_does_not_swallow_the_wakeup_of_a_blocking_call() {
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Session::open("mem:a", manual(&host)).unwrap());
    let queue = session.queue(0).unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let caller = {
        let (session, is_over) = (session.clone(), is_over.clone());
        std::thread::spawn(move || {
            (0..1000).for_each(|_| session.flush().unwrap());
            is_over.store(true, SeqCst);
        })
    };
    eventually(|| {
        for _ in 0..100 {
            queue.reap(|_, _| ());
            // Drains the doorbell, as an event loop does before it sleeps.
            queue.arm();
        }
        is_over.load(SeqCst)
    });
    caller.join().unwrap();
}

#[test]
fn a_host_is_told_while_a_blocking_call_waits() {
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Session::open("mem:a", manual(&host)).unwrap());
    let queue = session.queue(0).unwrap();
    host.holds_flushes.store(true, SeqCst);
    let caller = {
        let session = session.clone();
        std::thread::spawn(move || session.flush())
    };
    eventually(|| host.taken.load(SeqCst) == 1);
    for user_data in 0..10 {
        assert!(!queue.arm());
        queue.submit(Io::discard(0, BLOCK as u64), user_data).unwrap();
        queue.kick();
        // The blocking call reaps it, and goes on waiting.
        eventually(|| session.stats().in_flight == 1);
        wait_readable(queue.event_fd());
        let mut seen = None;
        queue.reap(|user_data, result| seen = Some((user_data, result)));
        assert_eq!(seen, Some((user_data, Ok(()))));
    }
    assert!(!caller.is_finished());
    host.holds_flushes.store(false, SeqCst);
    caller.join().unwrap().unwrap();
}

#[test]
fn a_completion_may_wait_for_a_blocking_call_behind_it() {
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Session::open("mem:a", manual(&host)).unwrap());
    let queue = session.queue(0).unwrap();
    host.set_mode(Mode::Hold);
    queue.submit(Io::discard(0, BLOCK as u64), 1).unwrap();
    queue.kick();
    eventually(|| host.taken.load(SeqCst) == 1);
    let (tell, told) = mpsc::channel();
    let caller = {
        let session = session.clone();
        std::thread::spawn(move || tell.send(session.flush()).unwrap())
    };
    eventually(|| host.taken.load(SeqCst) == 2);
    // Both are answered in one go, and nobody is called.
    host.set_mode(Mode::Mute);
    eventually(|| host.flushes.load(SeqCst) == 1);
    std::thread::sleep(Duration::from_millis(20));
    // A big lock, say: the host's code wants it, the thread in the call holds it.
    let reaped = queue.reap(|_, _| told.recv_timeout(LONG).unwrap().unwrap());
    assert_eq!(reaped, 1);
    caller.join().unwrap();
}

#[test]
fn a_callback_may_wait_for_a_blocking_call_that_waits_for_its_slot() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().depth(1).spin(Duration::ZERO);
    let session = Arc::new(Session::open("mem:a", options).unwrap());
    for _ in 0..50 {
        host.set_mode(Mode::Hold);
        let (tell, told) = mpsc::channel();
        let (called_tell, called) = mpsc::channel();
        let done = Box::new(move |_| called_tell.send(told.recv_timeout(LONG)).unwrap());
        session.submit(Io::flush(), done).unwrap();
        let caller = {
            let session = session.clone();
            std::thread::spawn(move || tell.send(session.flush()))
        };
        std::thread::sleep(Duration::from_millis(3));
        host.set_mode(Mode::Serve);
        called.recv().unwrap().unwrap().unwrap();
        caller.join().unwrap().unwrap();
    }
}

#[test]
fn busy_polling_keeps_time_limits_and_sees_results_that_others_reaped() {
    let host = Host::new();
    let server = host.start();
    let limit = Some(Duration::from_millis(30));
    let busy = || host.options().spin(Duration::MAX);
    let session = Session::open("mem:a", busy().io_timeout(limit)).unwrap();
    host.set_mode(Mode::Hold);
    assert_eq!(session.flush(), Err(errno::TIMEDOUT));
    let polled = busy().completion(CompletionMode::Manual);
    let polled = Arc::new(Session::open("mem:b", polled).unwrap());
    let queue = polled.queue(0).unwrap();
    assert!(!queue.wait(Some(Duration::from_millis(1))));
    // A session that fails is as good as a result.
    let waiting = std::thread::spawn(move || queue.wait(None));
    let caller = {
        let polled = polled.clone();
        std::thread::spawn(move || polled.flush())
    };
    eventually(|| host.taken.load(SeqCst) == 2);
    server.tell("detach");
    assert_eq!(caller.join().unwrap(), Err(nebd_client::Errno::INVAL));
    assert!(!waiting.join().unwrap());
}

#[test]
fn a_panic_while_reaping_costs_no_other_completion() {
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Session::open("mem:a", manual(&host)).unwrap());
    let queue = session.queue(0).unwrap();
    host.set_mode(Mode::Hold);
    for user_data in 0..4 {
        queue.submit(Io::flush(), user_data).unwrap();
    }
    queue.kick();
    eventually(|| host.taken.load(SeqCst) == 4);
    host.set_mode(Mode::Serve);
    eventually(|| host.flushes.load(SeqCst) == 4);
    let mut seen = Vec::new();
    while seen.is_empty() {
        assert!(queue.wait(None));
        let reaping = std::panic::AssertUnwindSafe(|| {
            queue.reap(|user_data, _| {
                seen.push(user_data);
                panic!("the host's own");
            })
        });
        assert!(std::panic::catch_unwind(reaping).is_err());
    }
    while seen.len() < 4 {
        assert!(queue.wait(Some(LONG)));
        queue.reap(|user_data, _| seen.push(user_data));
    }
    assert_eq!(seen, [0, 1, 2, 3]);
}

#[test]
fn nobody_waits_on_a_queue_of_a_closed_session() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", manual(&host)).unwrap();
    let queue = session.queue(0).unwrap();
    let waiting = std::thread::spawn(move || queue.wait(None));
    std::thread::sleep(Duration::from_millis(10));
    session.close().unwrap();
    assert!(!waiting.join().unwrap());
}

#[test]
fn a_raw_request_that_timed_out_keeps_its_buffer_from_others() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().io_timeout(Some(Duration::from_millis(20)));
    let session = Session::open("mem:a", options.arena_bytes(4 * 4096)).unwrap();
    host.set_mode(Mode::Hold);
    let buffer = session.alloc(BLOCK).unwrap();
    let iovec = RawIovec { pointer: buffer.as_ptr(), length: BLOCK };
    // SAFETY: the buffer lives until the call returns.
    let read = unsafe { session.run_raw(Op::Read, OpFlags::NONE, 0, &[iovec]) };
    assert_eq!(read, Err(errno::TIMEDOUT));
    drop(buffer);
    // The server may still write to that page: it is nobody else's. One more is kept in reserve.
    assert!(session.alloc(3 * BLOCK).is_err());
    drop(session.alloc(2 * BLOCK).unwrap());
    host.set_mode(Mode::Serve);
    eventually(|| session.flush().is_ok() && session.alloc(3 * BLOCK).is_ok());
}

#[test]
fn a_request_that_cannot_be_copied_without_an_arena_is_refused() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().arena_bytes(0).iovecs_per_slot(1);
    let session = Session::open("mem:a", options).unwrap();
    let memory = sealed_memory(1 << 20);
    let _registered =
        session.register_mapped_memory(memory.fd(), memory.size(), memory.as_ptr()).unwrap();
    let half = |index: usize| RawIovec {
        pointer: memory.as_ptr().wrapping_add(index * 8192),
        length: BLOCK / 2,
    };
    // SAFETY: in the mapping, which nobody else uses now.
    let written = unsafe { session.run_raw(Op::Write, OpFlags::NONE, 0, &[half(0), half(1)]) };
    assert_eq!(written, Err(errno::NOBUFS));
}

#[derive(Default)]
struct NotesThread(Mutex<Option<String>>);

impl Wake for NotesThread {
    fn wake(self: Arc<Self>) {
        *self.0.lock().unwrap() = std::thread::current().name().map(str::to_owned);
    }
}

#[test]
fn the_control_thread_wakes_no_future() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().io_timeout(Some(Duration::from_millis(20)));
    let session = Session::open("mem:a", options).unwrap();
    host.set_mode(Mode::Hold);
    let waker = Arc::new(NotesThread::default());
    let mut future = pin!(session.start(Io::flush()));
    let mut poll = || future.as_mut().poll(&mut Context::from_waker(&Waker::from(waker.clone())));
    assert_eq!(poll(), Poll::Pending);
    eventually(|| waker.0.lock().unwrap().as_deref() == Some("nebd-complete"));
    assert_eq!(poll(), Poll::Ready(Err(errno::TIMEDOUT)));
    host.set_mode(Mode::Serve);
}
