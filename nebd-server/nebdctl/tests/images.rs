//! Disk images into volumes and out of them, against a real keeper and server.

mod server;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use nebd_upgrade_tests::stamp::Dice;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use server::{NEBDCTL, Stage, json};

const MIB: u64 = 1 << 20;

/// A sparse file with random data in random places; returns its bytes.
fn sparse_image(path: &Path, bytes: u64, extents: u64, seed: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut image = vec![0; bytes as usize];
    let file = File::create_new(path).unwrap();
    file.set_len(bytes).unwrap();
    for _ in 0..extents {
        let start = dice.below(bytes) as usize;
        let end = (start + 1 + dice.below(3 * MIB / 2) as usize).min(image.len());
        let part = &mut image[start..end];
        part.fill_with(|| dice.bits() as u8);
        file.write_all_at(part, start as u64).unwrap();
    }
    image
}

fn padded(image: &[u8], bytes: u64) -> Vec<u8> {
    let mut padded = image.to_vec();
    padded.resize(bytes as usize, 0);
    padded
}

fn crc(image: &[u8]) -> String {
    format!("{:08x}", crc32c::crc32c(image))
}

/// The result of a command that succeeds.
fn done(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert_eq!(errors, "", "a successful command has nothing to say on standard error");
    json(output)
}

/// A command that is refused, and says why.
#[track_caller]
fn refused(output: &Output, code: i32, why: &str) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(errors.contains(why), "{errors}");
}

/// No names but those of the stage and of the test.
#[track_caller]
fn nothing_left(stage: &Stage, expected: &[&str]) {
    let mut names: Vec<String> = fs::read_dir(stage.path("."))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| {
            !["nebd.toml", "state", "s", "s.admin", "s.metrics"].contains(&name.as_str())
        })
        .collect();
    names.sort_unstable();
    assert_eq!(names, expected);
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

fn session(stage: &Stage) -> Value {
    json(&stage.run("status --json"))["sessions"][0].clone()
}

fn piped(mut command: Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Feeds a child from a thread of its own.
fn feed(mut stdin: ChildStdin, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    // The child may end before it has taken everything.
    std::thread::spawn(move || drop(stdin.write_all(&bytes)))
}

fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("skipped: qemu-img is not installed");
    }
    found
}

#[test]
fn a_sparse_raw_image_comes_back_as_it_was() {
    let stage = Stage::start();
    let bytes = 96 * MIB + 777;
    let image = sparse_image(&stage.path("a.raw"), bytes, 12, 1);
    let made = done(&stage.run("volume import a.raw file:a --mode 0640 --json"));
    let size = bytes.next_multiple_of(4096);
    assert_eq!((made["bytes"].as_u64(), made["size_bytes"].as_u64()), (Some(bytes), Some(size)));
    assert_eq!((&made["verified"], &made["format"]), (&true.into(), &"raw".into()));
    assert_eq!(made["crc32c"], crc(&image));
    assert!(made["data_bytes"].as_u64() < Some(40 * MIB), "{made}");
    assert!(made["seconds"].as_f64() > Some(0.0) && made["mib_per_s"].as_f64() > Some(0.0));
    let volume = json(&stage.run("volume info file:a --json"));
    assert_eq!((&volume["size_bytes"], &volume["mode"]), (&size.into(), &"0640".into()));

    let image = padded(&image, size);
    for command in ["volume export file:a b.raw --json", "volume export file:a c.raw --iodepth 1"] {
        let output = stage.run(command);
        assert_eq!(output.status.code(), Some(0));
        if command.ends_with("json") {
            let report = done(&output);
            assert_eq!((&report["verified"], &report["bytes"]), (&true.into(), &size.into()));
            assert_eq!(report["crc32c"], crc(&image));
        } else {
            assert!(String::from_utf8_lossy(&output.stdout).contains("verified"));
        }
    }
    for name in ["b.raw", "c.raw"] {
        assert!(fs::read(stage.path(name)).unwrap() == image, "{name}");
        let metadata = fs::metadata(stage.path(name)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(metadata.blocks() * 512 < 40 * MIB, "{name} is not sparse");
    }
    nothing_left(&stage, &["a.raw", "b.raw", "c.raw"]);
}

#[test]
fn a_pipe_of_unknown_length_makes_a_volume_that_fits() {
    let stage = Stage::start();
    // Longer than the volume is made at first, and no whole number of blocks.
    let image = sparse_image(&stage.path("a.raw"), 81 * MIB + 513, 9, 2);
    let mut child = piped(stage.command("volume import - file:a --block-size 512 --json"));
    let feeder = feed(child.stdin.take().unwrap(), image.clone());
    let made = done(&child.wait_with_output().unwrap());
    feeder.join().unwrap();
    let size = (image.len() as u64).next_multiple_of(512);
    assert_eq!((&made["size_bytes"], &made["crc32c"]), (&size.into(), &crc(&image).into()));
    assert_eq!(json(&stage.run("volume info file:a --json"))["size_bytes"], size);

    let output = stage.run("volume export file:a - --json");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == padded(&image, size), "what came through the pipe is wrong");
    // Standard output is the image, so the result is elsewhere.
    let line = String::from_utf8(output.stderr).unwrap();
    let report: Value = serde_json::from_str(line.trim()).unwrap();
    assert_eq!((&report["bytes"], &report["verified"]), (&size.into(), &false.into()));

    // A short one, and one that has a size to keep to.
    for (options, size) in [("", 4096), ("--size 1MiB", MIB)] {
        let mut child = piped(stage.command(&format!("volume import - mem:b {options} --json")));
        feed(child.stdin.take().unwrap(), b"short".to_vec()).join().unwrap();
        let made = done(&child.wait_with_output().unwrap());
        assert_eq!((&made["bytes"], &made["size_bytes"]), (&5.into(), &size.into()));
        assert_eq!(stage.run("volume export mem:b -").stdout, padded(b"short", size));
        assert!(stage.run("volume delete mem:b").status.success());
    }
}

#[test]
fn qcow2_comes_and_goes_through_qemu_img() {
    if !has_qemu_img() {
        return;
    }
    let stage = Stage::start();
    let image = sparse_image(&stage.path("a.raw"), 24 * MIB, 6, 3);
    let qemu_img = |arguments: &str| {
        let mut command = Command::new("qemu-img");
        command.current_dir(stage.path(".")).args(arguments.split_whitespace());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    qemu_img("convert -O qcow2 -c a.raw a.qcow2");
    let made = done(&stage.run("volume import a.qcow2 file:a --json"));
    assert_eq!((&made["format"], &made["crc32c"]), (&"qcow2".into(), &crc(&image).into()));
    assert_eq!((&made["bytes"], &made["verified"]), (&(24 * MIB).into(), &true.into()));
    let mut child = piped(stage.command("volume import - file:b --json"));
    let packed = fs::read(stage.path("a.qcow2")).unwrap();
    feed(child.stdin.take().unwrap(), packed).join().unwrap();
    assert_eq!(done(&child.wait_with_output().unwrap())["crc32c"], crc(&image));

    let report = done(&stage.run("volume export --format qcow2 file:a b.qcow2 --json"));
    assert_eq!((&report["format"], &report["verified"]), (&"qcow2".into(), &true.into()));
    qemu_img("compare -f qcow2 -F raw b.qcow2 a.raw");
    assert!(stage.path("b.qcow2").metadata().unwrap().len() < 16 * MIB);
    let output = stage.run("volume export --format qcow2 file:b -");
    assert_eq!(output.status.code(), Some(0));
    fs::write(stage.path("c.qcow2"), output.stdout).unwrap();
    qemu_img("compare -f qcow2 -F raw c.qcow2 a.raw");

    // Not what is in files that an image points to.
    qemu_img("create -q -f qcow2 -F raw -b a.raw d.qcow2");
    refused(&stage.run("volume import d.qcow2 file:d"), 1, "backing file");
    fs::remove_file(stage.path("d.qcow2")).unwrap();
    refused(&stage.run("volume info file:d"), 1, "does not exist");
    refused(&stage.run("volume import --format qcow2 a.raw file:d"), 1, "no qcow2");
    nothing_left(&stage, &["a.qcow2", "a.raw", "b.qcow2", "c.qcow2"]);
}

#[test]
fn without_qemu_img_the_package_is_named() {
    let stage = Stage::start();
    fs::write(stage.path("a.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    assert!(stage.run("volume create mem:b --size 1MiB").status.success());
    for command in ["volume import a.qcow2 mem:a", "volume export --format qcow2 mem:b b.qcow2"] {
        let output = stage.command(command).env("PATH", "/nonexistent").output().unwrap();
        refused(&output, 1, "qemu-utils");
    }
    nothing_left(&stage, &["a.qcow2"]);
    assert_eq!(json(&stage.run("volume list --json"))["volumes"].as_array().unwrap().len(), 1);
}

#[test]
fn an_import_outlives_its_server() {
    let stage = Stage::start();
    let image = sparse_image(&stage.path("a.raw"), 64 * MIB, 60, 4);
    for volume in ["file:a", "mem:a"] {
        let mut child = piped(stage.command(&format!("volume import - {volume} --json")));
        let mut stdin = child.stdin.take().unwrap();
        let (first, rest) = image.split_at(16 << 20);
        stdin.write_all(first).unwrap();
        stage.until("the import writes", || session(&stage)["bytes_written"].as_u64() > Some(MIB));
        let feeder = feed(stdin, rest.to_vec());
        stage.kill_server();
        stage.kill_server();
        let made = done(&child.wait_with_output().unwrap());
        feeder.join().unwrap();
        assert_eq!((&made["verified"], &made["crc32c"]), (&true.into(), &crc(&image).into()));
        assert!(stage.run(&format!("volume export {volume} -")).stdout == image, "{volume}");
    }
    // Two kills at once may meet one server before it owns anything, which is no generation.
    assert!(json(&stage.run("status --json"))["generation"].as_u64() > Some(2));
}

/// An export that is stopped while it reads, with a part of the volume read.
fn stopped_export(stage: &Stage, size: u64) -> Child {
    for _ in 0..50 {
        let mut child = piped(stage.command("volume export mem:a b.raw --overwrite --json"));
        while child.try_wait().unwrap().is_none() {
            if session(stage)["bytes_read"].as_u64() > Some(0) {
                signal(&child, Signal::SIGSTOP);
                if session(stage)["bytes_read"].as_u64().is_some_and(|bytes| bytes < size) {
                    return child;
                }
                signal(&child, Signal::SIGCONT);
                break;
            }
        }
        child.wait().unwrap();
    }
    panic!("every export was done before it was seen");
}

#[test]
fn an_export_outlives_its_server_and_leaves_nothing_when_it_ends_early() {
    let stage = Stage::start();
    let size = 256 * MIB;
    let image = sparse_image(&stage.path("a.raw"), size, 300, 5);
    done(&stage.run("volume import a.raw mem:a --no-verify --json"));

    let mut child = stopped_export(&stage, size);
    stage.kill_server();
    signal(&child, Signal::SIGCONT);
    stage.until("the export goes on", || {
        let session = session(&stage);
        session["takeovers"].as_u64() > Some(0) || child_is_gone(&child)
    });
    stage.kill_server();
    drop(child.stdin.take());
    let report = done(&child.wait_with_output().unwrap());
    assert_eq!((&report["verified"], &report["crc32c"]), (&true.into(), &crc(&image).into()));
    assert!(fs::read(stage.path("b.raw")).unwrap() == image);

    for (ending, code) in [(Signal::SIGINT, Some(130)), (Signal::SIGKILL, None)] {
        let _ = fs::remove_file(stage.path("b.raw"));
        let mut child = stopped_export(&stage, size);
        let _ = fs::remove_file(stage.path("b.raw"));
        signal(&child, ending);
        signal(&child, Signal::SIGCONT);
        assert_eq!(child.wait().unwrap().code(), code);
        nothing_left(&stage, &["a.raw"]);
    }
}

fn child_is_gone(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z'))
}

#[test]
fn an_import_that_ends_early_removes_the_volume_it_made() {
    let stage = Stage::start();
    let begun = |command: &str| {
        let mut child = piped(stage.command(command));
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&vec![7; 4 << 20]).unwrap();
        stage.until("the import writes", || session(&stage)["bytes_written"].as_u64() > Some(0));
        (child, stdin)
    };
    let (mut child, stdin) = begun("volume import - file:a");
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(stdin);
    refused(&stage.run("volume info file:a"), 1, "does not exist");

    // Longer than it was said to be.
    let mut child = piped(stage.command("volume import - file:a --size 2MiB"));
    let feeder = feed(child.stdin.take().unwrap(), vec![7; 4 << 20]);
    refused(&child.wait_with_output().unwrap(), 1, "larger than the 2 MiB");
    feeder.join().unwrap();
    refused(&stage.run("volume info file:a"), 1, "does not exist");

    // One that was there before stays, and it is told what may be in it.
    assert!(stage.run("volume create file:a --size 8MiB").status.success());
    let (child, stdin) = begun("volume import - file:a");
    signal(&child, Signal::SIGTERM);
    let ended = child.wait_with_output().unwrap();
    refused(&ended, 130, "file:a may hold a part of the image now");
    drop(stdin);
    assert!(stage.run("volume info file:a").status.success());
    nothing_left(&stage, &[]);
}

#[test]
fn data_is_overwritten_only_when_asked_and_then_all_of_it() {
    let stage = Stage::start();
    let small = sparse_image(&stage.path("a.raw"), 5 * MIB + 100, 2, 6);
    for volume in ["file:a", "mem:a"] {
        assert!(stage.run(&format!("volume create {volume} --size 12MiB")).status.success());
        let old = vec![0xee; 12 << 20];
        fs::write(stage.path("old"), &old).unwrap();
        // It is all zeros, so nothing is lost.
        let made = done(&stage.run(&format!("volume import old {volume} --json")));
        assert_eq!(made["data_bytes"], 12 * MIB);
        refused(&stage.run(&format!("volume import a.raw {volume}")), 1, "--overwrite");
        assert!(stage.run(&format!("volume export {volume} -")).stdout == old);

        let made = done(&stage.run(&format!("volume import a.raw {volume} --overwrite --json")));
        assert_eq!((&made["size_bytes"], &made["verified"]), (&(12 * MIB).into(), &true.into()));
        assert_eq!(made["bytes"], small.len());
        assert!(stage.run(&format!("volume export {volume} -")).stdout == padded(&small, 12 * MIB));
    }
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_changed() {
    let stage = Stage::start();
    sparse_image(&stage.path("a.raw"), 2 * MIB, 3, 7);
    fs::write(stage.path("empty"), b"").unwrap();
    assert!(stage.run("volume create mem:a --size 1MiB").status.success());
    refused(&stage.run("volume import a.raw mem:a"), 1, "volume resize mem:a --size 2097152");
    refused(&stage.run("volume import a.raw mem:b --size 1MiB"), 2, "--size 1 MiB");
    refused(&stage.run("volume import empty mem:b"), 1, "is empty");
    refused(&stage.run("volume import none mem:b"), 1, "none");
    refused(&stage.run("volume import state mem:b"), 1, "is a directory");
    refused(&stage.run("volume import a.raw nosuch:b"), 1, "backend");
    refused(&stage.run("volume export mem:b b.raw"), 1, "does not exist");
    refused(&stage.run("volume export mem:a a.raw"), 1, "--overwrite");
    refused(&stage.run("volume export mem:a state"), 1, "is no file");
    refused(&stage.run("volume export mem:a nosuch/b.raw"), 1, "nosuch");
    // Somebody else's.
    let mut bench = stage.command("bench --volume mem:a --seconds 60 --iodepth 1");
    let mut bench = bench.stdout(Stdio::null()).spawn().unwrap();
    stage.until("the volume is attached", || session(&stage)["volume"] == "mem:a");
    fs::write(stage.path("fits"), b"fits").unwrap();
    let (import, export) =
        (stage.run("volume import fits mem:a"), stage.run("volume export mem:a b.raw"));
    bench.kill().unwrap();
    bench.wait().unwrap();
    refused(&import, 1, "mem:a");
    assert_eq!(export.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&export.stderr).contains("attached by 1 session"));
    let volumes = json(&stage.run("volume list --json"))["volumes"].clone();
    assert_eq!(volumes.as_array().unwrap().len(), 1, "{volumes}");
    nothing_left(&stage, &["a.raw", "b.raw", "empty", "fits"]);
}

#[test]
fn a_volume_that_forgets_is_found_out() {
    let stage = Stage::start();
    fs::write(stage.path("a.raw"), vec![1; 3 << 20]).unwrap();
    assert!(stage.run("volume create null:a --size 4MiB").status.success());
    let output = stage.run("volume import a.raw null:a --json");
    refused(&output, 4, "4 of its chunks of 1 MiB differ, the first at byte 0");
    assert_eq!(json(&output)["verified"], false);
    let output = done(&stage.run("volume import a.raw null:a --no-verify --json"));
    assert_eq!(output["verified"], false);
}

#[test]
fn a_reader_that_goes_away_ends_the_export() {
    let stage = Stage::start();
    assert!(stage.run("volume create mem:a --size 8MiB").status.success());
    let mut child = piped(stage.command("volume export mem:a -"));
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4096]).unwrap();
    drop(stdout);
    refused(&child.wait_with_output().unwrap(), 1, "Broken pipe");
    let missing = Command::new(NEBDCTL)
        .args(["--socket", "/nonexistent/s", "volume", "export", "mem:a", "/nonexistent/b"])
        .output();
    refused(&missing.unwrap(), 3, "cannot reach nebd-server");
}
