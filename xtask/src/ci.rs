//! `cargo xtask ci`: the steps in order, up to the first failure.
//!
//! The output of each passes through untouched. What cannot run on a machine says `SKIPPED` and
//! why, and says it again at the end.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::c_example::{self, CExampleArgs};
use crate::cargo::{self, Profile, cargo, cargo_nightly};
use crate::curve_example;
use crate::guests::{self, GuestsArgs};
use crate::hypervisors::{self, HypervisorsArgs};
use crate::systemd::{self, GuestArgs};

/// Which steps.
#[derive(Args)]
pub struct CiArgs {
    /// Run only these steps.
    #[arg(long, value_name = "STEP")]
    only: Vec<String>,
    /// Leave these steps out.
    #[arg(long, value_name = "STEP")]
    skip: Vec<String>,
    /// Print the names of the steps.
    #[arg(long)]
    list: bool,
    /// Seconds for each fuzz target.
    #[arg(long, default_value_t = 20)]
    fuzz_seconds: u32,
}

/// Whether a step ran.
enum Ran {
    Yes,
    No(String),
}

struct Step {
    name: &'static str,
    run: fn(&CiArgs) -> Result<Ran>,
}

const fn step(name: &'static str, run: fn(&CiArgs) -> Result<Ran>) -> Step {
    Step { name, run }
}

/// The cheap ones first; those that need another toolchain or target directory last.
const STEPS: [Step; 17] = [
    step("packages", packages),
    step("fmt", fmt),
    step("tidy", tidy),
    step("systemd", systemd),
    step("clippy", clippy),
    step("clippy-test-hooks", clippy_test_hooks),
    step("test", test),
    step("crash-tests", crash_tests),
    step("c-example", c_example),
    step("curve-example", curve_example),
    step("hypervisors", hypervisors),
    step("guests", guests),
    step("systemd-guest", systemd_guest),
    step("loom", loom),
    step("address-sanitizer", address_sanitizer),
    step("fuzz", fuzz),
    step("docs", docs),
];

/// What tests run, and the Debian package that has it.
const PACKAGES: [(&str, &str); 9] = [
    ("cc", "gcc"),
    ("c++", "g++"),
    ("readelf", "binutils"),
    ("pkg-config", "pkg-config"),
    ("mkfs.ext4", "e2fsprogs"),
    ("strace", "strace"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdsh", "python3-libnbd"),
    // Without systemd-sysv: nothing makes it an init here.
    ("systemd-analyze", "systemd"),
];

/// Runs the chosen steps; fails with the name of the one that failed.
pub fn run(args: &CiArgs) -> Result<()> {
    for name in args.only.iter().chain(&args.skip) {
        if !STEPS.iter().any(|step| step.name == name) {
            bail!("there is no step {name}; --list prints them");
        }
    }
    if args.list {
        STEPS.iter().for_each(|step| println!("{}", step.name));
        return Ok(());
    }
    let is_chosen = |name: &str| {
        let named = |names: &[String]| names.iter().any(|other| other == name);
        (args.only.is_empty() || named(&args.only)) && !named(&args.skip)
    };
    let chosen: Vec<&Step> = STEPS.iter().filter(|step| is_chosen(step.name)).collect();

    let begin = Instant::now();
    let mut skipped = Vec::new();
    for (index, step) in chosen.iter().enumerate() {
        banner(&format!("{}/{} {}", index + 1, chosen.len(), step.name));
        let step_begin = Instant::now();
        let ran = (step.run)(args).with_context(|| format!("ci step {} failed", step.name))?;
        if let Ran::No(why) = ran {
            println!("SKIPPED {}: {why}", step.name);
            skipped.push(format!("{}: {why}", step.name));
        }
        println!("[{}: {:.1} s]", step.name, step_begin.elapsed().as_secs_f64());
    }
    let total = begin.elapsed().as_secs();
    banner(&format!("passed in {} min {} s", total / 60, total % 60));
    skipped.iter().for_each(|what| println!("SKIPPED {what}"));
    Ok(())
}

fn banner(text: &str) {
    println!("\n==== {text} {}", "=".repeat(72_usize.saturating_sub(text.len())));
}

/// Installs Debian packages and toolchain components that are missing.
fn packages(_: &CiArgs) -> Result<Ran> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let probe = cargo().args([subcommand, "--version"]).output()?;
        if !probe.status.success() {
            cargo::run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(program, _)| !is_on_machine(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(Ran::Yes);
    }
    if !cargo::is_installed("apt-get") || !rustix::process::geteuid().is_root() {
        return Ok(Ran::No(format!("no root with apt-get to install {}", missing.join(", "))));
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let install = || {
        let mut command = apt();
        command.args(["install", "-y", "--no-install-recommends"]).args(&missing);
        command
    };
    // The lists of a fresh image are empty, those of an old one stale.
    if cargo::run(&mut install()).is_err() {
        cargo::run(apt().arg("update"))?;
        cargo::run(&mut install())?;
    }
    Ok(Ran::Yes)
}

/// File-system tools stand in sbin, which is not on every path.
fn is_on_machine(program: &str) -> bool {
    let in_sbin =
        ["/sbin", "/usr/sbin"].iter().any(|dir| std::path::Path::new(dir).join(program).is_file());
    in_sbin || cargo::is_installed(program)
}

fn fmt(_: &CiArgs) -> Result<Ran> {
    cargo::run(cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Ran::Yes)
}

fn tidy(_: &CiArgs) -> Result<Ran> {
    crate::tidy::run(&crate::repo_root())?;
    Ok(Ran::Yes)
}

fn clippy(_: &CiArgs) -> Result<Ran> {
    cargo::run(
        cargo()
            .args(["clippy", "--locked", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )?;
    Ok(Ran::Yes)
}

fn clippy_test_hooks(_: &CiArgs) -> Result<Ran> {
    cargo::run(cargo().args(["clippy", "--locked", "--workspace", "--all-targets"]).args([
        "--features",
        "test-hooks",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(Ran::Yes)
}

fn test(_: &CiArgs) -> Result<Ran> {
    // The programs first: tests of other crates start them.
    cargo::run(cargo().args(["build", "--locked", "-p", "nebd-server", "-p", "nebdctl"]))?;
    let others = ["test", "--locked", "--workspace", "--exclude", "nebd-upgrade-tests"];
    cargo::run(cargo().args(others))?;
    Ok(Ran::Yes)
}

/// Those that kill servers. They build a server with failpoints and the fence-test backend, and
/// keep a copy of it under another name.
fn crash_tests(_: &CiArgs) -> Result<Ran> {
    // Random walks over takeovers with one of the ring's rules off must notice.
    let walks = ["test", "--locked", "-p", "nebd-abi", "--features", "test-hooks"];
    cargo::run(cargo().args(walks).args(["--test", "takeover"]))?;
    cargo::run(cargo().args(["test", "--locked", "-p", "nebd-upgrade-tests"]))?;
    // What stands in the target directory afterwards is a server without failpoints again.
    cargo::run(cargo().args(["build", "--locked", "-p", "nebd-server", "-p", "nebdctl"]))?;
    Ok(Ran::Yes)
}

fn c_example(_: &CiArgs) -> Result<Ran> {
    c_example::run(&CExampleArgs { seconds: 5, kills: 5, profile: Profile::Dev, no_run: false })?;
    Ok(Ran::Yes)
}

fn curve_example(_: &CiArgs) -> Result<Ran> {
    let args = CExampleArgs { seconds: 5, kills: 5, profile: Profile::Dev, no_run: false };
    curve_example::run(&args)?;
    Ok(Ran::Yes)
}

fn hypervisors(_: &CiArgs) -> Result<Ran> {
    let args = HypervisorsArgs { guest_seconds: 12, profile: Profile::Dev };
    Ok(match hypervisors::run(&args)? {
        Some(reason) => Ran::No(reason),
        None => Ran::Yes,
    })
}

/// A bounded part of what `upgrade-tests guests` can do. Like the tests that kill servers, it builds a
/// server with failpoints.
fn guests(_: &CiArgs) -> Result<Ran> {
    let reason = guests::run(&GuestsArgs::bounded())?;
    cargo::run(cargo().args(["build", "--locked", "-p", "nebd-server", "-p", "nebdctl"]))?;
    Ok(reason.map_or(Ran::Yes, Ran::No))
}

fn systemd(_: &CiArgs) -> Result<Ran> {
    Ok(match systemd::units::verify()? {
        Some(reason) => Ran::No(reason),
        None => Ran::Yes,
    })
}

fn systemd_guest(_: &CiArgs) -> Result<Ran> {
    let args = GuestArgs { profile: Profile::Dev, patience: 420, programs: None };
    Ok(match systemd::run_guest(&args)? {
        Some(reason) => Ran::No(reason),
        None => Ran::Yes,
    })
}

fn loom(_: &CiArgs) -> Result<Ran> {
    let target = cargo::target_dir()?.join("loom");
    cargo::run(cargo().env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", target).args([
        "test",
        "--locked",
        "-p",
        "nebd-abi",
        "--release",
        "--test",
        "loom",
    ]))?;
    Ok(Ran::Yes)
}

fn has_nightly() -> bool {
    cargo_nightly().arg("--version").output().is_ok_and(|output| output.status.success())
}

fn address_sanitizer(_: &CiArgs) -> Result<Ran> {
    if !has_nightly() {
        return Ok(Ran::No("no nightly toolchain".into()));
    }
    let target = cargo::target_dir()?.join("address-sanitizer");
    // With --target the flag does not reach build scripts and macros, which would not load.
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    cargo::run(
        cargo_nightly()
            .env("RUSTFLAGS", "-Zsanitizer=address")
            .env("CARGO_TARGET_DIR", target)
            .args(["test", "--locked", "-p", "nebd-abi", "--target", &triple]),
    )?;
    if !cargo_nightly().args(["miri", "--version"]).output()?.status.success() {
        println!("miri is not installed here: the ring runs under AddressSanitizer alone");
    }
    Ok(Ran::Yes)
}

/// Each fuzz target for a bounded time, from its corpus if there is one.
fn fuzz(args: &CiArgs) -> Result<Ran> {
    if !crate::repo_root().join("fuzz/Cargo.toml").is_file() {
        return Ok(Ran::No("there is no fuzz directory".into()));
    }
    if !has_nightly() {
        return Ok(Ran::No("no nightly toolchain".into()));
    }
    if !cargo::is_installed("cargo-fuzz") {
        cargo::run(cargo().args(["install", "cargo-fuzz", "--locked"]))?;
    }
    let targets = cargo::output(cargo_nightly().args(["fuzz", "list"]))?;
    for target in targets.lines() {
        let limit = format!("-max_total_time={}", args.fuzz_seconds);
        cargo::run(cargo_nightly().args(["fuzz", "run", target, "--", &limit]))?;
    }
    Ok(Ran::Yes)
}

/// Links in the documentation that lead nowhere.
fn docs(_: &CiArgs) -> Result<Ran> {
    cargo::run(
        cargo() // Links to private items are welcome: these pages are for those who work on them.
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links")
            .args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]),
    )?;
    Ok(Ran::Yes)
}
