use nebd_abi::host::{DeathCause, HostPage};
use nebd_backend::VolumeSpec;
use nebd_keeper::inherit::Inherited;
use nebd_rpc::admin::{self, AttachRequest, DetachRequest};

use super::*;
use crate::admin::{AdminError, Caller};
use crate::registry::Record;
use crate::run::{Assembly, Ingredients, assemble};

const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 1 };
const OWNER: Caller = Caller { uid: 1000, gid: 1000, pid: 1 };
const STRANGER: Caller = Caller { uid: 1001, gid: 1001, pid: 1 };

/// A server that owns everything, and answers no client.
fn server(dir: &tempfile::TempDir) -> Assembly {
    let config = Config {
        socket: dir.path().join("s"),
        state_dir: dir.path().join("state"),
        shards: 1,
        ..Config::default()
    };
    std::fs::create_dir_all(&config.state_dir).unwrap();
    let host = Arc::new(HostPage::create().unwrap());
    let ingredients = Ingredients::of(&config, host, Inherited::default(), None).unwrap();
    let assembly = assemble(&config, ingredients).unwrap();
    let server = &assembly.server;
    let generation = assembly.host().claim(assembly.host().generation()).unwrap();
    server.tenure.begin(generation, DeathCause::Unknown);
    server.frontends.load(server);
    server.frontends.open(&server.store);
    assembly
}

fn create(server: &Server, volume: &str) -> VolumeName {
    let name: VolumeName = volume.parse().unwrap();
    let spec = VolumeSpec { name: name.clone(), size: 1 << 20, block_size: 4096, path: None };
    server.registry.put(&name, Record::new(&spec, OWNER.uid, OWNER.gid, 0o640)).unwrap();
    name
}

fn request(volume: &VolumeName, id: &'static [u8]) -> AttachRequest {
    AttachRequest {
        operation_id: id.into(),
        volume: volume.to_string(),
        kind: admin::AttachmentKind::Nbd.into(),
        ..AttachRequest::default()
    }
}

fn detach(server: &Server, volume: &VolumeName, id: &'static [u8]) -> Result<usize, AdminError> {
    let (operation_id, volume) = (id.into(), volume.to_string());
    let request = DetachRequest { operation_id, volume, ..DetachRequest::default() };
    server.detach_frontend(&OWNER, &request).map(|detached| detached.len())
}

#[test]
fn a_repeated_call_is_answered_as_before_and_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let assembly = server(&dir);
    let server = &assembly.server;
    let volume = create(server, "null:a");
    let first = server.attach_frontend(&OWNER, &request(&volume, b"1")).unwrap();
    assert_eq!(server.attach_frontend(&OWNER, &request(&volume, b"1")).unwrap(), first);
    let other = server.attach_frontend(&OWNER, &request(&volume, b"2")).unwrap_err();
    assert!(matches!(other, AdminError::HasAttachment { .. }), "{other}");
    assert_eq!(detach(server, &volume, b"3").unwrap(), 1);
    assert_eq!(detach(server, &volume, b"3").unwrap(), 0);
    assert!(matches!(detach(server, &volume, b"4"), Err(AdminError::NotAttached { .. })));
    // One that was made since then is not what was to be detached.
    server.attach_frontend(&OWNER, &request(&volume, b"5")).unwrap();
    assert_eq!(detach(server, &volume, b"3").unwrap(), 0);
    assert_eq!(server.list_frontends(&OWNER).len(), 1);
}

#[test]
fn a_volume_is_attached_by_its_owner_and_a_path_is_chosen_by_root() {
    let dir = tempfile::tempdir().unwrap();
    let assembly = server(&dir);
    let server = &assembly.server;
    let volume = create(server, "null:a");
    let denied = server.attach_frontend(&STRANGER, &request(&volume, b"1")).unwrap_err();
    assert!(matches!(denied, AdminError::Denied { .. }), "{denied}");
    let socket = dir.path().join("own").display().to_string();
    let chosen = AttachRequest { socket, ..request(&volume, b"1") };
    // Whoever runs the tests may be the server's own user.
    if rustix::process::geteuid().as_raw() != OWNER.uid {
        let denied = server.attach_frontend(&OWNER, &chosen).unwrap_err();
        assert!(matches!(denied, AdminError::Denied { .. }), "{denied}");
    }
    let relative = AttachRequest { socket: "own".into(), ..chosen.clone() };
    let error = server.attach_frontend(&ROOT, &relative).unwrap_err();
    assert!(error.to_string().contains("absolute"), "{error}");
    assert!(server.list_frontends(&ROOT).is_empty());
    let attached = server.attach_frontend(&ROOT, &chosen).unwrap();
    assert_eq!(attached.socket, chosen.socket);
    assert_eq!(server.list_frontends(&OWNER), [attached]);
    assert!(server.list_frontends(&STRANGER).is_empty());
}

#[test]
fn while_a_volume_is_deleted_it_is_not_attached() {
    let dir = tempfile::tempdir().unwrap();
    let assembly = server(&dir);
    let server = &assembly.server;
    let volume = create(server, "null:a");
    let deletion = server.frontends.start_deletion(&volume).unwrap();
    let refused = server.attach_frontend(&OWNER, &request(&volume, b"1")).unwrap_err();
    assert!(matches!(refused, AdminError::NotFound { .. }), "{refused}");
    drop(deletion);
    server.attach_frontend(&OWNER, &request(&volume, b"1")).unwrap();
    assert!(server.frontends.start_deletion(&volume).is_err());
}

#[test]
fn another_volume_of_the_same_name_is_not_attached() {
    let dir = tempfile::tempdir().unwrap();
    let assembly = server(&dir);
    let volume = create(&assembly.server, "null:a");
    assembly.server.attach_frontend(&OWNER, &request(&volume, b"1")).unwrap();
    create(&assembly.server, "null:a");
    drop(assembly);
    let successor = server(&dir);
    let listed = successor.server.list_frontends(&OWNER);
    assert!(listed[0].problem.contains("gone"), "{listed:?}");
    assert!(successor.server.frontends.attachments_at(Path::new(&listed[0].socket)).is_empty());
    assert_eq!(detach(&successor.server, &volume, b"2").unwrap(), 1);
}

#[test]
fn connections_are_counted_and_none_begins_during_a_detach() {
    let dir = tempfile::tempdir().unwrap();
    let assembly = server(&dir);
    let server = assembly.server.clone();
    let volume = create(&server, "null:a");
    server.attach_frontend(&OWNER, &request(&volume, b"1")).unwrap();
    let key = (volume.clone(), AttachmentKind::Nbd);
    let attachment = server.frontends.attachment(&key).unwrap();
    let connection = attachment.connect().unwrap();
    assert_eq!(server.list_frontends(&OWNER)[0].connected, 1);
    let detaching = {
        let (server, volume) = (server.clone(), volume.clone());
        std::thread::spawn(move || detach(&server, &volume, b"2"))
    };
    while !attachment.is_ending() {
        std::thread::yield_now();
    }
    assert!(attachment.connect().is_none());
    assert!(server.registry.attachment(&key).is_some(), "its connection has not ended");
    drop(connection);
    assert_eq!(detaching.join().unwrap().unwrap(), 1);
    assert!(server.registry.attachment(&key).is_none());
}
