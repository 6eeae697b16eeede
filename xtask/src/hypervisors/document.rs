//! The commands of docs/hypervisors.md, as they stand there: fenced blocks marked `ci=NAME`.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

/// Marked blocks by name.
pub struct Document(BTreeMap<String, String>);

impl Document {
    /// Reads the page.
    pub fn read() -> Result<Document> {
        let path = crate::repo_root().join("docs/hypervisors.md");
        parse(&fs::read_to_string(&path).with_context(|| path.display().to_string())?)
    }

    /// A block's commands.
    pub fn block(&self, name: &str) -> Result<&str> {
        let block = self.0.get(name).map(String::as_str);
        block.with_context(|| format!("docs/hypervisors.md has no block marked ci={name}"))
    }

    /// Fails if a block is marked that nobody runs.
    pub fn expect_only(&self, names: &[String]) -> Result<()> {
        for name in self.0.keys() {
            let is_run = names.contains(name);
            ensure!(is_run, "docs/hypervisors.md: the block ci={name} is run by nobody");
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<Document> {
    let mut blocks = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(info) = line.strip_prefix("```").filter(|info| !info.is_empty()) else { continue };
        let body = lines.by_ref().take_while(|line| !line.starts_with("```"));
        let body: String = body.flat_map(|line| [line, "\n"]).collect();
        if let Some(name) = info.split_whitespace().find_map(|word| word.strip_prefix("ci=")) {
            let earlier = blocks.insert(name.to_owned(), body);
            ensure!(earlier.is_none(), "docs/hypervisors.md: two blocks are marked ci={name}");
        }
    }
    Ok(Document(blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_blocks_and_no_others() {
        let text =
            "a\n```sh ci=one\nx \\\n  y\n```\n```\nno\n```\n```sh\nno\n```\n```sh ci=two\nz\n```\n";
        let document = parse(text).unwrap();
        assert_eq!(document.block("one").unwrap(), "x \\\n  y\n");
        assert_eq!(document.block("two").unwrap(), "z\n");
        assert!(document.block("three").is_err());
        assert!(document.expect_only(&["one".into(), "two".into()]).is_ok());
        assert!(document.expect_only(&["one".into()]).is_err());
        assert!(parse("```sh ci=a\n```\n```sh ci=a\n```\n").is_err());
    }

    #[test]
    fn the_page_has_what_is_run() {
        let document = Document::read().unwrap();
        let blocks = super::super::blocks();
        document.expect_only(&blocks).unwrap();
        assert!(blocks.iter().all(|name| document.block(name).is_ok()));
    }
}
