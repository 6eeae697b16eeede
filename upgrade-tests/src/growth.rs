//! Whether processes grow from takeover to takeover: descriptors, threads, children, memory.
//!
//! A process is looked at under load, between two takeovers, again and again; the first looks are
//! compared with the last. What is there for a moment only (a thread that sees the old server out)
//! is waited for; what stays is growth, be it one descriptor in a hundred takeovers.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads, without those that the kernel adds for io_uring.
    pub threads: u64,
    /// Children, those that nobody has waited for included.
    pub children: u64,
    /// Memory that it has written and nobody shares, in KiB. Clean pages are left out: those of
    /// its program are its own alone whenever no second server happens to run.
    pub private_kib: u64,
    /// Its share of all that it has mapped and that is resident, in KiB.
    pub pss_kib: u64,
}

impl Size {
    /// Of this process; `None` once it is gone.
    pub fn of(pid: i32) -> Option<Size> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        let is_own = |name: &String| !name.starts_with("iou-wrk-");
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let kib = |name: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok())
        };
        Some(Size {
            descriptors: descriptors as u64,
            threads: names.filter(is_own).count() as u64,
            children: children(pid).len() as u64,
            private_kib: kib("Private_Dirty:")?,
            pss_kib: kib("Pss:")?,
        })
    }

    /// What is exact between two takeovers; threads of pools come and go with the load.
    fn counts(&self) -> [u64; 2] {
        [self.descriptors, self.children]
    }
}

/// The children of a process, of any of its threads, the oldest first.
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut children: Vec<i32> = tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| pid.parse().ok())
        .collect();
    children.sort_unstable();
    children
}

/// Looks at processes over time.
#[derive(Debug, Default)]
pub struct Growth {
    looks: BTreeMap<String, Vec<Size>>,
}

impl Growth {
    /// Looks at a process in its role (`keeper`, `server after sigkill`): until its counts are no
    /// larger than the least of this role so far, or for `patience`.
    pub fn look(&mut self, role: &str, pid: i32, patience: Duration) {
        let deadline = Instant::now() + patience;
        let looks = self.looks.entry(role.into()).or_default();
        let least = looks.iter().map(Size::counts).reduce(|least, counts| {
            std::array::from_fn(|figure| least[figure].min(counts[figure]))
        });
        let mut smallest: Option<Size> = None;
        while let Some(size) = Size::of(pid) {
            if smallest.is_none_or(|smallest| size.counts() <= smallest.counts()) {
                smallest = Some(size);
            }
            let is_at_rest = least.is_some_and(|least| {
                size.counts().iter().zip(least).all(|(count, least)| *count <= least)
            });
            if is_at_rest || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        looks.extend(smallest);
    }

    /// Compares the first `window` looks at each role with the last; roles that were looked at
    /// less than twice as often are left out.
    pub fn compare(&self, window: usize) -> Vec<Comparison> {
        let enough = self.looks.iter().filter(|(_, looks)| looks.len() >= 2 * window.max(1));
        enough.flat_map(|(role, looks)| compare(role, looks, window.max(1))).collect()
    }
}

type Figure = (&'static str, fn(&Size) -> u64);

/// The role of the harness itself, the client of the servers. Its memory is not judged: what it
/// notes of each takeover takes room.
pub const CLIENT: &str = "client";

const FIGURES: [Figure; 5] = [
    ("descriptors", |size| size.descriptors),
    ("threads", |size| size.threads),
    ("children", |size| size.children),
    ("private KiB", |size| size.private_kib),
    ("PSS KiB", |size| size.pss_kib),
];
/// Memory may vary by so much, and by a tenth: allocators are not exact.
const MEMORY_SLACK_KIB: u64 = 256;

fn compare(role: &str, looks: &[Size], window: usize) -> Vec<Comparison> {
    let (first, last) = (&looks[..window], &looks[looks.len() - window..]);
    let one = |(name, value): &Figure| {
        let (first, last) = (Spread::of(first, value), Spread::of(last, value));
        // What stays is in every look, so the least of the last has it. What comes and goes (threads
        // of pools, flush witnesses that are being replaced) is in some of the first.
        let limit = match *name {
            "descriptors" | "threads" | "children" => first.most,
            // Depends on who else runs the same program at that moment: for people.
            "PSS KiB" => u64::MAX,
            _ if role == CLIENT => u64::MAX,
            _ => first.most + first.most / 10 + MEMORY_SLACK_KIB,
        };
        Comparison {
            role: role.into(),
            figure: (*name).into(),
            looks: looks.len(),
            first,
            last,
            has_grown: last.least > limit,
        }
    };
    FIGURES.iter().map(one).collect()
}

/// A figure over a window of looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub least: u64,
    /// Half of them are smaller.
    pub median: u64,
    /// The largest.
    pub most: u64,
}

impl Spread {
    fn of(looks: &[Size], value: impl Fn(&Size) -> u64) -> Spread {
        let mut values: Vec<u64> = looks.iter().map(value).collect();
        values.sort_unstable();
        let at = |index: usize| values.get(index).copied().unwrap_or(0);
        Spread {
            least: at(0),
            median: at(values.len() / 2),
            most: at(values.len().saturating_sub(1)),
        }
    }
}

/// A figure of a role in the first looks and in the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Whose.
    pub role: String,
    /// Which.
    pub figure: String,
    /// How often it was looked at in all.
    pub looks: usize,
    /// At the beginning.
    pub first: Spread,
    /// At the end.
    pub last: Spread,
    /// Whether it is more than it may be.
    pub has_grown: bool,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Comparison { role, figure, looks, first, last, has_grown } = self;
        let spread = |s: &Spread| format!("{} ({} to {})", s.median, s.least, s.most);
        write!(f, "{role}, {figure}: {} then {}, {looks} looks", spread(first), spread(last))?;
        f.write_str(if *has_grown { ": GROWN" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(descriptors: u64) -> Size {
        Size { descriptors, threads: 5, children: 0, private_kib: 1000, pss_kib: 2000 }
    }

    fn grown(looks: Vec<Size>) -> Vec<String> {
        let growth = Growth { looks: BTreeMap::from([("server".into(), looks)]) };
        let compared = growth.compare(3);
        assert_eq!(compared.len(), 5);
        compared.into_iter().filter(|c| c.has_grown).map(|c| c.figure).collect()
    }

    #[test]
    fn what_stays_is_growth_and_what_passes_is_not() {
        assert_eq!(grown((0..9).map(|_| size(20)).collect()), [""; 0]);
        // A single descriptor, half way through.
        assert_eq!(grown((0..9).map(|at| size(20 + at / 5)).collect()), ["descriptors"]);
        let busy = |at: u64| Size { threads: 5 + at % 3, ..size(20) };
        assert_eq!(grown((0..9).map(busy).collect()), [""; 0]);
        let crowded = |at: u64| Size { threads: 5 + at, ..size(20) };
        assert_eq!(grown((0..9).map(crowded).collect()), ["threads"]);
        assert_eq!(grown((0..9).map(|at| size(20 + u64::from(at == 7))).collect()), [""; 0]);
        // Once there was more, and there is not any longer.
        assert_eq!(grown((0..9).map(|at| size(30 - at)).collect()), [""; 0]);
        let fat = |at: u64| Size { private_kib: 1000 + at * 1000, ..size(20) };
        assert_eq!(grown((0..9).map(fat).collect()), ["private KiB"]);
        let lean = |at: u64| Size { private_kib: 1000 + at * 50, ..size(20) };
        assert_eq!(grown((0..9).map(lean).collect()), [""; 0]);
    }

    #[test]
    fn a_process_is_looked_at() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let own = Size::of(std::process::id() as i32).unwrap();
        assert!(own.descriptors >= 3 && own.threads >= 1 && own.private_kib > 0, "{own:?}");
        assert!(children(std::process::id() as i32).contains(&(child.id() as i32)));
        assert_eq!(Size::of(child.id() as i32).unwrap().threads, 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(Size::of(child.id() as i32), None);
        let mut growth = Growth::default();
        growth.look("gone", child.id() as i32, Duration::ZERO);
        assert!(growth.compare(1).is_empty());
    }
}
