//! A disk in memory for one hypervisor, which dies all the time: what a server does with this crate.
//!
//! `cargo run -p nebd-vhost --example memory_disk -- SOCKET MIB [DIE_EVERY] [close]`: after so many turns of
//! its loop the server is dropped with all that it had in flight, and another one goes on from what a
//! descriptor store would hold: the connection, or, with `close`, the next connection of the hypervisor.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nebd_abi::region::SharedMemory;
use nebd_vhost::chain::{Chain, Segment, Ticket};
use nebd_vhost::connection::{Connection, Envelope, Peeked, Resumed};
use nebd_vhost::device::{Action, Device, Doorbell};
use nebd_vhost::inflight::{InflightRecord, QueueRecord};
use nebd_vhost::journal::Journal;
use nebd_vhost::memory::{Backing, GuestMemory, MappedRegion, RegionSpec};
use nebd_vhost::message::Reply;
use nebd_vhost::queue::VirtQueue;
use nebd_vhost::request::{Disk, Operation, Status, parse};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const QUEUES: u16 = 2;

/// What outlives a server.
#[derive(Default)]
struct Store {
    connection: Option<(OwnedFd, OwnedFd)>,
    regions: Vec<(RegionSpec, OwnedFd)>,
    doorbells: HashMap<(u32, u8), OwnedFd>,
    record: Option<OwnedFd>,
    channel: Option<OwnedFd>,
}

struct Server {
    connection: Connection,
    device: Device,
    memory: Arc<GuestMemory>,
    record: Option<InflightRecord>,
    queues: Vec<Option<VirtQueue>>,
    held: Vec<(u32, Ticket, u32)>,
}

fn disk(contents: &SharedMemory) -> Disk {
    Disk {
        size: contents.size(),
        block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 65536,
        read_only: false,
        queues: QUEUES,
        segments_max: 126,
        segment_bytes_max: 0,
        discard_bytes_max: 4 << 20,
        discard_ranges_max: 16,
        serial: *b"memory-disk-example\0",
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("SOCKET is missing")?;
    let mib: u64 = arguments.next().ok_or("MIB is missing")?.parse()?;
    let die_every: u64 = arguments.next().map_or(Ok(u64::MAX), |turns| turns.parse())?;
    let closes = arguments.next().is_some_and(|word| word == "close");
    let listener = UnixListener::bind(path)?;
    let contents = SharedMemory::create("disk", mib << 20)?;
    let mut store = Store::default();
    let (mut lives, mut in_flight) = (0u64, 0);
    loop {
        let mut server = match start(&mut store, &contents)? {
            Some(server) => server,
            None => {
                store = Store::default();
                let (socket, _) = listener.accept()?;
                let journal = Journal::create()?;
                store.connection = Some((socket.into(), journal.fd().try_clone_to_owned()?));
                continue;
            }
        };
        lives += 1;
        let is_connected = server.serve(&mut store, &contents, die_every)?;
        in_flight += server.held.len();
        if lives.is_multiple_of(64) {
            eprintln!("{lives} lives, {in_flight} requests in flight at their ends");
        }
        if !is_connected || closes {
            store.connection = None;
        }
        if !is_connected && die_every == u64::MAX {
            return Ok(());
        }
    }
}

/// A server, from what the store holds; `None` without a connection.
fn start(store: &mut Store, contents: &SharedMemory) -> Result<Option<Server>> {
    let Some((socket, journal)) = &store.connection else { return Ok(None) };
    let journal = Journal::map(journal.try_clone()?)?;
    let state = journal.state().ok_or("a damaged journal")?;
    let Resumed::Continue(connection) = Connection::resume(socket.try_clone()?, journal)? else {
        return Ok(None);
    };
    let device = Device::restore(disk(contents), &state).ok_or("a damaged state")?;
    let mut server = Server {
        connection,
        device,
        memory: map(&store.regions)?,
        record: None,
        queues: (0..QUEUES).map(|_| None).collect(),
        held: Vec::new(),
    };
    if let (Some(fd), Some(inflight)) = (&store.record, server.device.state().inflight) {
        let (offset, queues) = (inflight.mmap_offset, inflight.queues);
        let record = InflightRecord::map(fd.try_clone()?, offset, queues, inflight.queue_size)?;
        server.record = Some(record);
    }
    server.start_queues(contents)?;
    Ok(Some(server))
}

fn map(regions: &[(RegionSpec, OwnedFd)]) -> Result<Arc<GuestMemory>> {
    let mapped =
        regions.iter().map(|(spec, fd)| MappedRegion::map(*spec, fd.as_fd(), Backing::Sealed));
    Ok(GuestMemory::new(mapped.collect::<std::result::Result<_, _>>()?)?)
}

impl Server {
    /// Serves so many turns; false once the hypervisor has hung up.
    fn serve(&mut self, store: &mut Store, contents: &SharedMemory, turns: u64) -> Result<bool> {
        for turn in 0..turns {
            let kicks: Vec<&OwnedFd> =
                (0..QUEUES).filter_map(|queue| store.doorbells.get(&(queue.into(), 0))).collect();
            let socket = self.connection.socket();
            let mut waits = vec![PollFd::new(&socket, PollFlags::IN)];
            waits.extend(kicks.iter().map(|kick| PollFd::new(*kick, PollFlags::IN)));
            // A ring that has something left to do is looked at again soon.
            let limit = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
            poll(&mut waits, if self.held.is_empty() { None } else { Some(&limit) })?;
            for kick in kicks {
                let is_rung = poll(
                    &mut [PollFd::new(kick, PollFlags::IN)],
                    Some(&Timespec { tv_sec: 0, tv_nsec: 0 }),
                )?;
                if is_rung > 0 {
                    rustix::io::read(kick, &mut [0; 8])?;
                }
            }
            loop {
                match self.connection.peek(&mut Vec::new())? {
                    Peeked::Message(envelope) => self.deal_with(envelope, store, contents)?,
                    Peeked::Nothing => break,
                    Peeked::Closed => return Ok(false),
                }
            }
            // Every other turn leaves something in flight.
            self.pump(store, contents, turn % 2 == 0)?;
        }
        Ok(true)
    }

    fn deal_with(
        &mut self,
        mut envelope: Envelope,
        store: &mut Store,
        contents: &SharedMemory,
    ) -> Result<()> {
        let fds = std::mem::take(&mut envelope.fds);
        let action = self.device.handle(&envelope.message, fds)?;
        let mut record_fd = None;
        let mut reply = None;
        match action {
            Action::Reply(answer) => reply = Some(answer),
            Action::SetMemory(regions) => {
                store.regions = regions;
                self.memory = map(&store.regions)?;
            }
            Action::AddMemory(region, fd) => {
                store.regions.retain(|(known, _)| !known.is_same_as(&region));
                store.regions.push((region, fd));
                self.memory = map(&store.regions)?;
            }
            Action::RemoveMemory(region) => {
                store.regions.retain(|(known, _)| !known.is_same_as(&region));
                self.memory = map(&store.regions)?;
            }
            Action::Doorbell(ring, doorbell, fd) => {
                store.doorbells.remove(&(ring, doorbell as u8));
                store.doorbells.extend(fd.map(|fd| ((ring, doorbell as u8), fd)));
            }
            Action::Stop(ring) => {
                self.answer_held(store)?;
                let queue = self.queues.get_mut(ring as usize).and_then(Option::take);
                store.doorbells.remove(&(ring, Doorbell::Kick as u8));
                reply = Some(self.device.stopped(ring, queue.map(|queue| queue.base())));
            }
            Action::CreateInflight(asked) => {
                let layout = nebd_vhost::queue::QueueSetup {
                    features: self.device.state().features,
                    ..Default::default()
                }
                .layout();
                let record = InflightRecord::create(layout, asked.queues, asked.queue_size)?;
                reply = Some(self.device.recorded(&asked, record.size()));
                record_fd = Some(record.fd().try_clone_to_owned()?);
            }
            Action::SetInflight(inflight, fd) => {
                store.record = Some(fd.try_clone()?);
                let (offset, queues) = (inflight.mmap_offset, inflight.queues);
                self.record = Some(InflightRecord::map(fd, offset, queues, inflight.queue_size)?);
            }
            Action::Reset => {
                self.answer_held(store)?;
                self.queues = (0..QUEUES).map(|_| None).collect();
                if let Some(record) = self.record.take() {
                    record.reset();
                }
            }
            Action::Enable(ring, false) => {
                self.answer_held(store)?;
                self.queues[ring as usize] = None;
            }
            Action::SetChannel(fd) => store.channel = Some(fd),
            Action::None | Action::Enable(..) | Action::Writeback(_) => {}
        }
        let acknowledged =
            self.device.acknowledgement(&envelope.message, envelope.need_reply, true);
        let reply: Option<Reply> = reply.or(acknowledged);
        let bytes = reply.map(|reply| reply.encode(envelope.message.id()));
        let reply = bytes.as_deref().map(|bytes| (bytes, record_fd.as_ref().map(AsFd::as_fd)));
        self.connection.finish(envelope, &self.device.state().encode(), reply, || Ok(()))?;
        self.start_queues(contents)
    }

    fn start_queues(&mut self, contents: &SharedMemory) -> Result<()> {
        for index in 0..QUEUES {
            let is_running = self.queues[usize::from(index)].is_some();
            let Some(setup) = self.device.ring_setup(index.into()).filter(|_| !is_running) else {
                continue;
            };
            let record = match &self.record {
                Some(record) => record.queue(setup.layout(), index)?,
                None => QueueRecord::private(setup.layout(), setup.size),
            };
            let (queue, chains) = VirtQueue::start(&setup, self.memory.clone(), record)?;
            self.queues[usize::from(index)] = Some(queue);
            for chain in chains {
                self.execute(index.into(), chain, contents);
            }
        }
        Ok(())
    }

    fn pump(&mut self, store: &Store, contents: &SharedMemory, answers: bool) -> Result<()> {
        loop {
            let mut popped = Vec::new();
            for (index, queue) in self.queues.iter_mut().enumerate() {
                let Some(queue) = queue else { continue };
                queue.wake();
                while let Some(chain) = queue.pop()? {
                    popped.push((index as u32, chain));
                }
            }
            for (index, chain) in popped {
                self.execute(index, chain, contents);
            }
            if answers {
                self.answer_held(store)?;
            }
            if self.queues.iter_mut().flatten().all(VirtQueue::sleep) {
                return Ok(());
            }
        }
    }

    /// Does it at once, and keeps the answer.
    fn execute(&mut self, ring: u32, chain: Chain, contents: &SharedMemory) {
        let (operation, ticket) = parse(chain, self.device.disk(), &self.device.agreement());
        let at = |offset, length| contents.range(offset, length).expect("checked by parse");
        let written = match operation {
            Ok(Operation::Read { offset, length, segments }) => {
                copy(segments.as_slice(), at(offset, length.into()), false);
                length
            }
            Ok(Operation::Write { offset, length, segments, .. }) => {
                copy(segments.as_slice(), at(offset, length.into()), true);
                0
            }
            Ok(Operation::WriteZeroes { ranges, .. } | Operation::Discard(ranges)) => {
                for range in ranges.as_slice() {
                    // SAFETY: `range` has found the bytes in the mapping, which nobody else uses.
                    unsafe { at(range.offset, range.length).write_bytes(0, range.length as usize) };
                }
                0
            }
            Ok(Operation::Flush) => 0,
            Ok(Operation::Done(written)) => written,
            Err(refused) => {
                eprintln!("refused: {refused:?}");
                if let Some(queue) = &mut self.queues[ring as usize] {
                    queue.publish(ticket, refused.0, 0);
                }
                return;
            }
        };
        self.held.push((ring, ticket, written));
    }

    fn answer_held(&mut self, store: &Store) -> io::Result<()> {
        for (ring, ticket, written) in self.held.drain(..) {
            if let Some(queue) = &mut self.queues[ring as usize] {
                queue.publish(ticket, Status::Ok, written);
            }
        }
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            queue.flush();
            if queue.call_needed()
                && let Some(call) = store.doorbells.get(&(index as u32, Doorbell::Call as u8))
            {
                rustix::io::write(call, &1u64.to_ne_bytes())?;
            }
        }
        Ok(())
    }
}

/// Between a guest's segments and the disk.
fn copy(segments: &[Segment], mut at: *mut u8, to_disk: bool) {
    for segment in segments {
        let guest = segment.pointer();
        let (from, to) = if to_disk { (guest, at) } else { (at, guest) };
        // SAFETY: the segment is mapped, its ticket is held; the disk has as many bytes there, as
        // `parse` has checked. The mappings are of different files.
        unsafe { std::ptr::copy_nonoverlapping(from, to, segment.len()) };
        at = at.wrapping_add(segment.len());
    }
}
