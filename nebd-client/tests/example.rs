//! The example as a test: it passes under kills, and notices what is wrong.

mod common;

use std::process::{Command, ExitStatus};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{Host, Mode, eventually};

/// Runs the example while `meanwhile` does something to the server; `None` if it was not built.
fn run(host: &Host, seconds: u32, meanwhile: impl FnOnce()) -> Option<ExitStatus> {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/verified_io");
    if !path.exists() {
        println!("skipped: {} was not built", path.display());
        return None;
    }
    let mut command = Command::new(path);
    command.args(["mem:a", &seconds.to_string()]).env("NEBD_SOCKET", &host.path);
    let mut child = command.spawn().unwrap();
    meanwhile();
    Some(child.wait().unwrap())
}

#[test]
fn it_passes_under_kills() {
    let host = Host::new();
    let mut server = Some(host.start());
    let status = run(&host, 3, || {
        for round in 0..20 {
            let before = host.taken.load(SeqCst);
            eventually(|| host.taken.load(SeqCst) > before + 200);
            host.keeps_sessions.store(round % 3 == 0, SeqCst);
            host.set_mode([Mode::Serve, Mode::Hold, Mode::Swallow, Mode::Mute][round % 4]);
            std::thread::sleep(Duration::from_millis(5));
            drop(server.take());
            host.set_mode(Mode::Serve);
            server = Some(host.start());
        }
    });
    if let Some(status) = status {
        assert!(status.success(), "{status}");
    }
}

#[test]
fn it_notices_an_error_and_a_wrong_byte() {
    let host = Host::new();
    let _server = host.start();
    let fails = |host: &Host| host.errno.store(5, SeqCst);
    let lies = |host: &Host| host.lies.store(true, SeqCst);
    for (name, plant) in [("error", fails as fn(&Host)), ("wrong byte", lies)] {
        let status = run(&host, 30, || {
            let before = host.taken.load(SeqCst);
            eventually(|| host.taken.load(SeqCst) > before + 2000);
            plant(&host);
        });
        if let Some(status) = status {
            assert_eq!(status.code(), Some(1), "{name}");
        }
        host.errno.store(0, SeqCst);
    }
}
