//! The programs for Curve's API, as Curve's users build theirs: from the installed `nebd/libnebd.h`
//! alone, linked with `-lnebdclient`; run while their server is killed.
//!
//! ```text
//!  curve_io.c ────┬─ -lnebdclient, in lib/nebd ──────────────► needs libnebd.so.0
//!                 └─ -lnebdclient, a stand-in for Curve's own ► needs libnebdclient.so, no versions
//!  curve_io.cpp ──── pkg-config ─────────────────────────────► needs libnebd.so.0
//! ```
//!
//! The second is a program that was built long ago, with Curve's library, and finds ours in its place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::c_example::{CExampleArgs, Host, SECONDS_MAX, STRICT, pkg_config, run_under_kills};
use crate::cargo;
use crate::install::{self, InstallArgs, Installed};

/// The name of Curve's library.
const LIBRARY: &str = "-lnebdclient";

/// A program that was built, and where it is to find its library.
struct Program {
    name: &'static str,
    path: PathBuf,
    library_dir: PathBuf,
}

/// Installs, compiles, runs.
pub fn run(args: &CExampleArgs) -> Result<()> {
    let work_dir = cargo::target_dir()?.join("curve-example");
    let installed = install::run(&InstallArgs {
        prefix: work_dir.join("prefix"),
        destdir: None,
        profile: args.profile,
        library_only: args.no_run,
        keep_debug: true,
    })?;
    let programs = build(&work_dir, &installed)?;
    if args.no_run {
        return Ok(());
    }
    let host = Host::start(&installed)?;
    let conf = work_dir.join("nebd-client.conf");
    fs::write(&conf, client_file(host.socket()))?;
    for program in &programs {
        println!("curve_io, {}, {} kills of its server:", program.name, args.kills);
        let volume = format!("file:curve-{}", program.name);
        host.nebdctl(&["volume", "create", &volume, "--size", "4MiB"])?;
        let mut example = host.client(&program.path, &installed);
        // The file alone says where the server is.
        example.env_remove("NEBD_SOCKET").env("LD_LIBRARY_PATH", &program.library_dir);
        example.arg("--conf").arg(&conf).args(["--seconds", SECONDS_MAX]).arg(&volume);
        run_under_kills(&host, &mut example, args)?;
    }
    host.stop()
}

/// As Curve's package has it, of which one line counts.
fn client_file(socket: &Path) -> String {
    format!(
        "# part2 socket file address\n\
         nebdserver.serverAddress={}  # a comment\n\n\
         metacache.fileLockPath=/data/nebd/lock\n\
         request.syncRpcMaxRetryTimes=50\n\
         request.rpcRetryIntervalUs=100000\n\
         heartbeat.intervalS=5\n\
         log.path=/data/log/nebd/client\n",
        socket.display()
    )
}

fn build(work_dir: &Path, installed: &Installed) -> Result<Vec<Program>> {
    let curve_dir = installed.lib_dir.join("nebd");
    let stand_in = stand_in(work_dir, installed)?;
    let c = |path: &Path, library_dir: &Path| {
        let mut cc = Command::new("cc");
        cc.args(STRICT).arg("-o").arg(path).arg(source("curve_io.c"));
        cc.arg("-I").arg(include_dir(installed)).arg("-L").arg(library_dir).arg(LIBRARY);
        cargo::run(&mut cc)
    };
    let linked = work_dir.join("curve_io");
    c(&linked, &curve_dir)?;
    expect_needed(&linked, "libnebd.so.0")?;
    let old = work_dir.join("curve_io-old");
    c(&old, &stand_in)?;
    expect_needed(&old, "libnebdclient.so")?;
    let mut programs = vec![
        Program { name: "c", path: linked, library_dir: curve_dir },
        Program { name: "c-old", path: old, library_dir: installed.lib_dir.clone() },
    ];
    if !cargo::is_installed("c++") {
        println!("SKIPPED: curve_io.cpp, for there is no c++");
        return Ok(programs);
    }
    let path = work_dir.join("curve_io-cplusplus");
    let mut cplusplus = Command::new("c++");
    cplusplus.args(STRICT).arg("-std=c++17").arg("-o").arg(&path).arg(source("curve_io.cpp"));
    cplusplus.args(pkg_config(installed, &["--cflags", "--libs"])?).arg("-pthread");
    cargo::run(&mut cplusplus)?;
    programs.push(Program { name: "cplusplus", path, library_dir: installed.lib_dir.clone() });
    Ok(programs)
}

fn source(name: &str) -> PathBuf {
    crate::repo_root().join("examples/curve").join(name)
}

fn include_dir(installed: &Installed) -> PathBuf {
    installed.lib_dir.with_file_name("include")
}

/// A library with the functions' names, without versions and without a soname, as Curve's is.
fn stand_in(work_dir: &Path, installed: &Installed) -> Result<PathBuf> {
    let directory = work_dir.join("stand-in");
    fs::create_dir_all(&directory)?;
    let header = fs::read_to_string(include_dir(installed).join("nebd/libnebd.h"))?;
    let functions = install::functions_in_header(&header);
    let text: String = functions
        .iter()
        .map(|name| format!("void {name}(void) {{ __builtin_trap(); }}\n"))
        .collect();
    let source = directory.join("stand_in.c");
    fs::write(&source, text)?;
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(directory.join("libnebdclient.so")).arg(source);
    cargo::run(&mut cc)?;
    Ok(directory)
}

fn expect_needed(program: &Path, library: &str) -> Result<()> {
    let dynamic = cargo::output(Command::new("readelf").args(["-W", "-d"]).arg(program))?;
    let needs = |line: &str| line.contains("(NEEDED)") && line.contains(&format!("[{library}]"));
    ensure!(dynamic.lines().any(needs), "{} does not need {library}", program.display());
    Ok(())
}
