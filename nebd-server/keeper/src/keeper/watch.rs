//! Whether the server hangs: decided here, without a clock of its own.
//!
//! ```text
//!             knock, stop                    deadline, all answered
//!   quiet ─────────────────► pinged ─────────────────────────────────► quiet (or pinged, if it
//!     no timer               one timer ──► deadline, somebody silent   was asked for meanwhile)
//!                                          or stopped: kill
//! ```

use std::time::{Duration, Instant};

/// What a deadline that has passed means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// No deadline has passed, or all is well.
    Fine,
    /// All is well as of the last ping, but there was reason for doubt since.
    PingAgain,
    /// The server hangs.
    Hung,
}

/// The watch over one server.
#[derive(Debug)]
pub(crate) struct Watch {
    timeout: Duration,
    pinged: Option<(u64, Instant)>,
    doubt: bool,
    stopped: bool,
}

impl Watch {
    pub(crate) fn new(timeout: Duration) -> Watch {
        Watch { timeout, pinged: None, doubt: false, stopped: false }
    }

    /// There is reason for doubt; true if a ping is to be sent now.
    pub(crate) fn knock(&mut self) -> bool {
        self.doubt = self.pinged.is_some();
        !self.doubt
    }

    /// The server was stopped by a signal, or continued.
    pub(crate) fn set_stopped(&mut self, stopped: bool) {
        self.stopped = stopped;
    }

    /// `ping` was sent.
    pub(crate) fn pinged(&mut self, ping: u64, now: Instant) {
        self.pinged = Some((ping, now + self.timeout));
        self.doubt = false;
    }

    /// When [`expire`](Self::expire) has something to say.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.pinged.map(|(_, deadline)| deadline)
    }

    /// `silent` tells how many threads have not answered a ping; `None`: the server answers none yet.
    pub(crate) fn expire(
        &mut self,
        now: Instant,
        silent: impl Fn(u64) -> Option<usize>,
    ) -> Verdict {
        let Some((ping, deadline)) = self.pinged else { return Verdict::Fine };
        if now < deadline {
            return Verdict::Fine;
        }
        self.pinged = None;
        if self.stopped || silent(ping).is_some_and(|count| count > 0) {
            return Verdict::Hung;
        }
        if self.doubt { Verdict::PingAgain } else { Verdict::Fine }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);

    #[test]
    fn silence_is_a_hang_only_after_the_timeout() {
        let (mut watch, start) = (Watch::new(TIMEOUT), Instant::now());
        assert_eq!(watch.deadline(), None);
        assert!(watch.knock());
        watch.pinged(7, start);
        assert_eq!(watch.expire(start + TIMEOUT / 2, |_| Some(1)), Verdict::Fine);
        assert_eq!(watch.expire(start + TIMEOUT, |ping| Some((ping == 7) as usize)), Verdict::Hung);
    }

    #[test]
    fn a_knock_while_pinged_pings_again_later() {
        let (mut watch, start) = (Watch::new(TIMEOUT), Instant::now());
        assert!(watch.knock());
        watch.pinged(1, start);
        assert!(!watch.knock());
        assert_eq!(watch.expire(start + TIMEOUT, |_| Some(0)), Verdict::PingAgain);
        watch.pinged(2, start + TIMEOUT);
        assert_eq!(watch.expire(start + 2 * TIMEOUT, |_| Some(0)), Verdict::Fine);
        assert_eq!(watch.deadline(), None);
    }

    #[test]
    fn a_starting_server_is_silent_but_a_stopped_one_hangs() {
        let (mut watch, start) = (Watch::new(TIMEOUT), Instant::now());
        watch.pinged(1, start);
        assert_eq!(watch.expire(start + TIMEOUT, |_| None), Verdict::Fine);
        watch.set_stopped(true);
        watch.pinged(2, start);
        assert_eq!(watch.expire(start + TIMEOUT, |_| None), Verdict::Hung);
    }
}
