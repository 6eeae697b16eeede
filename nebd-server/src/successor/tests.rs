use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nebd_abi::Generation;
use nebd_abi::host::{DeathCause, HostPage};
use nebd_abi::layout::{Geometry, LayoutVersion, RegionParams};
use nebd_abi::region::Region;
use nebd_backend::{FdStore, VolumeSpec};
use nebd_keeper::inherit::Inherited;
use rustix::event::EventfdFlags;

use super::*;
use crate::config::Config;
use crate::registry::Record;
use crate::run::{Assembly, Ingredients, assemble};
use crate::server::Origin;
use crate::session::Memories;
use crate::session::ledger::Attachment;

fn server(dir: &tempfile::TempDir, name: &str, host: &Arc<HostPage>, store: Store) -> Assembly {
    let config = Config {
        socket: dir.path().join(name),
        state_dir: dir.path().join("state"),
        shards: 1,
        ..Config::default()
    };
    std::fs::create_dir_all(&config.state_dir).unwrap();
    let inherited = Inherited { store, ..Inherited::default() };
    assemble(&config, Ingredients::of(&config, host.clone(), inherited, None).unwrap()).unwrap()
}

type Store = BTreeMap<String, OwnedFd>;

fn claim(assembly: &Assembly) {
    let generation = assembly.host().claim(assembly.host().generation()).unwrap();
    assembly.server.tenure.begin(generation, DeathCause::Unknown);
}

fn create(server: &Server, volume: &str) -> VolumeName {
    let name: VolumeName = volume.parse().unwrap();
    let spec = VolumeSpec { name: name.clone(), size: 1 << 20, block_size: 4096, path: None };
    let spec = server.backend(&name).unwrap().create(&spec).unwrap();
    server.registry.put(&name, Record::new(&spec, 0, 0, 0o600)).unwrap();
    name
}

fn attach(server: &Server, id: u8, volume: &VolumeName) -> SessionId {
    let geometry =
        Geometry { queue_count: 1, queue_depth: 8, iovecs_per_slot: 4, arena_size: 4096 };
    let session = SessionId([id; 16]);
    let params = RegionParams {
        version: LayoutVersion::V1,
        session,
        geometry,
        volume: volume.clone(),
        client_pid: 0,
        client_version: "test".into(),
    };
    let doorbell = || rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let attachment = Attachment {
        major: 0,
        attach_flags: 0,
        client_uid: 0,
        client_gid: 0,
        client_pid: 0,
        incarnation: 0,
    };
    let request = AttachRequest {
        origin: Origin::Client,
        region: Arc::new(Region::create(params).unwrap()),
        kicks: vec![doorbell()],
        calls: vec![doorbell()],
        peer: None,
        ledger: None,
        memories: Memories::new(),
        attachment,
        vhost: None,
    };
    server.attach(request).unwrap();
    session
}

/// A server that owns.
fn owner() -> (tempfile::TempDir, Arc<HostPage>, Assembly) {
    let dir = tempfile::tempdir().unwrap();
    let host = Arc::new(HostPage::create().unwrap());
    let owner = server(&dir, "owner", &host, Store::new());
    claim(&owner);
    (dir, host, owner)
}

/// The heir hears of what the owner has stored, and the heir has not.
fn follow(owner: &Server, heir: &Server, preparation: &Preparation) {
    for (name, fd) in copy(owner) {
        if !heir.store.holds(&name) {
            heir.store.adopt(name.clone(), fd);
            preparation.note_change(&name);
        }
    }
}

fn copy(server: &Server) -> Store {
    let mut copy = Store::new();
    let mut take = |name: &str, fd: std::os::fd::BorrowedFd<'_>| {
        copy.insert(name.to_owned(), fd.try_clone_to_owned()?);
        Ok(())
    };
    server.store.each(&mut take).unwrap();
    copy
}

#[test]
fn what_the_owner_has_is_prepared_as_it_comes_and_goes_and_then_served() {
    let (dir, host, owner) = owner();
    let (first, second) = (create(&owner.server, "file:a"), create(&owner.server, "file:b"));
    let a = attach(&owner.server, 1, &first);

    let heir = server(&dir, "heir", &host, copy(&owner.server));
    let preparation = Preparation::new(heir.server.clone());
    let counts = |progress: Progress| (progress.volumes, progress.sessions, progress.failures);
    assert_eq!(counts(preparation.update()), (1, 1, vec![]));
    assert_eq!(heir.server.tenure.generation(), Generation(0));

    // A session that came: its descriptors first, the rest at the next update.
    let b = attach(&owner.server, 2, &second);
    follow(&owner.server, &heir.server, &preparation);
    assert_eq!(counts(preparation.update()), (2, 2, vec![]));
    // One that ended: nothing of it is kept mapped or open.
    for name in heir.server.store.names(&Session::store_name(b, "")) {
        heir.server.store.disown(&name);
        preparation.note_change(&name);
    }
    assert_eq!(counts(preparation.update()), (1, 1, vec![]));
    assert!(!heir.server.prepared().contains_key(&second));
    follow(&owner.server, &heir.server, &preparation);
    // Not prepared, and resumed all the same.
    drop(second);

    // The owner goes, as far as its locks are concerned.
    for session in owner.server.sessions() {
        session.volume.volume.relinquish();
    }
    claim(&heir);
    let prepared = preparation.take();
    assert_eq!(prepared.keys().collect::<Vec<_>>(), [&a]);
    let served = Resumption::reserve(&heir.server, prepared, &[]).run();
    assert_eq!(served.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), [a]);
    assert!(heir.server.prepared().is_empty());
    let is_served = |id| heir.server.session(id).is_some();
    while !is_served(b) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(is_served(a));
    // From now on nothing is prepared any more.
    assert_eq!(counts(preparation.update()).1, 0);
}

#[test]
fn a_session_that_changes_while_it_is_mapped_is_mapped_again() {
    let (dir, host, owner) = owner();
    let volume = create(&owner.server, "null:a");
    let id = attach(&owner.server, 1, &volume);
    let heir = server(&dir, "heir", &host, copy(&owner.server));
    let preparation = Preparation::new(heir.server.clone());
    preparation.update();
    let memory = nebd_abi::region::SharedMemory::create("guest", 4096).unwrap();
    let name = Session::store_name(id, "mem1");
    heir.server.store.adopt(name.clone(), memory.fd().as_fd().try_clone_to_owned().unwrap());
    preparation.note_change(&name);
    assert_eq!(preparation.state().sessions.len(), 0, "what was mapped lacks the memory");
    preparation.update();
    let sessions = preparation.take();
    assert!(sessions[&id].memories.get(1).is_some_and(Option::is_some));
}

/// The thread of a standby may have a round before it when the order to take over comes.
#[test]
fn a_round_that_comes_after_the_claim_does_nothing() {
    let (dir, host, owner) = owner();
    let volume = create(&owner.server, "null:a");
    let other = create(&owner.server, "null:b");
    attach(&owner.server, 1, &volume);
    let heir = server(&dir, "heir", &host, copy(&owner.server));
    let preparation = Preparation::new(heir.server.clone());
    preparation.update();
    claim(&heir);
    let prepared = preparation.take();
    Resumption::reserve(&heir.server, prepared, &[]).run();
    // Whatever looks at a session or a record now shows by this.
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    heir.server.store.adopt(Session::store_name(SessionId([9; 16]), "region"), null());
    let records = dir.path().join("state/volumes");
    for name in ["null:a", "null:b"] {
        std::fs::write(records.join(format!("{name}.toml")), "an editor was here").unwrap();
    }
    let progress = preparation.update();
    assert!(heir.server.registry.record(&volume).is_some(), "a serving server lost a volume");
    assert!(heir.server.registry.record(&other).is_some(), "a serving server lost a volume");
    assert_eq!(progress.failures, vec![]);
}

/// Detached, deleted, created and attached again between two rounds.
#[test]
fn what_was_made_anew_between_two_rounds_is_not_kept_from_being_freed() {
    let (dir, host, owner) = owner();
    let volume = create(&owner.server, "file:a");
    let id = attach(&owner.server, 1, &volume);
    let heir = server(&dir, "heir", &host, copy(&owner.server));
    let preparation = Preparation::new(heir.server.clone());
    assert_eq!(preparation.update().volumes, 1);

    owner.server.end_session(id);
    std::thread::sleep(Duration::from_millis(50));
    assert!(owner.server.queue_drained(id));
    let record = owner.server.registry.record(&volume).unwrap();
    owner.server.backend(&volume).unwrap().delete(&record.spec(&volume)).unwrap();
    owner.server.registry.remove(&volume).unwrap();
    create(&owner.server, "file:a");
    attach(&owner.server, 2, &volume);
    for name in heir.server.store.names("s.") {
        heir.server.store.disown(&name);
        preparation.note_change(&name);
    }
    for (name, fd) in copy(&owner.server) {
        heir.server.store.adopt(name.clone(), fd);
        preparation.note_change(&name);
    }
    assert_eq!(preparation.update().failures, vec![]);
    let own = format!("{}/", dir.path().display());
    let held = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
            .map(|path| path.to_string_lossy().into_owned())
            .filter(|path| path.starts_with(&own) && path.ends_with(" (deleted)"))
            .count()
    };
    // The owner of this test, whose control thread does not run, holds one too.
    let before = held();
    heir.server.prepared().clear();
    assert_eq!(before, held(), "its blocks are not freed as long as the standby lives");
}

/// A volume that cannot resume yet holds back itself: neither a session that was not prepared, nor
/// one that comes after many that wait.
#[test]
fn sessions_whose_storage_waits_hold_up_no_other() {
    use rustix::fs::FlockOperation;
    let (dir, host, owner) = owner();
    let waiting: Vec<VolumeName> =
        (0..100).map(|n| create(&owner.server, &format!("file:w{n}"))).collect();
    for (n, volume) in waiting.iter().enumerate() {
        attach(&owner.server, n as u8, volume);
    }
    let free = create(&owner.server, "null:free");
    let last = attach(&owner.server, 200, &free);
    let heir = server(&dir, "heir", &host, copy(&owner.server));
    let preparation = Preparation::new(heir.server.clone());
    assert_eq!(preparation.update().failures, vec![]);
    let late = attach(&owner.server, 201, &free);
    follow(&owner.server, &heir.server, &preparation);
    // A dead owner's requests that are stuck at their storage.
    let locks: Vec<_> = waiting
        .iter()
        .map(|name| {
            let path = dir.path().join(format!("state/images/{}.img", name.name()));
            let file = std::fs::File::open(path).unwrap();
            owner.server.volumes.open(name).unwrap().volume.relinquish();
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
            file
        })
        .collect();
    claim(&heir);
    let resumption = Resumption::reserve(&heir.server, preparation.take(), &[]);
    let begin = Instant::now();
    let server = heir.server.clone();
    std::thread::spawn(move || resumption.run());
    let mut took = [None; 2];
    while took.contains(&None) {
        for (id, took) in [last, late].into_iter().zip(&mut took) {
            if took.is_none() && server.session(id).is_some() {
                *took = Some(begin.elapsed());
            }
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    drop(locks);
    eprintln!("last in the queue, not prepared: {took:?}");
    assert!(took.iter().flatten().all(|took| *took < RESUME_TIME_MAX / 8), "{took:?}");
}

/// As above, and here it is the host's memory that is not freed.
#[test]
fn memory_that_was_deleted_and_made_anew_between_two_rounds_is_freed() {
    let (dir, host, owner) = owner();
    let volume = create(&owner.server, "mem:a");
    attach(&owner.server, 1, &volume);
    let heir = server(&dir, "heir", &host, copy(&owner.server));
    let preparation = Preparation::new(heir.server.clone());
    assert_eq!(preparation.update().volumes, 1);
    let inode = rustix::fs::fstat(heir.server.store.fetch("m.a").unwrap()).unwrap().st_ino;
    // Another memory of that name, and a session of it: what else happened is not seen.
    let anew = server(&dir, "anew", &host, Store::new());
    attach(&anew.server, 2, &volume);
    let names = [heir.server.store.names("s."), heir.server.store.names("m.")].concat();
    for name in names {
        heir.server.store.disown(&name);
        preparation.note_change(&name);
    }
    for (name, fd) in copy(&anew.server) {
        heir.server.store.adopt(name.clone(), fd);
        preparation.note_change(&name);
    }
    assert_eq!(preparation.update().failures, vec![]);
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of_inode = |line: &&str| line.split_whitespace().nth(4) == Some(&inode.to_string());
        maps.lines().filter(of_inode).count()
    };
    // The owner of this test has it mapped, too.
    let before = mapped();
    heir.server.prepared().clear();
    assert_eq!(before, mapped(), "its memory is not freed as long as the standby lives");
}

/// A crash before, or long after, the sessions are served must not write guests' memory to disk.
#[test]
fn what_a_successor_maps_is_no_part_of_core_dumps() {
    let (dir, host, owner) = owner();
    let volume = create(&owner.server, "null:a");
    let id = attach(&owner.server, 1, &volume);
    let memory = nebd_abi::region::SharedMemory::create("guest", 4096).unwrap();
    let mut store = copy(&owner.server);
    store.insert(Session::store_name(id, "mem1"), memory.fd().try_clone_to_owned().unwrap());
    let heir = server(&dir, "heir", &host, store);
    let request = heir.server.stored_request(id).unwrap();
    let is_kept_out = |address: *mut u8| {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", address.addr());
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
        lines.find(|line| line.starts_with("VmFlags:")).unwrap().split(' ').any(|flag| flag == "dd")
    };
    assert!(is_kept_out(request.region.memory().as_ptr()), "the region");
    assert!(is_kept_out(request.memories[1].as_ref().unwrap().as_ptr()), "registered memory");
}
