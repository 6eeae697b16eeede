//! `cargo xtask install`: what a C program needs to link the part client, and the programs.
//!
//! ```text
//!  cargo rustc ──► archive ── ld -r, objcopy ──► one object with nebd_* symbols alone
//!                                                ├─ ar ──────────► lib/libnebd.a
//!                                                └─ cc -shared, version script
//!                                                   └────────────► lib/libnebd.so.0 ◄─ libnebd.so
//!                                       lib/libnebdclient.so, lib/nebd/libnebdclient.so ◄┘
//!  nebd.h ───────────────────────────────────────────────────────► include/nebd.h
//!  libnebd.h ─────────────► include/nebd/libnebd.h, and a link include/libnebd.h
//!  nebd.pc.in + what rustc says it needs ────────────────────────► lib/pkgconfig/nebd.pc
//!  nebd-rbd ─► install_rbd.rs ───────────────────────────────────► lib/nebd/rbd/
//!  systemd/ ─► systemd/units.rs ─────────────────────────────────► lib/systemd/system/, /etc/nebd/
//!  nebd-server, nebdctl ──► bin/, man pages and completions by nebdctl itself
//! ```
//!
//! The shared library is linked here and not by rustc, whose own version script has no named
//! versions and cannot be combined with one that has. rustc's archive exports all of Rust's
//! standard library and carries its bitcode: two such archives do not link into one program, and
//! it is 25 times the size.
//!
//! Programs written for Curve include `<nebd/libnebd.h>` and link with `libnebdclient`, which its
//! package keeps in a directory of its own, `lib/nebd`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::cargo::{self, Profile, cargo};
use crate::install_rbd;
use crate::systemd;

/// The headers, and the version node of the functions that each declares.
const INTERFACES: [(&str, &str); 2] = [("nebd.h", "NEBD_0.1"), ("libnebd.h", "NEBD_CURVE_1.0")];
/// The library's name in Curve.
const CURVE_LIBRARY: &str = "libnebdclient.so";
const SONAME: &str = "libnebd.so.0";
/// What the shared library may need at run time.
pub const NEEDED_ALLOWED: [&str; 3] = ["libc.so", "ld-linux", "libgcc_s.so"];

/// Where to install, and what.
#[derive(Args)]
pub struct InstallArgs {
    /// Directory that gets bin, include, lib and share.
    #[arg(long, default_value = "/usr/local")]
    pub prefix: PathBuf,
    /// Directory put before the prefix while copying, for packages.
    #[arg(long)]
    pub destdir: Option<PathBuf>,
    /// How to compile.
    #[arg(long, value_enum, default_value = "release")]
    pub profile: Profile,
    /// Leave nebd-server and nebdctl out.
    #[arg(long)]
    pub library_only: bool,
    /// Keep line tables in the shared library and the programs.
    #[arg(long)]
    pub keep_debug: bool,
}

/// Where the parts went.
pub struct Installed {
    /// The directory of `nebd.pc`.
    pub pkgconfig_dir: PathBuf,
    /// The directory of the libraries.
    pub lib_dir: PathBuf,
    /// The directory of the programs, if they were installed.
    pub bin_dir: Option<PathBuf>,
}

/// Builds, installs, and checks what was installed.
pub fn run(args: &InstallArgs) -> Result<Installed> {
    let prefix = std::path::absolute(&args.prefix)?;
    let root = match &args.destdir {
        Some(destdir) => std::path::absolute(destdir)?.join(prefix.strip_prefix("/")?),
        None => prefix.clone(),
    };
    let library = install_library(args, &root, &prefix)?;
    install_rbd::run(args.profile, args.keep_debug, &library.lib_dir)?;
    let bin_dir = if args.library_only { None } else { Some(install_programs(args, &root)?) };
    if !args.library_only {
        systemd::units::install(&prefix, args.destdir.as_deref())?;
    }
    println!("installed under {}", root.display());
    Ok(Installed { bin_dir, ..library })
}

fn install_library(args: &InstallArgs, root: &Path, prefix: &Path) -> Result<Installed> {
    let capi = crate::repo_root().join("nebd-client/capi");
    let interfaces = Interface::read_all()?;
    let built = cargo::build(
        cargo()
            .args(["rustc", "-p", "nebd-capi", "--lib", "--crate-type", "staticlib"])
            .args(["--profile", args.profile.name()])
            .args(["--message-format=json", "--", "--print", "native-static-libs"]),
    )?;
    let archive = built.library("nebd", "a")?;
    let lib_dir = root.join("lib");
    let pkgconfig_dir = lib_dir.join("pkgconfig");

    let object = archive.with_file_name("libnebd.o");
    combine(&archive, &interfaces, args.keep_debug, &object)?;
    let static_library = archive.with_file_name("libnebd.installed.a");
    let _ = fs::remove_file(&static_library);
    cargo::output(Command::new("ar").arg("rcs").args([&static_library, &object]))?;
    let shared = archive.with_file_name(SONAME);
    link_shared(&object, &capi.join("nebd.map"), &shared)?;

    let include = root.join("include");
    write(&include.join("nebd.h"), interfaces[0].text.as_bytes(), 0o644)?;
    write(&include.join("nebd/libnebd.h"), interfaces[1].text.as_bytes(), 0o644)?;
    replace_link("nebd/libnebd.h", &include.join("libnebd.h"))?;
    place(&static_library, &lib_dir.join("libnebd.a"), 0o644)?;
    if !args.keep_debug {
        cargo::output(Command::new("strip").arg("--strip-unneeded").arg(&shared))?;
    }
    let installed = lib_dir.join(SONAME);
    place(&shared, &installed, 0o755)?;
    replace_link(SONAME, &lib_dir.join("libnebd.so"))?;
    replace_link(SONAME, &lib_dir.join(CURVE_LIBRARY))?;
    let curve_dir = lib_dir.join("nebd");
    fs::create_dir_all(&curve_dir)?;
    // The second for the loader, which looks for the soname where a program's run path leads.
    for name in [CURVE_LIBRARY, SONAME] {
        replace_link(&format!("../{SONAME}"), &curve_dir.join(name))?;
    }

    let template = fs::read_to_string(capi.join("nebd.pc.in")).context("nebd.pc.in")?;
    let text = template
        .replace("@PREFIX@", &prefix.to_string_lossy())
        .replace("@VERSION@", env!("CARGO_PKG_VERSION"))
        .replace("@LIBS_PRIVATE@", &built.native_static_libs()?);
    write(&pkgconfig_dir.join("nebd.pc"), text.as_bytes(), 0o644)?;

    check_shared(&installed, &interfaces)?;
    for (file, what) in [(installed, SONAME), (lib_dir.join("libnebd.a"), "libnebd.a")] {
        let state = if args.keep_debug { "with debug info" } else { "stripped" };
        println!("{what}: {} KiB, {state}", fs::metadata(&file)?.len() / 1024);
    }
    for interface in &interfaces {
        println!("{SONAME}: {} functions at {}", interface.functions.len(), interface.version_node);
    }
    Ok(Installed { pkgconfig_dir, lib_dir, bin_dir: None })
}

/// A header, and what it declares.
struct Interface {
    version_node: &'static str,
    text: String,
    functions: BTreeSet<String>,
}

impl Interface {
    fn read_all() -> Result<[Interface; 2]> {
        let read = |(header, version_node)| {
            let path = crate::repo_root().join("nebd-client/include").join(header);
            let text = fs::read_to_string(path).context(header)?;
            let functions = functions_in_header(&text);
            anyhow::Ok(Interface { version_node, text, functions })
        };
        Ok([read(INTERFACES[0])?, read(INTERFACES[1])?])
    }

    /// As the dynamic symbol table has them. The version node is a symbol itself.
    fn symbols(&self) -> impl Iterator<Item = String> + '_ {
        let node = self.version_node;
        let names = self.functions.iter().map(String::as_str).chain([node]);
        names.map(move |name| format!("{name}@@{node}"))
    }
}

/// One object of all that the functions need, with their symbols alone.
fn combine(
    archive: &Path,
    interfaces: &[Interface],
    keep_debug: bool,
    object: &Path,
) -> Result<()> {
    let mut ld = Command::new("ld");
    ld.args(["-r", "--gc-sections", "-o"]).arg(object);
    for function in interfaces.iter().flat_map(|interface| &interface.functions) {
        ld.args(["-u", function]);
    }
    cargo::output(ld.arg("--whole-archive").arg(archive))?;
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["--wildcard", "--keep-global-symbol=nebd_*"]);
    // rustc's own format, of which the linker has made nonsense.
    objcopy.args(["--remove-section=.llvmbc", "--remove-section=.llvmcmd"]);
    if !keep_debug {
        objcopy.arg("--strip-debug");
    }
    cargo::output(objcopy.arg(object)).map(|_| ())
}

fn link_shared(object: &Path, version_script: &Path, shared: &Path) -> Result<()> {
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.args(["-shared", "-o"]).arg(shared);
    cc.arg(object);
    cc.arg(format!("-Wl,--version-script={}", version_script.display()));
    cc.arg(format!("-Wl,-soname,{SONAME}"));
    // No symbol may stay open; a host that unloads the library must not pull code from under a
    // thread's destructors, hence nodelete.
    cc.args(["-Wl,--gc-sections", "-Wl,--as-needed", "-Wl,-z,defs,-z,relro,-z,now,-z,nodelete"]);
    cc.args(["-static-libgcc", "-lpthread", "-ldl", "-lm", "-lc"]);
    cargo::output(&mut cc).map(|_| ())
}

/// Fails unless the library exports exactly the headers' functions, versioned, and needs libc only.
fn check_shared(shared: &Path, interfaces: &[Interface]) -> Result<()> {
    let symbols = cargo::output(Command::new("readelf").args(["-W", "--dyn-syms"]).arg(shared))?;
    let exported = exported_symbols(&symbols);
    let expected: BTreeSet<String> = interfaces.iter().flat_map(Interface::symbols).collect();
    // binutils 2.35 and later print the nodes without a version.
    let is_node = |name: &str| INTERFACES.iter().any(|(_, node)| *node == name);
    let exported: BTreeSet<String> = exported
        .into_iter()
        .map(|name| if is_node(&name) { format!("{name}@@{name}") } else { name })
        .collect();
    let missing: Vec<&String> = expected.difference(&exported).collect();
    let extra: Vec<&String> = exported.difference(&expected).collect();
    ensure!(missing.is_empty(), "{SONAME} does not export what is declared: {missing:?}");
    ensure!(extra.is_empty(), "{SONAME} exports what no header declares: {extra:?}");

    let dynamic = cargo::output(Command::new("readelf").args(["-W", "-d"]).arg(shared))?;
    for needed in bracketed(&dynamic, "(NEEDED)") {
        println!("{SONAME}: needs {needed}");
        if !NEEDED_ALLOWED.iter().any(|allowed| needed.starts_with(allowed)) {
            bail!("{SONAME} needs {needed} at run time");
        }
    }
    ensure!(bracketed(&dynamic, "(SONAME)").eq([SONAME]), "{SONAME} has another soname");
    Ok(())
}

pub fn exported_symbols(readelf: &str) -> BTreeSet<String> {
    readelf
        .lines()
        .filter_map(|line| {
            // Num: Value Size Type Bind Vis Ndx Name
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, _, _, _, bind, _, index, name, ..] = fields[..] else { return None };
            let defined = index != "UND" && index != "Ndx" && bind != "LOCAL";
            defined.then(|| name.to_owned())
        })
        .collect()
}

pub fn bracketed<'a>(readelf: &'a str, tag: &'a str) -> impl Iterator<Item = &'a str> {
    readelf
        .lines()
        .filter(move |line| line.contains(tag))
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0))
}

/// Names that start with `nebd_` and are directly followed by a parenthesis, comments aside.
pub fn functions_in_header(header: &str) -> BTreeSet<String> {
    let code: String = header
        .split("/*")
        .enumerate()
        .map(|(i, part)| if i == 0 { part } else { part.split_once("*/").map_or("", |(_, s)| s) })
        .collect();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    code.split('(')
        .filter_map(|before| before.rsplit(|c| !is_name(c)).next())
        .filter(|name| name.starts_with("nebd_"))
        .map(str::to_owned)
        .collect()
}

fn install_programs(args: &InstallArgs, root: &Path) -> Result<PathBuf> {
    let built = cargo::build(
        cargo()
            .args(["build", "-p", "nebd-server", "-p", "nebdctl", "--message-format=json"])
            .args(["--profile", args.profile.name()]),
    )?;
    let bin_dir = root.join("bin");
    for program in ["nebd-server", "nebdctl"] {
        let installed = bin_dir.join(program);
        place(&built.executable(program)?, &installed, 0o755)?;
        if !args.keep_debug {
            cargo::output(Command::new("strip").arg(&installed))?;
        }
    }
    let nebdctl = bin_dir.join("nebdctl");
    let completions = [
        ("bash", "share/bash-completion/completions/nebdctl"),
        ("zsh", "share/zsh/site-functions/_nebdctl"),
        ("fish", "share/fish/vendor_completions.d/nebdctl.fish"),
    ];
    for (shell, file) in completions {
        let text = cargo::output(Command::new(&nebdctl).args(["completions", shell]))?;
        write(&root.join(file), text.as_bytes(), 0o644)?;
    }
    let man_dir = root.join("share/man/man1");
    fs::create_dir_all(&man_dir).with_context(|| man_dir.display().to_string())?;
    cargo::output(Command::new(&nebdctl).args(["man", "--dir"]).arg(&man_dir))?;
    Ok(bin_dir)
}

/// Copies a file into place by a rename: a program may have the old one mapped.
pub fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let content = fs::read(from).with_context(|| from.display().to_string())?;
    write(to, &content, mode)
}

/// Writes a file by a rename.
pub fn write(to: &Path, content: &[u8], mode: u32) -> Result<()> {
    let directory = to.parent().context("a file to install has no directory")?;
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let mut unfinished = to.as_os_str().to_owned();
    unfinished.push(".new");
    let unfinished = PathBuf::from(unfinished);
    fs::write(&unfinished, content).with_context(|| unfinished.display().to_string())?;
    fs::set_permissions(&unfinished, fs::Permissions::from_mode(mode))?;
    fs::rename(&unfinished, to).with_context(|| to.display().to_string())
}

pub fn replace_link(target: &str, link: &Path) -> Result<()> {
    let mut unfinished = link.as_os_str().to_owned();
    unfinished.push(".new");
    let unfinished = PathBuf::from(unfinished);
    let _ = fs::remove_file(&unfinished);
    symlink(target, &unfinished).with_context(|| unfinished.display().to_string())?;
    fs::rename(&unfinished, link).with_context(|| link.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_functions_from_a_header() {
        let header = "/* nebd_not(this) */ typedef void (*nebd_cb)(void *);\n\
                      int nebd_open(const char *n);\nconst char *nebd_version(void);";
        let expected = ["nebd_open", "nebd_version"].map(str::to_owned);
        assert_eq!(functions_in_header(header), BTreeSet::from(expected));
    }

    #[test]
    fn reads_exported_symbols_from_readelf() {
        let readelf = "   Num:    Value          Size Type    Bind   Vis      Ndx Name\n\
             1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND poll@GLIBC_2.2.5 (2)\n\
             2: 0000000000001000    10 FUNC    GLOBAL DEFAULT   12 nebd_open@@NEBD_0.1\n";
        assert_eq!(exported_symbols(readelf), BTreeSet::from(["nebd_open@@NEBD_0.1".to_owned()]));
    }
}
