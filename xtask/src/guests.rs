//! Guests whose disks are volumes, while their server is killed and replaced: builds what
//! `upgrade-tests guests` needs, and runs a bounded part of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::cargo::{self, Profile, cargo};
use crate::{guest_tools, install_rbd};

/// Every way into a guest.
const WAYS: &str = "linked,vhost-user";

/// How much, and of what.
#[derive(Args)]
pub struct GuestsArgs {
    /// Ways into the guest.
    #[arg(long, default_value = WAYS)]
    pub way: String,
    /// Deaths of the server under each guest.
    #[arg(long, default_value_t = 8)]
    pub kills: u32,
    /// Planned takeovers under each guest.
    #[arg(long, default_value_t = 8)]
    pub takeovers: u32,
    /// Seconds that a halted guest stands still.
    #[arg(long, default_value_t = 10)]
    pub halt_seconds: u32,
    /// How to compile the server and the library.
    #[arg(long, value_enum, default_value = "dev")]
    pub profile: Profile,
    /// More arguments for `upgrade-tests guests`.
    #[arg(last = true)]
    pub more: Vec<String>,
}

impl GuestsArgs {
    /// What CI runs.
    pub fn bounded() -> GuestsArgs {
        GuestsArgs {
            way: WAYS.into(),
            kills: 8,
            takeovers: 8,
            halt_seconds: 10,
            profile: Profile::Dev,
            more: Vec::new(),
        }
    }
}

/// Runs the guests. Returns why that is not possible here, if it is not.
pub fn run(args: &GuestsArgs) -> Result<Option<String>> {
    let dir = guest_tools::shared_dir()?;
    if let Err(reason) = timed("what guests need", || guest_tools::prepare(&dir))? {
        return Ok(Some(reason));
    }
    let lib_dir = dir.join("lib");
    timed("the library", || install_rbd::run(args.profile, true, &lib_dir))?;
    let programs = timed("the programs", || Programs::build(args.profile, &dir))?;
    let tests = || {
        let mut tests = Command::new(&programs.tests);
        tests.args(["guests", "--halt-seconds", &args.halt_seconds.to_string()]);
        tests.arg("--tools").arg(&dir).arg("--verifier").arg(&programs.verifier);
        tests.arg("--rbd-library").arg(lib_dir.join(install_rbd::DIRECTORY));
        tests.arg("--nebd-server").arg(&programs.server);
        tests.arg("--nebdctl").arg(&programs.nebdctl).args(&args.more);
        tests
    };
    // First that it would be noticed if something were wrong.
    timed("spoiled disks", || cargo::run(tests().arg("--spoil")))?;
    let (kills, takeovers) = (args.kills.to_string(), args.takeovers.to_string());
    let mut tests = tests();
    tests.args(["--way", &args.way, "--kills", &kills, "--takeovers", &takeovers]);
    timed(&args.way, || cargo::run(&mut tests))?;
    Ok(None)
}

/// Tells how long a part took.
fn timed<T>(part: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let result = run()?;
    println!("[guests, {part}: {:.0} s]", begun.elapsed().as_secs_f64());
    Ok(result)
}

struct Programs {
    tests: PathBuf,
    server: PathBuf,
    nebdctl: PathBuf,
    verifier: PathBuf,
}

impl Programs {
    fn build(profile: Profile, dir: &Path) -> Result<Programs> {
        let build = |package: &str, program: &str, arguments: &[&str]| {
            let mut build = cargo();
            build.args(["rustc", "--locked", "--message-format=json", "--package", package]);
            build.args(["--bin", program]).args(arguments);
            cargo::build(&mut build)?.executable(program)
        };
        let profile = ["--profile", profile.name()];
        let tests = build("nebd-upgrade-tests", "upgrade-tests", &profile)?;
        let nebdctl = build("nebdctl", "nebdctl", &profile)?;
        // Quick code, for the guest is slow; static, for it is alone there.
        let is_static = ["--profile", "release", "--", "-C", "target-feature=+crt-static"];
        let built = build("nebd-guest", "guest-verifier", &is_static)?;
        let verifier = dir.join("guest-verifier");
        cargo::output(Command::new("strip").arg("-o").args([&verifier, &built]))?;
        // Kept where no build without failpoints puts another.
        let hooks = [profile[0], profile[1], "--features", "test-hooks"];
        let server = dir.join("nebd-server");
        let built = build("nebd-server", "nebd-server", &hooks)?;
        let _ = fs::remove_file(&server);
        fs::copy(built, &server)?;
        Ok(Programs { tests, server, nebdctl, verifier })
    }
}
