//! Runs cargo and other programs, and reads what cargo says it built.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

/// How to compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Optimised: what is shipped.
    Release,
    /// Quicker to build.
    Dev,
}

impl Profile {
    /// Cargo's own word for it.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Release => "release",
            Profile::Dev => "dev",
        }
    }
}

/// The cargo that runs this program, or the one on the path; always at the workspace's root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::repo_root());
    command
}

/// `cargo +nightly`. Through rustup's proxy on the path: `$CARGO` is one toolchain's binary.
pub fn cargo_nightly() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(crate::repo_root()).arg("+nightly");
    // The running toolchain's settings would win over `+nightly`.
    for inherited in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC"] {
        command.env_remove(inherited);
    }
    command
}

/// Runs a command with its output untouched; fails with the command line.
pub fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    eprintln!("+ {line}");
    let status = command.status().with_context(|| format!("cannot start: {line}"))?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

/// Standard output of a command that succeeds; its errors pass through.
pub fn output(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start: {line}"))?;
    ensure!(output.status.success(), "{line}: {}", output.status);
    String::from_utf8(output.stdout).with_context(|| format!("{line}: its output is not UTF-8"))
}

fn command_line(command: &Command) -> String {
    let settings = command.get_envs().filter_map(|(name, value)| {
        Some(format!("{}={:?}", name.to_string_lossy(), value?.to_string_lossy()))
    });
    let program = std::iter::once(command.get_program()).chain(command.get_args());
    let words = program.map(|word| word.to_string_lossy().into_owned());
    settings.chain(words).collect::<Vec<_>>().join(" ")
}

/// Whether a program is on the path.
pub fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Where cargo builds.
pub fn target_dir() -> Result<PathBuf> {
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo metadata: no target")?;
    Ok(target.into())
}

/// What a build left behind.
pub struct Built {
    messages: Vec<Value>,
}

/// Runs a cargo command that builds; `--message-format=json` must be among its arguments.
///
/// Diagnostics are printed from the messages, for with `json-render-diagnostics` cargo would keep
/// the note about native libraries to itself.
pub fn build(command: &mut Command) -> Result<Built> {
    let line = command_line(command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start: {line}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let messages: Vec<Value> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let diagnostics = messages.iter().filter(|message| message["message"]["level"] != "note");
    for rendered in diagnostics.filter_map(|message| message["message"]["rendered"].as_str()) {
        eprintln!("{rendered}");
    }
    ensure!(output.status.success(), "{line}: {}", output.status);
    Ok(Built { messages })
}

impl Built {
    /// The file of the library target `name` that ends in `extension`.
    pub fn library(&self, name: &str, extension: &str) -> Result<PathBuf> {
        self.artifacts(name)
            .flat_map(|artifact| artifact["filenames"].as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .map(PathBuf::from)
            .find(|file| file.extension().is_some_and(|found| found == extension))
            .with_context(|| format!("cargo built no .{extension} for {name}"))
    }

    /// The executable of the binary target `name`.
    pub fn executable(&self, name: &str) -> Result<PathBuf> {
        self.artifacts(name)
            .filter_map(|artifact| artifact["executable"].as_str())
            .map(PathBuf::from)
            .next()
            .with_context(|| format!("cargo built no program {name}"))
    }

    /// System libraries that a static library needs, as rustc names them.
    pub fn native_static_libs(&self) -> Result<String> {
        self.messages
            .iter()
            .filter_map(|message| message["message"]["message"].as_str())
            .find_map(|text| text.strip_prefix("native-static-libs: "))
            .map(|libs| libs.trim().to_owned())
            .context("rustc did not say which libraries libnebd.a needs")
    }

    fn artifacts(&self, name: &str) -> impl Iterator<Item = &Value> {
        self.messages.iter().filter(move |message| {
            message["reason"] == "compiler-artifact" && message["target"]["name"] == name
        })
    }
}

/// Fails unless `path` is a file.
pub fn expect_file(path: &Path) -> Result<()> {
    if !path.is_file() {
        bail!("{} is missing", path.display());
    }
    Ok(())
}
