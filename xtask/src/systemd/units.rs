//! The files of `systemd/`: into a prefix, and before `systemd-analyze`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo;
use crate::install::write;

/// Where the units say that the programs and the configuration are.
const BIN: &str = "/usr/bin/";
const CONFIGURATION: &str = "/etc/nebd/";
/// `systemd-analyze security`: tenths of what it calls exposure, 100 at most. README.md has what is
/// left out.
const EXPOSURE_MAX: u32 = 16;

/// The units' texts by name, with the paths of this installation.
fn units(bin_dir: &Path, configuration: &Path) -> Result<Vec<(String, String)>> {
    let directory = crate::repo_root().join("systemd");
    let mut units = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.ends_with(".service") && !name.ends_with(".socket") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| name.clone())?;
        let bin = format!("{}/", bin_dir.display());
        let text = text.replace(&format!("{BIN}nebd"), &format!("{bin}nebd"));
        units.push((name, text.replace(CONFIGURATION, &format!("{}/", configuration.display()))));
    }
    ensure!(!units.is_empty(), "no units in {}", directory.display());
    units.sort();
    Ok(units)
}

/// Where the configuration is read from: a prefix that systemd looks into has it in /etc.
fn configuration_dir(prefix: &Path) -> PathBuf {
    let is_system = [Path::new("/usr"), Path::new("/usr/local")].contains(&prefix);
    if is_system { "/etc/nebd".into() } else { prefix.join("etc/nebd") }
}

/// Installs units, sysusers, tmpfiles and the sample configuration. A configuration that is there is
/// left alone.
pub fn install(prefix: &Path, destdir: Option<&Path>) -> Result<()> {
    let place = |path: &Path| match destdir {
        Some(destdir) => Ok(destdir.join(path.strip_prefix("/")?)),
        None => anyhow::Ok(path.to_path_buf()),
    };
    let lib = place(&prefix.join("lib"))?;
    let configuration_dir = configuration_dir(prefix);
    for (name, text) in units(&prefix.join("bin"), &configuration_dir)? {
        write(&lib.join("systemd/system").join(name), text.as_bytes(), 0o644)?;
    }
    let source = crate::repo_root().join("systemd");
    for kind in ["sysusers", "tmpfiles"] {
        let text = fs::read(source.join(format!("nebd.{kind}.conf"))).context(kind)?;
        write(&lib.join(format!("{kind}.d/nebd.conf")), &text, 0o644)?;
    }
    let sample = fs::read(source.join("nebd.toml")).context("nebd.toml")?;
    write(&place(&prefix.join("share/nebd/nebd.toml"))?, &sample, 0o644)?;
    let configuration = place(&configuration_dir.join("nebd.toml"))?;
    if !configuration.exists() {
        write(&configuration, &sample, 0o644)?;
    }
    Ok(())
}

/// `systemd-analyze verify` and `security`, on units whose programs are stubs.
pub fn verify() -> Result<Option<String>> {
    if !cargo::is_installed("systemd-analyze") {
        return Ok(Some("systemd-analyze is not installed".into()));
    }
    let directory = cargo::target_dir()?.join("systemd-units");
    let _ = fs::remove_dir_all(&directory);
    let bin = directory.join("bin");
    fs::create_dir_all(&bin)?;
    for program in ["nebd-server", "nebdctl"] {
        symlink("/bin/true", bin.join(program))?;
    }
    let mut files = Vec::new();
    for (name, text) in units(&bin, &directory)? {
        let path = directory.join(name);
        fs::write(&path, text)?;
        files.push(path);
    }
    // What it warns of, an unknown key for one, is no failure to it.
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=yes"]).args(&files);
    let output = verify.output().context("systemd-analyze")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let ours = said.lines().filter(|line| line.contains("nebd"));
    let ours: Vec<&str> = ours.collect();
    if !output.status.success() || !ours.is_empty() {
        bail!("systemd-analyze verify: {}\n{said}", output.status);
    }
    for file in files.iter().filter(|file| file.extension().is_some_and(|e| e == "service")) {
        check_exposure(file)?;
    }
    println!("systemd: {} units are in order", files.len());
    Ok(None)
}

fn check_exposure(file: &Path) -> Result<()> {
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--no-pager", "--offline=true"]);
    let output = security.arg(format!("--threshold={EXPOSURE_MAX}")).arg(file).output()?;
    let table = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{}: more exposed than {EXPOSURE_MAX}/100\n{table}", file.display());
    }
    println!("{}", table.lines().last().unwrap_or_default());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// `pub name: Type,` within the structures of the configuration.
    fn keys_of_the_server() -> BTreeSet<String> {
        let path = crate::repo_root().join("nebd-server/src/config.rs");
        let text = fs::read_to_string(path).unwrap();
        let fields = text.lines().filter_map(|line| line.strip_prefix("    pub "));
        let names = fields.filter_map(|field| Some(field.split_once(": ")?.0.to_owned()));
        names.filter(|name| !name.contains('(')).collect()
    }

    #[test]
    fn the_sample_has_every_key_and_no_other() {
        let sample = fs::read_to_string(crate::repo_root().join("systemd/nebd.toml")).unwrap();
        let keys = sample.lines().filter_map(|line| Some(line.split_once(" = ")?.0));
        let keys = keys.filter_map(|key| key.strip_prefix('#'));
        let sections = sample.lines().filter_map(|line| line.strip_prefix('[')?.strip_suffix(']'));
        let mut all: Vec<String> = keys.chain(sections).map(str::to_owned).collect();
        all.sort();
        assert_eq!(all, keys_of_the_server().into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn paths_are_those_of_the_prefix() {
        for (name, text) in units(Path::new("/opt/bin"), Path::new("/opt/conf")).unwrap() {
            assert!(!text.contains(BIN) && !text.contains(CONFIGURATION), "{name}");
        }
    }
}
