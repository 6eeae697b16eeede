//! Golden bytes of the admin API: a field that is renumbered or changes its type fails here.

use nebd_rpc::admin::{
    self, AttachRequest, Attachment, AttachmentKind, Blackout, ClientSupport, Counters,
    CreateVolumeRequest, DetachReply, DetachRequest, ListAttachmentsReply, OpCounters, Queue,
    ResizeVolumeRequest, Session, StartUpgradeRequest, Status, Takeover, Upgrade, UpgradeStep,
    Volume,
};
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
fn attachments() {
    let attach = AttachRequest {
        operation_id: vec![1].into(),
        volume: "b".into(),
        kind: AttachmentKind::VhostUser.into(),
        socket: "d".into(),
        queues: 5,
        read_only: true,
    };
    check(attach, "0a0101120162180122016428053001");
    let detach = DetachRequest {
        operation_id: vec![1].into(),
        volume: "b".into(),
        kind: AttachmentKind::Nbd.into(),
    };
    check(detach, "0a01011201621802");
    let attachment = Attachment {
        volume: "a".into(),
        kind: AttachmentKind::Nbd.into(),
        socket: "c".into(),
        read_only: true,
        queues: 5,
        connected: 6,
        problem: "g".into(),
    };
    let bytes = "0a016110021a01632001280530063a0167";
    check(attachment.clone(), bytes);
    let nested = format!("0a11{bytes}");
    check(DetachReply { attachments: vec![attachment.clone()] }, &nested);
    check(ListAttachmentsReply { attachments: vec![attachment] }, &nested);
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
        in_flight: 30,
        stalled: 31,
        oldest_request_ms: 32,
        counters: Some(Counters {
            ops: vec![OpCounters { op: "a".into(), requests: 2, errors: 3, bytes: 4 }],
            stalls: 2,
            throttles: 3,
            throttled_us: 4,
            latency_sum_us: 5,
            latency_buckets: vec![6, 7],
        }),
    };
    check(
        volume,
        "0a0161100218032004280530063a01674008480152016a5a016b600c680d700ef0011ef8011f8002208a02170a090a0161100218032004100218032004280532020607",
    );
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
        stalled: 30,
    };
    check(
        session,
        "0a0161120162180320042a016530063a016742016848015206080110021803580b600c680d700e780f800110880111900112f0011e",
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
        last_takeover: Some(Takeover {
            kind: "a".into(),
            generation: 2,
            unix_ms: 3,
            blackout_us: 4,
        }),
        takeovers: 31,
    };
    check(
        status,
        "0a01611002180320042a016530013a004200480952016a580bf201090a0161100218032004f8011f",
    );
}

#[test]
fn upgrades() {
    let start = StartUpgradeRequest {
        operation_id: vec![1].into(),
        kind: 2,
        binary: "c".into(),
        canary: "d".into(),
        probation_ms: 5,
    };
    check(start, "0a010110021a01632201642805");
    let server =
        |pid| admin::Server { version: "a".into(), binary: "b".into(), pid, generation: 4 };
    let upgrade = Upgrade {
        operation_id: vec![1].into(),
        kind: 1,
        state: 3,
        reason: "d".into(),
        from: Some(server(3)),
        to: Some(server(4)),
        steps: vec![UpgradeStep { name: "a".into(), at_us: 2, duration_us: 3, detail: "d".into() }],
        blackouts: vec![Blackout { volume: "a".into(), session: "b".into(), blackout_us: 3 }],
        clients: vec![ClientSupport {
            session: "a".into(),
            volume: "b".into(),
            client_pid: 3,
            client_version: "d".into(),
            layout_version: 5,
            supported: true,
            reason: "g".into(),
        }],
        probation_left_ms: 10,
        started_ns: 11,
    };
    check(
        upgrade,
        "0a0101100118032201642a0a0a016112016218032004320a0a0161120162180420043a0a0a0161100218032201644208\
         0a016112016218034a120a01611201621803220164280530013a0167500a580b",
    );
}
