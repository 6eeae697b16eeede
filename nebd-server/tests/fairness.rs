//! A greedy session beside a modest one: whose requests are answered, by counts, not by durations.

mod common;

use common::{Client, Server, until};
use nebd_abi::Op;
use nebd_abi::control::AttachFlags;

const MIB: u32 = 1 << 20;
const DEPTH: u32 = 8;

fn attach(server: &Server, volume: &str, id: u8) -> Client {
    server.create(volume);
    let mut client = Client::with_arena(server, volume, id, u64::from(2 * MIB));
    client.info = client.present(AttachFlags::EXCLUSIVE).unwrap();
    client
}

/// Both keep as much in flight as they may, in one thread, so that a host that stops it stops both.
/// How many requests the modest one has answered while the greedy one has so many.
fn answered_beside(greedy: &mut Client, modest: &mut Client, greedy_total: u32) -> u32 {
    (0..DEPTH).for_each(|slot| _ = greedy.submit(slot, Op::Write, 0, MIB));
    modest.submit(0, Op::Read, 0, 4096);
    let (mut of_greedy, mut of_modest) = (0, 0);
    while of_greedy < greedy_total {
        let mut moved = false;
        if let Some(done) = modest.reap.reap() {
            assert_eq!(done.result, Ok(()));
            (of_modest, moved) = (of_modest + 1, true);
            modest.submit(0, Op::Read, 0, 4096);
        }
        while let Some(done) = greedy.reap.reap() {
            assert_eq!(done.result, Ok(()));
            (of_greedy, moved) = (of_greedy + 1, true);
            greedy.submit(done.slot, Op::Write, 0, MIB);
        }
        if !moved {
            std::thread::yield_now();
        }
    }
    // Nothing is left over.
    (0..DEPTH).for_each(|_| assert_eq!(greedy.reap().result, Ok(())));
    assert_eq!(modest.reap().result, Ok(()));
    of_modest
}

#[test]
fn a_modest_session_has_its_turns_beside_a_greedy_one() {
    let server = Server::start_with("run", "shards = 1\n");
    let mut greedy = attach(&server, "mem:greedy", 1);
    let mut modest = attach(&server, "mem:modest", 2);
    // One for each request of the greedy one; fewer only while this thread does not run, and then the
    // greedy one has no more than its ring either.
    let of_modest = answered_beside(&mut greedy, &mut modest, 800);
    assert!(of_modest >= 800 / DEPTH, "{of_modest}");
}

/// What a session may not send to the storage waits in its ring, also while the shard sleeps.
#[test]
fn what_waits_for_room_at_the_storage_is_not_forgotten() {
    for engine in ["auto", "threads"] {
        let config = format!("shards = 1\n[ring]\nspin_us = 0\n[file]\nengine = \"{engine}\"\n");
        let server = Server::start_with("run", &config);
        let mut greedy = attach(&server, "file:greedy", 1);
        let mut modest = attach(&server, "file:modest", 2);
        let of_modest = answered_beside(&mut greedy, &mut modest, 100);
        assert!(of_modest > 0);
        // The modest one goes away in between, which must not leave the other waiting for ever.
        (0..DEPTH).for_each(|slot| _ = greedy.submit(slot, Op::Write, 0, MIB));
        drop(modest);
        (0..DEPTH).for_each(|_| assert_eq!(greedy.reap().result, Ok(())));
    }
}

/// Sessions on different shards may be on one disk.
#[test]
fn shards_beside_each_other_serve_to_the_end() {
    let server = Server::start_with("run", "shards = 2\n[ring]\nspin_cores_max = 0.1\n");
    let mut greedy = attach(&server, "file:greedy", 1);
    let mut modest = attach(&server, "file:modest", 2);
    assert!(answered_beside(&mut greedy, &mut modest, 100) > 0);
    let status = server.status();
    assert_eq!(status.pid, server.child.id());
    until(|| greedy.submit.kick_needed().then_some(()));
}
