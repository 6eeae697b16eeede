//! The metrics: they outlive servers, they are told as documented, and nobody can disturb by asking.

mod common;
mod exposition;
#[path = "../backend/tests/common/fuse.rs"]
#[allow(dead_code, reason = "made for the tests of the backend")]
mod fuse;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Client, Server, ask, until};
use exposition::{Family, parse};
use nebd_abi::Op;
use nebd_abi::control::{AttachFlags, Message};
use nebd_rpc::admin::{
    CreateVolumeRequest, GetStatusRequest, LimitVolumeRequest, StartUpgradeRequest, UpgradeKind,
};
use nebd_server::metrics::snapshot::CATALOGUE;

const REQUEST: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

fn socket(server: &Server) -> PathBuf {
    server.dir.path().join("nebd.sock.metrics")
}

/// Head and body of an answer.
fn exchange(mut stream: impl Read + Write, request: &str) -> io::Result<(String, String)> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let parts = answer.split_once("\r\n\r\n");
    let (head, body) = parts.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((head.to_owned(), body.to_owned()))
}

/// The text, if a server is there to tell it.
fn fetch(path: &Path) -> io::Result<String> {
    let (head, body) = exchange(UnixStream::connect(path)?, REQUEST)?;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    Ok(body)
}

fn scrape(server: &Server) -> BTreeMap<String, Family> {
    parse(&until(|| fetch(&socket(server)).ok()))
}

fn value(families: &BTreeMap<String, Family>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(label, value)| ((*label).into(), (*value).into())).collect();
    let mut found = families.values().filter_map(|f| f.samples.get(&(name.into(), labels.clone())));
    *found.next().unwrap_or_else(|| panic!("{name} {labels:?} is missing"))
}

fn requests(server: &Server, volume: &str, op: &str) -> f64 {
    value(&scrape(server), "nebd_volume_requests_total", &[("volume", volume), ("op", op)])
}

#[test]
fn counters_survive_kills_and_the_ends_of_sessions() {
    let server = Server::start("keeper");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    let count = |server: &Server, op| requests(server, "null:a", op);
    for round in 1..=3u32 {
        for _ in 0..100 {
            assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
        }
        assert_eq!(client.io(Op::Write, 4096, 8192), Ok(()));
        assert_eq!(client.io(Op::Flush, 0, 0), Ok(()));
        assert!(client.io(Op::Read, 1 << 40, 4096).is_err());
        let reads = f64::from(round * 101);
        until(|| (count(&server, "read") == reads).then_some(()));
        let before = scrape(&server);
        server.kill_server();
        // However early the successor is asked, it never tells less.
        let path = socket(&server);
        let after = until(|| {
            let families = parse(&fetch(&path).ok()?);
            assert!(value(&families, "nebd_generation", &[]) > f64::from(round));
            Some(families)
        });
        for (name, family) in &before {
            for ((sample, labels), old) in &family.samples {
                let new = after[name].samples.get(&(sample.clone(), labels.clone())).copied();
                if family.kind == "counter" || family.kind == "histogram" {
                    assert!(new >= Some(*old), "{sample}{labels:?} fell from {old} to {new:?}");
                }
            }
        }
        let labels = [("kind", "killed")];
        assert_eq!(value(&after, "nebd_takeovers_total", &labels), f64::from(round));
        assert_eq!(value(&after, "nebd_generation", &[]), f64::from(round + 1));
    }
    let of = |name: &str, op| value(&scrape(&server), name, &[("volume", "null:a"), ("op", op)]);
    assert_eq!(of("nebd_volume_bytes_total", "read"), 300.0 * 4096.0);
    assert_eq!(of("nebd_volume_bytes_total", "write"), 3.0 * 8192.0);
    assert_eq!(of("nebd_volume_requests_total", "flush"), 3.0);
    assert_eq!(of("nebd_volume_errors_total", "read"), 3.0);

    // The session's own counters go on too, and become the volume's with its end.
    assert_eq!(server.status().sessions[0].requests, 309);
    let socket = common::hello(&server.socket());
    let client = Client { socket, ..client };
    client.present(AttachFlags::EXCLUSIVE).unwrap();
    assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
    until(|| server.status().sessions.is_empty().then_some(()));
    assert_eq!(count(&server, "read"), 303.0);
    server.replace_server();
    assert_eq!(count(&server, "read"), 303.0);
    let mut client = Client::attach(&server, "null:a", 2, AttachFlags::EXCLUSIVE).unwrap();
    assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
    until(|| (count(&server, "read") == 304.0).then_some(()));
    let latency = |name| value(&scrape(&server), name, &[("volume", "null:a")]);
    // Those that were refused never went to the storage.
    assert_eq!(latency("nebd_volume_latency_seconds_count"), 300.0 + 3.0 + 3.0 + 1.0);
    assert!(latency("nebd_volume_latency_seconds_sum") > 0.0);
}

#[test]
fn a_planned_takeover_hands_counters_over_and_is_counted() {
    let server = Server::start("keeper");
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    for _ in 0..100 {
        assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
    }
    until(|| (requests(&server, "null:a", "read") == 100.0).then_some(()));
    let request = StartUpgradeRequest {
        operation_id: vec![1; 16].into(),
        kind: UpgradeKind::Upgrade.into(),
        ..Default::default()
    };
    server.admin(async |mut client| client.start_upgrade(request).await).unwrap();
    let path = socket(&server);
    // Whichever of the two tells, it tells no less, and there is always one of them.
    let families = until(|| {
        assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
        let families = parse(&fetch(&path).ok()?);
        let labels = [("volume", "null:a"), ("op", "read")];
        assert!(value(&families, "nebd_volume_requests_total", &labels) >= 100.0);
        let generation = value(&families, "nebd_generation", &[]);
        let resumed = families["nebd_takeover_phase_seconds"]
            .samples
            .iter()
            .any(|((_, labels), _)| labels.get("phase").is_some_and(|phase| phase == "RESUME"));
        (generation == 2.0 && resumed).then_some(families)
    });
    assert_eq!(value(&families, "nebd_takeovers_total", &[("kind", "planned")]), 1.0);
    assert_eq!(value(&families, "nebd_takeovers_total", &[("kind", "killed")]), 0.0);
    let planned = [("kind", "planned")];
    assert_eq!(value(&families, "nebd_blackout_seconds_count", &planned), 1.0);
    assert!(value(&families, "nebd_takeover_last_blackout_seconds", &[]) > 0.0);
    for phase in ["HELLO", "OFFER", "PREPARE", "FREEZE", "FENCE", "RESUME"] {
        let count = value(&families, "nebd_takeover_phase_seconds_count", &[("phase", phase)]);
        assert_eq!(count, 1.0, "{phase}");
    }
    let last = server.status().last_takeover.unwrap();
    assert_eq!((last.kind.as_str(), last.generation), ("planned", 2));
}

#[test]
fn every_metric_is_there_and_documented() {
    let server = Server::start("keeper");
    server.create("null:a");
    server.create("null:b");
    let _client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    server.replace_server();
    until(|| (server.status().sessions.len() == 1).then_some(()));
    let families = scrape(&server);
    let told: Vec<(&str, &str)> =
        families.iter().map(|(name, family)| (name.as_str(), family.kind.as_str())).collect();
    let mut known: Vec<(&str, &str)> =
        CATALOGUE.iter().map(|metric| (metric.name, metric.kind.name())).collect();
    known.sort_unstable();
    assert_eq!(told, known);
    for metric in CATALOGUE {
        for (_, labels) in families[metric.name].samples.keys() {
            let mut wanted = metric.labels.to_vec();
            wanted.sort_unstable();
            let labels: Vec<&String> = labels.keys().filter(|label| *label != "le").collect();
            assert_eq!(labels, wanted, "{}", metric.name);
        }
    }
    let clients = [("version", "raw"), ("layout", "1")];
    assert_eq!(value(&families, "nebd_client_info", &clients), 1.0);
    assert_eq!(value(&families, "nebd_oldest_client_layout", &[]), 1.0);
    assert_eq!(value(&families, "nebd_sessions", &[]), 1.0);
    for (volume, sessions) in [("null:a", 1.0), ("null:b", 0.0)] {
        let found = value(&families, "nebd_volume_sessions", &[("volume", volume)]);
        assert_eq!(found, sessions);
    }
    // A table row of the documentation: | `name` | kind | labels | text |.
    let docs = std::fs::read_to_string(docs("operations.md")).unwrap();
    let row = |line: &str| -> Option<Vec<String>> {
        let cells: Vec<&str> = line.strip_prefix("| `nebd_")?.split('|').map(str::trim).collect();
        let name = format!("nebd_{}", cells[0].trim_end_matches('`'));
        Some(vec![name, cells[1].into(), cells[2].replace('`', "")])
    };
    let documented: Vec<Vec<String>> = docs.lines().filter_map(row).collect();
    let known: Vec<Vec<String>> = CATALOGUE
        .iter()
        .map(|m| vec![m.name.into(), m.kind.name().into(), m.labels.join(", ")])
        .collect();
    assert_eq!(documented, known);

    promtool(&until(|| fetch(&socket(&server)).ok()));
}

fn docs(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file)
}

fn promtool(text: &str) {
    let check = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .spawn();
    let Ok(mut check) = check else { return skip("promtool is not installed") };
    check.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(check.wait().unwrap().success());
}

#[test]
fn alerts_ask_for_metrics_that_there_are() {
    let alerts = std::fs::read_to_string(docs("alerts.yml")).unwrap();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words: Vec<&str> = alerts
        .lines()
        .filter(|line| line.trim_start().starts_with("expr:"))
        .flat_map(|line| line.split(|c| !is_word(c)))
        .filter(|word| word.starts_with("nebd_"))
        .collect();
    assert!(words.len() > 5, "{words:?}");
    for word in words {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end));
        let known = |name: &str| CATALOGUE.iter().any(|metric| metric.name == name);
        assert!(known(word) || base.is_some_and(known), "{word}");
    }
}

#[test]
fn a_stall_and_its_end_are_told() {
    let Some(mount) = fuse::Mount::new(1 << 20, false) else { return };
    let server = Server::start_with("run", "[ring]\nstall_alarm_ms = 300\n");
    let request = CreateVolumeRequest {
        name: "file:slow".into(),
        path: mount.file().display().to_string(),
        ..Default::default()
    };
    server.admin(async |mut client| client.create_volume(request).await).unwrap();
    let mut client = Client::attach(&server, "file:slow", 1, AttachFlags::EXCLUSIVE).unwrap();
    let get = |name| value(&scrape(&server), name, &[("volume", "file:slow")]);
    assert_eq!(client.io(Op::Write, 0, 4096), Ok(()));
    assert_eq!(get("nebd_oldest_request_seconds"), 0.0);
    mount.control.state().holds_writes = true;
    client.submit(0, Op::Write, 0, 4096);
    client.submit(1, Op::Write, 8192, 4096);
    until(|| (get("nebd_volume_stalled_requests") == 2.0).then_some(()));
    assert!(get("nebd_oldest_request_seconds") >= 0.3);
    assert_eq!((get("nebd_volume_in_flight"), get("nebd_volume_stalls_total")), (2.0, 2.0));
    let status = server
        .admin(async |mut client| client.get_status(GetStatusRequest { counters: true }).await)
        .unwrap()
        .into_inner();
    assert_eq!((status.sessions[0].stalled, status.volumes[0].stalled), (2, 2));
    assert!(status.volumes[0].oldest_request_ms >= 300);
    assert_eq!(status.volumes[0].counters.as_ref().unwrap().stalls, 2);
    mount.control.release();
    client.reap();
    client.reap();
    until(|| (get("nebd_volume_stalled_requests") == 0.0).then_some(()));
    assert_eq!(get("nebd_oldest_request_seconds"), 0.0);
    assert_eq!((get("nebd_volume_in_flight"), get("nebd_volume_stalls_total")), (0.0, 2.0));
    assert_eq!(ask(&client.socket, &Message::Detach, &[]), Message::Done);
}

#[test]
fn what_limits_hold_back_is_counted() {
    let server = Server::start("run");
    server.create("null:a");
    let limit = LimitVolumeRequest { name: "null:a".into(), iops: Some(50), ..Default::default() };
    server.admin(async |mut client| client.limit_volume(limit).await).unwrap();
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    for _ in 0..6 {
        assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
    }
    let families = scrape(&server);
    let get = |name| value(&families, name, &[("volume", "null:a")]);
    assert!(get("nebd_volume_throttled_total") >= 5.0);
    assert!(get("nebd_volume_throttled_seconds_total") >= 0.08);
}

#[test]
fn the_endpoint_speaks_http_at_a_socket_that_is_not_for_everybody() {
    let server = Server::start("run");
    let path = socket(&server);
    until(|| fetch(&path).ok());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let send = |request: &str| exchange(UnixStream::connect(&path).unwrap(), request).unwrap();
    for (request, status) in [
        ("GET /metrics HTTP/1.0\r\n\r\n", "200"),
        ("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "200"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let (head, _) = send(request);
        assert_eq!(head.split(' ').nth(1), Some(status), "{request:?}: {head}");
    }
    assert_eq!(send("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").1, "");
}

/// A port that nobody had a moment ago.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn metrics_are_told_over_tcp_where_configured_and_by_the_successor_too() {
    let address = free_port();
    let config = format!("[metrics]\nlisten = \"{address}\"\n");
    let server = Server::start_with("keeper", &config);
    let fetch = || parse(&exchange(TcpStream::connect(address).ok()?, REQUEST).ok()?.1).into();
    let generation = |families: &BTreeMap<String, Family>| value(families, "nebd_generation", &[]);
    assert_eq!(generation(&until(fetch)), 1.0);
    server.replace_server();
    until(|| (generation(&fetch()?) == 2.0).then_some(()));
}

/// Either kind of connection, without an answer for now.
trait Stream: Read + Write {
    fn limit(&self);
}

impl Stream for UnixStream {
    fn limit(&self) {
        self.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    }
}

impl Stream for TcpStream {
    fn limit(&self) {
        self.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    }
}

#[test]
fn hostile_connections_disturb_nobody() {
    let address = free_port();
    let server = Server::start_with("run", &format!("[metrics]\nlisten = \"{address}\"\n"));
    server.create("null:a");
    let mut client = Client::attach(&server, "null:a", 1, AttachFlags::EXCLUSIVE).unwrap();
    let path = socket(&server);
    until(|| fetch(&path).ok());
    until(|| TcpStream::connect(address).ok());
    let before = server.descriptors();

    let unix = || UnixStream::connect(&path).map(|s| Box::new(s) as Box<dyn Stream>);
    let tcp = || TcpStream::connect(address).map(|s| Box::new(s) as Box<dyn Stream>);
    for connect in [&unix as &dyn Fn() -> io::Result<Box<dyn Stream>>, &tcp] {
        // A head that never ends is cut off.
        let mut endless = connect().unwrap();
        endless.limit();
        let mut head = b"GET /metrics HTTP/1.1\r\n".to_vec();
        head.extend(b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n".repeat(1000));
        let mut sent = 0;
        while endless.write_all(&head).is_ok() {
            sent += head.len();
            assert!(sent < 8 << 20, "it takes whatever comes");
        }
        // Many that begin and never go on, and one among them that asks.
        let mut slow = Vec::new();
        for k in 0..1000 {
            let Ok(mut stream) = connect() else { continue };
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHo");
            slow.push(stream);
            if k % 100 == 0 {
                assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
                until(|| exchange(connect().ok()?, REQUEST).ok());
            }
        }
        assert!(server.descriptors() < before + 200, "connections without bounds");
        // Many that ask and do not read.
        let asked: Vec<_> = (0..200)
            .filter_map(|_| {
                let mut stream = connect().ok()?;
                stream.write_all(REQUEST.as_bytes()).ok()?;
                Some(stream)
            })
            .collect();
        assert_eq!(client.io(Op::Read, 0, 4096), Ok(()));
        until(|| exchange(connect().ok()?, REQUEST).ok());
        assert_eq!(server.status().sessions.len(), 1);
        drop((slow, asked));
    }
    // Those that did not leave by themselves are shown out.
    let lasting = UnixStream::connect(&path).unwrap();
    lasting.limit();
    let mut rest = Vec::new();
    let _ = (&lasting).read_to_end(&mut rest);
    until(|| (server.descriptors() <= before + 2).then_some(()));
}
