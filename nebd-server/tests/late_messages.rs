//! Messages that come late, early or twice. Each of these tests failed when it was written.

mod common;

use common::{Client, Server, ask, until};
use nebd_abi::control::{AttachFlags, Message};
use nebd_abi::region::SharedMemory;
use nebd_abi::socket;
use nebd_rpc::admin::{DeleteVolumeRequest, GetVolumeRequest};

#[test]
fn a_detach_right_behind_its_attach_leaves_no_session() {
    let server = Server::start("run");
    for round in 0..10 {
        let volume = format!("null:v{round}");
        server.create(&volume);
        let gone = Client::new(&server, &volume, 2 * round);
        gone.ask_attach(AttachFlags::EXCLUSIVE);
        socket::send(&gone.socket, &Message::Detach.encode(3), &[]).unwrap();
        drop(gone.socket);
        // This process, the first client's too, lives on; its volume is free all the same.
        until(|| Client::attach(&server, &volume, 2 * round + 1, AttachFlags::EXCLUSIVE).ok());
    }
}

#[test]
fn a_memory_that_comes_after_the_end_of_its_session_is_not_kept() {
    let server = Server::start("run");
    server.create("null:a");
    let mut before = 0;
    for round in 0..12 {
        let client =
            until(|| Client::attach(&server, "null:a", round, AttachFlags::EXCLUSIVE).ok());
        assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
        for memory in 1..=8 {
            let shared = SharedMemory::create("late", 4096).unwrap();
            let fd = shared.fd().try_clone_to_owned().unwrap();
            ask(&client.socket, &Message::RegisterMemory { memory }, &[&fd]);
        }
        drop(client);
        if round == 1 {
            before = server.descriptors();
        }
    }
    until(|| (server.descriptors() <= before + 20).then_some(()));
}

/// Invariant 9: a repeated operation answers as before, and does nothing.
#[test]
fn a_repeated_delete_leaves_a_newer_volume_alone() {
    let server = Server::start("run");
    let delete = || DeleteVolumeRequest { operation_id: "once".into(), name: "file:a".into() };
    server.create("file:a");
    server.admin(async |mut client| client.delete_volume(delete()).await).unwrap();
    server.create("file:a");
    // Its sender did not hear the first answer.
    server.admin(async |mut client| client.delete_volume(delete()).await).unwrap();
    let request = GetVolumeRequest { name: "file:a".into() };
    let found = server.admin(async |mut client| client.get_volume(request).await);
    assert!(found.is_ok(), "the newer volume was deleted: {found:?}");
}
