//! A server that another one starts, to be followed by it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use nebd_abi::host::{DeathCause, HostPage};
use nebd_keeper::notify::Notifier;

use crate::server::{Server, listen_privately};

pub fn run(state_dir: PathBuf) -> ExitCode {
    let stdin = std::io::stdin();
    let receive = || nebd_abi::socket::receive(stdin.as_fd()).unwrap();
    // Its parent was refused, or is dead.
    let Some(held) = receive() else { return ExitCode::from(6) };
    let [client, admin, probe, life, host] = held.fds.try_into().unwrap();
    let mut store = BTreeMap::new();
    while let Some(packet) = receive() {
        let name = String::from_utf8(packet.bytes).unwrap();
        store.insert(name, packet.fds.into_iter().next().unwrap());
    }
    let page = HostPage::open(host).unwrap();
    let server = Arc::new(Server {
        client,
        admin,
        probe,
        life,
        cause: DeathCause::Unknown,
        generation: page.generation().0.into(),
        page,
        store: Mutex::new(store),
        notifier: Arc::new(Notifier::from_env().unwrap()),
        standby: false,
        had_predecessor: false,
        private: listen_privately(&state_dir),
        state_dir,
        child: Mutex::new(None),
        frozen: true.into(),
    });
    server.serve()
}
