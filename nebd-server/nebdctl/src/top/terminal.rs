//! The terminal while `nebdctl top` has it: another screen, no cursor, keys at once and unseen. As
//! it was when dropped.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};

use crate::demo::process::is_interrupted;

/// How often Ctrl-C is looked for.
const GLANCE: Duration = Duration::from_millis(50);
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// The terminal, taken.
#[derive(Debug)]
pub struct Terminal {
    /// Standard input as it was, if it is a terminal.
    input: Option<Termios>,
}

impl Terminal {
    /// Takes it.
    pub fn take() -> io::Result<Terminal> {
        let stdin = io::stdin();
        let input = match stdin.is_terminal() {
            true => Some(rustix::termios::tcgetattr(&stdin)?),
            false => None,
        };
        // From here on dropping it gives it back.
        let terminal = Terminal { input };
        if let Some(mut modes) = terminal.input.clone() {
            modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            // A stopped process would leave its screen to the shell.
            modes.special_codes[SpecialCodeIndex::VSUSP] = 0;
            rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &modes)?;
        }
        write_now(ENTER)?;
        Ok(terminal)
    }

    /// Shows this text, as much of it as there is room for.
    pub fn show(&self, text: &str) -> io::Result<()> {
        let (rows, columns) = match rustix::termios::tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
            _ => (24, 80),
        };
        write_now(&frame(text, rows.into(), columns.into()))
    }

    /// Waits, and says whether to go on: not after `q` or Ctrl-C.
    pub fn wait(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if is_interrupted() || self.quits(left.min(GLANCE)) {
                return false;
            }
            if left.is_zero() {
                return true;
            }
        }
    }

    fn quits(&self, time: Duration) -> bool {
        if self.input.is_none() {
            std::thread::sleep(time);
            return false;
        }
        let stdin = io::stdin();
        let timeout =
            Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        if !matches!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1..)) {
            return false;
        }
        let mut keys = [0; 16];
        match stdin.lock().read(&mut keys) {
            // The terminal has gone.
            Ok(0) | Err(_) => true,
            Ok(count) => keys[..count].iter().any(|key| matches!(key, b'q' | b'Q' | 3 | 4)),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = write_now(LEAVE);
        if let Some(modes) = &self.input {
            let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, modes);
        }
    }
}

fn write_now(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// What makes `text` stand on a screen of this size, over whatever stood there.
fn frame(text: &str, rows: usize, columns: usize) -> String {
    let mut frame = String::from("\x1b[H");
    for (row, line) in text.lines().take(rows).enumerate() {
        let line: String = line.chars().filter(|c| !c.is_control()).take(columns).collect();
        let end = if row == 0 { "" } else { "\r\n" };
        let _ = write!(frame, "{end}{line}\x1b[K");
    }
    frame.push_str("\x1b[J");
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_stays_within_the_screen() {
        assert_eq!(frame("ab\ncdef\ng\nh\n", 3, 3), "\x1b[Hab\x1b[K\r\ncde\x1b[K\r\ng\x1b[K\x1b[J");
        assert_eq!(frame("a\x1b[31mb", 1, 80), "\x1b[Ha[31mb\x1b[K\x1b[J");
    }
}
