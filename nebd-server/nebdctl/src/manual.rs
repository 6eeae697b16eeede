//! Completion scripts and man pages, made from the command line's own description.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::failure::Failure;

/// The completion script.
pub fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "nebdctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes `nebdctl.1` and a page for each subcommand; returns what was written.
pub fn pages(directory: &Path) -> Result<String, Failure> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    clap_mangen::generate_to(Cli::command(), directory)
        .with_context(|| format!("cannot write man pages to {}", directory.display()))?;
    Ok(format!("man pages are in {}\n", directory.display()))
}
