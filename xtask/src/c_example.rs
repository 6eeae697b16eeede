//! The C example, as a user of the installed library would build and run it: compiled from the
//! installed header through pkg-config, shared and static, and run while its server is killed; and
//! a tour of all functions, for what the example does not use.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::cargo::{self, Profile};
use crate::install::{self, InstallArgs, Installed};

/// A server that takes longer than this to begin or to come back is a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The example is told to end; this is for one that nobody tells.
pub const SECONDS_MAX: &str = "3600";
const LINKINGS: [Linking; 2] = [Linking::Shared, Linking::Static];
/// How programs of examples are compiled.
pub const STRICT: [&str; 5] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2"];

/// How long, and how rough.
#[derive(Args, Clone, Copy)]
pub struct CExampleArgs {
    /// Seconds between the kills taken together, for each way of linking.
    #[arg(long, default_value_t = 5)]
    pub seconds: u32,
    /// SIGKILLs of the server meanwhile, for each way of linking.
    #[arg(long, default_value_t = 5)]
    pub kills: u32,
    /// How to compile the library and the programs.
    #[arg(long, value_enum, default_value = "dev")]
    pub profile: Profile,
    /// Compile only.
    #[arg(long)]
    pub no_run: bool,
}

#[derive(Clone, Copy, Debug)]
enum Linking {
    Shared,
    Static,
}

impl Linking {
    /// Both ways of completing are tried, one with each way of linking.
    fn options(self) -> &'static [&'static str] {
        match self {
            Linking::Shared => &[],
            Linking::Static => &["--poll"],
        }
    }
}

/// Installs, compiles, runs.
pub fn run(args: &CExampleArgs) -> Result<()> {
    let work_dir = cargo::target_dir()?.join("c-example");
    let installed = install::run(&InstallArgs {
        prefix: work_dir.join("prefix"),
        destdir: None,
        profile: args.profile,
        library_only: args.no_run,
        keep_debug: true,
    })?;
    check_header_as_cplusplus(&installed)?;
    let example = Path::new("examples/c/verified_io.c");
    let programs = LINKINGS
        .into_iter()
        .map(|linking| Ok((linking, compile(example, linking, &installed, &work_dir)?)))
        .collect::<Result<Vec<_>>>()?;
    let tour = Path::new("nebd-client/capi/tests/tour.c");
    let tour = compile(tour, Linking::Shared, &installed, &work_dir)?;
    if args.no_run {
        return Ok(());
    }
    let host = Host::start(&installed)?;
    host.nebdctl(&["volume", "create", "file:tour", "--size", "64MiB"])?;
    let mut tour = host.client(&tour, &installed).arg("file:tour").spawn()?;
    let status = wait(&mut tour, PATIENCE).context("the tour hangs")?;
    ensure!(status.success(), "tour: {status}");
    for (linking, program) in &programs {
        let options = linking.options();
        println!(
            "verified_io {options:?}, linked {linking:?}, {} kills of its server:",
            args.kills
        );
        let volume = format!("file:c-example-{linking:?}").to_lowercase();
        host.nebdctl(&["volume", "create", &volume, "--size", "64MiB"])?;
        let mut example = host.client(program, &installed);
        example.args(options).args(["--seconds", SECONDS_MAX]).arg(&volume);
        run_under_kills(&host, &mut example, args)?;
    }
    host.stop()
}

/// Words that pkg-config says for the installed library.
pub fn pkg_config(installed: &Installed, arguments: &[&str]) -> Result<Vec<String>> {
    let text = cargo::output(
        Command::new("pkg-config")
            .env("PKG_CONFIG_PATH", &installed.pkgconfig_dir)
            .args(arguments)
            .arg("nebd"),
    )?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

fn compile(
    source: &Path,
    linking: Linking,
    installed: &Installed,
    work_dir: &Path,
) -> Result<PathBuf> {
    let name = source.file_stem().context("a source has a name")?.to_string_lossy();
    let program = work_dir.join(format!("{name}-{linking:?}").to_lowercase());
    let source = crate::repo_root().join(source);
    let mut cc = Command::new("cc");
    cc.args(STRICT).arg("-o").arg(&program).arg(source);
    cc.args(pkg_config(installed, &["--cflags"])?);
    match linking {
        Linking::Shared => cc.args(pkg_config(installed, &["--libs"])?),
        // The archive by name, for `-lnebd` would find the shared library beside it.
        Linking::Static => {
            let private = pkg_config(installed, &["--static", "--libs"])?;
            cc.arg(installed.lib_dir.join("libnebd.a"))
                .args(private.into_iter().filter(|word| word != "-lnebd"))
        }
    };
    cargo::run(&mut cc)?;
    Ok(program)
}

/// The header is also for C++, whose compiler is not on every machine.
fn check_header_as_cplusplus(installed: &Installed) -> Result<()> {
    if !cargo::is_installed("c++") {
        println!("SKIPPED: nebd.h as C++, for there is no c++");
        return Ok(());
    }
    let cflags = pkg_config(installed, &["--cflags"])?;
    let mut cplusplus = Command::new("c++");
    cplusplus.args(STRICT).args(["-fsyntax-only", "-x", "c++", "-include", "nebd.h"]);
    cargo::run(cplusplus.args(cflags).arg("/dev/null"))
}

/// Runs the example until every kill has been survived, then tells it to end and to check all.
pub fn run_under_kills(host: &Host, example: &mut Command, args: &CExampleArgs) -> Result<()> {
    let mut example = example.spawn().context("the example")?;
    let killed = kill_servers(host, &mut example, args);
    if example.try_wait()?.is_none() {
        kill_process(Pid::from_child(&example), Signal::TERM)?;
    }
    let status = wait(&mut example, PATIENCE).context("the example hangs")?;
    killed?;
    ensure!(status.success(), "the example: {status}");
    Ok(())
}

fn kill_servers(host: &Host, example: &mut Child, args: &CExampleArgs) -> Result<()> {
    let pause = Duration::from_secs(args.seconds.into()) / (args.kills + 1);
    for kill in 0..=args.kills {
        sleep(pause);
        if let Some(status) = example.try_wait()? {
            bail!("the example ended after {kill} of {} kills: {status}", args.kills);
        }
        if kill < args.kills {
            host.kill_server()?;
        }
    }
    Ok(())
}

/// Waits for a child; kills it when it takes longer than `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        sleep(Duration::from_millis(20));
    }
    child.kill()?;
    child.wait()?;
    bail!("not done within {} s", limit.as_secs())
}

/// A keeper with its server, in a directory of its own.
pub struct Host {
    keeper: Child,
    dir: PathBuf,
    socket: PathBuf,
    nebdctl: PathBuf,
}

impl Host {
    /// Starts both and waits until the server serves.
    pub fn start(installed: &Installed) -> Result<Host> {
        let bin_dir = installed.bin_dir.as_ref().context("the programs were not installed")?;
        // A socket's path may have 107 bytes, which a target directory can exceed.
        let dir = std::env::temp_dir().join(format!("nebd-c-example-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let (config, socket) = (dir.join("nebd.toml"), dir.join("nebd.sock"));
        fs::write(&config, "log = \"error\"\n")?;
        let keeper = Command::new(bin_dir.join("nebd-server"))
            .arg("keeper")
            .arg("--config")
            .arg(&config)
            .arg("--socket")
            .arg(&socket)
            .arg("--state-dir")
            .arg(dir.join("state"))
            .stdin(Stdio::null())
            .spawn()
            .context("nebd-server keeper")?;
        let nebdctl = bin_dir.join("nebdctl");
        let mut host = Host { keeper, dir, socket, nebdctl };
        host.wait_until_serving()?;
        Ok(host)
    }

    fn wait_until_serving(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.keeper.try_wait()? {
                bail!("the keeper ended: {status}");
            }
            if self.server_pid().is_some() && self.socket.exists() {
                return Ok(());
            }
            sleep(Duration::from_millis(20));
        }
        bail!("no server within {} s", PATIENCE.as_secs())
    }

    /// A program that uses the installed library and this host's server.
    pub fn client(&self, program: &Path, installed: &Installed) -> Command {
        let mut command = Command::new(program);
        command.env("NEBD_SOCKET", &self.socket).env("LD_LIBRARY_PATH", &installed.lib_dir);
        command
    }

    /// Runs nebdctl.
    pub fn nebdctl(&self, arguments: &[&str]) -> Result<()> {
        cargo::run(Command::new(&self.nebdctl).arg("--socket").arg(&self.socket).args(arguments))
    }

    fn server_pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.dir.join("state/server.pid")).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }

    /// Kills the serving server, and waits until the keeper names another.
    pub fn kill_server(&self) -> Result<()> {
        let victim = self.server_pid().context("there is no server to kill")?;
        kill_process(victim, Signal::KILL).context("killing the server")?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.server_pid().is_some_and(|pid| pid != victim) {
                return Ok(());
            }
            sleep(Duration::from_millis(5));
        }
        bail!("no new server within {} s", PATIENCE.as_secs())
    }

    /// The client socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends both.
    pub fn stop(mut self) -> Result<()> {
        self.terminate()
    }

    fn terminate(&mut self) -> Result<()> {
        if self.keeper.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.keeper), Signal::TERM)?;
            wait(&mut self.keeper, PATIENCE).context("the keeper does not stop")?;
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Err(error) = self.terminate() {
            eprintln!("xtask: {error:#}");
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}
