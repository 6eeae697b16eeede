//! Death and restart, and what survives it.

mod rig;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;

use rig::{Rig, count_fds, count_sleeps, eventually, is_alive, signal};
use rustix::process::Signal;

#[test]
fn every_end_is_followed_by_a_restart_and_told() {
    let rig = Rig::start(&[]);
    let mut last = rig.info();
    assert_eq!((last.generation, last.predecessor), (1, false));
    let causes = [("kill", "Killed"), ("segv", "Crash"), ("abort", "Crash"), ("exit", "Exit")];
    for (end, cause) in causes {
        rig.tell_last(&format!("die {end}"));
        let next = rig.successor(&last);
        assert_eq!((next.cause.as_str(), next.predecessor), (cause, true), "{end}");
        assert_eq!(next.generation, last.generation + 1);
        eventually("server.pid", || (rig.pid_file("server.pid") == Some(next.pid)).then_some(()));
        last = next;
    }
    assert_eq!(rig.pid_file("keeper.pid"), Some(rig.keeper_pid()));
}

#[test]
fn the_store_survives_with_all_that_was_sent() {
    let rig = Rig::start(&[]);
    let first = rig.info();
    rig.tell("store m.keep one");
    rig.tell("store m.replaced old");
    rig.tell("store m.replaced new");
    rig.tell("store m.removed gone");
    rig.tell("remove m.removed");
    // The last of these are in the socket when their sender is already dead.
    rig.tell_last("store_and_die m.last 300");
    let second = rig.successor(&first);
    let store: Vec<(&str, &str)> =
        second.store.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(store, [("m.keep", "one"), ("m.last", "299"), ("m.replaced", "new")]);
}

#[test]
fn a_store_with_long_names_is_passed_whole() {
    let rig = Rig::start(&[]);
    let first = rig.info();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let possible = limit.maximum.unwrap_or(u64::MAX).saturating_sub(200) / 2;
    let count = 3000.min(possible);
    // 60 bytes a name: more than one string of the environment may hold.
    let prefix = "s.0123456789abcdef0123456789abcdef.0123456789abcdef012345.";
    rig.tell(&format!("store_many {prefix} {count}"));
    rig.tell_last("die kill");
    let second = rig.successor(&first);
    assert_eq!(second.store.len() as u64, count);
    assert_eq!(second.store[&format!("{prefix}17")], "17");
}

#[test]
fn a_server_gets_its_descriptors_and_no_others() {
    let rig = Rig::start(&[]);
    let first = rig.info();
    rig.tell("store m.a a");
    rig.tell_last("die kill");
    rig.successor(&first);
    let fds = rig.ask("fds").unwrap();
    // Its own: the notifier, a connection, the listing, the life thread's pipe.
    let foreign = ["/keeper.lock", "signalfd", "eventpoll"];
    assert!(foreign.iter().all(|name| !fds.contains(name)), "{fds}");
    assert_eq!(fds.matches("memfd:fake").count(), 1, "{fds}");
    assert_eq!(fds.matches("memfd:nebd-host").count(), 1, "{fds}");
    assert_eq!(fds.matches("eventfd").count(), 1, "{fds}");
}

#[test]
fn strangers_are_ignored() {
    let rig = Rig::start(&[]);
    let first = rig.info();
    rig.tell("store m.a a");
    let socket = UnixDatagram::unbound().unwrap();
    for message in ["FDSTOREREMOVE=1\nFDNAME=m.a", "READY=1", "MAINPID=1", "\0nonsense"] {
        socket.send_to(message.as_bytes(), rig.state_dir().join("notify.sock")).unwrap();
    }
    rig.tell("store m.b b");
    assert_eq!(rig.info().pid, first.pid);
    rig.tell_last("die kill");
    assert_eq!(rig.successor(&first).store.len(), 2);
}

#[test]
fn a_server_that_cannot_start_is_tried_again_with_delays() {
    let rig = Rig::start(&[]);
    let first = rig.info();
    rig.tell("store m.a a");
    rig.write_state("fail", "exit");
    rig.tell_last("die abort");
    eventually("two failures are in the past", || {
        // The record of children is rewritten at each start and end.
        let record = std::fs::read_to_string(rig.state_dir().join("children")).ok()?;
        (record.lines().filter(|line| !line.is_empty()).count() == 1).then_some(())
    });
    assert_eq!(rig.pid_file("server.pid"), Some(first.pid), "nobody serves yet");
    rig.remove_state("fail");
    let second = rig.info();
    // Those that never claimed did not overwrite what is known of the first.
    assert_eq!((second.generation, second.cause.as_str()), (2, "Crash"));
    assert_eq!(second.store["m.a"], "a");
    // And it is forgiven: the next one starts at once.
    rig.tell_last("die kill");
    rig.successor(&second);
}

#[test]
fn a_server_that_never_gets_ready_is_given_up() {
    let rig = Rig::start(&["start_ms=200"]);
    let first = rig.info();
    rig.write_state("fail", "hang");
    rig.tell_last("die kill");
    let hanging = eventually("a server that hangs", || rig.pid_file("hanging"));
    assert_ne!(hanging, first.pid);
    rig.remove_state("fail");
    eventually("its end", || (!is_alive(hanging)).then_some(()));
    assert_eq!(rig.info().cause, "Killed");
}

#[test]
fn nothing_leaks_over_300_restarts() {
    let rig = Rig::start(&[]);
    let mut last = rig.info();
    rig.tell("store m.a a");
    rig.tell_last("die kill");
    last = rig.successor(&last);
    // Either may have opened a file less or more at the moment; a leak would show 300 times.
    let (fds, server_fds) = (count_fds(rig.keeper_pid()), count_fds(last.pid));
    for _ in 0..300 {
        signal(last.pid, Signal::KILL);
        last = rig.successor(&last);
    }
    assert_eq!(last.generation, 302);
    eventually("no more descriptors than before", || {
        let (now, server_now) = (count_fds(rig.keeper_pid()), count_fds(last.pid));
        (now <= fds + 16 && server_now <= server_fds + 16).then_some(())
    });
    let path = format!("/proc/{}/task/{0}/children", rig.keeper_pid());
    if let Ok(children) = std::fs::read_to_string(path) {
        assert_eq!(children.split_whitespace().count(), 1, "zombies: {children}");
    }
}

#[test]
fn an_idle_keeper_sleeps() {
    let rig = Rig::start(&["standby"]);
    rig.info();
    rig.standby(&[]);
    // Whatever its start left behind is worked off when it sleeps twice for this long.
    let nap = std::time::Duration::from_millis(1500);
    let quiet = eventually("no wakeup in a while", || {
        let before = count_sleeps(rig.keeper_pid());
        std::thread::sleep(nap);
        (count_sleeps(rig.keeper_pid()) == before).then_some(before)
    });
    std::thread::sleep(2 * nap);
    assert_eq!(count_sleeps(rig.keeper_pid()), quiet);
}

#[test]
fn a_stop_leaves_nothing_behind() {
    let mut rig = Rig::start(&["standby"]);
    let server = rig.info();
    let standby = rig.standby(&[]);
    for path in [rig.socket(), rig.admin()] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o660);
    }
    let notify = rig.state_dir().join("notify.sock");
    assert_eq!(std::fs::metadata(&notify).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(rig.stop().success());
    assert!(!is_alive(server.pid) && !is_alive(standby));
    assert!(!rig.socket().exists() && !rig.admin().exists() && !notify.exists());
    assert!(rig.pid_file("server.pid").is_none() && rig.pid_file("keeper.pid").is_none());
}

#[test]
fn a_stop_ends_a_stopped_server_too() {
    let mut rig = Rig::start(&["stop_ms=300", "hang_ms=60000"]);
    let server = rig.info();
    signal(server.pid, Signal::STOP);
    assert!(rig.stop().success());
    assert!(!is_alive(server.pid));
}

#[test]
fn a_second_keeper_is_refused_by_name() {
    let rig = Rig::start(&[]);
    rig.info();
    let output = rig.second_keeper().wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(text.contains(&format!("pid {}", rig.keeper_pid())), "{text}");
    assert!(rig.socket().exists());
}

#[test]
fn a_child_that_ended_before_the_keeper_began_is_taken_note_of() {
    let rig = Rig::start_with_a_dead_child();
    rig.info();
    assert_eq!(rig.zombies(), []);
}
