//! Limits of a volume: they hold it back, and nobody else; they change at run time; they last.

mod common;

use std::time::{Duration, Instant};

use common::{Client, Server, until};
use nebd_abi::Op;
use nebd_abi::control::AttachFlags;
use nebd_rpc::admin::{LimitVolumeRequest, Volume};

fn limit(server: &Server, request: LimitVolumeRequest) -> Volume {
    server.admin(async |mut client| client.limit_volume(request).await).unwrap().into_inner()
}

fn iops(name: &str, iops: u64) -> LimitVolumeRequest {
    LimitVolumeRequest { name: name.into(), iops: Some(iops), ..Default::default() }
}

fn reads(client: &mut Client, count: u64) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
    }
    start.elapsed()
}

#[test]
fn a_limited_volume_is_held_back_and_its_neighbour_is_not() {
    let server = Server::start("run");
    server.create("null:slow");
    server.create("null:free");
    let mut slow = Client::attach(&server, "null:slow", 1, AttachFlags::EXCLUSIVE).unwrap();
    let mut free = Client::attach(&server, "null:free", 2, AttachFlags::EXCLUSIVE).unwrap();
    let volume = limit(&server, iops("null:slow", 100));
    assert_eq!((volume.iops_limit, volume.bytes_per_s_limit), (100, 0));
    // The first is free; each of the others is 10 ms after the one before.
    assert!(reads(&mut slow, 21) >= Duration::from_millis(195));

    let bandwidth =
        |bytes_per_s| LimitVolumeRequest { bytes_per_s: Some(bytes_per_s), ..iops("null:slow", 0) };
    limit(&server, bandwidth(10));
    reads(&mut slow, 1);
    // What was read is paid for in seven minutes, unless the limit is lifted.
    slow.submit(0, Op::Read, 0, 4096);
    reads(&mut free, 2000);
    assert_eq!(slow.reap.reap(), None, "it waits");
    limit(&server, bandwidth(0));
    assert_eq!(slow.reap().result, Ok(()));

    limit(&server, bandwidth(4096 * 100));
    assert!(reads(&mut slow, 11) >= Duration::from_millis(95));
    // A flush moves nothing, but keeps its place.
    assert_eq!(slow.io(Op::Flush, 0, 0), Ok(()));
}

#[test]
fn a_burst_is_saved_up_and_limits_outlast_the_server() {
    let server = Server::start("keeper");
    server.create("null:a");
    let burst = LimitVolumeRequest { burst_ms: Some(60_000), ..iops("null:a", 10) };
    limit(&server, burst);
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    // A minute's worth at 10 a second.
    assert!(reads(&mut client, 500) < Duration::from_secs(30));
    let old = server.server_pid();
    server.kill_server();
    until(|| (server.server_pid() != old).then_some(()));
    let volume = limit(&server, LimitVolumeRequest { name: "null:a".into(), ..Default::default() });
    assert_eq!((volume.iops_limit, volume.burst_ms), (10, 60_000));
    assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
}

#[test]
fn a_waiting_session_ends_at_once() {
    let server = Server::start("run");
    server.create("null:a");
    let request = LimitVolumeRequest { bytes_per_s: Some(10), ..iops("null:a", 0) };
    limit(&server, request);
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    reads(&mut client, 1);
    for slot in 0..4 {
        client.submit(slot, Op::Write, 0, 4096);
    }
    let detach = nebd_abi::control::Message::Detach;
    assert_eq!(common::ask(&client.socket, &detach, &[]), nebd_abi::control::Message::Done);
    Client::attach(&server, "null:a", 2, AttachFlags::EXCLUSIVE).unwrap();
}
