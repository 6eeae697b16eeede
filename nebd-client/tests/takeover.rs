//! Servers that die and are replaced, with requests in flight.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use common::{BLOCK, Host, Mode, eventually, pattern, sealed_memory};
use nebd_client::{
    CallError, CompletionMode, Errno, Event, Generation, Io, OpFlags, Options, Session, errno,
};

type Events = Arc<Mutex<Vec<Event>>>;

fn recording(options: Options) -> (Options, Events) {
    let events = Events::default();
    let seen = events.clone();
    (options.on_event(move |event| seen.lock().unwrap().push(event)), events)
}

fn has(events: &Events, event: Event) -> bool {
    events.lock().unwrap().contains(&event)
}

/// Sixteen writes in flight when the server dies in the given mode; a successor answers them all.
fn die_with_writes_in_flight(mode: Mode, keeps_sessions: bool) {
    let host = Host::new();
    host.keeps_sessions.store(keeps_sessions, SeqCst);
    let server = host.start();
    let (options, events) = recording(host.options());
    let session = Session::open("mem:a", options).unwrap();
    session.flush().unwrap();
    host.set_mode(mode);
    let (tell, told) = mpsc::channel();
    let before = host.taken.load(SeqCst);
    let mut buffers = Vec::new();
    for block in 0..16u64 {
        let mut buffer = session.alloc(BLOCK).unwrap();
        assert!(buffer.write(0, &pattern(block, 1)));
        let tell = tell.clone();
        let done = Box::new(move |result| tell.send(result).unwrap());
        session.submit(Io::write(block * BLOCK as u64, &buffer), done).unwrap();
        buffers.push(buffer);
    }
    eventually(|| host.taken.load(SeqCst) == before + 16);
    if mode != Mode::Mute {
        assert_eq!(session.stats().in_flight, 16);
        assert!(told.try_recv().is_err());
    }
    drop(server);
    // Nobody is there; submitting goes on.
    eventually(|| !session.stats().connected);
    let done = Box::new(move |result| tell.send(result).unwrap());
    session.submit(Io::flush(), done).unwrap();
    host.set_mode(Mode::Serve);
    let server = host.start();
    for _ in 0..17 {
        told.recv().unwrap().unwrap();
    }
    for block in 0..16 {
        assert!(host.storage.lock().unwrap()[block * BLOCK..][..BLOCK] == pattern(block as u64, 1));
    }
    eventually(|| session.stats().connected);
    let stats = session.stats();
    assert_eq!((stats.generation, stats.reconnects, stats.takeovers), (Generation(2), 1, 1));
    assert_eq!(stats.in_flight, 0);
    assert!(stats.blackout_last_us > 0 && stats.blackout_worst_us >= stats.blackout_last_us);
    eventually(|| has(&events, Event::ServerChanged { generation: Generation(2) }));
    assert_eq!(host.logged("resume"), usize::from(keeps_sessions));
    session.close().unwrap();
    drop(server);
}

#[test]
fn requests_held_by_a_dead_server_are_answered_by_the_next() {
    die_with_writes_in_flight(Mode::Hold, false);
}

#[test]
fn requests_carried_out_but_not_answered_are_answered_by_the_next() {
    die_with_writes_in_flight(Mode::Swallow, false);
}

#[test]
fn answers_whose_doorbell_died_are_found() {
    die_with_writes_in_flight(Mode::Mute, false);
}

#[test]
fn a_successor_resumes_from_its_store() {
    die_with_writes_in_flight(Mode::Hold, true);
}

#[test]
fn the_data_path_needs_no_socket() {
    let host = Host::new();
    host.keeps_sessions.store(true, SeqCst);
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    session.flush().unwrap();
    *host.refusal.lock().unwrap() = Some((Errno(11), true));
    drop(server);
    let _server = host.start();
    // The successor knows the session and refuses every attach for now.
    session.write_at(&pattern(1, 2), 0, OpFlags::NONE).unwrap();
    assert_eq!((session.stats().reconnects, session.stats().takeovers), (0, 1));
    eventually(|| host.logged("attach") > 3);
    *host.refusal.lock().unwrap() = None;
    eventually(|| session.stats().connected);
    session.close().unwrap();
}

#[test]
fn blocking_calls_of_many_threads_over_many_takeovers() {
    let host = Host::new();
    let mut server = Some(host.start());
    let session = Session::open("mem:a", host.options().queues(2).depth(4)).unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (session, is_over) = (&session, &is_over);
            scope.spawn(move || {
                let mut round = 0;
                while !is_over.load(SeqCst) {
                    round += 1;
                    let bytes =
                        [pattern(2 * thread, round), pattern(2 * thread + 1, round)].concat();
                    let offset = 2 * thread * BLOCK as u64;
                    session.write_at(&bytes, offset, OpFlags::NONE).unwrap();
                    let mut read = vec![0; bytes.len()];
                    session.read_at(&mut read, offset).unwrap();
                    assert!(read == bytes, "thread {thread} round {round}");
                }
            });
        }
        for round in 0..30 {
            let mode = [Mode::Hold, Mode::Swallow, Mode::Mute, Mode::Serve][round % 4];
            host.keeps_sessions.store(round % 3 == 0, SeqCst);
            let before = host.taken.load(SeqCst);
            eventually(|| host.taken.load(SeqCst) > before + 20);
            host.set_mode(mode);
            std::thread::sleep(Duration::from_millis(3));
            drop(server.take());
            host.set_mode(Mode::Serve);
            server = Some(host.start());
        }
        is_over.store(true, SeqCst);
    });
    eventually(|| session.stats().takeovers == 30);
    session.close().unwrap();
    drop(server);
}

#[test]
fn a_host_queue_over_a_takeover() {
    let host = Host::new();
    let server = host.start();
    let options = host.options().completion(CompletionMode::Manual);
    let session = Session::open("mem:a", options).unwrap();
    let queue = session.queue(0).unwrap();
    host.set_mode(Mode::Hold);
    let buffer = session.alloc(BLOCK).unwrap();
    for user_data in 0..20 {
        queue.submit(Io::write(user_data * BLOCK as u64, &buffer), user_data).unwrap();
    }
    queue.kick();
    drop(buffer);
    eventually(|| host.taken.load(SeqCst) == 20);
    drop(server);
    assert!(!queue.wait(Some(Duration::from_millis(20))));
    host.set_mode(Mode::Serve);
    let _server = host.start();
    let mut seen = Vec::new();
    while seen.len() < 20 {
        assert!(queue.wait(None));
        queue.reap(|user_data, result| {
            result.unwrap();
            seen.push(user_data);
        });
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
}

#[test]
fn registered_memory_is_registered_before_the_attach() {
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    let memory = sealed_memory(1 << 20);
    let wrong = session.register_memory(memory.fd(), 4096);
    assert!(matches!(wrong, Err(CallError::Memory { .. })));
    let first = session.register_memory(memory.fd(), memory.size()).unwrap();
    let second = session.register_memory(memory.fd(), memory.size()).unwrap();
    assert_eq!((first.id(), second.id()), (1, 2));
    let place = memory.range(4096, BLOCK as u64).unwrap();
    // SAFETY: in the mapping, which nobody else uses now.
    unsafe { std::ptr::copy(pattern(5, 5).as_ptr(), place, BLOCK) };
    host.set_mode(Mode::Hold);
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |result| tell.send(result).unwrap());
    session.submit(Io::write(0, second.range(4096, BLOCK as u32)), done).unwrap();
    eventually(|| host.taken.load(SeqCst) == 1);
    // The request in flight keeps the memory, whatever the host does with its handle.
    drop(second);
    drop(server);
    eventually(|| !session.stats().connected);
    host.log.lock().unwrap().clear();
    host.set_mode(Mode::Serve);
    let _server = host.start();
    told.recv().unwrap().unwrap();
    assert!(host.storage.lock().unwrap()[..BLOCK] == pattern(5, 5)[..]);
    eventually(|| host.logged("unregister 2") == 1);
    let log = host.log.lock().unwrap().clone();
    assert_eq!(log[..4], ["hello", "register 1", "register 2", "attach mem:a 4 77"]);
    // Its id is free again, the other's is not.
    eventually(|| {
        let again = session.register_memory(memory.fd(), memory.size()).unwrap();
        again.id() == 2
    });
    assert_eq!(session.run(Io::read(0, first.range(0, BLOCK as u32))), Ok(()));
    session.close().unwrap();
}

#[test]
fn a_resize_survives_the_server_that_carried_it_out() {
    let host = Host::new();
    let server = host.start();
    let (options, events) = recording(host.options());
    let session = Arc::new(Session::open("mem:a", options).unwrap());
    let other = Session::open("mem:a", host.options()).unwrap();
    host.dies_in_resize.store(true, SeqCst);
    let resizing = {
        let session = session.clone();
        std::thread::spawn(move || session.resize(32 << 20))
    };
    server.wait_for_death();
    let server = host.start();
    resizing.join().unwrap().unwrap();
    assert_eq!((host.logged("resize"), host.logged("resized")), (3, 1));
    assert_eq!(session.info().size, 32 << 20);
    assert_eq!(session.refresh().unwrap().size, 32 << 20);
    eventually(|| has(&events, Event::Resized { size: 32 << 20 }));
    // The other session learns it with its own attach; later ones by the event.
    eventually(|| other.info().size == 32 << 20);
    server.tell("16777216");
    eventually(|| other.info().size == 16 << 20 && session.info().size == 16 << 20);
    assert_eq!(other.write_at(&pattern(0, 0), 16 << 20, OpFlags::NONE), Err(Errno::NOSPC));
}

#[test]
fn a_session_that_is_refused_fails_all_that_waits() {
    let host = Host::new();
    let server = host.start();
    let (options, events) = recording(host.options().depth(4));
    let session = Arc::new(Session::open("mem:a", options).unwrap());
    host.set_mode(Mode::Hold);
    let (tell, told) = mpsc::channel();
    // More than there are slots, and a blocking call.
    for _ in 0..10 {
        let tell = tell.clone();
        session.submit(Io::flush(), Box::new(move |result| tell.send(result).unwrap())).unwrap();
    }
    let blocked = {
        let session = session.clone();
        std::thread::spawn(move || session.flush())
    };
    eventually(|| host.taken.load(SeqCst) == 4);
    *host.refusal.lock().unwrap() = Some((Errno(116), false));
    drop(server);
    let _server = host.start();
    for _ in 0..10 {
        assert_eq!(told.recv().unwrap(), Err(Errno(116)));
    }
    assert_eq!(blocked.join().unwrap(), Err(Errno(116)));
    assert_eq!(session.flush(), Err(Errno(116)));
    let detached = Event::Detached { errno: Errno(116) };
    eventually(|| has(&events, detached));
    assert!(matches!(session.resize(0), Err(CallError::Session { errno: Errno(116), .. })));
    Arc::into_inner(session).unwrap().close().unwrap();
}

#[test]
fn a_server_that_detaches_fails_the_host_queue_too() {
    let host = Host::new();
    let server = host.start();
    let options = host.options().completion(CompletionMode::Manual);
    let (options, events) = recording(options);
    let session = Session::open("mem:a", options).unwrap();
    let queue = session.queue(0).unwrap();
    server.tell("park");
    eventually(|| has(&events, Event::Parked));
    server.tell("unpark");
    eventually(|| has(&events, Event::Unparked));
    host.set_mode(Mode::Hold);
    queue.submit(Io::flush(), 42).unwrap();
    queue.kick();
    assert!(!queue.arm());
    server.tell("detach");
    common::wait_readable(queue.event_fd());
    let mut seen = Vec::new();
    queue.reap(|user_data, result| seen.push((user_data, result)));
    assert_eq!(seen, [(42, Err(Errno::INVAL))]);
    assert_eq!(queue.failure(), Some(Errno::INVAL));
    session.close().unwrap();
}

#[test]
fn a_stall_is_told_and_knocked_for() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().stall_after(Duration::from_millis(20));
    let (options, events) = recording(options);
    let session = Arc::new(Session::open("mem:a", options).unwrap());
    host.set_mode(Mode::Hold);
    let blocked = {
        let session = session.clone();
        std::thread::spawn(move || session.flush())
    };
    eventually(|| has(&events, Event::Stalled));
    eventually(|| host.logged("ping") > 2);
    host.set_mode(Mode::Serve);
    blocked.join().unwrap().unwrap();
    eventually(|| has(&events, Event::Resumed));
    let stalls = events.lock().unwrap().iter().filter(|event| **event == Event::Stalled).count();
    assert_eq!(stalls, 1);
}

#[test]
fn a_time_limit_is_kept_and_memory_is_left_alone() {
    let host = Host::new();
    let _server = host.start();
    let limit = Some(Duration::from_millis(30));
    let session = Session::open("mem:a", host.options().io_timeout(limit)).unwrap();
    let manual = host.options().io_timeout(limit).completion(CompletionMode::Manual);
    let manual = Session::open("mem:b", manual).unwrap();
    let queue = manual.queue(0).unwrap();
    host.set_mode(Mode::Hold);
    let mut bytes = vec![7; BLOCK];
    assert_eq!(session.read_at(&mut bytes, 0), Err(errno::TIMEDOUT));
    let (tell, told) = mpsc::channel();
    session.submit(Io::flush(), Box::new(move |result| tell.send(result).unwrap())).unwrap();
    assert_eq!(told.recv().unwrap(), Err(errno::TIMEDOUT));
    let buffer = manual.alloc(BLOCK).unwrap();
    queue.submit(Io::read(0, &buffer), 3).unwrap();
    queue.kick();
    assert!(queue.wait(None));
    let mut seen = Vec::new();
    queue.reap(|user_data, result| seen.push((user_data, result)));
    assert_eq!(seen, [(3, Err(errno::TIMEDOUT))]);
    // The ring answers later; nobody is told twice and the slots come back.
    host.set_mode(Mode::Serve);
    eventually(|| session.flush().is_ok());
    assert!(bytes.iter().all(|byte| *byte == 7));
    eventually(|| session.stats().in_flight == 0);
    eventually(|| {
        assert_eq!(queue.reap(|_, _| panic!("told twice")), 0);
        manual.stats().in_flight == 0
    });
    session.close().unwrap();
    manual.close().unwrap();
}

#[test]
fn closing_waits_for_requests_and_for_no_server() {
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    host.set_mode(Mode::Hold);
    let (tell, told) = mpsc::channel();
    session.submit(Io::flush(), Box::new(move |result| tell.send(result).unwrap())).unwrap();
    let closing = std::thread::spawn(move || session.close());
    eventually(|| host.taken.load(SeqCst) == 1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!closing.is_finished() && told.try_recv().is_err());
    host.set_mode(Mode::Serve);
    closing.join().unwrap().unwrap();
    assert_eq!(told.try_recv().unwrap(), Ok(()));
    // Without a server the goodbye is said in the background, to the next one.
    let quick = host.options().connect_timeout(Duration::from_millis(500));
    let session = Session::open("mem:a", quick).unwrap();
    drop(server);
    assert!(matches!(session.close(), Err(CallError::Timeout { .. })));
    assert_eq!(host.logged("detach"), 1);
    let _server = host.start();
    eventually(|| host.logged("detach") == 2);
}
