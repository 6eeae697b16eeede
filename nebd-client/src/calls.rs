//! Calls over the control socket: asked again on each new connection until a server answers.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nebd_abi::Errno;
use nebd_abi::control::Message;

use crate::core::Core;
use crate::error::CallError;
use crate::sync::{Promise, lock};

/// A call and its answer.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) message: Message,
    /// The connection on which it was asked last; zero if it is to be asked.
    pub(crate) asked_on: AtomicU64,
    /// Not to be asked (again) earlier than this.
    pub(crate) retry_at: Mutex<Option<Instant>>,
    answer: Promise<Answer>,
    /// Set with the answer, and left when the answer is taken.
    is_answered: AtomicBool,
}

/// What a call came to.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// The server's answer.
    Message(Message),
    /// The server refused for good.
    Refused(Errno, String),
    /// The session cannot be used any more.
    Session(Errno),
}

impl Call {
    pub(crate) fn new(message: Message) -> Call {
        Call {
            message,
            asked_on: AtomicU64::new(0),
            retry_at: Mutex::new(None),
            answer: Promise::default(),
            is_answered: AtomicBool::new(false),
        }
    }

    /// Tells the one who waits; the first answer counts.
    pub(crate) fn answered(&self, answer: Answer) {
        if !self.is_answered.swap(true, Relaxed) {
            self.answer.keep(answer);
        }
    }

    /// Whether there is an answer.
    pub(crate) fn is_answered(&self) -> bool {
        self.is_answered.load(Relaxed)
    }
}

/// The calls of a session that wait for an answer, in the order of their asking.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    waiting: Mutex<Vec<Arc<Call>>>,
}

impl Calls {
    /// Queues a call; the control thread has to be woken.
    pub(crate) fn push(&self, call: Arc<Call>) {
        lock(&self.waiting).push(call);
    }

    /// Those that are not asked on connection `link` and may be, now.
    pub(crate) fn to_ask(&self, link: u64, now: Instant) -> Vec<Arc<Call>> {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|call| !call.is_answered());
        waiting
            .iter()
            .filter(|call| call.asked_on.load(Relaxed) != link)
            .filter(|call| lock(&call.retry_at).is_none_or(|at| at <= now))
            .cloned()
            .collect()
    }

    /// The earliest time at which a refused call is to be asked again.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        let waiting = lock(&self.waiting);
        waiting.iter().filter(|call| !call.is_answered()).filter_map(|c| *lock(&c.retry_at)).min()
    }

    /// Answers all of them: the session is over.
    pub(crate) fn answer_all(&self, errno: Errno) {
        for call in lock(&self.waiting).drain(..) {
            call.answered(Answer::Session(errno));
        }
    }

    /// Asks and waits.
    pub(crate) fn ask(&self, core: &Core, message: Message) -> Result<Message, CallError> {
        if let Err(errno) = core.usable() {
            return Err(CallError::Session { volume: core.volume.clone(), errno });
        }
        let call = Arc::new(Call::new(message));
        self.push(call.clone());
        core.runtime.wake_control();
        self.wait(core, &call, core.options.io_timeout)
    }

    /// Waits for the answer of a call that was asked.
    pub(crate) fn wait(
        &self,
        core: &Core,
        call: &Call,
        timeout: Option<Duration>,
    ) -> Result<Message, CallError> {
        let volume = core.volume.clone();
        match call.answer.wait(timeout) {
            Some(Answer::Message(message)) => Ok(message),
            Some(Answer::Refused(errno, text)) => Err(CallError::Refused { volume, errno, text }),
            Some(Answer::Session(errno)) => Err(CallError::Session { volume, errno }),
            None => Err(CallError::Timeout { volume }),
        }
    }
}
