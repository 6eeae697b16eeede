//! Standby, hangs, and keepers that are replaced.

mod rig;

use rig::{Rig, count_fds, eventually, is_alive, signal};
use rustix::process::Signal;

#[test]
fn a_standby_follows_the_store_and_takes_over() {
    let rig = Rig::start(&["standby"]);
    let first = rig.info();
    assert!(!first.standby);
    rig.tell("store m.before 1");
    let mut seen = vec![first.pid];
    let mut last = first;
    for round in 0..3 {
        let standby = rig.standby(&seen);
        seen.push(standby);
        rig.tell(&format!("store m.during{round} {round}"));
        rig.tell("store m.gone x");
        rig.tell("remove m.gone");
        rig.tell_last("store_and_die m.last 200");
        let next = rig.successor(&last);
        assert_eq!((next.pid, next.standby), (standby, true));
        assert_eq!((next.cause.as_str(), next.generation), ("Killed", last.generation + 1));
        assert_eq!(next.store["m.before"], "1");
        assert_eq!(next.store[&format!("m.during{round}")], round.to_string());
        assert_eq!(next.store["m.last"], "199");
        assert!(!next.store.contains_key("m.gone"));
        eventually("server.pid", || (rig.pid_file("server.pid") == Some(standby)).then_some(()));
        last = next;
    }
}

#[test]
fn a_large_store_reaches_a_standby_that_reads_late() {
    let rig = Rig::start(&["standby"]);
    let first = rig.info();
    let standby = rig.standby(&[]);
    rig.tell("store_many m.a 1500");
    // More than a socket holds, so most of it waits in the keeper; then the order must hold.
    rig.tell_last("store_and_die m.last 500");
    let second = rig.successor(&first);
    assert_eq!(second.pid, standby);
    assert_eq!(second.store.len(), 1501);
    assert_eq!(second.store["m.last"], "499");
}

#[test]
fn without_a_standby_the_restart_is_cold() {
    let rig = Rig::start(&["standby"]);
    let first = rig.info();
    let standby = rig.standby(&[]);
    rig.tell("store m.a a");
    rig.write_state("fail", "standby");
    signal(standby, Signal::KILL);
    eventually("its end", || (!is_alive(standby)).then_some(()));
    rig.tell_last("die kill");
    let second = rig.successor(&first);
    assert_eq!((second.standby, second.store["m.a"].as_str()), (false, "a"));
    rig.remove_state("fail");
    rig.standby(&[standby]);
}

#[test]
fn a_standby_that_fails_when_activated_is_followed_by_a_cold_server() {
    let rig = Rig::start(&["standby"]);
    let first = rig.info();
    rig.tell("store m.a a");
    let standby = rig.standby(&[]);
    rig.write_state("fail-activation", "");
    rig.tell_last("die segv");
    let second = rig.successor(&first);
    assert!(!second.standby && second.pid != standby);
    // The death of the standby, which never claimed, is not told in place of the server's.
    assert_eq!((second.cause.as_str(), second.generation), ("Crash", 2));
    assert_eq!(second.store["m.a"], "a");
}

#[test]
fn a_stopped_server_is_killed_by_the_watchdog() {
    let rig = Rig::start(&["hang_ms=200"]);
    let first = rig.info();
    signal(first.pid, Signal::STOP);
    let second = rig.successor(&first);
    assert_eq!((second.cause.as_str(), second.generation), ("Watchdog", 2));
}

#[test]
fn a_server_that_spins_is_killed_once_somebody_knocks() {
    let rig = Rig::start(&["hang_ms=300", "standby"]);
    let first = rig.info();
    rig.standby(&[]);
    let socket = rig.socket();
    let knocker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        nebd_abi::socket::connect(&socket).map(drop)
    });
    rig.tell_last("hang");
    knocker.join().unwrap().unwrap();
    let second = rig.successor(&first);
    assert_eq!((second.cause.as_str(), second.standby), ("Watchdog", true));
}

#[test]
fn a_server_that_hangs_at_work_is_killed_though_nobody_knocks() {
    for standby in [&["hang_ms=300"][..], &["hang_ms=300", "standby"]] {
        let rig = Rig::start(standby);
        let first = rig.info();
        rig.tell("work");
        rig.tell_last("hang");
        let second = rig.successor(&first);
        assert_eq!(second.cause, "Watchdog");
    }
}

/// Work that a dead keeper was told of is looked after by the next.
#[test]
fn a_server_that_hangs_at_work_is_killed_by_a_keeper_that_came_later() {
    let mut rig = Rig::start(&["hang_ms=300"]);
    let first = rig.info();
    rig.kill_keeper();
    rig.tell("work");
    rig.tell("freeze");
    rig.replace_dead_keeper();
    let second = rig.successor(&first);
    assert_eq!(second.cause, "Watchdog");
}

#[test]
fn a_server_that_answers_is_left_alone() {
    let rig = Rig::start(&["hang_ms=100"]);
    let first = rig.info();
    for _ in 0..5 {
        nebd_abi::socket::connect(&rig.socket()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60));
    }
    // Stopped, but not for long.
    let rig_patient = Rig::start(&["hang_ms=5000"]);
    let patient = rig_patient.info();
    signal(patient.pid, Signal::STOP);
    signal(patient.pid, Signal::CONT);
    assert_eq!(rig_patient.info().pid, patient.pid);
    assert_eq!(rig.info().pid, first.pid);
}

#[test]
fn a_replaced_keeper_keeps_everything() {
    let rig = Rig::start(&["standby"]);
    let first = rig.info();
    rig.tell("store m.a a");
    let standby = rig.standby(&[]);
    let mut fds = None;
    for round in 0..5 {
        // Each image lies at addresses of its own.
        let image = || std::fs::read(format!("/proc/{}/auxv", rig.keeper_pid())).unwrap();
        let before = image();
        signal(rig.keeper_pid(), Signal::HUP);
        eventually("a new image", || (image() != before).then_some(()));
        // Answered by the new image, which by then has opened all it opens.
        rig.tell(&format!("store m.round{round} {round}"));
        // (The barrier's descriptor may still be about to be closed.)
        let count = || count_fds(rig.keeper_pid()) - round;
        let least = *fds.get_or_insert_with(count);
        eventually("no more descriptors than before", || (count() <= least).then_some(()));
    }
    assert_eq!(rig.info().pid, first.pid);
    assert!(is_alive(standby));
    // The same standby, which has followed across all images; and the cause is still told.
    rig.tell_last("die abort");
    let second = rig.successor(&first);
    assert_eq!((second.pid, second.cause.as_str()), (standby, "Crash"));
    assert_eq!((second.generation, second.store.len()), (2, 6));
    let third = rig.standby(&[standby]);
    rig.tell_last("die kill");
    assert_eq!(rig.successor(&second).pid, third);
}

#[test]
fn a_new_keeper_adopts_the_server_of_a_dead_one() {
    let mut rig = Rig::start(&["standby"]);
    let first = rig.info();
    rig.tell("store m.a a");
    let mut orphans = vec![];
    for _ in 0..3 {
        let standby = rig.standby(&orphans);
        orphans.push(standby);
        rig.replace_killed_keeper();
        eventually("keeper.pid", || {
            (rig.pid_file("keeper.pid") == Some(rig.keeper_pid())).then_some(())
        });
        assert_eq!(rig.info().pid, first.pid, "it served on");
        eventually("the orphaned standby's end", || (!is_alive(standby)).then_some(()));
    }
    // A barrier of the server fails while it is not registered.
    eventually("the new keeper knows the server", || {
        (rig.ask("store m.b b").ok()? == "ok").then_some(())
    });
    let warm = rig.standby(&orphans);
    rig.tell_last("die segv");
    let second = rig.successor(&first);
    assert_eq!((second.pid, second.standby), (warm, true));
    assert_eq!(second.generation, first.generation + 1);
    // No child of this keeper: before Linux 6.15 an init that is quick to reap hides the cause.
    assert!(["Crash", "Unknown"].contains(&second.cause.as_str()), "{}", second.cause);
    assert_eq!((second.store["m.a"].as_str(), second.store["m.b"].as_str()), ("a", "b"));
}

#[test]
fn a_server_that_does_not_register_is_replaced() {
    let mut rig = Rig::start(&["adopt_ms=300"]);
    let first = rig.info();
    // Stopped after the keeper's death: it cannot notice the new one.
    rig.kill_keeper();
    signal(first.pid, Signal::STOP);
    rig.replace_dead_keeper();
    let second = rig.successor(&first);
    assert!(!is_alive(first.pid));
    assert!(second.store.is_empty());
}

#[test]
fn a_keeper_and_its_server_dead_leave_room_for_the_next() {
    let mut rig = Rig::start(&[]);
    let first = rig.info();
    rig.kill_keeper();
    signal(first.pid, Signal::KILL);
    eventually("its end", || (!is_alive(first.pid)).then_some(()));
    rig.replace_dead_keeper();
    let second = rig.successor(&first);
    assert!(!second.predecessor);
}

#[test]
fn a_server_may_name_its_successor() {
    let rig = Rig::start(&[]);
    let first = rig.info();
    rig.tell("store m.a a");
    rig.tell_last("hand_over");
    let named = eventually("server.pid names another", || {
        rig.pid_file("server.pid").filter(|pid| *pid != first.pid)
    });
    eventually("the first one's end", || (!is_alive(first.pid)).then_some(()));
    assert!(is_alive(named));
    signal(named, Signal::KILL);
    let third = rig.successor(&first);
    assert_ne!(third.pid, named);
    assert_eq!(third.store["m.a"], "a");
}

#[test]
fn a_barrier_that_no_keeper_answered_fails() {
    let mut rig = Rig::start(&[]);
    let first = rig.info();
    signal(rig.keeper_pid(), Signal::STOP);
    std::thread::scope(|scope| {
        let stored = scope.spawn(|| rig.ask("store m.a a").unwrap());
        // Long enough for the datagrams to be on their way, as a rule; it fails in either case.
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(!stored.is_finished(), "a stopped keeper answered");
        signal(rig.keeper_pid(), Signal::KILL);
        let reply = stored.join().unwrap();
        assert!(reply.starts_with("barrier: "), "{reply}");
    });
    rig.kill_keeper();
    rig.replace_dead_keeper();
    // The registration made it good.
    eventually("a keeper", || (rig.ask("store m.b b").ok()? == "ok").then_some(()));
    rig.tell_last("die kill");
    let second = rig.successor(&first);
    assert_eq!((second.store["m.a"].as_str(), second.generation), ("a", 2));
}
