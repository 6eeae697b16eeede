//! Golden files as they were released, which no later version may contradict.
//!
//! ```text
//!  cargo xtask freeze      tests/golden/** of every crate ─► proto/releases/VERSION.golden, once a release
//!  cargo xtask tidy        every golden file begins with the lines that it had in each release
//! ```
//!
//! A layout may grow at its end, where released programs write and read zeros; a file of messages may get
//! more messages.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::tidy::{self, Source};

/// Where releases are kept, from the root.
const RELEASES: &str = "proto/releases";
/// Stands before a file's path in a release.
const HEAD: &str = "=== ";

/// Golden files: path from the root, text.
type Golden = BTreeMap<String, String>;

/// Whether this is a golden file.
fn is_golden(path: &str) -> bool {
    path.contains("/tests/golden/") && (path.ends_with(".hex") || path.ends_with(".txt"))
}

/// Keeps the golden files of this version, which is about to be released.
pub fn freeze(root: &Path, version: &str) -> Result<()> {
    if version.contains('-') {
        bail!("{version} is no release: set the workspace's version first");
    }
    let path = root.join(RELEASES).join(format!("{version}.golden"));
    if path.exists() {
        bail!("{} exists: a release is frozen once", path.display());
    }
    let golden = golden_of(&tidy::collect(root)?);
    fs::create_dir_all(root.join(RELEASES))?;
    fs::write(&path, render(&golden)).with_context(|| format!("write {}", path.display()))?;
    println!("{}: {} golden files", path.display(), golden.len());
    Ok(())
}

/// What contradicts a release.
pub fn problems(sources: &[Source]) -> Vec<String> {
    let golden = golden_of(sources);
    let release = |source: &Source| {
        let name = source.path.strip_prefix(RELEASES)?.strip_prefix('/')?;
        Some((name.strip_suffix(".golden")?.to_owned(), parse(&source.text)))
    };
    let releases = sources.iter().filter_map(release);
    releases.flat_map(|(version, released)| contradictions(&version, &released, &golden)).collect()
}

fn golden_of(sources: &[Source]) -> Golden {
    let files = sources.iter().filter(|source| is_golden(&source.path));
    files.map(|source| (source.path.clone(), source.text.clone())).collect()
}

fn contradictions(version: &str, released: &Golden, golden: &Golden) -> Vec<String> {
    let is_kept = |path: &str, text: &str| {
        let Some(now) = golden.get(path) else { return false };
        // The first line is a title.
        let mut lines = now.lines().skip(1);
        text.lines().skip(1).all(|line| lines.next() == Some(line))
    };
    let changed = released.iter().filter(|(path, text)| !is_kept(path, text));
    changed
        .map(|(path, _)| format!("{path}: its bytes are not those of release {version} any more"))
        .collect()
}

fn render(golden: &Golden) -> String {
    golden.iter().fold(String::new(), |mut text, (path, file)| {
        let _ = write!(text, "{HEAD}{path}\n{file}");
        text
    })
}

fn parse(text: &str) -> Golden {
    let mut golden = Golden::new();
    let mut path = "";
    for line in text.lines() {
        match line.strip_prefix(HEAD) {
            Some(next) => {
                path = next;
                golden.insert(path.to_owned(), String::new());
            }
            None => golden.entry(path.to_owned()).or_default().push_str(&format!("{line}\n")),
        }
    }
    golden
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(files: &[(&str, &str)]) -> Golden {
        files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn what_was_released_may_grow_and_not_change() {
        let released = golden(&[("a", "# title\n0000  01  x\n"), ("b", "# b\n0000  02  y\n")]);
        assert_eq!(parse(&render(&released)), released);
        let grown = golden(&[
            ("a", "# another title\n0000  01  x\n0001  02  z\n"),
            ("b", "# b\n0000  02  y\n"),
            ("c", "# new\n"),
        ]);
        assert!(contradictions("1", &released, &grown).is_empty());
        let changed = golden(&[("a", "# title\n0000  03  x\n")]);
        let problems = contradictions("1", &released, &changed);
        assert_eq!(problems.len(), 2, "one changed, one gone: {problems:?}");
        assert!(problems[0].contains("release 1"), "{problems:?}");
    }
}
