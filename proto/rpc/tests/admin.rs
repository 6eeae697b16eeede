//! Golden bytes of the admin API: a field that is renumbered or changes its type fails here.

use nebd_rpc::admin::{CreateVolumeRequest, Queue, ResizeVolumeRequest, Session, Status, Volume};
use prost::Message;

fn check<M: Message + Default + PartialEq + std::fmt::Debug>(message: M, golden: &str) {
    let bytes = message.encode_to_vec();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, golden, "{message:?}");
    assert_eq!(M::decode(&bytes[..]).unwrap(), message);
}

#[test]
fn requests() {
    let create = CreateVolumeRequest {
        operation_id: vec![1].into(),
        name: "b".into(),
        size_bytes: 3,
        block_size: 4,
        path: "e".into(),
        owner_uid: Some(6),
        owner_gid: Some(7),
        mode: Some(0),
    };
    check(create, "0a0101120162180320042a0165300638074000");
    let resize = ResizeVolumeRequest {
        operation_id: vec![1].into(),
        name: "b".into(),
        size_bytes: 3,
        shrink: true,
    };
    check(resize, "0a010112016218032001");
}

#[test]
fn volumes_and_status() {
    let volume = Volume {
        name: "a".into(),
        size_bytes: 2,
        block_size: 3,
        owner_uid: 4,
        owner_gid: 5,
        mode: 6,
        path: "g".into(),
        sessions: 8,
        parked: true,
        parked_reason: "j".into(),
        epoch: "k".into(),
        iops_limit: 12,
        bytes_per_s_limit: 13,
        burst_ms: 14,
    };
    check(volume, "0a0161100218032004280530063a01674008480152016a5a016b600c680d700e");
    let session = Session {
        id: "a".into(),
        volume: "b".into(),
        client_pid: 3,
        client_uid: 4,
        client_version: "e".into(),
        layout_version: 6,
        state: "g".into(),
        epoch: "h".into(),
        connected: true,
        queues: vec![Queue { depth: 1, in_flight: 2, shard: 3 }],
        requests: 11,
        errors: 12,
        bytes_read: 13,
        bytes_written: 14,
        takeovers: 15,
        blackout_last_us: 16,
        blackout_worst_us: 17,
        reissued: 18,
    };
    check(
        session,
        "0a0161120162180320042a016530063a016742016848015206080110021803580b600c680d700e780f800110880111900112",
    );
    let status = Status {
        version: "a".into(),
        pid: 2,
        generation: 3,
        uptime_ms: 4,
        file_engine: "e".into(),
        fd_store: true,
        sessions: vec![Session::default()],
        volumes: vec![Volume::default()],
        shards: 9,
        last_death: "j".into(),
        resident_bytes: 11,
    };
    check(status, "0a01611002180320042a016530013a004200480952016a580b");
}
