//! The library that an unpatched QEMU or fio takes for Ceph's, in a directory of its own: whoever
//! does not name the directory gets the host's real one.
//!
//! ```text
//!  lib/nebd/rbd/libnebd-rbd.so ◄─ librbd.so.1
//!                              ◄─ librados.so.2     one file, which the loader maps once
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{self, Profile, cargo};
use crate::install::{NEEDED_ALLOWED, bracketed, exported_symbols, place, replace_link};

const LIBRARY: &str = "libnebd-rbd.so";
/// What those look for that were built for Ceph.
const NAMES: [&str; 2] = ["librbd.so.1", "librados.so.2"];
/// The directory, in that of the libraries.
pub const DIRECTORY: &str = "nebd/rbd";

/// Builds, installs, and checks what was installed.
pub fn run(profile: Profile, keep_debug: bool, lib_dir: &Path) -> Result<()> {
    let map = crate::repo_root().join("nebd-client/rbd/rbd.map");
    let functions = functions_in_map(&fs::read_to_string(&map).context("rbd.map")?);
    let built = cargo::build(
        cargo().args(["rustc", "-p", "nebd-rbd", "--lib", "--crate-type", "staticlib"]).args([
            "--profile",
            profile.name(),
            "--message-format=json",
        ]),
    )?;
    let archive = built.library("nebd_rbd", "a")?;
    let linked = archive.with_file_name(LIBRARY);
    link(&archive, &map, &functions, &linked)?;
    if !keep_debug {
        cargo::output(Command::new("strip").arg("--strip-unneeded").arg(&linked))?;
    }
    let directory = lib_dir.join(DIRECTORY);
    let installed = directory.join(LIBRARY);
    place(&linked, &installed, 0o755)?;
    for name in NAMES {
        replace_link(LIBRARY, &directory.join(name))?;
    }
    check(&installed, &functions)?;
    let size = fs::metadata(&installed)?.len() / 1024;
    println!("{LIBRARY}: {size} KiB, {} functions", functions.len());
    Ok(())
}

/// Not by rustc: its own version script would export these, but also needs libgcc's library.
fn link(archive: &Path, map: &Path, functions: &BTreeSet<String>, to: &Path) -> Result<()> {
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.args(["-shared", "-o"]).arg(to);
    cc.args(functions.iter().map(|function| format!("-Wl,-u,{function}")));
    cc.arg(archive);
    cc.arg(format!("-Wl,--version-script={}", map.display()));
    cc.arg(format!("-Wl,-soname,{LIBRARY}"));
    // No symbol may stay open; a host that unloads the library must not pull code from under its
    // threads, hence nodelete.
    cc.args(["-Wl,--gc-sections", "-Wl,--as-needed", "-Wl,-z,defs,-z,relro,-z,now,-z,nodelete"]);
    cc.args(["-static-libgcc", "-lpthread", "-ldl", "-lm", "-lc"]);
    cargo::output(&mut cc).map(|_| ())
}

/// Fails unless the library exports exactly the functions, and needs libc only.
fn check(installed: &Path, functions: &BTreeSet<String>) -> Result<()> {
    let symbols = cargo::output(Command::new("readelf").args(["-W", "--dyn-syms"]).arg(installed))?;
    let exported = exported_symbols(&symbols);
    let missing: Vec<&String> = functions.difference(&exported).collect();
    let extra: Vec<&String> = exported.difference(functions).collect();
    ensure!(missing.is_empty(), "{LIBRARY} lacks {missing:?}");
    ensure!(extra.is_empty(), "{LIBRARY} exports what rbd.map does not name: {extra:?}");
    let dynamic = cargo::output(Command::new("readelf").args(["-W", "-d"]).arg(installed))?;
    for needed in bracketed(&dynamic, "(NEEDED)") {
        if !NEEDED_ALLOWED.iter().any(|allowed| needed.starts_with(allowed)) {
            bail!("{LIBRARY} needs {needed} at run time");
        }
    }
    Ok(())
}

fn functions_in_map(map: &str) -> BTreeSet<String> {
    let names = map.lines().filter_map(|line| line.trim().strip_suffix(';'));
    names
        .filter(|name| name.starts_with("rbd_") || name.starts_with("rados_"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_functions_from_a_version_script() {
        let map = "{\n  global:\n    rados_connect;\n    rbd_open;\n  local:\n    *;\n};\n";
        let expected = ["rados_connect", "rbd_open"].map(str::to_owned);
        assert_eq!(functions_in_map(map), BTreeSet::from(expected));
    }
}
