//! The C example is a test of servers; here it is tested itself: over a volume in memory it passes,
//! and with each planted fault it fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const FAULTS: [&str; 9] = [
    "read-error",
    "short-read",
    "misplaced-read",
    "refused-write",
    "lost-write",
    "torn-write",
    "misplaced-write",
    "wide-discard",
    "lost-zeroes",
];

fn compile(dir: &Path) -> PathBuf {
    let capi = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = dir.join("verified_io");
    let compiled = Command::new("cc")
        .args(["-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(capi.join("../include"))
        .arg("-o")
        .arg(&program)
        .arg(capi.join("../../examples/c/verified_io.c"))
        .args([capi.join("tests/faulty_nebd.c")])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    program
}

fn run(program: &Path, arguments: &[&str], fault: &str) -> Output {
    // Faulty runs end with the tenth finding, long before their time is up.
    let seconds = if fault.is_empty() { "1" } else { "60" };
    Command::new(program)
        .args(["--blocks", "64", "--seconds", seconds])
        .args(arguments)
        .arg("mem:faulty")
        .env("FAULT", fault)
        .output()
        .unwrap()
}

#[test]
fn the_example_passes_without_and_fails_with_each_fault() {
    if Command::new("cc").arg("--version").output().is_err() {
        println!("SKIPPED: there is no C compiler");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path());
    for arguments in [&[][..], &["--poll"][..]] {
        let passed = run(&program, arguments, "");
        let said = String::from_utf8_lossy(&passed.stdout);
        assert_eq!(passed.status.code(), Some(0), "{said}");
        assert!(said.contains(" 0 errors, 0 mismatches"), "{said}");
    }
    for fault in FAULTS {
        let failed = run(&program, &[], fault);
        assert_eq!(failed.status.code(), Some(1), "{fault} went unnoticed");
    }
}
