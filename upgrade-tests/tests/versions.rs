//! Servers of different versions take over from each other, forwards and back, under load.
//!
//! The base is the commit in `tests/base-commit`: the first with planned takeovers. It differs from
//! what follows in real fields: it knows no `Connections` message of the handover (clients connect
//! again), no `blackout_generation` in a region, and keeps no counters in ledgers.
//!
//! ```text
//!   client   server (and keeper)
//!   head     base ⇄ head          versions_take_over_from_each_other_forwards_and_back
//!   head     base alone           a_client_of_this_version_lives_with_servers_of_the_base
//!   base     head ⇄ base          a_client_of_the_base_lives_with_servers_of_both_versions
//! ```

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{assert_clean, assert_unharmed, build, config, programs};
use nebd_rpc::admin::UpgradeState;
use nebd_upgrade_tests::campaign::{self, Campaign, CampaignConfig, Kill};
use nebd_upgrade_tests::supervisor::{Admin, FenceStore, Host, HostConfig};
use nix::sys::signal::Signal;
use serde_json::Value;

fn git(arguments: &[&str]) -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Programs of the base.
struct Base {
    server: PathBuf,
    /// `upgrade-tests`, whose command `run` is a client that verifies every block.
    client: PathBuf,
}

/// Builds the base, once a target directory; `None` without the history to build it from.
fn base() -> Option<&'static Base> {
    static BASE: OnceLock<Option<Base>> = OnceLock::new();
    let base = BASE.get_or_init(build_base).as_ref();
    if base.is_none() {
        eprintln!(
            "skipped: this checkout has no history to build the base from (git fetch --unshallow)"
        );
    }
    base
}

fn build_base() -> Option<Base> {
    let commit = include_str!("base-commit").trim();
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("base-{}", &commit[..12]));
    let debug = scratch.join("target/debug");
    let base = Base { server: debug.join("nebd-server"), client: debug.join("upgrade-tests") };
    if base.server.exists() && base.client.exists() {
        return Some(base);
    }
    git(&["cat-file", "-e", &format!("{commit}^{{commit}}")])?;
    std::fs::create_dir_all(scratch.join("source")).unwrap();
    let archive = scratch.join("source.tar");
    git(&["archive", "--output", archive.to_str().unwrap(), commit])?;
    let unpacked = Command::new("tar")
        .args(["-xf", archive.to_str().unwrap(), "-C"])
        .arg(scratch.join("source"))
        .status();
    assert!(unpacked.unwrap().success());
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // One invocation: what the two have in common is built once. In a directory of its own: cargo takes
    // crates of two checkouts for the same, and the older files for built already.
    let built = Command::new(cargo)
        .current_dir(scratch.join("source"))
        .args(["build", "--locked", "--features", "nebd-server/test-hooks"])
        .args(["-p", "nebd-server", "--bin", "nebd-server"])
        .args(["-p", "nebd-upgrade-tests", "--bin", "upgrade-tests"])
        .arg("--target-dir")
        .arg(scratch.join("target"))
        .status();
    assert!(built.unwrap().success(), "the base does not build");
    Some(base)
}

/// base → head → base → head, with deaths in between, the clients attached all the time.
#[test]
fn versions_take_over_from_each_other_forwards_and_back() {
    let Some(base) = base() else { return };
    for backend in ["file", "mem", "fence-test"] {
        let head = programs();
        let mut older = config(backend, 3, 1);
        older.programs.server = base.server.clone();
        let mut campaign = Campaign::start(older).unwrap();
        for _ in 0..3 {
            campaign.kill(&Kill::TakeoverBy(head.server.clone())).unwrap();
            campaign.kill(&Kill::SIGKILL).unwrap();
            campaign.kill(&Kill::TakeoverBy(base.server.clone())).unwrap();
            campaign.kill(&Kill::SIGKILL).unwrap();
        }
        campaign.kill(&Kill::TakeoverBy(head.server)).unwrap();
        let summary = campaign.finish();
        assert_unharmed(&summary, 13);
        assert!(summary.kills_counted > 6, "{summary}");
    }
}

/// A host that was left behind while its hypervisors were restarted with a newer library.
#[test]
fn a_client_of_this_version_lives_with_servers_of_the_base() {
    let Some(base) = base() else { return };
    for backend in ["file", "mem", "fence-test"] {
        let mut older = config(backend, 2, 8);
        older.programs.server = base.server.clone();
        let older = CampaignConfig { kinds: vec![Kill::Takeover, Kill::SIGKILL], ..older };
        assert_clean(&campaign::run(older).unwrap(), 8);
    }
}

/// A hypervisor that lives for months, on a host whose servers are replaced and die.
#[test]
fn a_client_of_the_base_lives_with_servers_of_both_versions() {
    let Some(base) = base() else { return };
    let head = programs();
    let store = FenceStore::start(&head.fence_store, &[]).unwrap();
    let config =
        HostConfig::new(&head.server).with_env("NEBD_FENCE_STORE", store.socket().display());
    nebdctl(); // built before there is load
    for backend in ["file", "mem", "fence-test"] {
        let host = Host::start(&config).unwrap();
        let volume = format!("{backend}:old");
        host.admin().unwrap().create(&volume, 16 << 20, 4096).unwrap();
        let client = OldClient::start(base, &host, &volume);
        let mut test = Test { host, client, turn: 0 };
        test.goes_on();
        if backend == "file" {
            test.is_supported_by(&base.server);
            test.is_supported_by(&head.server);
        }
        for _ in 0..3 {
            test.takeover_by(&base.server);
            test.kill();
            test.takeover_by(&head.server);
            test.kill();
        }
        test.client.finish();
    }
}

/// The base's `upgrade-tests run`.
struct OldClient {
    process: Child,
    end: PathBuf,
    _dir: tempfile::TempDir,
}

impl OldClient {
    /// Puts `volume` under load until [`finish`](Self::finish).
    fn start(base: &Base, host: &Host, volume: &str) -> OldClient {
        let dir = tempfile::tempdir().unwrap();
        let end = dir.path().join("end");
        // Its load runs on while it waits for the command that is to do something to the server.
        let wait = "while [ -d \"$DIR\" ] && [ ! -e \"$DIR/end\" ]; do sleep 0.02; done";
        let process = Command::new(&base.client)
            .args(["run", volume, "--json", "--seconds", "1", "--kill-every-ms", "1"])
            .arg("--socket")
            .arg(host.socket())
            .args(["--kill-command", wait])
            .env("DIR", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        OldClient { process, end, _dir: dir }
    }

    /// Has it read every block again, and tell what it found.
    fn finish(mut self) {
        std::fs::write(&self.end, "").unwrap();
        let mut text = String::new();
        let stdout = self.process.stdout.as_mut().unwrap();
        std::io::Read::read_to_string(stdout, &mut text).unwrap();
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}: {text}");
        let report: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        for found in ["errors", "mismatches", "failures"] {
            assert_eq!(report[found], 0, "{text}");
        }
        for done in ["requests", "writes", "blocks_checked"] {
            assert!(report[done].as_u64().unwrap() > 500, "{text}");
        }
        println!("{text}");
    }
}

impl Drop for OldClient {
    fn drop(&mut self) {
        // The shell that waits outlives it, until the directory is gone.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An old client at a host whose servers change.
struct Test {
    // Dropped in this order.
    client: OldClient,
    host: Host,
    turn: u8,
}

/// More than can be in flight when a server is replaced.
const REQUESTS_AFTER: u64 = 64;
const PATIENCE: Duration = Duration::from_secs(60);

impl Test {
    fn admin(&self) -> Admin {
        self.host.admin().unwrap()
    }

    /// The client's requests reach the present server, which has answered them.
    fn goes_on(&mut self) {
        let (admin, server) = (self.admin(), self.host.server_pid().unwrap());
        let mut begun = None;
        self.wait_for("requests of the client", || {
            let status = admin.status().unwrap();
            if status.pid != server.cast_unsigned() {
                return false;
            }
            let Some(session) = status.sessions.first() else { return false };
            session.requests >= *begun.get_or_insert(session.requests) + REQUESTS_AFTER
        });
    }

    fn wait_for(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "no {what}; the log:\n{}", self.host.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn takeover_by(&mut self, binary: &Path) {
        let owner = self.host.server_pid().unwrap();
        self.turn += 1;
        let admin = self.admin();
        admin.start_upgrade(&[self.turn; 16], Some(binary)).unwrap();
        self.wait_for("end of the takeover", || {
            let upgrade = admin.upgrade().unwrap();
            let is_failed = matches!(
                upgrade.state(),
                UpgradeState::Refused | UpgradeState::Failed | UpgradeState::RolledBack
            );
            assert!(!is_failed, "{}; the log:\n{}", upgrade.reason, self.host.log());
            upgrade.state() == UpgradeState::Done
        });
        let server = self.host.wait_for_successor(owner).unwrap();
        assert_eq!(std::fs::read_link(format!("/proc/{server}/exe")).unwrap(), binary);
        self.goes_on();
    }

    fn kill(&mut self) {
        let server = self.host.server_pid().unwrap();
        self.host.signal(server, Signal::SIGKILL).unwrap();
        self.host.wait_for_successor(server).unwrap();
        self.goes_on();
    }

    /// What `nebdctl upgrade --check` says of the client, with this binary as the next server.
    fn is_supported_by(&self, binary: &Path) {
        let server = self.host.server_pid();
        let output = Command::new(nebdctl())
            .args(["upgrade", "--check", "--json", "--binary"])
            .arg(binary)
            .env("NEBD_SOCKET", self.host.socket())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(
            (&report["kind"], &report["state"]),
            (&"check".into(), &"done".into()),
            "{text}"
        );
        let clients = report["clients"].as_array().unwrap();
        assert_eq!(clients.len(), 1, "{text}");
        assert_eq!(clients[0]["client_pid"], self.client.process.id(), "{text}");
        assert_eq!(clients[0]["supported"], true, "{text}");
        assert_eq!(self.host.server_pid(), server, "a check changes nothing");
    }
}

fn nebdctl() -> PathBuf {
    static NEBDCTL: OnceLock<PathBuf> = OnceLock::new();
    NEBDCTL.get_or_init(|| build("nebdctl", &["--bin", "nebdctl"])).clone()
}
