//! Volumes for hypervisors without our library: sockets that outlive servers.

mod server;

use std::fs;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use server::{Stage, json};

fn stage() -> Stage {
    let stage = Stage::start();
    for volume in ["mem:a", "mem:b"] {
        assert!(stage.run(&format!("volume create {volume} --size 1MiB")).status.success());
    }
    stage
}

fn done(stage: &Stage, command: &str) -> Value {
    let output = stage.run(&format!("{command} --json"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    json(&output)
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn attachments(stage: &Stage) -> Vec<Value> {
    done(stage, "attachments")["attachments"].as_array().unwrap().clone()
}

/// The sockets that listen there, by the numbers that the kernel gave them when they were made.
fn listening_sockets(path: &Path) -> Vec<String> {
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let here = sockets.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(7).map(Path::new) == Some(path) && fields[3] == ACCEPTS;
        is_it.then(|| fields[6].to_owned())
    });
    here.collect()
}

fn listening_socket(path: &Path) -> String {
    let mut sockets = listening_sockets(path);
    assert_eq!(sockets.len(), 1, "{}", path.display());
    sockets.remove(0)
}

/// Until the server has accepted this connection: it turns an NBD client away, and hangs up once a
/// hypervisor has.
fn await_accepted(mut client: UnixStream) {
    client.shutdown(Shutdown::Write).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let read = client.read(&mut [0; 1]);
    assert!(read.is_ok(), "the connection was lost, or nobody has accepted it: {read:?}");
}

#[test]
fn attachments_are_made_listed_and_ended() {
    let stage = stage();
    let vhost = done(&stage, "attach mem:a --as vhost-user --queues 2 --read-only");
    let socket = fs::canonicalize(stage.path("vhost-user/mem-a.sock")).unwrap();
    assert_eq!(vhost["socket"].as_str(), socket.to_str());
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    let expected = serde_json::json!({
        "volume": "mem:a", "kind": "vhost-user", "socket": socket, "read_only": true, "queues": 2,
        "connected": 0, "problem": null
    });
    assert_eq!(vhost, expected);
    let told = stage.run("attach mem:a --as nbd");
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    for part in ["export=mem:a,reconnect-delay=60,open-timeout=10", "<host transport='unix'"] {
        assert!(told.contains(part), "{told}");
    }
    done(&stage, "attach mem:b --as nbd");
    let nbd = stage.path("nbd.sock");
    let listed = attachments(&stage);
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[0], vhost);
    assert_eq!(listed[1]["socket"], listed[2]["socket"], "one socket for all");
    let text = String::from_utf8_lossy(&stage.run("attachments").stdout).into_owned();
    assert!(text.starts_with("VOLUME") && text.contains(socket.to_str().unwrap()), "{text}");

    let error = refused(&stage.run("volume delete mem:a"));
    assert!(
        error.contains("attached as vhost-user") && error.contains("nebdctl detach"),
        "{error}"
    );
    done(&stage, "detach mem:a --as nbd");
    await_accepted(UnixStream::connect(&nbd).unwrap());
    let ended = done(&stage, "detach mem:a");
    assert_eq!(ended["attachments"][0]["kind"], "vhost-user");
    assert!(!socket.exists() && nbd.exists());
    assert!(stage.run("volume delete mem:a").status.success());
    done(&stage, "detach mem:b");
    assert!(!nbd.exists());
    assert!(attachments(&stage).is_empty());
    assert!(refused(&stage.run("detach mem:b")).contains("not attached"));
    stage.kill_server();
    assert!(attachments(&stage).is_empty() && !nbd.exists());
}

#[test]
fn what_is_impossible_is_refused_and_leaves_nothing() {
    let stage = stage();
    assert!(refused(&stage.run("attach mem:none --as nbd")).contains("mem:none does not exist"));
    let long = "x".repeat(120);
    let error = refused(&stage.run(&format!("attach mem:a --as nbd --socket {long}")));
    assert!(error.contains("at most 107 bytes"), "{error}");
    assert!(refused(&stage.run("attach mem:a --as nbd --queues 2")).contains("queues"));

    let foreign = stage.path("foreign");
    let listener = UnixListener::bind(&foreign).unwrap();
    let error = refused(&stage.run("attach mem:a --as vhost-user --socket foreign"));
    assert!(error.contains("somebody listens there"), "{error}");
    UnixStream::connect(&foreign).unwrap();
    let error = refused(&stage.run("attach mem:a --as vhost-user --socket s.admin"));
    assert!(error.contains("somebody listens there"), "{error}");
    fs::write(stage.path("file"), "precious").unwrap();
    let error = refused(&stage.run("attach mem:a --as vhost-user --socket file"));
    assert!(error.contains("is no socket"), "{error}");
    assert_eq!(fs::read(stage.path("file")).unwrap(), b"precious");
    assert!(attachments(&stage).is_empty());

    // Left over: nobody listens any more.
    drop(listener);
    done(&stage, "attach mem:a --as vhost-user --socket foreign");
    await_accepted(UnixStream::connect(&foreign).unwrap());

    for clash in
        ["attach mem:b --as vhost-user --socket foreign", "attach mem:b --as nbd --socket foreign"]
    {
        let error = refused(&stage.run(clash));
        assert!(error.contains("that of volume mem:a"), "{error}");
    }
    let error = refused(&stage.run("attach mem:a --as vhost-user --socket other"));
    assert!(error.contains("mem:a is attached as vhost-user"), "{error}");
    assert_eq!(attachments(&stage).len(), 1);
    assert!(!stage.path("other").exists());
}

/// Connects while the server cannot accept, then has it replaced by `replace`.
fn replaced(stage: &Stage, paths: &[PathBuf], replace: impl FnOnce()) {
    let before: Vec<_> = paths.iter().map(|path| listening_socket(path)).collect();
    let pid = stage.server_pid().unwrap();
    replace();
    assert_ne!(stage.server_pid(), Some(pid));
    let after: Vec<_> = paths.iter().map(|path| listening_socket(path)).collect();
    assert_eq!(before, after, "the sockets are the same");
    for path in paths {
        await_accepted(UnixStream::connect(path).unwrap());
    }
}

#[test]
fn sockets_outlive_servers_with_whoever_waits_there() {
    let stage = stage();
    done(&stage, "attach mem:a --as vhost-user");
    done(&stage, "attach mem:b --as nbd");
    let listed = attachments(&stage);
    let paths: Vec<PathBuf> =
        listed.iter().map(|known| known["socket"].as_str().unwrap().into()).collect();
    for _ in 0..2 {
        let mut waiting = Vec::new();
        replaced(&stage, &paths, || {
            let pid = Pid::from_raw(stage.server_pid().unwrap() as i32);
            kill(pid, Signal::SIGSTOP).unwrap();
            waiting.extend(paths.iter().map(|path| UnixStream::connect(path).unwrap()));
            stage.kill_server();
        });
        waiting.into_iter().for_each(await_accepted);
    }
    replaced(&stage, &paths, || {
        let output = stage.run("upgrade --probation 0s");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
    stage.kill_server();
    assert_eq!(attachments(&stage), listed);
    assert!(refused(&stage.run("volume delete mem:a")).contains("nebdctl detach mem:a"));
}

#[test]
fn a_socket_that_somebody_removed_is_made_anew_by_the_next_server() {
    let stage = stage();
    done(&stage, "attach mem:a --as nbd");
    let path = stage.path("nbd.sock");
    let before = listening_socket(&path);
    fs::remove_file(&path).unwrap();
    stage.kill_server();
    stage.until("there is another socket, and the old one is gone", || {
        let now = listening_sockets(&path);
        now.len() == 1 && now[0] != before
    });
    await_accepted(UnixStream::connect(&path).unwrap());
    // Somebody has taken the place: it is told, and holds up nothing.
    fs::remove_file(&path).unwrap();
    let _listener = UnixListener::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "in the way").unwrap();
    stage.kill_server();
    stage.until("the problem is told", || {
        let problem = attachments(&stage)[0]["problem"].clone();
        problem.as_str().is_some_and(|problem| problem.contains("is no socket"))
    });
}
