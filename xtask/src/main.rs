//! The project's chores: `cargo xtask ci | tidy | demo | install | c-example | curve-example |
//! hypervisors | guests | systemd-guest`.

mod c_example;
mod cargo;
mod ci;
mod curve_example;
mod demo;
mod guest_tools;
mod guests;
mod hypervisors;
mod install;
mod install_rbd;
mod release;
mod systemd;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// The project's chores.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
enum Chore {
    /// Everything that must hold before a change goes in, in order, up to the first failure.
    Ci(ci::CiArgs),
    /// The rules that no compiler checks.
    Tidy,
    /// Keeps the golden files as they are released with this version.
    Freeze,
    /// Build the server and `nebdctl`, and run `nebdctl demo` with the given arguments.
    Demo(demo::DemoArgs),
    /// Install the library with its header and pkg-config file, and the programs.
    Install(install::InstallArgs),
    /// Install, compile the C example as a user would, and run it while its server is killed.
    CExample(c_example::CExampleArgs),
    /// The same with the programs for Curve's API, in C and in C++.
    CurveExample(c_example::CExampleArgs),
    /// The commands of docs/hypervisors.md, a guest among them, while their server is killed.
    Hypervisors(hypervisors::HypervisorsArgs),
    /// Guests whose disks are volumes, while their server is killed and replaced.
    Guests(guests::GuestsArgs),
    /// The units under a systemd that is the init of a guest, while their server is killed.
    SystemdGuest(systemd::GuestArgs),
}

fn main() -> ExitCode {
    match run(Chore::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore) -> Result<()> {
    match chore {
        Chore::Ci(args) => ci::run(&args),
        Chore::Tidy => tidy::run(&repo_root()),
        Chore::Freeze => release::freeze(&repo_root(), env!("CARGO_PKG_VERSION")),
        Chore::Demo(args) => demo::run(&args),
        Chore::Install(args) => install::run(&args).map(|_| ()),
        Chore::CExample(args) => c_example::run(&args),
        Chore::CurveExample(args) => curve_example::run(&args),
        Chore::Hypervisors(args) => possible(hypervisors::run(&args)?),
        Chore::Guests(args) => possible(guests::run(&args)?),
        Chore::SystemdGuest(args) => possible(systemd::run_guest(&args)?),
    }
}

/// What was asked for by name is not skipped.
fn possible(reason: Option<String>) -> Result<()> {
    reason.map_or(Ok(()), |reason| anyhow::bail!("not possible here: {reason}"))
}

/// The workspace's directory: the parent of this crate's. `cargo run` says where that is now; two
/// checkouts that share a target directory may share this program.
fn repo_root() -> PathBuf {
    let own =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let own = Path::new(&own);
    own.parent().unwrap_or(own).to_path_buf()
}
