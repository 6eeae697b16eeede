//! QEMU 10, fio and a guest's kernel, from Debian's archive, without harm to the machine: apt gets a
//! sources list and lists of its own, and may neither remove nor upgrade anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cargo;

/// Where QEMU's drivers stand.
const DRIVER: &str = "/usr/lib/x86_64-linux-gnu/qemu/block-rbd.so";
const PROGRAMS: [&str; 4] = ["qemu-system-x86_64", "qemu-img", "qemu-io", "fio"];
const PACKAGES: [&str; 5] =
    ["qemu-system-x86", "qemu-system-common", "qemu-block-extra", "qemu-utils", "fio"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Archive, and suite.
const SOURCES: [(&str, &str); 4] = [
    ("debian", "bookworm"),
    ("debian", "bookworm-updates"),
    ("debian", "bookworm-backports"),
    ("debian-security", "bookworm-security"),
];
/// The package that names the present kernel.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Installs what is missing. Returns why that is not possible here.
pub fn install(work_dir: &Path) -> Result<Option<String>> {
    if std::env::consts::ARCH != "x86_64" {
        return Ok(Some("the guest is for x86_64".into()));
    }
    let missing: Vec<&str> =
        PROGRAMS.into_iter().filter(|program| !cargo::is_installed(program)).collect();
    if missing.is_empty() && Path::new(DRIVER).is_file() {
        return Ok(None);
    }
    if let Some(reason) = no_apt() {
        return Ok(Some(format!("{} not installed, and {reason}", missing.join(", "))));
    }
    let apt = match Apt::prepare(work_dir) {
        Ok(apt) => apt,
        Err(error) => return Ok(Some(format!("no archive to install QEMU from: {error:#}"))),
    };
    let mut install = apt.command("apt-get");
    install.args(["install", "-y", "-t", "bookworm-backports", "--no-install-recommends"]);
    install.args(["--no-remove", "--no-upgrade"]).args(PACKAGES);
    if let Err(error) = cargo::run(&mut install) {
        return Ok(Some(format!("QEMU cannot be installed: {error:#}")));
    }
    Ok(None)
}

fn no_apt() -> Option<String> {
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !system.contains("VERSION_CODENAME=bookworm") {
        return Some("this is not Debian 12".into());
    }
    let is_root = rustix::process::geteuid().is_root();
    let is_able = cargo::is_installed("apt-get") && Path::new(KEYRING).is_file();
    (!is_root || !is_able).then(|| "there is no root with apt-get".into())
}

/// A kernel, unpacked.
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// The directory that has its modules.
    pub modules: PathBuf,
}

impl Kernel {
    /// Fetches the kernel if it is not there. `None`, with the reason, where that is not possible.
    pub fn fetch(work_dir: &Path) -> Result<Result<Kernel, String>> {
        let unpacked = work_dir.join("kernel");
        if let Some(kernel) = Kernel::find(&unpacked) {
            return Ok(Ok(kernel));
        }
        if let Some(reason) = no_apt() {
            return Ok(Err(format!("no guest kernel: {reason}")));
        }
        let apt = match Apt::prepare(work_dir) {
            Ok(apt) => apt,
            Err(error) => return Ok(Err(format!("no archive to fetch a kernel from: {error:#}"))),
        };
        let package = apt.kernel_package()?;
        if let Err(error) = cargo::run(apt.command("apt-get").args(["download", &package])) {
            return Ok(Err(format!("no guest kernel: {error:#}")));
        }
        let file = apt.downloaded(&package)?;
        cargo::run(Command::new("dpkg-deb").arg("-x").args([&file, &unpacked]))?;
        fs::remove_file(&file)?;
        Ok(Ok(Kernel::find(&unpacked).context("the kernel's package has no kernel")?))
    }

    fn find(unpacked: &Path) -> Option<Kernel> {
        let entries = fs::read_dir(unpacked.join("boot")).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let release =
            names.filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned())).max()?;
        let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
        let modules = unpacked.join("lib/modules").join(release).join("kernel/drivers");
        Some(Kernel { image, modules })
    }
}

/// apt with files of its own.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn prepare(work_dir: &Path) -> Result<Apt> {
        let dir = work_dir.join("apt");
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let line = |(archive, suite)| {
            format!("deb [signed-by={KEYRING}] http://deb.debian.org/{archive} {suite} main\n")
        };
        fs::write(dir.join("sources.list"), SOURCES.map(line).concat())?;
        let apt = Apt { dir };
        cargo::run(apt.command("apt-get").args(["update", "-q"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive").current_dir(&self.dir);
        let files = [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache::archives", "archives"),
        ];
        for (option, file) in files {
            command.arg("-o").arg(format!("{option}={}", self.dir.join(file).display()));
        }
        // Nothing of the machine's own lists and caches, neither read nor written.
        for option in
            ["Dir::Etc::sourceparts=-", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache="]
        {
            command.args(["-o", option]);
        }
        command
    }

    fn kernel_package(&self) -> Result<String> {
        let depends = cargo::output(self.command("apt-cache").args(["depends", KERNEL]))?;
        let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let package = names.into_iter().find(|name| name.starts_with("linux-image-"));
        package.map(str::to_owned).with_context(|| format!("{KERNEL} depends on no kernel"))
    }

    fn downloaded(&self, package: &str) -> Result<PathBuf> {
        let beginning = format!("{package}_");
        let entries = fs::read_dir(&self.dir)?.filter_map(Result::ok).map(|entry| entry.path());
        let found: Vec<PathBuf> = entries
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&beginning) && name.ends_with(".deb")
            })
            .collect();
        ensure!(found.len() == 1, "{} files of {package}", found.len());
        found.into_iter().next().context("one was there")
    }
}
