//! Named points at which a test build dies, hangs or stops on demand.
//!
//! `<state-dir>/failpoints` is read once at start; each line is `point action [nth]`, where action
//! is `kill`, `segv`, `abort`, `hang` or `stop`, and `nth` (1 by default) says at which passage it
//! fires. `keeper-kill`, `keeper-segv` and `keeper-stop` do it to the keeper; this process goes on
//! once it is done. A line is removed from the file before it fires, so a successor does not meet it
//! again; what follows on a line tells it from one that some server has read before.
//! Without the feature `test-hooks` the points compile to nothing.

/// Passes a failpoint.
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "test-hooks")]
        $crate::failpoint::active::pass($name);
    };
}

#[cfg(feature = "test-hooks")]
pub mod active {
    //! The points of a test build.

    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, kill, raise};
    use nix::unistd::Pid;

    /// A keeper that was sent a signal has met it by then, its core dump included.
    const STRIKE_TIME_MAX: Duration = Duration::from_secs(10);

    struct Armed {
        point: String,
        action: String,
        left: AtomicU64,
        line: String,
    }

    struct Table {
        state_dir: PathBuf,
        path: PathBuf,
        armed: Vec<Armed>,
        file: Mutex<()>,
    }

    static TABLE: OnceLock<Table> = OnceLock::new();

    /// Reads the file; call once, early.
    pub fn load(state_dir: &Path) {
        let path = state_dir.join("failpoints");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let armed = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (point, action) = (words.next()?.to_owned(), words.next()?.to_owned());
                let nth = words.next().and_then(|n| n.parse().ok()).unwrap_or(1);
                Some(Armed { point, action, left: AtomicU64::new(nth), line: line.into() })
            })
            .collect();
        let _ = TABLE.set(Table { state_dir: state_dir.into(), path, armed, file: Mutex::new(()) });
    }

    /// Passes a point; may not return.
    pub fn pass(point: &str) {
        let Some(table) = TABLE.get() else { return };
        for armed in table.armed.iter().filter(|armed| armed.point == point) {
            let before = armed.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
            if before == Ok(1) {
                // Another process that read the same line may have been there first.
                if table.disarm(armed) {
                    fire(&armed.action, &table.state_dir);
                }
            }
        }
    }

    impl Table {
        /// False if the line was gone already.
        fn disarm(&self, armed: &Armed) -> bool {
            let _guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let text = std::fs::read_to_string(&self.path).unwrap_or_default();
            let mut removed = false;
            let rest: String = text
                .lines()
                .filter(|line| {
                    let this = *line == armed.line && !removed;
                    removed |= this;
                    !this
                })
                .map(|line| format!("{line}\n"))
                .collect();
            let _ = std::fs::write(&self.path, rest);
            removed
        }
    }

    fn fire(action: &str, state_dir: &Path) {
        match action {
            "kill" => _ = raise(Signal::SIGKILL),
            "segv" => _ = raise(Signal::SIGSEGV),
            "abort" => std::process::abort(),
            "stop" => _ = raise(Signal::SIGSTOP),
            "hang" => loop {
                std::thread::park();
            },
            "keeper-kill" => strike_keeper(state_dir, Signal::SIGKILL),
            "keeper-segv" => strike_keeper(state_dir, Signal::SIGSEGV),
            "keeper-stop" => strike_keeper(state_dir, Signal::SIGSTOP),
            other => eprintln!("failpoint action {other:?} is unknown"),
        }
    }

    /// Returns once the keeper does nothing any more: dead, reaped or not, or stopped.
    fn strike_keeper(state_dir: &Path, signal: Signal) {
        let text = std::fs::read_to_string(state_dir.join("keeper.pid")).unwrap_or_default();
        let Ok(pid) = text.trim().parse() else {
            return eprintln!("there is no keeper to send {signal} to");
        };
        let deadline = Instant::now() + STRIKE_TIME_MAX;
        while !does_nothing(pid) && Instant::now() < deadline {
            // The standard library's handler takes a first SIGSEGV for a fault that will come again.
            let _ = kill(Pid::from_raw(pid), signal);
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn does_nothing(pid: i32) -> bool {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
        // The name, in parentheses, may hold anything.
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        matches!(state, Some('T' | 'Z' | 'X'))
    }
}
