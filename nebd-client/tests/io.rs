//! Requests of every kind, with a server that stays.

mod common;

use std::future::Future;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};

use common::{BLOCK, Host, SIZE, pattern, sealed_memory, wait_readable};
use nebd_client::{
    CompletionMode, Errno, Io, Op, OpFlags, OpenError, RawIovec, Session, SubmitError, errno,
};

#[test]
fn blocking_requests_reach_the_volume() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    assert_eq!(session.info().size, SIZE);
    let bytes = pattern(3, 1);
    session.write_at(&bytes, 3 * BLOCK as u64, OpFlags::NONE).unwrap();
    assert_eq!(host.storage.lock().unwrap()[3 * BLOCK..4 * BLOCK], bytes[..]);
    let mut read = vec![0; BLOCK];
    session.read_at(&mut read, 3 * BLOCK as u64).unwrap();
    assert_eq!(read, bytes);
    session.write_at(&bytes, 0, OpFlags::FUA).unwrap();
    session.flush().unwrap();
    assert_eq!((host.fuas.load(SeqCst), host.flushes.load(SeqCst)), (1, 1));
    session.write_zeroes(3 * BLOCK as u64, BLOCK as u64, OpFlags::NO_UNMAP).unwrap();
    session.discard(0, BLOCK as u64).unwrap();
    session.read_at(&mut read, 3 * BLOCK as u64).unwrap();
    assert!(read.iter().all(|byte| *byte == 0));
    session.close().unwrap();
    assert_eq!(host.logged("detach"), 1);
}

#[test]
fn what_cannot_succeed_is_refused_here() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    let block = vec![1; BLOCK];
    assert_eq!(session.write_at(&block, 7, OpFlags::NONE), Err(Errno::INVAL));
    assert_eq!(session.write_at(&block[..100], 0, OpFlags::NONE), Err(Errno::INVAL));
    assert_eq!(session.write_at(&block, SIZE, OpFlags::NONE), Err(Errno::NOSPC));
    assert_eq!(session.read_at(&mut block.clone(), SIZE), Err(Errno::INVAL));
    assert_eq!(session.discard(u64::MAX - 4095, 4096), Err(Errno::NOSPC));
    assert_eq!(session.write_at(&block, 0, OpFlags::NO_UNMAP), Err(Errno::INVAL));
    assert_eq!(session.write_at(&[], 0, OpFlags::NONE), Ok(()));
    assert_eq!(host.taken.load(SeqCst), 0);
    // What the server says travels as it is.
    host.errno.store(61, SeqCst);
    assert_eq!(session.write_at(&block, 0, OpFlags::NONE), Err(Errno(61)));
    host.errno.store(0, SeqCst);
    let other = Session::open("mem:b", host.options().read_only(true)).unwrap();
    assert_eq!(other.write_at(&block, 0, OpFlags::NONE), Err(Errno::ROFS));
    let foreign = other.alloc(BLOCK).unwrap();
    assert_eq!(session.run(Io::read(0, &foreign)), Err(Errno::INVAL));
    let own = session.alloc(BLOCK).unwrap();
    assert_eq!(session.run(Io::read(0, own.range(1, BLOCK as u32))), Err(Errno::INVAL));
}

#[test]
fn opening_says_why_it_failed() {
    let host = Host::new();
    let quick = std::time::Duration::from_millis(50);
    let nobody = host.options().socket("/nonexistent/nebd.sock").connect_timeout(quick);
    assert!(matches!(Session::open("mem:a", nobody), Err(OpenError::Connect { .. })));
    assert!(matches!(Session::open("nonsense", host.options()), Err(OpenError::Name(_))));
    let impossible = Session::open("mem:a", host.options().depth(3));
    assert!(matches!(impossible, Err(OpenError::Region { .. })));
    let silent = Session::open("mem:a", host.options().connect_timeout(quick));
    assert!(matches!(silent, Err(OpenError::Connect { .. })));
    let _server = host.start();
    *host.refusal.lock().unwrap() = Some((Errno(16), false));
    let refused = Session::open("mem:a", host.options());
    assert!(matches!(refused, Err(OpenError::Refused { errno: Errno(16), .. })));
    *host.refusal.lock().unwrap() = Some((Errno(11), true));
    let refused = Session::open("mem:a", host.options().connect_timeout(quick));
    assert!(matches!(refused, Err(OpenError::Refused { errno: Errno(11), .. })));
    *host.refusal.lock().unwrap() = None;
    Session::open("mem:a", host.options()).unwrap().close().unwrap();
}

#[test]
fn requests_larger_than_anything_are_split() {
    let host = Host::new();
    host.transfer_max.store(64 << 10, SeqCst);
    let _server = host.start();
    // An arena of eight pages, four slots, two iovecs: every limit is met.
    let options = host.options().arena_bytes(8 * 4096).depth(4).iovecs_per_slot(2);
    let session = Session::open("mem:a", options).unwrap();
    let bytes: Vec<u8> = (0..100).flat_map(|block| pattern(block, 9)).collect();
    session.write_at(&bytes, 0, OpFlags::NONE).unwrap();
    let mut read = vec![0; bytes.len()];
    session.read_at(&mut read, 0).unwrap();
    assert!(read == bytes);
    // Slices whose borders are no blocks.
    let (a, b) = bytes.split_at(10_001);
    let (b, c) = b.split_at(3);
    session
        .writev(
            &[IoSlice::new(a), IoSlice::new(b), IoSlice::new(&[]), IoSlice::new(c)],
            0,
            OpFlags::FUA,
        )
        .unwrap();
    let mut read = vec![0; bytes.len()];
    let (a, b) = read.split_at_mut(4097);
    session.readv(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], 0).unwrap();
    assert!(read == bytes);
    // Eight threads compete for it.
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let session = &session;
            scope.spawn(move || {
                for round in 0..30 {
                    let bytes: Vec<u8> =
                        (0..12).flat_map(|block| pattern(thread * 12 + block, round)).collect();
                    let offset = thread * 12 * BLOCK as u64;
                    session.write_at(&bytes, offset, OpFlags::NONE).unwrap();
                    let mut read = vec![0; bytes.len()];
                    session.read_at(&mut read, offset).unwrap();
                    assert!(read == bytes);
                }
            });
        }
    });
    session.close().unwrap();
}

#[test]
fn an_arena_full_of_buffers_leaves_room_for_copies() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options().arena_bytes(16 * 4096)).unwrap();
    let held: Vec<_> = std::iter::from_fn(|| session.alloc(BLOCK).ok()).collect();
    assert_eq!((held.len(), session.alloc(BLOCK).unwrap_err()), (14, errno::NOMEM));
    let bytes = vec![7; 256 << 10];
    session.write_at(&bytes, 0, OpFlags::NONE).unwrap();
    drop(held);
    assert_eq!(session.alloc(14 * BLOCK).unwrap().len(), 14 * BLOCK);
    let none = Session::open("mem:a", host.options().arena_bytes(0)).unwrap();
    assert_eq!(none.write_at(&bytes, 0, OpFlags::NONE), Err(errno::NOBUFS));
    none.flush().unwrap();
}

#[test]
fn callbacks_run_once_each_and_may_submit() {
    let host = Host::new();
    let _server = host.start();
    let session = Arc::new(Session::open("mem:a", host.options().depth(8)).unwrap());
    let (tell, told) = mpsc::channel();
    let mut buffers = Vec::new();
    for block in 0..100u64 {
        let mut buffer = session.alloc(BLOCK).unwrap();
        assert!(buffer.write(0, &pattern(block, 5)));
        let (tell, again) = (tell.clone(), session.clone());
        let done = move |result: Result<(), Errno>| {
            result.unwrap();
            // A blocking call in a callback, too.
            again.flush().unwrap();
            let ended = Box::new(move |result| tell.send((block, result)).unwrap());
            again.submit(Io::flush(), ended).unwrap();
        };
        session.submit(Io::write(block * BLOCK as u64, &buffer), Box::new(done)).unwrap();
        buffers.push(buffer);
    }
    let mut blocks: Vec<u64> = told.iter().take(100).map(|(block, _)| block).collect();
    blocks.sort_unstable();
    assert_eq!(blocks, (0..100).collect::<Vec<_>>());
    for block in 0..100 {
        assert!(host.storage.lock().unwrap()[block * BLOCK..][..BLOCK] == pattern(block as u64, 5));
    }
    // A callback that panics hurts nobody.
    session.submit(Io::flush(), Box::new(|_| panic!("on purpose"))).unwrap();
    session.submit(Io::flush(), Box::new(move |_| tell.send((0, Ok(()))).unwrap())).unwrap();
    told.recv().unwrap().1.unwrap();
}

struct Flag(Mutex<mpsc::Sender<()>>);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.lock().unwrap().send(()).unwrap();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let (tell, told) = mpsc::channel();
    let waker = Waker::from(Arc::new(Flag(Mutex::new(tell))));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => told.recv().unwrap(),
        }
    }
}

#[test]
fn futures_complete_on_any_executor() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options()).unwrap();
    let mut buffer = session.alloc(2 * BLOCK).unwrap();
    assert!(buffer.write(0, &[pattern(1, 1), pattern(2, 1)].concat()));
    block_on(session.start(Io::write(0, &buffer).with_flags(OpFlags::FUA))).unwrap();
    let back = session.alloc(2 * BLOCK).unwrap();
    // The second half first, in two ranges.
    let ranges = [back.range(BLOCK as u64, BLOCK as u32), back.range(0, BLOCK as u32)];
    block_on(session.start(Io::readv(0, &ranges))).unwrap();
    let mut bytes = vec![0; 2 * BLOCK];
    assert!(back.read(0, &mut bytes));
    assert!(bytes == [pattern(2, 1), pattern(1, 1)].concat());
    assert_eq!(block_on(session.start(Io::read(1, &back))), Err(Errno::INVAL));
    // A future that is dropped lets its request go on, and its buffer stays taken until then.
    drop(session.start(Io::write(BLOCK as u64, &buffer)));
    drop(buffer);
    session.flush().unwrap();
    session.close().unwrap();
}

#[test]
fn a_queue_driven_by_the_host() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().completion(CompletionMode::Manual).depth(4).queues(2);
    let session = Session::open("mem:a", options).unwrap();
    assert!(session.queue(2).is_none());
    let queue = session.queue(1).unwrap();
    let buffer = session.alloc(4 * BLOCK).unwrap();
    let mut seen = Vec::new();
    for round in 0..50u64 {
        for block in 0..4u64 {
            let range = buffer.range(block * BLOCK as u64, BLOCK as u32);
            queue.submit(Io::write(block * BLOCK as u64, range), round * 4 + block).unwrap();
        }
        assert_eq!(queue.submit(Io::flush(), 0), Err(SubmitError::WouldBlock));
        queue.kick();
        let mut left = 4;
        while left > 0 {
            // By turns through the eventfd and through `wait`.
            if round % 2 == 0 {
                assert!(queue.wait(None));
            } else if !queue.arm() {
                wait_readable(queue.event_fd());
            }
            left -= queue.reap(|user_data, result| {
                result.unwrap();
                seen.push(user_data);
            });
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..200).collect::<Vec<_>>());
    assert!(!queue.wait(Some(std::time::Duration::from_millis(1))));
    assert_eq!(queue.in_flight(), 0);
    session.close().unwrap();
    assert_eq!(queue.submit(Io::flush(), 0), Err(SubmitError::Errno(errno::CLOSED)));
}

#[test]
fn blocking_calls_and_callbacks_beside_a_queue_of_the_host() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().completion(CompletionMode::Manual);
    let session = Session::open("mem:a", options).unwrap();
    let queue = session.queue(0).unwrap();
    let (tell, told) = mpsc::channel();
    for user_data in 0..10 {
        queue.submit(Io::flush(), user_data).unwrap();
        let tell = tell.clone();
        session.submit(Io::flush(), Box::new(move |result| tell.send(result).unwrap())).unwrap();
        assert!(queue.arm() || user_data < 10);
        // It reaps what is the host's, and leaves it for the host.
        session.flush().unwrap();
    }
    let mut seen = Vec::new();
    let mut called = told.try_iter().count();
    while seen.len() + called < 20 {
        if !queue.arm() {
            wait_readable(queue.event_fd());
        }
        queue.reap(|user_data, _| seen.push(user_data));
        called += told.try_iter().count();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
}

#[test]
fn raw_requests_are_copied_or_used_in_place() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options().iovecs_per_slot(3)).unwrap();
    let memory = sealed_memory(1 << 20);
    let registered =
        session.register_mapped_memory(memory.fd(), memory.size(), memory.as_ptr()).unwrap();
    assert_eq!((registered.id(), registered.size()), (1, 1 << 20));
    let mut buffer = session.alloc(BLOCK).unwrap();
    assert!(buffer.write(0, &pattern(0, 1)));
    let mut own = pattern(1, 1);
    let mapped = memory.range(8192, BLOCK as u64).unwrap();
    // SAFETY: in the mapping, which nobody else uses now.
    unsafe { std::ptr::copy(pattern(2, 1).as_ptr(), mapped, BLOCK) };
    let piece = |pointer: *mut u8, from: usize, length| RawIovec {
        pointer: pointer.wrapping_add(from),
        length,
    };
    let iovecs = [
        piece(buffer.as_ptr(), 0, BLOCK),
        piece(own.as_mut_ptr(), 0, 100),
        piece(own.as_mut_ptr(), 100, BLOCK - 100),
        piece(mapped, 0, 7),
        piece(mapped, 7, BLOCK - 7),
    ];
    // SAFETY: all of it lives until the call returns.
    unsafe { session.run_raw(Op::Write, OpFlags::NONE, 0, &iovecs).unwrap() };
    let expected = [pattern(0, 1), pattern(1, 1), pattern(2, 1)].concat();
    assert!(host.storage.lock().unwrap()[..3 * BLOCK] == expected[..]);
    // Backwards into the same memory, by callback.
    let backwards: Vec<_> = [&iovecs[3..], &iovecs[1..3], &iovecs[..1]].concat();
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |result| tell.send(result).unwrap());
    // SAFETY: all of it lives until the callback was called.
    unsafe { session.submit_raw(Op::Read, OpFlags::NONE, 0, &backwards, done).unwrap() };
    told.recv().unwrap().unwrap();
    let mut first = vec![0; BLOCK];
    assert!(buffer.read(0, &mut first));
    assert!(first == pattern(2, 1) && own == pattern(1, 1));
    // SAFETY: in the mapping, which nobody else uses now.
    let last = unsafe { std::slice::from_raw_parts(mapped, BLOCK) };
    assert!(last == pattern(0, 1));
    // A block in more pieces than a slot has iovecs is copied, registered memory too.
    let shreds: Vec<_> = (0..16).map(|part| piece(mapped, part * 256, 256)).collect();
    // SAFETY: as above.
    unsafe { session.run_raw(Op::Write, OpFlags::NONE, 0, &shreds).unwrap() };
    assert!(host.storage.lock().unwrap()[..BLOCK] == pattern(0, 1)[..]);
    drop(registered);
    common::eventually(|| host.logged("unregister 1") == 1);
}

#[test]
fn raw_requests_in_a_queue_of_the_host() {
    let host = Host::new();
    let _server = host.start();
    let options = host.options().completion(CompletionMode::Manual);
    // Two slots and a small arena: most of the request has to wait.
    let session = Session::open("mem:a", options.depth(2).arena_bytes(8 * 4096)).unwrap();
    let queue = session.queue(0).unwrap();
    let mut bytes: Vec<u8> = (0..20).flat_map(|block| pattern(block, 3)).collect();
    let iovec = RawIovec { pointer: bytes.as_mut_ptr(), length: bytes.len() };
    for op in [Op::Write, Op::Read] {
        // SAFETY: `bytes` lives until its user data was reaped.
        unsafe { queue.submit_raw(op, OpFlags::NONE, 0, &[iovec], op as u64).unwrap() };
        queue.kick();
        let mut seen = Vec::new();
        while seen.is_empty() {
            assert!(queue.wait(None));
            queue.reap(|user_data, result| seen.push((user_data, result)));
        }
        assert_eq!(seen, [(op as u64, Ok(()))]);
        let expected: Vec<u8> = (0..20).flat_map(|block| pattern(block, 3)).collect();
        assert!(bytes == expected);
        assert!(host.storage.lock().unwrap()[..bytes.len()] == expected[..]);
        // SAFETY: nobody uses it now.
        unsafe { std::ptr::write_bytes(iovec.pointer, u8::from(op == Op::Write), iovec.length) };
    }
}

#[test]
fn many_threads_and_modes_at_once() {
    let host = Host::new();
    let _server = host.start();
    let session = Session::open("mem:a", host.options().queues(2).depth(16)).unwrap();
    let called = Arc::new(AtomicU32::new(0));
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (session, called) = (&session, called.clone());
            scope.spawn(move || {
                let mut buffer = session.alloc(BLOCK).unwrap();
                for round in 0..200 {
                    let bytes = pattern(thread, round);
                    let offset = thread * BLOCK as u64;
                    match thread % 3 {
                        0 => session.write_at(&bytes, offset, OpFlags::NONE).unwrap(),
                        1 => {
                            assert!(buffer.write(0, &bytes));
                            block_on(session.start(Io::write(offset, &buffer))).unwrap();
                        }
                        _ => {
                            assert!(buffer.write(0, &bytes));
                            let (tell, told) = mpsc::channel();
                            let done = Box::new(move |result| tell.send(result).unwrap());
                            session.submit(Io::write(offset, &buffer), done).unwrap();
                            told.recv().unwrap().unwrap();
                        }
                    }
                    let mut read = vec![0; BLOCK];
                    session.read_at(&mut read, offset).unwrap();
                    assert!(read == bytes);
                    called.fetch_add(1, SeqCst);
                }
            });
        }
    });
    assert_eq!(called.load(SeqCst), 1200);
    session.close().unwrap();
}
