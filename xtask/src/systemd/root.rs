//! The guest's root file system: packages of Debian, extracted and not configured, and on top what
//! `cargo xtask install` installs.
//!
//! Nothing is mounted and no program of the tree is run: packages are unpacked with tar, the image
//! is filled by `mke2fs -d`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::GuestArgs;
use crate::cargo::{self, cargo};
use crate::install::{self, InstallArgs, write};

/// With what they depend on: a system that systemd can run, and a shell.
const PACKAGES: [&str; 9] =
    ["systemd", "base-files", "base-passwd", "bash", "coreutils", "grep", "sed", "mawk", "mount"];
/// Raised when the tree is made in another way; the packages are a part of the key, too.
const RECIPE: u32 = 3;
/// Nothing in the guest reads these.
const LEFT_OUT: [&str; 6] = [
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/info/*",
    "./usr/share/locale/*",
    "./usr/share/lintian/*",
    "./usr/share/perl5/*",
];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const IMAGE_BYTES: &str = "768M";
const DISK_BYTES: u64 = 64 << 20;

/// The tree without nebd, made once. `Err`: why it cannot be made here.
pub fn base(work_dir: &Path) -> Result<Result<PathBuf, String>> {
    let key = format!("recipe {RECIPE}, bookworm: {}\n", PACKAGES.join(" "));
    let (tree, stamp) = (work_dir.join("base"), work_dir.join("base.key"));
    if fs::read_to_string(&stamp).is_ok_and(|made| made == key) {
        return Ok(Ok(tree));
    }
    if !rustix::process::geteuid().is_root() || !cargo::is_installed("apt-get") {
        return Ok(Err("no root with apt-get to fetch a guest's packages".into()));
    }
    let _ = fs::remove_file(&stamp);
    let _ = fs::remove_dir_all(&tree);
    let archives = match download(work_dir) {
        Ok(archives) => archives,
        Err(error) => return Ok(Err(format!("no archive to fetch packages from: {error:#}"))),
    };
    // Merged, as every Debian 12 is; packages still have both.
    for directory in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(tree.join("usr").join(directory))?;
        symlink(format!("usr/{directory}"), tree.join(directory))?;
    }
    for archive in &archives {
        unpack(archive, &tree)?;
    }
    configure(&tree)?;
    fs::remove_dir_all(work_dir.join("apt"))?;
    fs::write(&stamp, key)?;
    Ok(Ok(tree))
}

/// All packages, whatever is installed on the machine: apt is shown an empty one.
fn download(work_dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = work_dir.join("apt");
    for part in ["lists/partial", "archives/partial"] {
        fs::create_dir_all(dir.join(part))?;
    }
    let sources = [
        ("debian", "bookworm"),
        ("debian", "bookworm-updates"),
        ("debian-security", "bookworm-security"),
    ];
    let line = |(archive, suite)| {
        format!("deb [signed-by={KEYRING}] http://deb.debian.org/{archive} {suite} main\n")
    };
    fs::write(dir.join("sources.list"), sources.map(line).concat())?;
    fs::write(dir.join("status"), "")?;
    let apt = || {
        let mut command = Command::new("apt-get");
        let files = [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache::archives", "archives"),
        ];
        for (option, file) in files {
            command.arg("-o").arg(format!("{option}={}", dir.join(file).display()));
        }
        for option in
            ["Dir::Etc::sourceparts=-", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache="]
        {
            command.args(["-o", option]);
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q");
        command
    };
    cargo::run(apt().arg("update"))?;
    let mut install = apt();
    install.args(["install", "-y", "--download-only", "--no-install-recommends"]);
    cargo::run(install.args(PACKAGES))?;
    let files = fs::read_dir(dir.join("archives"))?.filter_map(|entry| Some(entry.ok()?.path()));
    let archives: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).collect();
    ensure!(archives.len() >= PACKAGES.len(), "only {} packages were fetched", archives.len());
    Ok(archives)
}

/// dpkg-deb alone would put directories in the place of the links to /usr.
fn unpack(archive: &Path, tree: &Path) -> Result<()> {
    let excluded = LEFT_OUT.map(|pattern| format!("--exclude='{pattern}'")).join(" ");
    let script = format!(
        "dpkg-deb --fsys-tarfile \"$1\" | tar -xp --keep-directory-symlink {excluded} -C \"$2\""
    );
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", &script, "unpack"]).args([archive, tree]);
    cargo::output(&mut bash).map(|_| ())
}

/// What the packages' scripts would have made.
fn configure(tree: &Path) -> Result<()> {
    for (from, to) in [
        ("usr/share/base-passwd/passwd.master", "etc/passwd"),
        ("usr/share/base-passwd/group.master", "etc/group"),
    ] {
        install::place(&tree.join(from), &tree.join(to), 0o644)?;
    }
    let files = [
        ("etc/hostname", "guest\n"),
        ("etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\n"),
        // Neither a first boot, nor one after an update.
        ("etc/machine-id", "6e656264000000000000000000000001\n"),
        ("etc/.updated", ""),
        ("var/.updated", ""),
        ("etc/fstab", ""),
    ];
    for (file, text) in files {
        write(&tree.join(file), text.as_bytes(), 0o644)?;
    }
    for (program, name) in [("mawk", "awk"), ("bash", "sh")] {
        symlink(program, tree.join("usr/bin").join(name))?;
    }
    // Without hardware's help each of these takes a second, and none has anything to do.
    let systemd = tree.join("usr/lib/systemd");
    fs::remove_dir_all(systemd.join("system-generators"))?;
    let wants = systemd.join("system/sysinit.target.wants");
    for entry in fs::read_dir(&wants).with_context(|| wants.display().to_string())? {
        let entry = entry?;
        if entry.file_name() != "systemd-journald.service" {
            fs::remove_file(entry.path())?;
        }
    }
    for directory in ["proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    Ok(())
}

/// The disks: the root, with nebd in it, and an empty one.
pub struct Disks {
    /// The root file system.
    pub root: PathBuf,
    /// For a volume on a block device.
    pub empty: PathBuf,
}

/// Builds nebd, installs it as an operator would, and makes the disks.
pub fn image(work_dir: &Path, base: &Path, args: &GuestArgs) -> Result<Disks> {
    let tree = work_dir.join("tree");
    let _ = fs::remove_dir_all(&tree);
    // Linked, not copied: whatever is written goes to a new file.
    cargo::run(Command::new("cp").arg("-al").args([base, &tree]))?;
    match &args.programs {
        None => {
            install::run(&InstallArgs {
                prefix: "/usr".into(),
                destdir: Some(tree.clone()),
                profile: args.profile,
                library_only: false,
                keep_debug: false,
            })?;
            install_stripped(&build_upgrade_tests(args)?, &tree)?;
        }
        Some(directory) => {
            super::units::install(Path::new("/usr"), Some(&tree))?;
            for program in ["nebd-server", "nebdctl", "upgrade-tests"] {
                install_stripped(&directory.join(program), &tree)?;
            }
        }
    }
    let guest = crate::repo_root().join("upgrade-tests/guest");
    for (file, to, mode) in [
        ("systemd.sh", "usr/lib/nebd-guest/systemd.sh", 0o755),
        ("nebd-guest.service", "etc/systemd/system/nebd-guest.service", 0o644),
        ("nebd-guest.target", "etc/systemd/system/nebd-guest.target", 0o644),
        ("reload.conf", "etc/systemd/system/nebd-server.service.d/reload.conf", 0o644),
        ("reload.conf", "etc/systemd/system/nebd-keeper.service.d/reload.conf", 0o644),
    ] {
        install::place(&guest.join(file), &tree.join(to), mode)?;
    }
    let root = work_dir.join("root.img");
    let _ = fs::remove_file(&root);
    let mut mke2fs = Command::new("/sbin/mke2fs");
    // A guest that lives for minutes needs no journal.
    mke2fs.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"]).arg(&tree);
    cargo::run(mke2fs.arg(&root).arg(IMAGE_BYTES))?;
    fs::remove_dir_all(&tree)?;
    let empty = work_dir.join("empty.img");
    fs::File::create(&empty)?.set_len(DISK_BYTES)?;
    Ok(Disks { root, empty })
}

fn build_upgrade_tests(args: &GuestArgs) -> Result<PathBuf> {
    let built = cargo::build(
        cargo().args(["build", "-p", "nebd-upgrade-tests", "--bin", "upgrade-tests"]).args([
            "--message-format=json",
            "--profile",
            args.profile.name(),
        ]),
    )?;
    built.executable("upgrade-tests")
}

fn install_stripped(program: &Path, tree: &Path) -> Result<()> {
    let name = program.file_name().context("a program has a name")?;
    let to = tree.join("usr/bin").join(name);
    let mut strip = Command::new("strip");
    cargo::output(strip.arg("-o").arg(&to).arg(program)).map(|_| ())
}
