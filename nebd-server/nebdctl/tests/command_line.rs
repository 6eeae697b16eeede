//! What scripts rely on: exit codes, streams, JSON on the last line, generated documentation.

mod fake;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use fake::Fake;

fn nebdctl(socket: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nebdctl"))
        .env_remove("NEBD_SERVER")
        .env("NEBD_SOCKET", socket)
        .args(arguments.split_whitespace())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_str(stdout(output).lines().last().unwrap()).unwrap()
}

#[test]
fn a_missing_server_is_exit_code_3_and_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none");
    for command in ["status --json", "volume list", "bench --volume mem:a"] {
        let output = nebdctl(&socket, command);
        assert_eq!(output.status.code(), Some(3), "{command}");
        assert!(stderr(&output).contains("NEBD_SOCKET"), "{}", stderr(&output));
        assert!(stderr(&output).contains("none.admin"), "{}", stderr(&output));
        assert_eq!(stdout(&output), "");
    }
    // Left over from a server that is gone.
    drop(UnixListener::bind(directory.path().join("none.admin")).unwrap());
    let output = nebdctl(&socket, "status");
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("left over"), "{}", stderr(&output));
}

#[test]
fn a_server_that_does_not_speak_is_exit_code_3() {
    let directory = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(directory.path().join("s.admin")).unwrap();
    let output = nebdctl(&directory.path().join("s"), "status --timeout 1");
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("within 1 s"), "{}", stderr(&output));
}

#[test]
fn a_wrong_command_line_is_exit_code_2() {
    for command in [
        "",
        "volume create file:a",
        "volume create noname --size 1G",
        "volume create file:a --size 1x",
        "volume create file:a --size 1G --block-size 1024",
        "volume create file:a --size 1G --mode 0777",
        "bench --volume mem:a --op sideways",
        "volume import disk.raw",
        "volume import disk.vmdk file:a --format vmdk",
        "volume export file:a disk.raw --format auto",
        "volume export file:a disk.raw --iodepth 0",
        "attach file:a",
        "attach file:a --as scsi",
        "attach file:a --as vhost-user --queues 65",
        "detach",
    ] {
        let output = nebdctl(Path::new("/nonexistent"), command);
        assert_eq!(output.status.code(), Some(2), "{command}");
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn volumes_are_made_listed_resized_and_deleted() {
    let fake = Fake::start();
    let run = |command: &str| nebdctl(fake.socket(), command);
    let made = run("volume create file:a --size 64MiB --owner 5:6 --mode 0640 --json");
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    let volume = json(&made);
    assert_eq!(volume["size_bytes"], 64 << 20);
    assert_eq!((&volume["owner_uid"], &volume["mode"]), (&5.into(), &"0640".into()));

    let again = run("volume create file:a --size 1G");
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("file:a exists"), "{}", stderr(&again));

    let list = run("volume list");
    assert!(stdout(&list).starts_with("VOLUME"), "{}", stdout(&list));
    assert!(stdout(&list).contains("64 MiB"));
    assert_eq!(json(&run("volume list --json"))["volumes"][0]["name"], "file:a");
    assert_eq!(json(&run("volume resize file:a --size 1G --json"))["size_bytes"], 1 << 30);
    assert!(stdout(&run("volume info file:a")).contains("1 GiB"));
    assert_eq!(json(&run("volume delete file:a --json"))["deleted"], true);
    let gone = run("volume info file:a");
    assert_eq!(gone.status.code(), Some(1));
    assert_eq!(json(&run("status --json"))["pid"], std::process::id());
}

#[test]
fn an_attach_listens_at_one_socket_and_speaks_to_the_server_at_another() {
    let fake = Fake::start();
    let run = |before: &Path, options: String| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nebdctl"));
        command.env_remove("NEBD_SOCKET").arg("--socket").arg(before);
        command.args(["attach", "file:a", "--as", "vhost-user", "--socket", "x", "--json"]);
        command.args(options.split_whitespace()).output().unwrap()
    };
    let output = run(fake.socket(), String::new());
    let socket = json(&output)["socket"].as_str().unwrap().to_owned();
    assert!(socket.starts_with('/') && socket.ends_with("/x"), "{socket}");
    let options = format!("--server-socket {}", fake.socket().display());
    assert_eq!(json(&run(Path::new("/nonexistent"), options))["socket"], socket.as_str());
}

#[test]
fn a_path_is_made_absolute() {
    let fake = Fake::start();
    let output = nebdctl(fake.socket(), "volume create file:a --path Cargo.toml --json");
    let path = json(&output)["path"].as_str().unwrap().to_owned();
    assert!(path.starts_with('/') && path.ends_with("/Cargo.toml"), "{path}");
}

#[test]
fn a_call_that_breaks_off_is_made_again_with_the_same_operation_id() {
    let fake = Fake::start_after_broken_connections(2);
    let output = nebdctl(fake.socket(), "volume create file:a --size 1M");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let fake = Fake::start_refusing_first_calls(2);
    let output = nebdctl(fake.socket(), "volume create file:a --size 1M");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let operations = fake.operations();
    assert_eq!(operations.len(), 3);
    assert!(operations.iter().all(|id| id.len() == 16 && *id == operations[0]));
}

#[test]
fn the_help_and_the_man_pages_tell_the_exit_codes() {
    let help = nebdctl(Path::new("/nonexistent"), "--help");
    assert_eq!(help.status.code(), Some(0));
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man1");
    let output = nebdctl(Path::new("/nonexistent"), &format!("man --dir {}", pages.display()));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = std::fs::read_to_string(pages.join("nebdctl.1")).unwrap();
    for text in [stdout(&help), page] {
        assert!(text.contains("cannot be reached") && text.contains("130"), "{text}");
    }
    for page in [
        "nebdctl-bench.1",
        "nebdctl-demo.1",
        "nebdctl-volume-create.1",
        "nebdctl-volume-import.1",
        "nebdctl-volume-export.1",
    ] {
        assert!(pages.join(page).is_file(), "{page}");
    }
}

#[test]
fn completions_are_made_for_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = nebdctl(Path::new("/nonexistent"), &format!("completions {shell}"));
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("unpark"), "{shell}");
    }
}

#[test]
fn a_demo_without_a_server_says_where_it_looked() {
    let output = nebdctl(Path::new("/nonexistent"), "demo --server /nonexistent/nebd-server");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("/nonexistent/nebd-server"), "{}", stderr(&output));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_nebdctl"))
        .args(["completions", "zsh"])
        .stdout(writer)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
}
