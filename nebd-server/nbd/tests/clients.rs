//! The library against clients that are not ours. Each test skips, and says so, where its client
//! is not installed: Debian's `libnbd-bin`, `python3-libnbd`, `qemu-utils`.

mod server;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::Ordering::SeqCst;

use nebd_nbd::negotiate::CloseReason;
use nebd_nbd::{Policy, Sizes, TlsPolicy};
use server::{Disk, Server, Setup};

/// A client, or `None` where there is none.
fn client(name: &str) -> Option<Command> {
    let folders = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&folders).any(|folder| folder.join(name).is_file());
    if found {
        // Waiting for ever would hide a hang.
        let mut command = Command::new("timeout");
        command.args(["120", name]);
        // The distribution's Python has the module that nbdsh is; another one may come first.
        let system = [Path::new("/usr/bin"), Path::new("/bin")].map(Path::to_path_buf);
        let folders = system.into_iter().chain(std::env::split_paths(&folders));
        command.env("PATH", std::env::join_paths(folders).unwrap());
        return Some(command);
    }
    eprintln!("skipped: {name} is not installed");
    None
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

fn fail(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} should fail: {}", text(&output));
    assert_ne!(output.status.code(), Some(124), "{command:?} hung");
    text(&output)
}

/// Runs a Python script in nbdsh; `connect()` and `uri` are there for it.
fn nbdsh(server: &Server, script: &str) -> Option<String> {
    let mut command = client("nbdsh")?;
    let socket = server.socket();
    let prelude = format!(
        "import errno\nsocket = {socket:?}\ndef connect(name='disk'):\n    \
         h.set_export_name(name)\n    h.connect_unix(socket)\n\
         def fails(code, f, *args, **kw):\n    try:\n        f(*args, **kw)\n    \
         except nbd.Error as e:\n        assert e.errno == code, e\n    \
         else:\n        raise AssertionError('no error')\n"
    );
    let script = script.lines().map(|line| line.strip_prefix("        ").unwrap_or(line));
    let script = script.collect::<Vec<_>>().join("\n");
    Some(succeed(command.args(["-c", &prelude, "-c", &script])))
}

fn sparse_file(path: &Path, size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    for (i, byte) in data.iter_mut().enumerate() {
        if (i / 65536) % 3 == 1 {
            *byte = (i % 251) as u8 | 1;
        }
    }
    std::fs::write(path, &data).unwrap();
    data
}

#[test]
fn exports_are_listed_and_described() {
    let disks = vec![Disk::new("disk", 8 << 20), Disk::new("other", 1 << 20).read_only()];
    let server = Server::start(Setup { disks, ..Setup::default() });
    let Some(mut nbdinfo) = client("nbdinfo") else { return };
    let list = succeed(nbdinfo.args(["--list", &server.uri("")]));
    for expected in ["export=\"disk\"", "export=\"other\"", "in memory", "base:allocation"] {
        assert!(list.contains(expected), "{expected}: {list}");
    }
    let Some(mut nbdinfo) = client("nbdinfo") else { return };
    let info = succeed(nbdinfo.args(["--json", &server.uri("disk")]));
    for expected in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 8388608",
        "\"is_read_only\": false",
        "\"is_rotational\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 4194304",
        "\"base:allocation\"",
    ] {
        assert!(info.contains(expected), "{expected}: {info}");
    }
    let Some(mut nbdinfo) = client("nbdinfo") else { return };
    assert!(nbdinfo.args(["--is", "read-only", &server.uri("other")]).status().unwrap().success());
}

#[test]
fn an_export_that_does_not_exist_is_refused() {
    let server = Server::start(Setup::default());
    if let Some(mut nbdinfo) = client("nbdinfo") {
        let error = fail(nbdinfo.arg(server.uri("nothing")));
        assert!(error.contains("nothing"), "{error}");
        // The client left politely, or fell back to an option that has no reply.
        assert_eq!(server.seen().transmissions.load(SeqCst), 0);
    }
    if let Some(mut qemu) = client("qemu-img") {
        let error = fail(qemu.args(["info", &server.uri("nothing")]));
        assert!(error.contains("Requested export not available"), "{error}");
    }
}

#[test]
fn tls_that_is_required_is_asked_for() {
    let policy = Policy { tls: TlsPolicy::Required, ..Policy::default() };
    let server = Server::start(Setup { policy, ..Setup::default() });
    if let Some(mut qemu) = client("qemu-img") {
        let error = fail(qemu.args(["info", &server.uri("disk")]));
        assert!(error.contains("TLS"), "{error}");
    }
    let script = "
        h.set_handshake_flags(0)
        try:
            connect()
        except nbd.Error as e:
            pass
        else:
            raise AssertionError('connected')
        ";
    if nbdsh(&server, script).is_some() {
        // Without fixed newstyle there is no reply that could say so.
        assert!(server.closed().contains(&CloseReason::TlsRequired), "{:?}", server.closed());
    }
    assert_eq!(server.seen().transmissions.load(SeqCst), 0);
}

#[test]
fn tls_that_is_not_offered_is_refused() {
    let server = Server::start(Setup::default());
    let script = "
        h.set_tls(nbd.TLS_REQUIRE)
        try:
            connect()
        except nbd.Error as e:
            assert 'TLS' in str(e), e
        else:
            raise AssertionError('connected')
        ";
    let Some(_) = nbdsh(&server, script) else { return };
    assert_eq!(server.seen().transmissions.load(SeqCst), 0);
    // A client that merely prefers it goes on without.
    nbdsh(
        &server,
        "
        h.set_tls(nbd.TLS_ALLOW)
        connect()
        assert not h.get_tls_negotiated()
        h.shutdown()
        ",
    );
    assert_eq!(server.seen().transmissions.load(SeqCst), 1);
}

#[test]
fn reads_come_in_pieces_with_holes() {
    let server = Server::start(Setup::default());
    let script = "
        connect()
        h.pwrite(b'a' * 8192, 4096)
        h.pwrite(b'b' * 4096, 65536)
        got = []
        def chunk(data, offset, status, error):
            got.append((offset, len(data), {nbd.READ_DATA: 'data', nbd.READ_HOLE: 'hole'}[status]))
        data = h.pread_structured(131072, 0, chunk)
        assert got == [(0, 4096, 'hole'), (4096, 8192, 'data'), (12288, 53248, 'hole'),
                       (65536, 4096, 'data'), (69632, 61440, 'hole')], got
        assert data == bytes(4096) + b'a' * 8192 + bytes(53248) + b'b' * 4096 + bytes(61440)
        got.clear()
        data = h.pread_structured(65536, 1024, chunk, nbd.CMD_FLAG_DF)
        assert got == [(1024, 65536, 'data')], got
        assert data == bytes(3072) + b'a' * 8192 + bytes(53248) + b'b' * 1024
        h.shutdown()
        ";
    if nbdsh(&server, script).is_some() {
        assert_eq!(server.seen().holes_sent.load(SeqCst), 3);
    }
}

#[test]
fn clients_of_long_ago_are_served() {
    // No structured replies; then neither these nor fixed newstyle, with and without the zeroes.
    for setting in [
        "h.set_request_structured_replies(False)",
        "h.set_handshake_flags(0)",
        "h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)",
    ] {
        let server = Server::start(Setup::default());
        let script = format!(
            "
        {setting}
        connect()
        assert not h.get_structured_replies_negotiated()
        assert not h.can_df()
        assert h.get_size() == 8388608
        h.pwrite(b'x' * 512, 1024, nbd.CMD_FLAG_FUA)
        h.zero(4096, 4096)
        h.flush()
        assert h.pread(2048, 0) == bytes(1024) + b'x' * 512 + bytes(512)
        h.set_strict_mode(0)
        fails('EINVAL', h.pread, 512, 8388608)
        fails('EINVAL', h.pread, 100, 0)
        h.shutdown()
        "
        );
        if nbdsh(&server, &script).is_some() {
            assert_eq!(server.seen().fuas.load(SeqCst), 1);
            assert_eq!(server.seen().holes_sent.load(SeqCst), 0);
        }
    }
}

#[test]
fn every_command_and_flag_arrives() {
    let server = Server::start(Setup::default());
    let script = "
        h.add_meta_context('base:allocation')
        connect()
        h.pwrite(b'a' * 65536, 0, nbd.CMD_FLAG_FUA)
        h.zero(4096, 0, nbd.CMD_FLAG_FUA)
        h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
        h.zero(4096, 16384, nbd.CMD_FLAG_FAST_ZERO)
        fails('ENOTSUP', h.zero, 4096, 24576, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
        h.trim(4096, 32768, nbd.CMD_FLAG_FUA)
        h.cache(65536, 0)
        h.flush()
        a = 'a'
        got = []
        def extent(context, offset, entries, error):
            assert context == 'base:allocation'
            got.append((offset, entries))
        h.block_status(65536, 0, extent)
        assert got == [(0, [4096, 3, 12288, 0, 4096, 3, 12288, 0, 4096, 3, 28672, 0])], got
        got.clear()
        h.block_status(65536, 8192, extent, nbd.CMD_FLAG_REQ_ONE)
        assert got == [(8192, [8192, 0])], got
        assert h.pread(4096, 8192) == bytes(4096)
        assert h.pread(4096, 24576) == b'a' * 4096
        h.shutdown()
        ";
    let Some(_) = nbdsh(&server, script) else { return };
    let seen = server.seen();
    let counts = [
        (&seen.writes, 1),
        (&seen.zeroes, 3),
        (&seen.fuas, 3),
        (&seen.no_holes, 2),
        (&seen.fast_zeroes, 2),
        (&seen.trims, 1),
        (&seen.caches, 1),
        (&seen.flushes, 1),
        (&seen.statuses, 2),
    ];
    for (index, (count, expected)) in counts.into_iter().enumerate() {
        assert_eq!(count.load(SeqCst), expected, "{index}: {seen:?}");
    }
}

#[test]
fn broken_rules_have_their_errors_and_the_connection_goes_on() {
    let disks = vec![
        Disk::new("disk", 1 << 20).failing_at(65536 + 512),
        Disk::new("fixed", 1 << 20).read_only(),
        Disk::new("large", 64 << 20).with_sizes(Sizes::new(4096, 4096, 1 << 20).unwrap()),
    ];
    let server = Server::start(Setup { disks, ..Setup::default() });
    let script = "
        h.set_strict_mode(0)
        connect()
        fails('EINVAL', h.pread, 512, 1048576)
        fails('ENOSPC', h.pwrite, b'x' * 1024, 1048576 - 512)
        fails('ENOSPC', h.zero, 1024, 1048576 - 512)
        fails('EINVAL', h.trim, 1024, 1048576 - 512)
        fails('EINVAL', h.pread, 512, 100)
        fails('EINVAL', h.pwrite, b'x' * 100, 0)
        fails('EINVAL', h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
        fails('EINVAL', h.block_status, 512, 0, lambda *a: 0)
        bad = []
        def chunk(data, offset, status, error):
            bad.append((offset, status == nbd.READ_ERROR, error.value))
        fails('EIO', h.pread_structured, 65536, 32768, chunk)
        assert bad == [(66048, True, errno.EIO)], bad
        assert h.pread(512, 0) == bytes(512)
        h.shutdown()
        ";
    if nbdsh(&server, script).is_none() {
        return;
    }
    nbdsh(
        &server,
        "
        h.set_strict_mode(0)
        connect('fixed')
        fails('EPERM', h.pwrite, b'x' * 512, 0)
        fails('EPERM', h.zero, 512, 0)
        fails('EPERM', h.trim, 512, 0)
        assert h.pread(512, 0) == bytes(512)
        h.shutdown()
        ",
    );
    nbdsh(
        &server,
        "
        h.set_strict_mode(0)
        connect('large')
        fails('EINVAL', h.pwrite, bytes(8 << 20), 0)
        fails('EOVERFLOW', h.pread, 8 << 20, 0)
        fails('EOVERFLOW', h.pread, 2 << 20, 0, nbd.CMD_FLAG_DF)
        h.zero(64 << 20, 0)
        assert h.pread(1 << 20, 0) == bytes(1 << 20)
        h.shutdown()
        ",
    );
    assert_eq!(server.seen().transmissions.load(SeqCst), 3);
}

#[test]
fn maps_are_told() {
    let server = Server::start(Setup::default());
    server.disk("disk").write(65536, &[1; 8192]);
    server.disk("disk").write(4 << 20, &[1; 4096]);
    if let Some(mut nbdinfo) = client("nbdinfo") {
        let map = succeed(nbdinfo.args(["--map", &server.uri("disk")]));
        let map: Vec<Vec<&str>> =
            map.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            map,
            [
                vec!["0", "65536", "3", "hole,zero"],
                vec!["65536", "8192", "0", "data"],
                vec!["73728", "4120576", "3", "hole,zero"],
                vec!["4194304", "4096", "0", "data"],
                vec!["4198400", "4190208", "3", "hole,zero"],
            ]
        );
    }
    if let Some(mut qemu) = client("qemu-img") {
        let map = succeed(qemu.args(["map", "--output=json", "-f", "raw", &server.uri("disk")]));
        assert!(
            map.contains("\"start\": 65536, \"length\": 8192, \"depth\": 0")
                && map.contains("\"start\": 4194304, \"length\": 4096, \"depth\": 0"),
            "{map}"
        );
    }
}

#[test]
fn nbdcopy_copies_there_and_back_on_many_connections() {
    copies_there_and_back(None);
}

#[test]
fn nbdcopy_does_not_notice_takeovers() {
    let server = copies_there_and_back(Some(3));
    if let Some(server) = server {
        assert!(server.seen().handovers.load(SeqCst) > 20);
    }
}

fn copies_there_and_back(hand_over_every: Option<u64>) -> Option<Server> {
    let server = Server::start(Setup { hand_over_every, ..Setup::default() });
    let (from, to) = (server.folder().join("from"), server.folder().join("to"));
    let data = sparse_file(&from, 8 << 20);
    let many = ["--connections=4", "--threads=4", "--requests=8", "--request-size=262144"];
    succeed(client("nbdcopy")?.args(many).args(["--flush"]).arg(&from).arg(server.uri("disk")));
    assert!(server.disk("disk").read(0, 8 << 20).unwrap() == data, "what was written");
    succeed(client("nbdcopy")?.args(many).arg(server.uri("disk")).arg(&to));
    assert!(std::fs::read(&to).unwrap() == data, "what was read");
    let seen = server.seen();
    assert_eq!(seen.open_max.load(SeqCst), 4);
    assert!(seen.flushes.load(SeqCst) > 0, "{seen:?}");
    assert!(seen.statuses.load(SeqCst) > 0, "{seen:?}");
    Some(server)
}

#[test]
fn qemu_converts_compares_and_talks() {
    let server = Server::start(Setup::default());
    let from = server.folder().join("from");
    let data = sparse_file(&from, 8 << 20);
    let uri = server.uri("disk");
    let (Some(mut convert), Some(mut compare), Some(mut io)) =
        (client("qemu-img"), client("qemu-img"), client("qemu-io"))
    else {
        return;
    };
    succeed(convert.args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&from).arg(&uri));
    assert!(server.disk("disk").read(0, 8 << 20).unwrap() == data, "what was written");
    assert!(server.seen().zeroes.load(SeqCst) > 0, "{:?}", server.seen());
    let same = succeed(compare.args(["compare", "-f", "raw", "-F", "raw"]).arg(&from).arg(&uri));
    assert!(same.contains("identical"), "{same}");
    let fuas = server.seen().fuas.load(SeqCst);
    let talk = succeed(
        io.args(["-f", "raw", "-t", "none"])
            .args([
                "-c",
                "write -P 0x5a 0 64k",
                "-c",
                "write -f -P 0x5b 64k 4k",
                "-c",
                "flush",
                "-c",
                "write -z -u 8k 4k",
                "-c",
                "write -z 12k 4k",
                "-c",
                "discard 16k 4k",
                "-c",
                "read -P 0x5a 0 8k",
                "-c",
                "read -P 0 8k 12k",
                "-c",
                "read -P 0x5b 64k 4k",
            ])
            .arg(&uri),
    );
    assert!(!talk.contains("failed"), "{talk}");
    let seen = server.seen();
    assert_eq!(seen.fuas.load(SeqCst), fuas + 1, "{seen:?}");
    assert!(seen.trims.load(SeqCst) > 0 && seen.no_holes.load(SeqCst) > 0, "{seen:?}");
    assert!(seen.flushes.load(SeqCst) > 0, "{seen:?}");
}
