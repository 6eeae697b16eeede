//! A keeper and a server for the tests: the server does what it is told over the admin socket.
//!
//! `nebd-keeper-fake keeper SOCKET STATE-DIR [standby] [hang_ms=N] [start_ms=N] [adopt_ms=N]`
//! `nebd-keeper-fake server STATE-DIR [--standby]`, started by the keeper
//! `nebd-keeper-fake server STATE-DIR --candidate`, started by a server

mod candidate;
mod log;
mod server;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use nebd_keeper::keeper::{KeeperConfig, run};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(|a| a.to_str().unwrap()).collect();
    log::start();
    match words[..] {
        ["keeper", socket, state_dir, ref options @ ..] => keeper(socket, state_dir, options),
        ["server", state_dir, "--candidate"] => candidate::run(PathBuf::from(state_dir)),
        ["server", state_dir, ref options @ ..] => {
            server::run(PathBuf::from(state_dir), options.contains(&"--standby"))
        }
        _ => ExitCode::from(2),
    }
}

fn keeper(socket: &str, state_dir: &str, options: &[&str]) -> ExitCode {
    let program = std::env::current_exe().unwrap();
    let argv = vec![program.into(), "server".into(), state_dir.into()];
    let mut config = KeeperConfig::new(argv, socket, state_dir);
    for option in options {
        match option.split_once('=') {
            None => config.standby = *option == "standby",
            Some((key, value)) => {
                let time = Duration::from_millis(value.parse().unwrap());
                match key {
                    "hang_ms" => config.hang_timeout = time,
                    "start_ms" => config.start_timeout = time,
                    "adopt_ms" => config.adopt_timeout = time,
                    "stop_ms" => config.stop_timeout = time,
                    _ => return ExitCode::from(2),
                }
            }
        }
    }
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            eprintln!("{error}: {}", source.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
