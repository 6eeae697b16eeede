//! The descriptor store.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Descriptors by name, at most so many.
#[derive(Debug)]
pub(crate) struct Store {
    entries: BTreeMap<String, Rc<OwnedFd>>,
    count_max: usize,
}

impl Store {
    pub(crate) fn new(count_max: usize) -> Store {
        Store { entries: BTreeMap::new(), count_max }
    }

    /// Keeps `fd`, in place of any before under this name; `None` (and `fd` is closed) if the store
    /// is full.
    pub(crate) fn insert(&mut self, name: &str, fd: OwnedFd) -> Option<Rc<OwnedFd>> {
        if self.entries.len() >= self.count_max && !self.entries.contains_key(name) {
            return None;
        }
        let fd = Rc::new(fd);
        self.entries.insert(name.to_owned(), fd.clone());
        Some(fd)
    }

    /// Forgets `name`; false if there is none.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Rc<OwnedFd>)> {
        self.entries.iter().map(|(name, fd)| (name.as_str(), fd))
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_refuses_when_full() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut store = Store::new(2);
        assert!(store.insert("a", null()).is_some() && store.insert("b", null()).is_some());
        assert!(store.insert("c", null()).is_none());
        assert!(store.insert("a", null()).is_some());
        assert!(store.remove("a") && !store.remove("a"));
        assert!(store.insert("c", null()).is_some());
        assert_eq!(store.len(), 2);
    }
}
