//! The rules that a person forgets and no compiler checks.
//!
//! The tree is walked rather than asked from git, which refuses a checkout that another user owns.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::release;

/// Longest source file in lines; design asks for about 500.
const LINES_MAX: usize = 700;
/// Directories that hold nothing written by people.
const SKIPPED: [&str; 6] = ["target", ".git", "corpus", "artifacts", "node_modules", "coverage"];
/// Where the list of files with `unsafe` stands.
const ARCHITECTURE: &str = "docs/ARCHITECTURE.md";
const UNSAFE_SECTION: &str = "Where unsafe lives";

/// Text that must not stay, written so that this file does not hold it.
const LEFTOVERS: [&str; 6] = [
    concat!("todo", "!("),
    concat!("dbg", "!("),
    concat!("unimplemented", "!("),
    concat!("FIX", "ME"),
    concat!("<<<<", "<<< "),
    concat!(">>>>", ">>> "),
];
/// The directory that checkouts stand in on some machines.
const WORKPLACE: &str = concat!("/wo", "rk/");

/// A file of the tree that is text.
pub(crate) struct Source {
    /// From the root, with slashes.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    fn extension(&self) -> &str {
        Path::new(&self.path).extension().and_then(|text| text.to_str()).unwrap_or("")
    }

    fn is_code(&self) -> bool {
        matches!(self.extension(), "rs" | "c" | "h" | "proto" | "py" | "sh")
    }
}

/// Checks everything, then fails with all that is wrong.
pub fn run(root: &Path) -> Result<()> {
    let sources = collect(root)?;
    let problems = problems(root, &sources);
    for problem in &problems {
        eprintln!("tidy: {problem}");
    }
    if problems.is_empty() {
        println!("tidy: {} files are in order", sources.len());
        return Ok(());
    }
    bail!("tidy: {} problem(s)", problems.len())
}

fn problems(root: &Path, sources: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for source in sources {
        check_length(source, &mut problems);
        check_lines(source, &mut problems);
        check_manifest(source, &mut problems);
        check_licence_line(source, &mut problems);
        check_decision(source, &mut problems);
    }
    check_unsafe(sources, &mut problems);
    check_top_level(root, &mut problems);
    problems.extend(release::problems(sources));
    problems
}

pub(crate) fn collect(root: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name();
            if kind.is_dir() && !SKIPPED.iter().any(|skipped| name == *skipped) {
                directories.push(entry.path());
            } else if kind.is_file() {
                // What is no UTF-8 is no source.
                if let Ok(text) = fs::read_to_string(entry.path()) {
                    sources.push(Source { path: relative(root, &entry.path()), text });
                }
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}

fn check_length(source: &Source, problems: &mut Vec<String>) {
    let lines = source.text.lines().count();
    if source.is_code() && lines > LINES_MAX {
        problems.push(format!("{}: {lines} lines, more than {LINES_MAX}", source.path));
    }
}

fn check_lines(source: &Source, problems: &mut Vec<String>) {
    if source.extension() == "lock" {
        return;
    }
    for (index, line) in source.text.lines().enumerate() {
        let place = format!("{}:{}", source.path, index + 1);
        for leftover in LEFTOVERS.iter().filter(|leftover| line.contains(**leftover)) {
            problems.push(format!("{place}: {leftover} left behind"));
        }
        if names_workplace(line) {
            problems.push(format!("{place}: names a directory of one machine"));
        }
        if source.is_code() && line.ends_with([' ', '\t']) {
            problems.push(format!("{place}: spaces at the end of the line"));
        }
    }
}

/// Whether the line has the workplace's path, and not just a longer path with such a part.
fn names_workplace(line: &str) -> bool {
    line.match_indices(WORKPLACE).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "._-/~}".contains(c))
    })
}

fn check_manifest(source: &Source, problems: &mut Vec<String>) {
    if !source.path.ends_with("Cargo.toml") || !source.text.contains("[package]") {
        return;
    }
    // The fuzz targets are a workspace of their own, built by nightly only.
    let is_member = !source.text.lines().any(|line| line.trim() == "[workspace]");
    let sections: Vec<&str> = source.text.split("\n[").collect();
    let section = |name: &str| sections.iter().find(|text| text.starts_with(name));
    let inherits = |name: &str| section(name).is_some_and(|text| text.contains("workspace = true"));
    if is_member && !inherits("lints]") {
        problems.push(format!("{}: [lints] workspace = true is missing", source.path));
    }
    if !source.text.contains("license.workspace = true") && !source.text.contains("\nlicense = ") {
        problems.push(format!("{}: no licence", source.path));
    }
}

/// C files are copied out of the tree one by one, so each names its licence.
fn check_licence_line(source: &Source, problems: &mut Vec<String>) {
    let head = source.text.lines().take(3).any(|line| line.contains("SPDX-License-Identifier:"));
    if matches!(source.extension(), "c" | "h") && !head {
        problems.push(format!("{}: no SPDX-License-Identifier at its head", source.path));
    }
}

fn check_decision(source: &Source, problems: &mut Vec<String>) {
    let Some(name) = source.path.strip_prefix("docs/decisions/") else { return };
    let numbered = name.len() > 5
        && name.as_bytes()[..4].iter().all(u8::is_ascii_digit)
        && name.as_bytes()[4] == b'-'
        && name.ends_with(".md");
    if name != "README.md" && !numbered {
        problems.push(format!("{}: is not named NNNN-title.md", source.path));
    }
    let titled =
        source.text.lines().next().is_some_and(|line| {
            line.strip_prefix("# ").is_some_and(|title| !title.trim().is_empty())
        });
    if !titled {
        problems.push(format!("{}: has no title in its first line", source.path));
    }
}

fn check_unsafe(sources: &[Source], problems: &mut Vec<String>) {
    let found: BTreeSet<&str> = sources
        .iter()
        .filter(|source| source.extension() == "rs" && has_unsafe(&source.text))
        .map(|source| source.path.as_str())
        .collect();
    let listed = sources
        .iter()
        .find(|source| source.path == ARCHITECTURE)
        .map(|source| paths_with_unsafe(&source.text))
        .unwrap_or_default();
    for path in found.iter().filter(|path| !listed.contains(**path)) {
        problems.push(format!(
            "{path}: has unsafe code, but {ARCHITECTURE} does not list it under \"{UNSAFE_SECTION}\""
        ));
    }
    for path in listed.iter().filter(|path| !found.contains(path.as_str())) {
        problems.push(format!("{ARCHITECTURE}: lists {path}, which has no unsafe code"));
    }
}

/// Paths of Rust files in backticks between the section's heading and the next heading.
fn paths_with_unsafe(architecture: &str) -> BTreeSet<String> {
    let is_heading = |line: &str| line.starts_with('#');
    architecture
        .lines()
        .skip_while(|line| !(is_heading(line) && line.contains(UNSAFE_SECTION)))
        .skip(1)
        .take_while(|line| !is_heading(line))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|path| path.ends_with(".rs"))
        .map(str::to_owned)
        .collect()
}

/// Whether the word stands in code: not in a comment, and not in a text on one line.
fn has_unsafe(text: &str) -> bool {
    text.lines().any(|line| {
        let code = line.split("//").next().unwrap_or("");
        let outside_texts = code.split('"').step_by(2);
        outside_texts
            .flat_map(|part| part.split(|c: char| !c.is_alphanumeric() && c != '_'))
            .any(|word| word == "unsafe")
    })
}

fn check_top_level(root: &Path, problems: &mut Vec<String>) {
    for file in ["LICENSE", "README.md", "docs/formats.md", ".ci/run", ARCHITECTURE] {
        if !root.join(file).is_file() {
            problems.push(format!("{file} is missing"));
        }
    }
    if !is_executable(&root.join(".ci/run")) {
        problems.push(".ci/run is not executable".into());
    }
}

fn is_executable(path: &PathBuf) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems_of(path: &str, text: &str) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        let source = Source { path: path.into(), text: text.into() };
        let mut problems = problems(root.path(), &[source]);
        problems.retain(|problem| problem.starts_with(path));
        problems
    }

    #[test]
    fn finds_what_was_left_behind() {
        for leftover in LEFTOVERS {
            assert_eq!(problems_of("a.rs", &format!("x {leftover}y")).len(), 1, "{leftover}");
        }
        assert_eq!(problems_of("a.md", &format!("in {WORKPLACE}main")).len(), 1);
        assert!(problems_of("a.md", &format!("in ~{WORKPLACE}main")).is_empty());
        assert_eq!(problems_of("a.rs", "let x = 1; \n").len(), 1);
        assert_eq!(problems_of("a.rs", &"x\n".repeat(LINES_MAX + 1)).len(), 1);
    }

    #[test]
    fn finds_unsafe_code_and_nothing_that_looks_like_it() {
        let keyword = concat!("un", "safe");
        assert_eq!(problems_of("a.rs", &format!("{keyword} {{ x() }}")).len(), 1);
        assert_eq!(problems_of("a.rs", &format!("#[{keyword}(no_mangle)]")).len(), 1);
        for harmless in ["// {} {{", "\"{}\"", "#![forbid({}_code)]"] {
            let line = harmless.replace("{}", keyword);
            assert!(problems_of("a.rs", &line).is_empty(), "{line}");
        }
    }

    #[test]
    fn reads_the_list_of_files_with_unsafe() {
        let text =
            format!("# A\n`x.rs`\n## {UNSAFE_SECTION}\n- `a/b.rs`: why, `word`\n## B\n`y.rs`");
        assert_eq!(paths_with_unsafe(&text), BTreeSet::from(["a/b.rs".to_owned()]));
    }

    #[test]
    fn finds_manifests_and_decisions_out_of_shape() {
        let good = "[package]\nlicense.workspace = true\n\n[lints]\nworkspace = true\n";
        assert!(problems_of("x/Cargo.toml", good).is_empty());
        assert_eq!(problems_of("x/Cargo.toml", "[package]\nname = 1\n").len(), 2);
        assert!(problems_of("docs/decisions/0001-x.md", "# X\n").is_empty());
        assert_eq!(problems_of("docs/decisions/x.md", "X\n").len(), 2);
    }
}
