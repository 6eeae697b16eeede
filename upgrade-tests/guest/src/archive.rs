//! An archive that the kernel unpacks as a guest's first file system (`newc`, of cpio).

use std::collections::BTreeSet;
use std::path::Path;

const DIRECTORY: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;

/// The archive, as far as it has been put together.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An executable file, and the directories that it stands in.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        let path = path.trim_start_matches('/');
        if let Some(parent) = Path::new(path).parent() {
            self.directory(&parent.to_string_lossy());
        }
        self.add(path, PROGRAM, content);
    }

    /// A directory, and those that it stands in.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        if path.is_empty() || !self.directories.insert(path.to_owned()) {
            return;
        }
        if let Some(parent) = Path::new(path).parent() {
            self.directory(&parent.to_string_lossy());
        }
        self.add(path, DIRECTORY, &[]);
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (links, name_bytes) = (1, name.len() + 1);
        // inode, mode, uid, gid, links, mtime, size, four of devices, length of the name, checksum
        let numbers = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name_bytes as u32,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend(numbers.iter().flat_map(|number| format!("{number:08x}").into_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// What the kernel is given.
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_of_one_file() {
        let mut archive = Archive::default();
        archive.program("/init", b"abc");
        let text = String::from_utf8(archive.finish()).unwrap();
        let header = "070701".to_owned() + "00000001" + "000081ed" + &"00000000".repeat(2);
        assert!(text.starts_with(&header), "{text}");
        let rest = format!("{}{}init\0\0abc\0070701", "00000005", "00000000");
        assert!(text[header.len()..].contains(&rest), "{text}");
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut archive = Archive::default();
        archive.program("/usr/sbin/a", b"");
        archive.program("/usr/sbin/b", b"");
        let text = String::from_utf8(archive.finish()).unwrap();
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("usr\0") < at("usr/sbin\0") && at("usr/sbin\0") < at("usr/sbin/a\0"));
        assert_eq!(text.matches("usr/sbin\0").count(), 1);
    }
}
