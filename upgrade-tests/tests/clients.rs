//! Clients that die, freeze, or write nonsense cost the server nothing but their own session.

mod common;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use common::{assert_unharmed, config};
use nebd_abi::control::{AttachFlags, Message};
use nebd_abi::layout::{Geometry, LayoutVersion, PAGE, RegionParams, SessionId};
use nebd_abi::region::Region;
use nebd_abi::ring::{Buffer, ClientSubmit, Submission};
use nebd_abi::{Op, OpFlags, socket};
use nebd_upgrade_tests::campaign::{Campaign, Kill};
use nebd_upgrade_tests::stamp::Dice;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::EventfdFlags;

/// A neighbour under verified load, on a server of its own.
fn neighbour() -> Campaign {
    let campaign = Campaign::start(config("file", 1, 0)).unwrap();
    for name in ["file:guest", "file:other"] {
        campaign.host().admin().unwrap().create(name, 8 << 20, 4096).unwrap();
    }
    campaign
}

/// The neighbour goes on: it completes a good many more requests, and nothing is wrong.
fn assert_goes_on(campaign: &Campaign, after: &str) {
    let load = campaign.load().unwrap();
    let goal = load.completions() + 300;
    let went_on = campaign
        .host()
        .wait_for("the neighbour's IO", |_| load.completions() >= goal || load.problems() > 0);
    assert!(went_on.is_ok(), "after {after}: {went_on:?}");
    assert_eq!(load.problems(), 0, "after {after}");
}

fn sessions_of(campaign: &Campaign, volume: &str) -> usize {
    let status = campaign.host().admin().unwrap().status().unwrap();
    status.sessions.iter().filter(|session| session.volume == volume).count()
}

/// A client process with verified load on `volume`.
fn client(campaign: &Campaign, volume: &str, seconds: u64) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_upgrade-tests"))
        .args(["run", volume, "--seconds", &seconds.to_string(), "--socket"])
        .arg(campaign.host().socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let attached = campaign.host().wait_for("the client's session", |_| {
        let status = campaign.host().admin().unwrap().status().unwrap();
        status.sessions.iter().any(|session| session.volume == volume && session.requests > 100)
    });
    attached.unwrap();
    child
}

#[test]
fn a_client_that_dies_leaves_nothing_behind() {
    let campaign = neighbour();
    let server = campaign.host().server_pid();
    for round in 0..5 {
        let mut child = client(&campaign, "file:guest", 60);
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = campaign
            .host()
            .wait_for("the end of its session", |_| sessions_of(&campaign, "file:guest") == 0);
        gone.unwrap();
        assert_goes_on(&campaign, &format!("death {round}"));
    }
    assert_eq!(campaign.host().server_pid(), server, "the server was replaced");
    assert_unharmed(&campaign.finish(), 0);
}

#[test]
fn a_client_that_dies_together_with_the_server_leaves_nothing_behind() {
    let mut campaign = neighbour();
    let mut child = client(&campaign, "file:guest", 60);
    let victim = campaign.host().server_pid().unwrap();
    campaign.host().signal(victim, Signal::SIGKILL).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    campaign.host().wait_for_successor(victim).unwrap();
    let gone = campaign
        .host()
        .wait_for("the end of its session", |_| sessions_of(&campaign, "file:guest") == 0);
    gone.unwrap();
    campaign.kill(&Kill::SIGKILL).unwrap();
    assert_goes_on(&campaign, "two deaths");
    assert_unharmed(&campaign.finish(), 1);
}

#[test]
fn a_client_that_freezes_holds_back_itself_alone_and_goes_on_later() {
    let mut campaign = neighbour();
    let mut child = client(&campaign, "file:guest", 3);
    let pid = Pid::from_raw(child.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    assert_goes_on(&campaign, "the freeze");
    // The server dies meanwhile, twice.
    campaign.kill(&Kill::SIGKILL).unwrap();
    campaign.kill(&Kill::SIGKILL).unwrap();
    kill(pid, Signal::SIGCONT).unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "the frozen client's check:\n{text}");
    assert_unharmed(&campaign.finish(), 2);
}

/// A session made by hand, out of the bare shared bytes.
struct Hostile {
    socket: OwnedFd,
    region: Arc<Region>,
    kick: OwnedFd,
    _call: OwnedFd,
}

const GEOMETRY: Geometry =
    Geometry { queue_count: 1, queue_depth: 32, iovecs_per_slot: 4, arena_size: 64 * PAGE };

impl Hostile {
    fn attach(server: &Path, volume: &str, dice: &mut Dice) -> Hostile {
        let mut session = SessionId([0; 16]);
        session.0[..8].copy_from_slice(&dice.bits().to_le_bytes());
        // The session of a process before this one, with the same dice, may not have ended yet.
        session.0[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        let params = RegionParams {
            version: LayoutVersion::CURRENT,
            session,
            geometry: GEOMETRY,
            volume: volume.parse().unwrap(),
            client_pid: std::process::id(),
            client_version: "hostile".into(),
        };
        let region = Arc::new(Region::create(params).unwrap());
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (kick, call) = (event(), event());
        let socket = socket::connect(server).unwrap();
        let hello = Message::Hello {
            layout_min: 1,
            layout_max: 1,
            features: 0,
            pid: std::process::id(),
            version: "hostile".into(),
        };
        ask(&socket, &hello, &[]);
        let attach = Message::Attach {
            session,
            flags: AttachFlags::default(),
            queue_count: 1,
            incarnation: 0,
            volume: volume.parse().unwrap(),
        };
        let fds = [region.memory().fd(), kick.as_fd(), call.as_fd()];
        let answer = ask(&socket, &attach, &fds);
        assert!(matches!(answer, Some(Message::Attached(_))), "{answer:?}");
        Hostile { socket, region, kick, _call: call }
    }

    /// Proper requests, so that there is something to be spoiled.
    fn submit(&self, dice: &mut Dice) {
        let queue = self.region.queue(0).unwrap();
        let mut submit = ClientSubmit::new(queue);
        for slot in 0..GEOMETRY.queue_depth {
            let buffers = [Buffer { memory: 0, length: 4096, offset: u64::from(slot) * PAGE }];
            let op = if dice.percent(50) { Op::Read } else { Op::Write };
            let offset = dice.below(2048) * 4096;
            let request =
                Submission { op, flags: OpFlags::NONE, offset, length: 4096, buffers: &buffers };
            submit.submit(slot, &request);
        }
        self.kick();
    }

    fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Random words over every shared word before the arena: header, rings, slots, iovecs.
    fn scribble(&self, dice: &mut Dice, words: u64) {
        let end = GEOMETRY.arena_offset();
        for _ in 0..words {
            let at = dice.below(end / 8) * 8;
            let value = match dice.below(5) {
                0 => dice.bits(),
                1 => u64::MAX,
                2 => dice.below(64),
                3 => dice.bits() & dice.bits() & dice.bits(),
                _ => 1 << dice.below(64),
            };
            // SAFETY: an aligned word inside the region, which consists of atomics up to the arena.
            let word = unsafe { self.region.memory().atomics::<AtomicU64>(at) }.unwrap();
            word.store(value, Relaxed);
        }
        self.kick();
    }
}

fn ask(
    socket: &OwnedFd,
    message: &Message,
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> Option<Message> {
    socket::send(socket, &message.encode(1), fds).ok()?;
    let packet = socket::receive(socket).ok()??;
    Message::decode(&packet.bytes).ok().map(|(_, message)| message)
}

/// The server ends a session whose process lives only if the region breaks a rule, or if it is asked
/// to: so the hostile clients have a process of their own, and with its end all of them must go.
const HOSTILE_SOCKET: &str = "NEBD_TEST_HOSTILE_SOCKET";

#[test]
#[ignore = "the child process of the next test"]
fn hostile_process() {
    let Some(server) = std::env::var_os(HOSTILE_SOCKET) else { return };
    let mut dice = Dice::new(99);
    for _ in 0..120 {
        let hostile = Hostile::attach(server.as_ref(), "file:guest", &mut dice);
        hostile.submit(&mut dice);
        for _ in 0..12 {
            let words = 1 + dice.below(400);
            hostile.scribble(&mut dice, words);
            if dice.percent(30) {
                hostile.submit(&mut dice);
            }
        }
        if dice.percent(50) {
            // Give the server a moment to meet it; it may also meet the disconnect first.
            std::thread::sleep(Duration::from_millis(dice.below(4)));
        }
    }
}

#[test]
fn random_bytes_over_every_shared_word_reach_nobody_else() {
    let campaign = neighbour();
    let server = campaign.host().server_pid();
    for round in 0..3 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hostile_process", "--ignored"])
            .env(HOSTILE_SOCKET, campaign.host().socket())
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        assert_goes_on(&campaign, &format!("hostile clients, round {round}"));
    }
    assert_eq!(campaign.host().server_pid(), server, "the server was replaced");
    let gone = campaign
        .host()
        .wait_for("the end of all hostile sessions", |_| sessions_of(&campaign, "file:guest") == 0);
    let status = campaign.host().admin().unwrap().status().unwrap();
    gone.unwrap_or_else(|error| panic!("{error}\n{:#?}", status.sessions));
    assert_unharmed(&campaign.finish(), 0);
}

#[test]
fn a_region_full_of_nonsense_does_not_harm_the_successor() {
    let mut campaign = neighbour();
    let mut dice = Dice::new(7);
    for _ in 0..6 {
        let hostile = Hostile::attach(campaign.host().socket(), "file:guest", &mut dice);
        hostile.submit(&mut dice);
        hostile.scribble(&mut dice, 20_000);
        // The successor finds the region in the store, in whatever state.
        campaign.kill(&Kill::SIGKILL).unwrap();
        hostile.scribble(&mut dice, 20_000);
        assert_goes_on(&campaign, "a takeover of nonsense");
    }
    assert_unharmed(&campaign.finish(), 6);
}

#[test]
fn random_packets_on_the_control_socket_harm_nobody() {
    let campaign = neighbour();
    let server = campaign.host().server_pid();
    let mut dice = Dice::new(5);
    for _ in 0..200 {
        let hostile = Hostile::attach(campaign.host().socket(), "file:other", &mut dice);
        for _ in 0..8 {
            let mut packet = match dice.below(3) {
                0 => Message::Resize { operation: [7; 16], size: dice.bits() }.encode(dice.bits()),
                1 => Message::RegisterMemory { memory: dice.bits() as u32 }.encode(3),
                _ => Message::Ping.encode(dice.bits()),
            };
            for _ in 0..dice.below(4) {
                let at = dice.below(packet.len() as u64) as usize;
                packet[at] = dice.bits() as u8;
            }
            packet.truncate(packet.len() - dice.below(packet.len() as u64 / 2) as usize);
            let fds = [hostile.region.memory().fd()];
            let sent = &fds[..dice.below(2) as usize];
            if socket::send(&hostile.socket, &packet, sent).is_err() {
                break; // The server has had enough of it.
            }
        }
    }
    assert_goes_on(&campaign, "random packets");
    assert_eq!(campaign.host().server_pid(), server, "the server was replaced");
    assert_unharmed(&campaign.finish(), 0);
}
