//! Whether the server hangs: decided here, without a clock of its own.
//!
//! ```text
//!             knock, stop, work              deadline, all answered
//!   quiet ─────────────────► pinged ─────────────────────────────────► quiet (or pinged, if it was
//!     no timer               one timer ──► deadline, somebody silent   asked for meanwhile, or there
//!                                          or stopped: kill            was work when it was sent)
//! ```
//!
//! A server at work is pinged all the time, since hypervisors do not knock. Once all have answered a
//! ping that was sent when nobody had taken up work since the ping before, there is none: who has
//! some in hand says so with the answer.

use std::time::{Duration, Instant};

use nebd_abi::host::Work;

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

/// What is to be done about a server's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Nothing now.
    Later,
    /// A ping is to be sent.
    Ping {
        /// Nobody has taken up work for a while.
        at_rest: bool,
    },
    /// There is no work: the keeper may sleep until there is.
    Away,
}

/// The watch over one server.
#[derive(Debug)]
pub(crate) struct Watch {
    timeout: Duration,
    pinged: Option<(u64, Instant)>,
    /// The last ping was sent while there was no work.
    at_rest: bool,
    doubt: bool,
    stopped: bool,
}

impl Watch {
    pub(crate) fn new(timeout: Duration) -> Watch {
        Watch { timeout, pinged: None, at_rest: false, doubt: false, stopped: false }
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

    /// `ping` was sent, after a [look](Self::look) that said so, `at_rest`.
    pub(crate) fn pinged(&mut self, ping: u64, now: Instant, at_rest: bool) {
        self.pinged = Some((ping, now + self.timeout));
        self.at_rest = at_rest;
        self.doubt = false;
    }

    /// What to do about the server's work, at any time.
    pub(crate) fn look(&self, work: impl FnOnce() -> Work) -> Look {
        if self.pinged.is_some() {
            return Look::Later;
        }
        match work() {
            Work::None => Look::Later,
            Work::NoneSince if self.at_rest => Look::Away,
            Work::NoneSince => Look::Ping { at_rest: true },
            Work::Some => Look::Ping { at_rest: false },
        }
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
        watch.pinged(7, start, false);
        assert_eq!(watch.expire(start + TIMEOUT / 2, |_| Some(1)), Verdict::Fine);
        assert_eq!(watch.expire(start + TIMEOUT, |ping| Some((ping == 7) as usize)), Verdict::Hung);
    }

    #[test]
    fn a_knock_while_pinged_pings_again_later() {
        let (mut watch, start) = (Watch::new(TIMEOUT), Instant::now());
        assert!(watch.knock());
        watch.pinged(1, start, false);
        assert!(!watch.knock());
        assert_eq!(watch.expire(start + TIMEOUT, |_| Some(0)), Verdict::PingAgain);
        watch.pinged(2, start + TIMEOUT, false);
        assert_eq!(watch.expire(start + 2 * TIMEOUT, |_| Some(0)), Verdict::Fine);
        assert_eq!(watch.deadline(), None);
    }

    #[test]
    fn a_server_at_work_is_pinged_until_it_has_rested() {
        let (mut watch, start) = (Watch::new(TIMEOUT), Instant::now());
        assert_eq!(watch.look(|| Work::None), Look::Later);
        for (turn, work, look) in [
            (0, Work::Some, Look::Ping { at_rest: false }),
            (1, Work::Some, Look::Ping { at_rest: false }),
            (2, Work::NoneSince, Look::Ping { at_rest: true }),
            // Work again, before that was sure.
            (3, Work::Some, Look::Ping { at_rest: false }),
            (4, Work::NoneSince, Look::Ping { at_rest: true }),
        ] {
            assert_eq!(watch.look(|| work), look);
            let Look::Ping { at_rest } = look else { unreachable!() };
            watch.pinged(turn, start + TIMEOUT * turn as u32, at_rest);
            assert_eq!(watch.look(|| work), Look::Later, "an answer is awaited");
            let over = start + TIMEOUT * (turn + 1) as u32;
            assert_eq!(watch.expire(over, |_| Some(0)), Verdict::Fine);
        }
        assert_eq!(watch.look(|| Work::NoneSince), Look::Away);
    }

    #[test]
    fn a_starting_server_is_silent_but_a_stopped_one_hangs() {
        let (mut watch, start) = (Watch::new(TIMEOUT), Instant::now());
        watch.pinged(1, start, false);
        assert_eq!(watch.expire(start + TIMEOUT, |_| None), Verdict::Fine);
        watch.set_stopped(true);
        watch.pinged(2, start, false);
        assert_eq!(watch.expire(start + TIMEOUT, |_| None), Verdict::Hung);
    }
}
