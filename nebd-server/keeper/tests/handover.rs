//! Planned takeovers as the keeper sees them: a server, its candidate, and death at every point.
//!
//! Whoever the keeper starts looks whether anybody is alive who served or could have claimed; each
//! test ends with [`Rig::assert_no_rivals`].

mod rig;

use rig::{Info, Rig, count_fds, eventually, is_alive, signal};
use rustix::process::Signal;

/// A keeper whose server serves.
fn start(options: &[&str]) -> Rig {
    let rig = Rig::start(options);
    rig.info();
    rig
}

/// A server and a candidate that has all it needs. The server answers nobody but this test.
fn with_candidate(rig: &Rig) -> (Info, i32) {
    let first = rig.info();
    let candidate = rig.candidate(first.pid, "");
    rig.tell_pid(first.pid, "freeze");
    (first, candidate)
}

fn await_server_pid(rig: &Rig, pid: i32) {
    eventually("server.pid", || (rig.pid_file("server.pid") == Some(pid)).then_some(()));
}

fn await_end(pid: i32) {
    eventually("its end", || (!is_alive(pid)).then_some(()));
}

#[test]
fn a_candidate_takes_over() {
    let rig = start(&[]);
    rig.tell("store m.a a");
    let (first, candidate) = with_candidate(&rig);
    assert_eq!(rig.role(candidate).as_deref(), Some("candidate"));
    rig.tell_pid(candidate, "store m.early x");
    rig.tell_pid(candidate, "claim");
    rig.tell_pid(candidate, "main_pid");
    assert_eq!(rig.pid_file("server.pid"), Some(candidate));
    assert_eq!(rig.role(candidate).as_deref(), Some("serving"));
    assert_eq!(rig.role(first.pid).as_deref(), Some("other"));
    rig.tell_pid(candidate, "serve");
    rig.tell("store m.b b");
    // Its barriers are answered, and that is all.
    rig.tell_pid(first.pid, "store m.late x");
    rig.tell_pid(first.pid, "remove m.a");
    rig.ask_pid(first.pid, "die exit").unwrap_err();
    eventually("the end of the first", || rig.role(first.pid).is_none().then_some(()));
    let second = rig.info();
    assert_eq!((second.pid, second.generation), (candidate, 2));

    // A child of the keeper by now, and a server like any other.
    rig.tell_last("die abort");
    let third = rig.successor(&second);
    assert_eq!((third.generation, third.cause.as_str()), (3, "Crash"));
    assert_eq!(third.store.keys().collect::<Vec<_>>(), ["m.a", "m.b"]);
    eventually("no zombie", || rig.zombies().is_empty().then_some(()));
    rig.assert_no_rivals();
}

#[test]
fn a_candidate_that_has_not_claimed_is_not_the_server() {
    let rig = start(&[]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "main_pid");
    assert_eq!(rig.pid_file("server.pid"), Some(first.pid));
    rig.tell_pid(first.pid, "withdraw");
    rig.tell_pid(first.pid, "serve");
    assert_eq!(rig.info().pid, first.pid);
    // It may try again.
    let (_, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.tell_pid(candidate, "main_pid");
    rig.tell_pid(candidate, "serve");
    assert_eq!(rig.info().pid, candidate);
    assert_eq!(rig.pid_file("server.pid"), Some(candidate));
}

#[test]
fn a_candidate_that_dies_early_is_forgotten() {
    let rig = start(&[]);
    let (first, candidate) = with_candidate(&rig);
    rig.ask_pid(candidate, "die kill").unwrap_err();
    eventually("it is forgotten", || rig.role(candidate).is_none().then_some(()));
    rig.tell_pid(first.pid, "serve");
    assert_eq!(rig.info(), first);
    // Nobody waited for it; that is left to the keeper.
    rig.tell_last("die segv");
    let second = rig.successor(&first);
    assert_eq!((second.generation, second.cause.as_str()), (2, "Crash"));
    eventually("no zombie", || rig.zombies().is_empty().then_some(()));
    rig.assert_no_rivals();
}

#[test]
fn a_server_that_dies_before_the_claim_takes_its_candidate_along() {
    for options in [&[][..], &["standby"]] {
        let rig = start(options);
        rig.tell("store m.a a");
        let standby = options.first().map(|_| rig.standby(&[]));
        let (first, candidate) = with_candidate(&rig);
        // It cannot even run.
        signal(candidate, Signal::STOP);
        rig.ask_pid(first.pid, "die segv").unwrap_err();
        let second = rig.successor(&first);
        assert!(!is_alive(candidate));
        assert_ne!(second.pid, candidate);
        assert_eq!((second.generation, second.cause.as_str()), (2, "Crash"));
        assert_eq!(standby.unwrap_or(second.pid), second.pid);
        assert_eq!(second.store["m.a"], "a");
        eventually("no zombie", || rig.zombies().is_empty().then_some(()));
        rig.assert_no_rivals();
    }
}

#[test]
fn a_server_that_dies_after_the_claim_has_been_followed() {
    let rig = start(&["standby"]);
    rig.tell("store m.a a");
    let standby = rig.standby(&[]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.ask_pid(first.pid, "die kill").unwrap_err();
    await_server_pid(&rig, candidate);
    rig.tell_pid(candidate, "main_pid");
    rig.tell_pid(candidate, "serve");
    rig.tell("store m.b b");
    let second = rig.info();
    assert_eq!((second.pid, second.generation), (candidate, 2));
    // The standby stood by all the while.
    rig.tell_last("die kill");
    let third = rig.successor(&second);
    assert_eq!((third.pid, third.generation), (standby, 3));
    assert_eq!(third.store.len(), 2);
    rig.assert_no_rivals();
}

#[test]
fn both_dead_at_once_are_followed_whoever_had_claimed() {
    for claimed in [false, true] {
        for server_first in [false, true] {
            let rig = start(&[]);
            let (first, candidate) = with_candidate(&rig);
            if claimed {
                rig.tell_pid(candidate, "claim");
            }
            // The keeper finds both at once, and both in its mailbox.
            signal(rig.keeper_pid(), Signal::STOP);
            let order = if server_first { [first.pid, candidate] } else { [candidate, first.pid] };
            order.into_iter().for_each(|pid| signal(pid, Signal::KILL));
            order.into_iter().for_each(await_end);
            signal(rig.keeper_pid(), Signal::CONT);
            let next = rig.successor(&first);
            assert_eq!(next.generation, if claimed { 3 } else { 2 });
            assert_eq!(next.cause, "Killed");
            rig.assert_no_rivals();
        }
    }
}

#[test]
fn a_server_that_lost_to_a_dead_candidate_has_a_little_time_to_exit() {
    let rig = start(&["hang_ms=60000"]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.ask_pid(candidate, "die abort").unwrap_err();
    eventually("it has lost", || {
        (rig.role(candidate).is_none() && rig.role(first.pid)? == "other").then_some(())
    });
    rig.ask_pid(first.pid, "die exit").unwrap_err();
    let third = rig.successor(&first);
    assert_eq!((third.generation, third.cause.as_str()), (3, "Crash"));
    rig.assert_no_rivals();
}

#[test]
fn and_is_killed_when_it_does_not() {
    let rig = start(&["hang_ms=200", "standby"]);
    rig.tell("store m.a a");
    let standby = rig.standby(&[]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.ask_pid(candidate, "die kill").unwrap_err();
    let third = rig.successor(&first);
    assert!(!is_alive(first.pid));
    assert_eq!((third.pid, third.generation), (standby, 3));
    assert_eq!(third.store["m.a"], "a");
    rig.assert_no_rivals();
}

#[test]
fn an_old_server_is_killed_before_anybody_follows_the_new_one() {
    let rig = start(&[]);
    rig.tell("store m.a a");
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    // The message is in the socket when its sender is dead.
    rig.ask_pid(candidate, "main_pid_and_die").unwrap_err();
    let third = rig.successor(&first);
    assert!(!is_alive(first.pid));
    assert_eq!((third.generation, third.cause.as_str()), (3, "Killed"));
    assert_eq!(third.store["m.a"], "a");
    rig.assert_no_rivals();
}

#[test]
fn a_new_server_that_never_gets_going_is_given_up() {
    let rig = start(&["start_ms=300"]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.tell_pid(candidate, "main_pid");
    let third = rig.successor(&first);
    assert!(!is_alive(candidate) && !is_alive(first.pid));
    assert_eq!((third.generation, third.cause.as_str()), (3, "Watchdog"));
    rig.assert_no_rivals();
}

#[test]
fn a_new_server_is_watched_like_any_other() {
    let rig = start(&["hang_ms=200"]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.tell_pid(candidate, "main_pid");
    rig.tell_pid(candidate, "serve");
    // The child of another, so far: nobody tells the keeper that it was stopped.
    rig.ask_pid(first.pid, "die exit").unwrap_err();
    await_end(first.pid);
    let second = rig.info();
    signal(candidate, Signal::STOP);
    nebd_abi::socket::connect(&rig.socket()).unwrap();
    let third = rig.successor(&second);
    assert_eq!((third.generation, third.cause.as_str()), (3, "Watchdog"));
    rig.assert_no_rivals();
}

#[test]
fn a_hung_server_with_a_candidate_is_killed_all_the_same() {
    let rig = start(&["hang_ms=200"]);
    let (first, candidate) = with_candidate(&rig);
    signal(first.pid, Signal::STOP);
    let second = rig.successor(&first);
    assert!(!is_alive(candidate));
    assert_eq!((second.generation, second.cause.as_str()), (2, "Watchdog"));
    rig.assert_no_rivals();
}

#[test]
fn a_second_candidate_ends_both() {
    let rig = start(&[]);
    let first = rig.info();
    let one = rig.candidate(first.pid, "");
    let two: i32 = rig.ask_pid(first.pid, "candidate").unwrap().parse().unwrap();
    await_end(one);
    await_end(two);
    eventually("the record", || rig.role(one).is_none().then_some(()));
    assert_eq!(rig.role(two), None);
    assert_eq!(rig.info().pid, first.pid);
}

/// The program of a process.
fn program(pid: i32) -> String {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap().display().to_string()
}

#[test]
fn the_program_of_later_servers_is_switched() {
    let rig = start(&["standby"]);
    let first = rig.info();
    let old_standby = rig.standby(&[]);
    let new = rig.dir.path().join("new").display().to_string();
    std::fs::copy(env!("CARGO_BIN_EXE_nebd-keeper-fake"), &new).unwrap();
    let candidate = rig.candidate(first.pid, &new);
    rig.tell_pid(first.pid, "freeze");
    rig.tell_pid(candidate, "claim");
    rig.tell_pid(candidate, "main_pid");
    rig.tell_pid(candidate, "serve");
    rig.ask_pid(first.pid, "die exit").unwrap_err();
    // The candidate may yet prove bad: whoever follows it is of the old program.
    assert_eq!(rig.standby(&[]), old_standby);
    rig.tell("binary relative");
    rig.tell(&format!("binary {new}.missing"));
    assert_eq!(rig.standby(&[]), old_standby);

    rig.tell(&format!("binary {new}"));
    let standby = rig.standby(&[old_standby]);
    assert!(!is_alive(old_standby));
    assert_eq!(program(standby), new);
    // Said twice, it changes nothing.
    rig.tell(&format!("binary {new}"));
    assert_eq!(rig.standby(&[]), standby);

    let image = || std::fs::read(format!("/proc/{}/auxv", rig.keeper_pid())).unwrap();
    let before = image();
    signal(rig.keeper_pid(), Signal::HUP);
    eventually("a new image", || (image() != before).then_some(()));
    rig.tell("store m.a a");
    rig.tell_last("die kill");
    await_server_pid(&rig, standby);
    let next = rig.standby(&[old_standby, standby]);
    assert_eq!(program(next), new);

    // It has gone: better an old server than none.
    std::fs::remove_file(&new).unwrap();
    let serving = rig.info();
    assert_eq!(serving.pid, standby);
    rig.write_state("fail", "standby");
    signal(next, Signal::KILL);
    await_end(next);
    rig.tell_last("die kill");
    let last = rig.successor(&serving);
    assert_eq!(program(last.pid), env!("CARGO_BIN_EXE_nebd-keeper-fake"));
    rig.assert_no_rivals();
}

#[test]
fn a_replaced_keeper_remembers_the_candidate() {
    let rig = start(&[]);
    let replace = || {
        let image = || std::fs::read(format!("/proc/{}/auxv", rig.keeper_pid())).unwrap();
        let before = image();
        signal(rig.keeper_pid(), Signal::HUP);
        eventually("a new image", || (image() != before).then_some(()));
    };
    let (first, candidate) = with_candidate(&rig);
    replace();
    rig.tell_pid(candidate, "claim");
    replace();
    rig.tell_pid(candidate, "main_pid");
    assert_eq!(rig.pid_file("server.pid"), Some(candidate));
    rig.tell_pid(candidate, "serve");
    replace();
    // Also the one that is about to exit.
    rig.tell_last("die kill");
    let third = rig.successor(&first);
    assert_ne!(third.pid, candidate);
    assert!(!is_alive(first.pid));
    rig.assert_no_rivals();
}

#[test]
fn a_new_keeper_kills_the_candidate_of_a_server_that_it_adopts() {
    let mut rig = start(&[]);
    let first = rig.info();
    let candidate = rig.candidate(first.pid, "");
    rig.replace_killed_keeper();
    eventually("the new keeper knows the server", || {
        (rig.ask("store m.a a").ok()? == "ok").then_some(())
    });
    await_end(candidate);
    assert_eq!(rig.info().pid, first.pid);
}

/// The keeper dies when the candidate is about to take over, and is back when it has.
#[test]
fn a_new_keeper_finds_a_candidate_that_has_taken_over() {
    for old_lives in [false, true] {
        let mut rig = start(&["adopt_ms=60000"]);
        rig.tell("store m.a a");
        let (first, candidate) = with_candidate(&rig);
        rig.kill_keeper();
        rig.tell_pid(candidate, "claim");
        if !old_lives {
            rig.ask_pid(first.pid, "die exit").unwrap_err();
            await_end(first.pid);
        }
        rig.replace_dead_keeper();
        if old_lives {
            // It registers, and is found to have lost.
            await_end(first.pid);
        }
        rig.tell_pid(candidate, "serve");
        eventually("the new keeper knows the server", || {
            (rig.ask("store m.b b").ok()? == "ok").then_some(())
        });
        await_server_pid(&rig, candidate);
        let second = rig.info();
        assert_eq!((second.pid, second.generation), (candidate, 2));
        rig.tell_last("die kill");
        let third = rig.successor(&second);
        assert_eq!((third.generation, third.store.len()), (3, 2));
        rig.assert_no_rivals();
    }
}

#[test]
fn a_stop_ends_all_of_them() {
    let mut rig = start(&["standby"]);
    let standby = rig.standby(&[]);
    let (first, candidate) = with_candidate(&rig);
    rig.tell_pid(candidate, "claim");
    rig.tell_pid(candidate, "main_pid");
    rig.tell_pid(candidate, "serve");
    let next = rig.candidate(candidate, "");
    assert!(rig.stop().success());
    for pid in [first.pid, standby, candidate, next] {
        await_end(pid);
    }
}

#[test]
fn nothing_leaks_over_50_takeovers() {
    let rig = start(&[]);
    let mut last = rig.info();
    let mut fds = None;
    for _ in 0..50 {
        let candidate = rig.candidate(last.pid, "");
        rig.tell_pid(last.pid, "freeze");
        rig.tell_pid(candidate, "claim");
        rig.tell_pid(candidate, "main_pid");
        rig.tell_pid(candidate, "serve");
        rig.ask_pid(last.pid, "die exit").unwrap_err();
        eventually("its end", || rig.role(last.pid).is_none().then_some(()));
        last = rig.info_of(candidate);
        fds.get_or_insert_with(|| count_fds(rig.keeper_pid()));
    }
    assert_eq!(last.generation, 51);
    // One may be open less or more at the moment.
    let most = fds.unwrap() + 8;
    eventually("no more than before", || (count_fds(rig.keeper_pid()) <= most).then_some(()));
    eventually("no zombie", || rig.zombies().is_empty().then_some(()));
}
