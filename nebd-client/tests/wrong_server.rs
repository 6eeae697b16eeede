//! Servers that die while they attach, refuse, or say what cannot be.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;
use std::time::Duration;

use common::{BLOCK, Host, Mode, eventually, pattern, sealed_memory};
use nebd_client::{Errno, Io, OpFlags, OpenError, Session};

#[test]
fn a_session_whose_attach_was_never_answered_is_not_left_behind() {
    let host = Host::new();
    host.keeps_sessions.store(true, SeqCst);
    host.dies_in_attach.store(true, SeqCst);
    let server = host.start();
    let options = host.options().connect_timeout(Duration::from_millis(300));
    assert!(matches!(Session::open("mem:a", options), Err(OpenError::Connect { .. })));
    server.wait_for_death();
    assert_eq!((host.logged("attach"), host.logged("detach")), (1, 0));
    // The next server finds the session in the store, and would hold its volume for it.
    let _server = host.start();
    eventually(|| host.logged("resume") == 1 && host.logged("detach") == 1);
}

#[test]
fn opening_goes_on_with_the_successor_of_a_server_that_died_in_the_attach() {
    let host = Host::new();
    host.keeps_sessions.store(true, SeqCst);
    host.dies_in_attach.store(true, SeqCst);
    let server = host.start();
    let options = host.options();
    let opening = std::thread::spawn(move || Session::open("mem:a", options));
    server.wait_for_death();
    let _server = host.start();
    let session = opening.join().unwrap().unwrap();
    session.write_at(&pattern(1, 1), 0, OpFlags::NONE).unwrap();
    assert_eq!(session.stats().reconnects, 0);
    session.close().unwrap();
}

#[test]
fn an_attached_session_waits_for_a_server_that_takes_it() {
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    let memory = sealed_memory(1 << 20);
    let registered = session.register_memory(memory.fd(), memory.size()).unwrap();
    host.set_mode(Mode::Hold);
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |result| tell.send(result).unwrap());
    session.submit(Io::write(0, registered.range(0, BLOCK as u32)), done).unwrap();
    eventually(|| host.taken.load(SeqCst) == 1);
    drop(server);
    host.set_mode(Mode::Serve);
    // It refuses every Hello for good: another release, or a bug. The guest need not know.
    host.is_choosy.store(true, SeqCst);
    let before = host.logged("hello");
    let server = host.start();
    eventually(|| host.logged("hello") > before + 2);
    assert!(told.try_recv().is_err());
    drop(server);
    host.is_choosy.store(false, SeqCst);
    let _server = host.start();
    told.recv().unwrap().unwrap();
    session.close().unwrap();
}

#[test]
fn a_memory_that_one_server_took_may_wait_for_another_to_take_it() {
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    let memory = sealed_memory(1 << 20);
    let registered = session.register_memory(memory.fd(), memory.size()).unwrap();
    host.refuses_memory.store(true, SeqCst);
    drop(server);
    let before = host.logged("register");
    let _server = host.start();
    eventually(|| host.logged("register") > before + 2);
    host.refuses_memory.store(false, SeqCst);
    session.run(Io::write(0, registered.range(0, BLOCK as u32))).unwrap();
    // New memory is the caller's affair alone.
    host.refuses_memory.store(true, SeqCst);
    assert!(session.register_memory(memory.fd(), memory.size()).is_err());
    session.flush().unwrap();
    session.close().unwrap();
}

#[test]
fn an_impossible_block_size_takes_no_thread_along() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    for block_size in [u32::MAX, 0, 1000, 1 << 20] {
        host.block_size.store(block_size, SeqCst);
        let options = host.options().connect_timeout(Duration::from_millis(100));
        let opened = Session::open("mem:b", options);
        assert!(matches!(opened, Err(OpenError::Connect { .. })), "{block_size}");
    }
    host.block_size.store(BLOCK as u32, SeqCst);
    session.refresh().unwrap();
    session.close().unwrap();
}

#[test]
fn a_doorbell_that_a_dead_server_has_filled_rings_again() {
    let host = Host::new();
    host.keeps_sessions.store(true, SeqCst);
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    host.set_mode(Mode::Hold);
    let (tell, told) = mpsc::channel();
    let submit = || {
        let tell = tell.clone();
        let done = Box::new(move |result| tell.send(result).unwrap());
        session.submit(Io::flush(), done).unwrap();
    };
    submit();
    eventually(|| host.taken.load(SeqCst) == 1);
    drop(server);
    host.flood();
    host.set_mode(Mode::Serve);
    let _server = host.start();
    told.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    submit();
    told.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    session.close().unwrap();
}

#[test]
fn a_detach_while_opening_ends_the_opening() {
    let host = Host::new();
    let server = host.start();
    *host.refusal.lock().unwrap() = Some((Errno(11), true));
    let options = host.options();
    let opening = std::thread::spawn(move || Session::open("mem:a", options));
    eventually(|| host.logged("attach") > 0);
    while !opening.is_finished() {
        server.tell("detach");
    }
    let opened = opening.join().unwrap();
    assert!(matches!(opened, Err(OpenError::Refused { .. })));
}

#[test]
fn a_server_of_another_layout_is_refused_at_once_and_waited_for_later() {
    let host = Host::new();
    let server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    host.layout.store(2, SeqCst);
    let opened = Session::open("mem:b", host.options());
    assert!(matches!(opened, Err(OpenError::Layout(2))));
    drop(server);
    let before = host.logged("hello");
    let _server = host.start();
    eventually(|| host.logged("hello") > before + 2);
    host.layout.store(1, SeqCst);
    session.flush().unwrap();
    session.close().unwrap();
}
