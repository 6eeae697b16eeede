//! The descriptors a server starts with.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;

use crate::{names, sys};

/// What the keeper or the service manager handed over.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Listening client socket (`SOCK_SEQPACKET`, non-blocking).
    pub client: Option<OwnedFd>,
    /// Listening admin socket (`SOCK_STREAM`, non-blocking).
    pub admin: Option<OwnedFd>,
    /// The host page.
    pub host: Option<OwnedFd>,
    /// Eventfd (non-blocking) that the keeper rings after raising the host page's ping. A standby
    /// leaves it alone until it is activated.
    pub probe: Option<OwnedFd>,
    /// Pidfd of the server before this one.
    pub predecessor: Option<OwnedFd>,
    /// End of file here means that the keeper is gone; see [`crate::notify::Reregister`].
    pub life: Option<OwnedFd>,
    /// The channel of a standby; see [`crate::standby::StandbyChannel`].
    pub standby: Option<OwnedFd>,
    /// The store, by name.
    pub store: BTreeMap<String, OwnedFd>,
}

/// Why the inherited descriptors cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Called with other threads running: the environment cannot be changed safely.
    #[error("descriptors must be taken before the process starts threads")]
    Threads,
    /// A variable holds no number, or an impossible one.
    #[error("{variable} is not a sensible number")]
    Number {
        /// Which variable.
        variable: &'static str,
    },
    /// There are more or fewer names than descriptors.
    #[error("{descriptors} descriptors were passed, but {names} names")]
    Names {
        /// According to `LISTEN_FDS`.
        descriptors: usize,
        /// According to `LISTEN_FDNAMES`.
        names: usize,
    },
    /// A descriptor is not open, or was taken before.
    #[error("cannot take the inherited descriptors")]
    Descriptors(#[source] io::Error),
    /// The long list of names cannot be read.
    #[error("cannot read the names of the inherited descriptors")]
    LongNames(#[source] io::Error),
}

const VARIABLES: [&str; 4] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];

/// Takes the descriptors that were passed to this process, marks each close-on-exec and removes the
/// `LISTEN_*` variables. Nothing was passed: everything is empty.
///
/// Call it first in `main`, once, before any thread starts.
pub fn inherit() -> Result<Inherited, InheritError> {
    let variable = |name| std::env::var(name).ok();
    let (pid, count, list) =
        (variable(VARIABLES[0]), variable(VARIABLES[1]), variable(VARIABLES[2]));
    if pid.is_none() && count.is_none() {
        return Ok(Inherited::default());
    }
    if !sys::clear_environment(&VARIABLES) {
        return Err(InheritError::Threads);
    }
    let number = |text: Option<String>, variable| {
        text.and_then(|t| t.parse::<u32>().ok()).ok_or(InheritError::Number { variable })
    };
    if number(pid, "LISTEN_PID")? != std::process::id() {
        return Ok(Inherited::default());
    }
    let count = number(count, "LISTEN_FDS")? as usize;
    if count > (i32::MAX as usize) / 2 {
        return Err(InheritError::Number { variable: "LISTEN_FDS" });
    }
    let fds = sys::take_inherited(count).map_err(InheritError::Descriptors)?;
    name_all(fds, list.as_deref())
}

fn name_all(mut fds: Vec<OwnedFd>, list: Option<&str>) -> Result<Inherited, InheritError> {
    let long;
    let mut list = list.unwrap_or("");
    if list == names::NAMES && !fds.is_empty() {
        long = read_names(fds.remove(0)).map_err(InheritError::LongNames)?;
        list = &long;
    }
    let given: Vec<&str> = if list.is_empty() { Vec::new() } else { list.split(':').collect() };
    if given.len() != fds.len() {
        return Err(InheritError::Names { descriptors: fds.len(), names: given.len() });
    }
    let mut inherited = Inherited::default();
    for (name, fd) in given.into_iter().zip(fds) {
        match name {
            names::CLIENT => inherited.client = Some(fd),
            names::ADMIN => inherited.admin = Some(fd),
            names::HOST => inherited.host = Some(fd),
            names::PROBE => inherited.probe = Some(fd),
            names::PREDECESSOR => inherited.predecessor = Some(fd),
            names::LIFE => inherited.life = Some(fd),
            names::STANDBY => inherited.standby = Some(fd),
            // Of a later keeper, for a later server.
            other if other.starts_with(names::RESERVED) => drop(fd),
            other => drop(inherited.store.insert(other.to_owned(), fd)),
        }
    }
    Ok(inherited)
}

fn read_names(fd: OwnedFd) -> io::Result<String> {
    let mut file = File::from(fd);
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn names_find_their_places() {
        let list = "nebd.client:nebd.host:m.disk:nebd.future";
        let inherited = name_all((0..4).map(|_| null()).collect(), Some(list)).unwrap();
        assert!(inherited.client.is_some() && inherited.host.is_some());
        assert!(inherited.admin.is_none());
        assert_eq!(inherited.store.keys().collect::<Vec<_>>(), ["m.disk"]);
    }

    #[test]
    fn a_wrong_count_is_refused() {
        let error = name_all(vec![null()], Some("a:b")).unwrap_err();
        assert!(matches!(error, InheritError::Names { descriptors: 1, names: 2 }));
    }
}
