//! `cargo xtask demo`: the README's first command.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};
use clap::Args;

use crate::cargo::{self, cargo};

/// What to hand to `nebdctl demo`.
#[derive(Args)]
pub struct DemoArgs {
    /// Arguments of `nebdctl demo`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Builds both programs optimised, then becomes `nebdctl demo`.
pub fn run(args: &DemoArgs) -> Result<()> {
    let built = cargo::build(cargo().args([
        "build",
        "--release",
        "--message-format=json",
        "-p",
        "nebd-server",
        "-p",
        "nebdctl",
    ]))?;
    let nebdctl = built.executable("nebdctl")?;
    // Beside it, where the demo looks for the server.
    cargo::expect_file(&built.executable("nebd-server")?)?;
    // Taking this process over keeps signals and the exit code exactly the demo's.
    let error = std::process::Command::new(&nebdctl).arg("demo").args(&args.arguments).exec();
    Err(error).with_context(|| nebdctl.display().to_string())
}
