//! `nebdctl`, the operator's command for nebd.

mod attachment;
mod bench;
mod cli;
mod connection;
mod demo;
mod failure;
mod image;
mod manual;
mod status;
mod table;
mod top;
mod units;
mod upgrade;
mod view;
mod volume;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;

use cli::{Cli, Command};
use connection::Connection;
use failure::Failure;

fn main() -> ExitCode {
    // Errors of the command line end here, with exit code 2.
    let cli = Cli::parse();
    let (text, failure) = match run(cli) {
        Ok(text) => (text, None),
        Err(failure) => (failure.report().to_owned(), Some(failure)),
    };
    // A reader that has gone away (`nebdctl status | head`) is no error.
    if let Err(error) = io::stdout().write_all(text.as_bytes())
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        eprintln!("nebdctl: cannot write the result: {error}");
        return ExitCode::FAILURE;
    }
    match failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            eprintln!("nebdctl: {failure}");
            failure.exit_code()
        }
    }
}

fn run(cli: Cli) -> Result<String, Failure> {
    let connect = || {
        Connection::new(&cli.socket, Duration::from_secs(cli.timeout))
            .context("cannot start the admin client")
    };
    match cli.command {
        Command::Volume(command) => volume::run(&cli.socket, &connect()?, command),
        Command::Attach(args) => attachment::attach(&connect()?, args),
        Command::Detach(args) => attachment::detach(&connect()?, args),
        Command::Attachments(output) => attachment::list(&connect()?, output),
        Command::Status(output) => status::run(&connect()?, output),
        Command::Upgrade(args) => upgrade::run(&connect()?, &args),
        Command::Rollback(output) => upgrade::rollback(&connect()?, output),
        Command::Top(args) => top::run(&cli.socket, &connect()?, &args),
        Command::Bench(args) => bench::run(&cli.socket, connect()?, &args),
        Command::Demo(args) => demo::run(&args),
        Command::Completions { shell } => Ok(manual::completions(shell)),
        Command::Man { dir } => manual::pages(&dir),
    }
}
