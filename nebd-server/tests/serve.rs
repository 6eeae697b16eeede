//! The server as a process, driven by a client that is nothing but the shared bytes.

mod common;

use std::time::Duration;

use common::{Client, Server, ask, hello, until};
use nebd_abi::control::{AttachFlags, Event, Message};
use nebd_abi::layout::ServerState;
use nebd_abi::ring::{Buffer, Submission};
use nebd_abi::{Errno, Op, OpFlags, socket};

#[test]
fn requests_are_served_and_rules_are_kept() {
    let server = Server::start("run");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    assert_eq!((client.info.size, client.info.block_size), (1 << 20, 4096));
    for op in Op::ALL {
        assert_eq!(client.io(op, 4096, 4096), Ok(()), "{op:?}");
    }
    assert_eq!(client.io(Op::Read, 1 << 20, 4096), Err(Errno::INVAL));
    assert_eq!(client.io(Op::Write, 1 << 20, 4096), Err(Errno::NOSPC));
    assert_eq!(client.io(Op::Write, 512, 4096), Err(Errno::INVAL));
    assert_eq!(client.io(Op::Write, u64::MAX - 4095, 4096), Err(Errno::NOSPC));
    let beyond = [Buffer { memory: 0, length: 4096, offset: 1 << 16 }];
    let foreign = [Buffer { memory: 3, length: 4096, offset: 0 }];
    for buffers in [&beyond[..], &foreign[..]] {
        let (op, flags) = (Op::Write, OpFlags::FUA);
        client.submit.submit(0, &Submission { op, flags, offset: 0, length: 4096, buffers });
        rustix::io::write(&client.kick, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(client.reap().result, Err(Errno(14)));
    }
    let taken = Client::attach(&server, "null:a", 2, AttachFlags::default());
    assert!(matches!(taken, Err(Message::Failed { errno: Errno(16), retry: false, .. })));
    assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
    let mut reader = Client::attach(&server, "null:a", 3, AttachFlags::READ_ONLY).unwrap();
    assert_eq!(reader.io(Op::Write, 0, 4096), Err(Errno::ROFS));
    assert_eq!(reader.io(Op::Read, 0, 4096), Ok(()));
}

#[test]
fn nonsense_costs_its_own_session() {
    let server = Server::start("run");
    server.create("null:a");
    server.create("null:b");
    let mut honest = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    let hostile = Client::attach(&server, "null:b", 2, AttachFlags::EXCLUSIVE).unwrap();
    let memory = hostile.region.queue(0).unwrap();
    memory.header().sq_tail.word.store(12345, std::sync::atomic::Ordering::Release);
    rustix::io::write(&hostile.kick, &1u64.to_ne_bytes()).unwrap();
    until(|| (hostile.state() == ServerState::Detached).then_some(()));
    let packet = socket::receive(&hostile.socket).unwrap().unwrap();
    let (_, message) = Message::decode(&packet.bytes).unwrap();
    assert_eq!(message, Message::Event(Event::Detached(Errno::INVAL)));
    assert_eq!(honest.io(Op::Write, 0, 4096), Ok(()));
    // Its volume is free again.
    until(|| Client::attach(&server, "null:b", 3, AttachFlags::EXCLUSIVE).ok());
    assert_eq!(server.status().sessions.len(), 2);
}

#[test]
fn what_follows_an_attach_finds_the_session() {
    let server = Server::start("run");
    server.create("null:a");
    for id in 0..200 {
        let mut client = Client::attach(&server, "null:a", id, AttachFlags::EXCLUSIVE).unwrap();
        let memory = nebd_abi::region::SharedMemory::create("guest", 4096).unwrap();
        let fd = memory.fd().try_clone_to_owned().unwrap();
        let register = Message::RegisterMemory { memory: 1 };
        assert_eq!(ask(&client.socket, &register, &[&fd]), Message::Done);
        let buffers = [Buffer { memory: 1, length: 4096, offset: 0 }];
        let (op, flags) = (Op::Write, OpFlags::NONE);
        client
            .submit
            .submit(0, &Submission { op, flags, offset: 0, length: 4096, buffers: &buffers });
        rustix::io::write(&client.kick, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(client.reap().result, Ok(()), "attach {id}");
        assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
    }
}

#[test]
fn a_doorbell_that_could_block_is_refused() {
    let server = Server::start("run");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::default()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    client.socket = hello(&server.socket());
    (client.kick, client.call) = (reader, writer);
    let refused = client.present(AttachFlags::REATTACH);
    assert!(matches!(refused, Err(Message::Failed { errno: Errno::INVAL, .. })));
}

#[test]
fn a_doorbell_that_was_made_to_block_afterwards_holds_up_nobody() {
    let server = Server::start("keeper");
    server.create("null:a");
    server.create("null:b");
    let pid = server.server_pid();
    // On every shard, the honest client's too.
    let mut hostile: Vec<Client> = (1..9)
        .map(|id| Client::attach(&server, "null:b", id, AttachFlags::default()).unwrap())
        .collect();
    for client in &mut hostile {
        let flags = rustix::fs::fcntl_getfl(&client.call).unwrap();
        rustix::fs::fcntl_setfl(&client.call, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
        let mut count = [0; 8];
        rustix::io::read(&client.call, &mut count).unwrap();
        rustix::io::write(&client.call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert!(client.reap.sleep());
        client.submit(0, Op::Flush, 0, 0);
    }
    let mut honest = Client::attach(&server, "null:a", 9, AttachFlags::EXCLUSIVE).unwrap();
    for _ in 0..100 {
        assert_eq!(honest.io(Op::Write, 0, 4096), Ok(()));
    }
    for client in &mut hostile {
        assert_eq!(client.reap().result, Ok(()));
    }
    assert_eq!(server.server_pid(), pid, "the server did not hang");
}

#[test]
fn a_killed_server_is_replaced_under_a_client_that_only_looks_at_its_ring() {
    let server = Server::start("keeper");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    for round in 0..10 {
        assert_eq!(client.io(Op::Write, 0, 4096), Ok(()));
        let before = server.server_pid();
        server.kill_server();
        // Submitted to nobody: the successor finds it in the region it has from the keeper.
        assert_eq!(client.io(Op::Write, 4096, 4096), Ok(()), "round {round}");
        until(|| (server.server_pid() != before).then_some(()));
        client.socket = hello(&server.socket());
        let info = until(|| client.present(AttachFlags::REATTACH).ok());
        assert_eq!(info.epoch.minor, round + 2);
    }
    assert_eq!(server.status().sessions.len(), 1);
}

#[test]
fn an_idle_server_does_not_wake_up() {
    let server = Server::start("keeper");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    assert_eq!(client.io(Op::Write, 0, 4096), Ok(()));
    let pid = server.server_pid();
    // Name and voluntary context switches of each thread.
    let switches = || -> Vec<(String, String)> {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let statuses =
            tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")));
        let word = |status: &str, key| {
            let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
            line.split_whitespace().nth(1).unwrap_or_default().to_owned()
        };
        statuses
            .map(|status| status.unwrap_or_default())
            .map(|status| (word(&status, "Name:"), word(&status, "voluntary")))
            .collect()
    };
    // Threads that had work go to sleep, or end, soon after; from then on nothing moves.
    let mut last = switches();
    until(|| {
        // Longer than the keeper takes between two pings, of which the last follow the last work.
        std::thread::sleep(Duration::from_millis(2500));
        let now = switches();
        let settled = now == last;
        last = now;
        settled.then_some(())
    });
}
