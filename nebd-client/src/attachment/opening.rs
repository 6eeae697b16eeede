//! How opening a session fails.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use nebd_abi::control::Message;

use super::{Attachment, Known, Link, Refusal};
use crate::calls::Call;
use crate::error::{OpenError, errno};

impl Attachment {
    pub(super) fn refuse_open(&mut self, error: OpenError) {
        if let Some(opened) = self.opened.take() {
            self.link = Link::Over;
            self.core.is_closing.store(true, SeqCst);
            opened.keep(Err(error));
        }
    }

    /// The opener has waited long enough. A session that some server may have is not left there,
    /// where it would hold its volume as long as this process lives: it is detached, and for that
    /// attached again if need be, whenever that can be done.
    pub(super) fn give_up_open(&mut self) {
        let error = self.open_error();
        if self.known == Known::No && !self.is_attaching() {
            return self.refuse_open(error);
        }
        if let Some(opened) = self.opened.take() {
            let core = &self.core;
            core.refuse(errno::CLOSED);
            core.is_closing.store(true, SeqCst);
            core.is_detaching.store(true, SeqCst);
            core.calls.push(Arc::new(Call::new(Message::Detach)));
            opened.keep(Err(error));
        }
    }

    /// Why the volume could not be attached in time.
    fn open_error(&mut self) -> OpenError {
        let volume = self.core.volume.clone();
        match (self.last_refusal.take(), self.last_error.take()) {
            (Some(Refusal { errno, text }), _) => OpenError::Refused { volume, errno, text },
            (None, error) => OpenError::Connect {
                path: self.core.options.socket.clone(),
                source: error.unwrap_or_else(|| io::ErrorKind::TimedOut.into()),
            },
        }
    }
}
