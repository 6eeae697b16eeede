//! When an `fdatasync` may report success: the flush witness.
//!
//! # The gap
//! The kernel tells each open file description once of a failed write-back, and forgets the failed
//! pages (`errseq_t`). If a server's `fdatasync` fails and the server dies before its client can see
//! the answer, the successor issues the flush again on a description of its own. That was opened
//! after the error had been seen by someone, so the kernel reports nothing: the flush would succeed
//! and the loss would never be told.
//!
//! # The witness
//! A description that was open all the while still owes the error to whoever syncs it. So
//! [`WITNESSES`] read-only descriptors of the file are opened before the first write, never synced,
//! and kept in the store. A successor's first flush of its epoch syncs one of them as well, and
//! fails if either sync fails.
//!
//! # Why two deaths in a row cannot lose an error
//! Let an error be *undelivered* while no answer that reports it is visible to the client. We keep
//! (I): every witness in the store was never synced, and syncing it would report every undelivered
//! error.
//! - At first open nothing was written: (I) holds. Nothing is dispatched before the barrier.
//! - *Use.* A sync of a witness tells nobody else of what it reports, so it may be used once. It is
//!   marked before it is synced, in the description itself (its file offset): a death before that
//!   leaves it unsynced, a death after it leaves the others, which owe the same errors. It is removed
//!   from the store, too, but nobody waits for that: the keeper may be away.
//! - *Top up.* New witnesses are opened before the old one is synced, and stored only if that sync
//!   and the one of the volume's own descriptor succeeded. Success means that from the opening of the
//!   old witness to its sync there was no error, so the new ones missed none; (I) holds for them.
//!   They are sent to the store before anybody is answered; a death before that, or while the keeper
//!   is away, costs one witness. Several such deaths in a row use them up; with none left the first
//!   flush fails with `EIO`: a lie on the safe side.
//! - *After an error* the stored witnesses owe it still, which is right while it is undelivered and
//!   tedious afterwards: each takeover would report it again. They are replaced when every failed
//!   answer is known to be delivered (see [`Lane::drain`](crate::Lane::drain)) and no sync is under
//!   way: new ones are opened, the volume's own descriptor is synced, and if that succeeds there is
//!   no error that only the old ones know of.
//! - Witnesses found at a first open (the client died with the server) are used all the same. If they
//!   are fewer than a set, one is used and the set made whole before anything is dispatched.
//!
//! Syncs that arrive while a witness is asked wait for its verdict: all of them cover the writes that
//! may have been lost. All this runs in the volume's pool, the shard's thread never waits.
//!
//! # What it cannot see
//! An error that the kernel keeps in no `errseq_t`: a device that fails a cache flush (not a write),
//! or a FUSE file system that fails FSYNC itself, tells only the caller. And without a store that
//! outlives the process there is no witness; `open` warns of that.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nebd_abi::Errno;

use super::open_file::OpenFile;
use super::task::{Step, Task};
use super::witness::{WITNESSES, Witnesses};
use crate::Mailbox;

const STORE_ATTEMPTS_MAX: u32 = 50;
const STORE_RETRY: Duration = Duration::from_millis(200);

#[derive(Default)]
struct State {
    /// A witness must be asked before a sync of this epoch may succeed.
    owed: bool,
    /// The pool settles; these wait for it.
    settling: bool,
    #[expect(clippy::vec_box, reason = "they come boxed, and a task is large to move")]
    held: Vec<Box<Task>>,
    /// Syncs issued and not ended.
    running: u32,
    /// Failed answers whose delivery is not known: the lane they went to, and its drains then.
    failures: Vec<(Arc<Mailbox>, u64)>,
}

impl State {
    /// Whether every error that was reported is visible to its client.
    fn is_delivered(&mut self) -> bool {
        self.failures.retain(|(mailbox, drains)| {
            mailbox.drains() < drains + 3 && Arc::strong_count(mailbox) > 1
        });
        self.failures.is_empty()
    }
}

/// The syncs of one volume.
pub(super) struct Syncs {
    state: Mutex<State>,
    /// `None` if nothing outlives this process.
    witnesses: Option<Witnesses>,
    /// The stored witnesses owe an error that was reported.
    stale: AtomicBool,
    /// Whether the volume was closed, or given up; held while witnesses are stored, so that none come after.
    closed: Mutex<bool>,
}

impl Syncs {
    /// `owed`: there was an earlier epoch.
    pub(super) fn new(witnesses: Option<Witnesses>, owed: bool) -> Syncs {
        let state = State { owed: owed && witnesses.is_some(), ..State::default() };
        Syncs {
            state: Mutex::new(state),
            witnesses,
            stale: false.into(),
            closed: Mutex::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the task back if its `fdatasync` may be issued now; otherwise it is held and answered
    /// from the pool.
    pub(super) fn admit(&self, file: &Arc<OpenFile>, task: Box<Task>) -> Option<Box<Task>> {
        let mut state = self.state();
        let begin = !state.settling;
        if begin {
            let replace = self.stale.load(SeqCst) && state.running == 0 && state.is_delivered();
            if !state.owed && !replace {
                state.running += 1;
                return Some(task);
            }
            state.settling = true;
        }
        state.held.push(task);
        drop(state);
        if begin {
            // With the task in its place and the lock free: a pool that cannot run it fails it.
            file.pool().settle(file);
        }
        None
    }

    /// An admitted sync is over, its answer not yet given.
    pub(super) fn end(&self, mailbox: &Arc<Mailbox>, result: Result<(), Errno>) {
        let mut state = self.state();
        state.running -= 1;
        if result.is_err() && self.witnesses.is_some() {
            state.failures.push((mailbox.clone(), mailbox.drains()));
            self.stale.store(true, SeqCst);
        }
    }

    /// The volume is closed: nobody will ask.
    pub(super) fn close(&self) {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *closed, true) {
            return;
        }
        if let Some(witnesses) = &self.witnesses
            && let Err(error) = witnesses.remove(&witnesses.names())
        {
            tracing::warn!(%error, "cannot remove flush witnesses from the store");
        }
    }

    /// The volume and its witnesses are a successor's now: none are stored or removed from here on.
    pub(super) fn relinquish(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Stores new witnesses in place of those that were used or are of no use any more.
    fn renew(&self, witnesses: &Witnesses, fresh: io::Result<Vec<File>>, old: &[String]) {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return;
        }
        let renewed =
            fresh.and_then(|fresh| witnesses.put(&fresh)).and_then(|()| witnesses.remove(old));
        if let Err(error) = renewed {
            tracing::warn!(%error, "cannot renew the flush witnesses");
        }
    }

    fn ask(&self, witnesses: &Witnesses) -> Result<(), Errno> {
        let mut attempts = 0;
        let witness = loop {
            match witnesses.take_oldest() {
                Ok(witness) => break witness,
                Err(error) => {
                    attempts += 1;
                    tracing::error!(%error, attempts, "the descriptor store does not answer");
                    if attempts == STORE_ATTEMPTS_MAX {
                        return Err(Errno::IO);
                    }
                    std::thread::sleep(STORE_RETRY);
                }
            }
        };
        match witness {
            Some(witness) => sync(witness),
            None => {
                tracing::error!("no flush witness is left: the first flush fails to be safe");
                Err(Errno::IO)
            }
        }
    }
}

pub(super) fn sync(fd: impl AsFd) -> Result<(), Errno> {
    loop {
        match rustix::fs::fdatasync(&fd) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::INVAL) => return Err(Errno::IO),
            Err(errno) => return Err(Errno(errno.raw_os_error())),
        }
    }
}

/// Runs in the pool: asks a witness if one is owed, issues the held syncs, renews the witnesses.
pub(super) fn settle(file: &Arc<OpenFile>) {
    let syncs = file.syncs();
    let owed = syncs.state().owed;
    let Some(witnesses) = &syncs.witnesses else {
        return fail_all(file, Errno::IO);
    };
    let before = witnesses.names();
    // One is about to be used; after an error none is of use any more.
    let wanted =
        if owed { (WITNESSES + 1).saturating_sub(witnesses.unused().max(1)) } else { WITNESSES };
    let fresh = witnesses.open(wanted);
    // The volume's own descriptor is synced before anybody is answered, so that what was used up is
    // replaced at once: a server that is killed again soon must not run out of witnesses.
    let verdict = if owed { syncs.ask(witnesses) } else { Ok(()) }.and_then(|()| sync(&**file));
    let old = if owed { Vec::new() } else { before };
    let mut is_clean = verdict.is_ok();
    match verdict {
        Ok(()) => syncs.renew(witnesses, fresh, &old),
        Err(errno) => tracing::error!(
            %errno, "a flush of an earlier epoch failed; the first flush of this one reports it"
        ),
    }
    let mut verdict = verdict;
    loop {
        let mut state = syncs.state();
        let held = std::mem::take(&mut state.held);
        if held.is_empty() {
            state.settling = false;
            state.owed = false;
            syncs.stale.store(!is_clean, SeqCst);
            break;
        }
        drop(state);
        for mut task in held {
            let result = verdict.and(sync(&**file));
            is_clean &= result.is_ok();
            if result.is_err() {
                let failure = (task.mailbox.clone(), task.mailbox.drains());
                syncs.state().failures.push(failure);
            }
            task.settle(result);
            answer(*task);
        }
        // It was told to all who waited for it.
        verdict = Ok(());
    }
}

/// There is no thread to settle in.
pub(super) fn fail_all(file: &Arc<OpenFile>, errno: Errno) {
    let mut state = file.syncs().state();
    state.settling = false;
    let held = std::mem::take(&mut state.held);
    drop(state);
    for mut task in held {
        task.settle(Err(errno));
        answer(*task);
    }
}

fn answer(mut task: Task) {
    // A flush, or what is synced after its data: nothing follows.
    if let Step::Done(result) = task.step() {
        task.request.complete_remote(result);
    }
}
