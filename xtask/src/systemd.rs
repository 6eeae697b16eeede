//! systemd: the units in `systemd/`, checked, and run by a systemd that is the init of a guest.
//!
//! ```text
//!  systemd/*.service, *.socket ── paths of the prefix ──► lib/systemd/system      install
//!                                 │                       /etc/nebd/nebd.toml
//!                                 └─ stub programs ─────► systemd-analyze         ci: systemd
//!  Debian packages ── tar ──► tree ── + cargo xtask install ── mke2fs -d ──► disk  ci: systemd-guest
//!                                      QEMU ◄── kernel ◄───────────────────────┘
//!                                       └─ console: GUEST-OK …, GUEST-DONE
//! ```
//!
//! systemd is never started as an init here, in whatever namespace: it would clean the real /tmp.

mod guest;
mod root;
pub mod units;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::cargo::{self, Profile};
use crate::guest_tools;

/// The guest.
#[derive(Args)]
pub struct GuestArgs {
    /// How to compile the programs.
    #[arg(long, value_enum, default_value = "dev")]
    pub profile: Profile,
    /// Seconds after which the guest hangs.
    #[arg(long, default_value_t = 420)]
    pub patience: u64,
    /// Programs that stand elsewhere: a directory with nebd-server, nebdctl and upgrade-tests.
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
}

/// Boots the guest. Returns why that is not possible here, if it is not.
pub fn run_guest(args: &GuestArgs) -> Result<Option<String>> {
    let target = cargo::target_dir()?;
    let work_dir = target.join("systemd-guest");
    std::fs::create_dir_all(&work_dir)?;
    let kernel = match guest_tools::prepare(&guest_tools::shared_dir()?)? {
        Ok(kernel) => kernel,
        Err(reason) => return Ok(Some(reason)),
    };
    let base = match root::base(&work_dir)? {
        Ok(base) => base,
        Err(reason) => return Ok(Some(reason)),
    };
    let root = root::image(&work_dir, &base, args)?;
    guest::run(&work_dir, &kernel.image, &root, Duration::from_secs(args.patience))?;
    Ok(None)
}
