//! `nebd-server`: the part server, and the keeper that holds its descriptors.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use nebd_keeper::keeper::KeeperConfig;
use nebd_server::config::Config;
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(version, about = "The part server of nebd: block devices that outlive their server")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Hold sockets and descriptors, and keep a server running.
    Keeper(Options),
    /// Serve; under a keeper or a service manager, or alone.
    Run {
        #[command(flatten)]
        options: Options,
        /// Stand by until the keeper says that the server is gone.
        #[arg(long)]
        standby: bool,
        /// Take over from the server at the other end of standard input, which starts this one.
        #[arg(long, hide = true, conflicts_with = "standby")]
        candidate: bool,
    },
}

#[derive(Args, Clone)]
struct Options {
    /// Configuration file; every key is optional.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Client socket; the admin socket is beside it, with `.admin` appended.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where volumes, images and pid files are kept.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Options {
    fn load(&self) -> anyhow::Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        };
        if let Some(socket) = &self.socket {
            config.socket = socket.clone();
        }
        if let Some(state_dir) = &self.state_dir {
            config.state_dir = state_dir.clone();
        }
        Ok(config)
    }

    /// The same options for a child process.
    fn to_args(&self) -> Vec<OsString> {
        let pairs = [
            ("--config", &self.config),
            ("--socket", &self.socket),
            ("--state-dir", &self.state_dir),
        ];
        pairs
            .into_iter()
            .filter_map(|(flag, value)| Some([flag.into(), value.clone()?.into_os_string()]))
            .flatten()
            .collect()
    }
}

fn main() -> ExitCode {
    // Before anything else: descriptors and environment are still as they were passed.
    let inherited = nebd_keeper::inherit::inherit();
    match act(Cli::parse(), inherited) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nebd-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(
    cli: Cli,
    inherited: Result<nebd_keeper::inherit::Inherited, nebd_keeper::inherit::InheritError>,
) -> anyhow::Result<()> {
    match cli.command {
        Command::Keeper(options) => {
            let config = options.load()?;
            log_to_stderr(&config)?;
            Ok(nebd_keeper::keeper::run(keeper_config(&options, &config)?)?)
        }
        Command::Run { options, standby, candidate } => {
            let config = options.load()?;
            log_to_stderr(&config)?;
            if candidate {
                return Ok(nebd_server::upgrade::run_candidate(&config)?);
            }
            Ok(nebd_server::run::run(&config, standby, inherited?)?)
        }
    }
}

fn log_to_stderr(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .with_context(|| format!("configuration key log: {:?} is no level", config.log))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    Ok(())
}

fn keeper_config(options: &Options, config: &Config) -> anyhow::Result<KeeperConfig> {
    let program = std::env::current_exe().context("cannot find this executable")?;
    let mut server_argv = vec![program.into_os_string(), "run".into()];
    server_argv.extend(options.to_args());
    let mut keeper =
        KeeperConfig::new(server_argv, config.socket.clone(), config.state_dir.clone());
    keeper.socket_mode = config.socket_mode()?;
    keeper.socket_gid = config.access.gid;
    keeper.standby = config.keeper.standby;
    keeper.hang_timeout = Duration::from_millis(config.keeper.hang_timeout_ms);
    keeper.restart_delay_min = Duration::from_millis(config.keeper.backoff_min_ms);
    keeper.restart_delay_max = Duration::from_millis(config.keeper.backoff_max_ms);
    Ok(keeper)
}
