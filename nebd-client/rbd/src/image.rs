//! `rbd_image_t`: a session, and what a request needs on its way to it.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use nebd_client::{Errno, Event, Io, Op, OpFlags, Session, VolumeInfo};

use crate::claims::{Claims, Kind};
use crate::completion::{Completion, InFlight, Notice, Reply};
use crate::config::Config;
use crate::failure::{tell, tell_error};
use crate::guest_memory::GuestMemory;
use crate::job::Job;
use crate::raw::Caller;

/// `EACCES`: the volume's mode lets us read, but not write.
const ACCES: Errno = Errno(13);

/// What `rbd_image_t` points to.
pub struct Image {
    session: Session,
    claims: Arc<Claims>,
    memory: GuestMemory,
    parts: AtomicU64,
    tells_statistics: bool,
    pub(crate) in_flight: InFlight,
    pub(crate) notice: OnceLock<Notice>,
}

/// A request for caller memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// [`Op::Read`] or [`Op::Write`].
    pub op: Op,
    /// Of a write.
    pub flags: OpFlags,
    /// First byte of the image.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Image {
    /// Opens a volume; read-only if the caller may only read it, for librbd's open has no such word.
    pub fn open(config: &Config, volume: &str, read_only: bool) -> Result<Image, Errno> {
        let name = volume.to_owned();
        let options = config.options().on_event(move |event| tell_event(&name, event));
        let opened = Session::open(volume, options.clone().read_only(read_only));
        let opened = match opened {
            Err(error) if !read_only && [ACCES, Errno::ROFS].contains(&error.errno()) => {
                Session::open(volume, options.read_only(true))
            }
            opened => opened,
        };
        let session = opened.map_err(|error| {
            tell_error(&error);
            error.errno()
        })?;
        Ok(Image {
            session,
            claims: Arc::default(),
            memory: GuestMemory::default(),
            parts: AtomicU64::new(0),
            tells_statistics: config.tells_statistics,
            in_flight: InFlight::default(),
            notice: OnceLock::new(),
        })
    }

    /// Waits for everything that was begun, and detaches.
    pub fn close(image: Arc<Image>) {
        image.in_flight.wait_for_none();
        let mut image = image;
        // The thread that told last has its reference for a few instructions more.
        let image = loop {
            match Arc::try_unwrap(image) {
                Ok(image) => break image,
                Err(shared) => image = shared,
            }
            std::thread::yield_now();
        };
        if image.tells_statistics {
            let (direct, copied) = image.memory.counts();
            tell(&format!(
                "{}: {direct} requests in guest memory, {copied} copied, {} of parts of blocks; \
                 {} takeovers, longest blackout {} us",
                image.session.volume(),
                image.parts.load(Relaxed),
                image.session.stats().takeovers,
                image.session.stats().blackout_worst_us,
            ));
        }
        drop(image.memory);
        // Without a server to say goodbye to that is done in the background.
        if let Err(error) = image.session.close() {
            tell_error(&error);
        }
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// What the volume is, now.
    pub fn info(&self) -> VolumeInfo {
        self.session.info()
    }

    fn block_size(&self) -> u64 {
        u64::from(self.info().block_size).max(1)
    }

    /// The whole blocks in which a range lies.
    pub fn blocks_around(&self, offset: u64, length: u64) -> Result<Range<u64>, Errno> {
        let block = self.block_size();
        let end = offset.checked_add(length).and_then(|end| end.checked_next_multiple_of(block));
        Ok(offset - offset % block..end.ok_or(Errno::INVAL)?)
    }

    /// Whole blocks, rounded up, for a new size.
    pub fn resize(&self, size: u64) -> Result<(), Errno> {
        let size = size.checked_next_multiple_of(self.block_size()).ok_or(Errno::INVAL)?;
        self.session.resize(size).map_err(|error| {
            tell_error(&error);
            error.errno()
        })
    }

    /// How much of a read lies inside the image: the rest is not there, as at the end of a file.
    fn clip(&self, offset: u64, length: u64) -> u64 {
        length.min(self.info().size.saturating_sub(offset))
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), Errno> {
        match offset.checked_add(length) {
            Some(end) if end <= self.info().size => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }

    /// Reads caller memory from the image.
    pub fn read(
        self: &Arc<Self>,
        offset: u64,
        mut caller: Caller<'_>,
        completion: Arc<Completion>,
    ) -> Result<(), Errno> {
        let length = self.clip(offset, caller.length()?);
        if length < caller.length()? {
            caller = caller.truncated(length);
        }
        let reply = Reply::new(completion, self, length);
        if length == 0 {
            reply.tell(Ok(()));
            return Ok(());
        }
        let data = Data { op: Op::Read, flags: OpFlags::NONE, offset, length };
        let blocks = self.blocks_around(offset, length)?;
        if blocks == (offset..offset + length) {
            return self.pass(data, caller, reply, ());
        }
        self.parts.fetch_add(1, Relaxed);
        Job::read(data, blocks, caller.into_owned(), reply).start();
        Ok(())
    }

    /// Writes caller memory to the image.
    pub fn write(
        self: &Arc<Self>,
        offset: u64,
        flags: OpFlags,
        caller: Caller<'_>,
        completion: Arc<Completion>,
    ) -> Result<(), Errno> {
        let length = caller.length()?;
        self.check_range(offset, length)?;
        let reply = Reply::new(completion, self, 0);
        let data = Data { op: Op::Write, flags, offset, length };
        let blocks = self.blocks_around(offset, length)?;
        if blocks != (offset..offset + length) {
            self.parts.fetch_add(1, Relaxed);
            let caller = caller.into_owned();
            let block = self.block_size();
            self.claims.claim(Kind::Part, blocks.clone(), move |claim| {
                Job::write(data, blocks, block, caller, reply, claim).start();
            });
            return Ok(());
        }
        if let Some(claim) = self.claims.try_claim(Kind::Whole, blocks.clone()) {
            return self.pass(data, caller, reply, claim);
        }
        let (image, caller) = (self.clone(), caller.into_owned());
        self.claims.claim(Kind::Whole, blocks, move |claim| {
            // The host was told that it is in flight; a refusal has to reach it all the same.
            let refused = reply.twin();
            if let Err(errno) = image.pass(data, caller, reply, claim) {
                refused.tell(Err(errno));
            }
        });
        Ok(())
    }

    /// Passes whole blocks on.
    fn pass(
        self: &Arc<Self>,
        data: Data,
        caller: Caller<'_>,
        reply: Reply,
        keep: impl Send + 'static,
    ) -> Result<(), Errno> {
        let unknown = self.memory.look_at(&caller);
        caller.submit(&self.session, data, move |result| {
            drop(keep);
            reply.tell(result);
            if let Some(address) = unknown {
                // The server has just answered, so that registering will not have to wait for one,
                // and the host was told already.
                reply.image().memory.find(&reply.image().session, address);
            }
        })
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(
        self: &Arc<Self>,
        (offset, length): (u64, u64),
        flags: OpFlags,
        completion: Arc<Completion>,
    ) -> Result<(), Errno> {
        self.check_range(offset, length)?;
        let reply = Reply::new(completion, self, 0);
        let blocks = self.blocks_around(offset, length)?;
        let is_whole = blocks == (offset..offset + length);
        let kind = if is_whole { Kind::Whole } else { Kind::Part };
        let block = self.block_size();
        let zero = move |claim| {
            Job::zero((offset, length), flags, block, reply, claim).start();
        };
        self.claims.claim(kind, blocks, zero);
        Ok(())
    }

    /// Forgets the whole blocks in a range; what is left of others stays as it is, which a discard
    /// may do.
    pub fn discard(
        self: &Arc<Self>,
        offset: u64,
        length: u64,
        completion: Arc<Completion>,
    ) -> Result<(), Errno> {
        self.check_range(offset, length)?;
        let reply = Reply::new(completion, self, 0);
        let block = self.block_size();
        let start = offset.next_multiple_of(block);
        let end = (offset + length) / block * block;
        let length = end.saturating_sub(start);
        self.claims.claim(Kind::Whole, start..start + length, move |claim| {
            Job::discard((start, length), reply, claim).start();
        });
        Ok(())
    }

    /// Makes every write that was told durable.
    pub fn flush(self: &Arc<Self>, completion: Arc<Completion>) -> Result<(), Errno> {
        let reply = Reply::new(completion, self, 0);
        self.session.submit(Io::flush(), Box::new(move |result| reply.tell(result)))
    }
}

/// What an operator would want to find in the host's log.
fn tell_event(volume: &str, event: Event) {
    let what: Cow<'_, str> = match event {
        Event::Parked => {
            "parked: its requests wait for the operator (nebdctl volume unpark)".into()
        }
        Event::Unparked => "served again".into(),
        Event::Stalled => "no answer from the server for a while: requests wait".into(),
        Event::Resumed => "requests are answered again".into(),
        Event::Detached { errno } => format!("the session is over: {errno}").into(),
        _ => return,
    };
    tell(&format!("{volume}: {what}"));
}
