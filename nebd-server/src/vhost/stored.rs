//! From the descriptor store to a hypervisor's disk: what a successor maps in advance, and what it does
//! once it owns the volume.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nebd_abi::layout::{SessionId, TRANSFER_BYTES_MAX};
use nebd_backend::FdStore;
use nebd_vhost::connection::{Connection, ConnectionError, Resumed};
use nebd_vhost::device::Device;
use nebd_vhost::inflight::{InflightRecord, RecordError};
use nebd_vhost::journal::{Journal, JournalError};
use nebd_vhost::memory::{Backing, GuestMemory, MappedRegion, MemoryError};
use nebd_vhost::request::{Disk, SERIAL_BYTES};

use super::hypervisor::{Hypervisor, LostDoorbell};
use super::kept::{Kept, KeptRecord, Serial};
use crate::session::Session;
use crate::session::ledger::Ledger;
use crate::shard::{Adopted, Front, VirtFront};
use crate::volume::OpenVolume;

/// Slots of a queue's ledger, and so the most descriptors that its ring may have.
pub(crate) const QUEUE_SIZE_MAX: u32 = 1024;
/// Names of the socket and the journal in the store, within their session.
const SOCKET: &str = "vhost";
const JOURNAL: &str = "journal";
/// Bytes that a guest may discard, or have zeroed, by one request.
const DISCARD_BYTES_MAX: u64 = 128 << 20;
/// Data segments in a request: with header and status they fill a ring of 128.
const SEGMENTS_MAX: u32 = 126;
/// Bytes of a segment: what a driver asks for at once is no more than a transfer.
const SEGMENT_BYTES_MAX: u32 = (TRANSFER_BYTES_MAX / SEGMENTS_MAX as u64) as u32 & !4095;
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// Whether a reply went out is not known.
    #[error("the server died while it replied to the hypervisor, which has to connect again")]
    InDoubt,
    /// The connection is of no use any more.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// What is known of it is damaged.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal does not speak of this device.
    #[error("the connection's journal is not this device's")]
    State,
    /// A descriptor that the journal names.
    #[error("a descriptor of the connection is not in the store")]
    Missing,
    /// The same, of a ring.
    #[error(transparent)]
    Lost(#[from] LostDoorbell),
    /// The guest's memory cannot be mapped again.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What was in flight cannot be known.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// A connection and all that goes with it, not acted on yet.
pub struct Stored {
    socket: OwnedFd,
    journal: Journal,
    kept: BTreeMap<Serial, OwnedFd>,
    /// Mapped in advance.
    mapped: BTreeMap<Serial, Arc<MappedRegion>>,
    backing: Backing,
}

impl Stored {
    /// A connection that was just accepted.
    pub(crate) fn new(socket: OwnedFd, backing: Backing) -> Result<Stored, JournalError> {
        let journal = Journal::create()?;
        let (kept, mapped) = (BTreeMap::new(), BTreeMap::new());
        Ok(Stored { socket, journal, kept, mapped, backing })
    }

    /// What the store has of a session, if it is a hypervisor's; its guest's memory is mapped. Nothing is
    /// changed: whoever owns the session may be alive.
    pub(crate) fn fetch(
        store: &dyn FdStore,
        id: SessionId,
        rings: usize,
        backing: Backing,
    ) -> Result<Option<Stored>, JournalError> {
        let name = |what: &str| Session::store_name(id, what);
        let (Some(socket), Some(journal)) =
            (store.fetch(&name(SOCKET)), store.fetch(&name(JOURNAL)))
        else {
            return Ok(None);
        };
        let journal = Journal::map(journal)?;
        let kept = kept_names(store, id)
            .filter_map(|(serial, name)| Some((serial, store.fetch(&name)?)))
            .collect();
        let mut stored = Stored { socket, journal, kept, mapped: BTreeMap::new(), backing };
        let state = stored.journal.state().unwrap_or_default();
        for (spec, serial) in Kept::decode(&state, rings).map_or(vec![], |(kept, _)| kept.regions) {
            let mapped =
                stored.kept.get(&serial).map(|fd| MappedRegion::map(spec, fd.as_fd(), backing));
            if let Some(Ok(region)) = mapped {
                stored.mapped.insert(serial, region);
            }
        }
        Ok(Some(stored))
    }

    /// What a successor needs beside what every session has.
    pub(crate) fn put(&self, store: &dyn FdStore, id: SessionId) -> std::io::Result<()> {
        store.put(&Session::store_name(id, JOURNAL), self.journal.fd())?;
        store.put(&Session::store_name(id, SOCKET), self.socket.as_fd())
    }

    /// Goes on where a dead server stopped, or begins. Queues that ran run again; of each comes what is
    /// to be issued again. On an error the hypervisor finds its connection closed.
    pub(crate) fn resume(
        self,
        id: SessionId,
        disk: Disk,
        volume: &Arc<OpenVolume>,
        ledger: &Ledger,
    ) -> Result<(Hypervisor, Vec<Adopted>), ResumeError> {
        let socket = self.socket.try_clone();
        let resumed = self.resume_connection(id, disk, volume, ledger);
        if let (Err(_), Ok(socket)) = (&resumed, socket) {
            // Whoever holds it still: it is over.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
        resumed
    }

    fn resume_connection(
        self,
        id: SessionId,
        disk: Disk,
        volume: &Arc<OpenVolume>,
        ledger: &Ledger,
    ) -> Result<(Hypervisor, Vec<Adopted>), ResumeError> {
        let Stored { socket, journal, kept: fds, mapped, backing } = self;
        let state = journal.state().unwrap_or_default();
        let rings = disk.queues;
        let (kept, state) = Kept::decode(&state, rings.into()).ok_or(ResumeError::State)?;
        let device = Device::restore(disk.clone(), state).ok_or(ResumeError::State)?;
        let Resumed::Continue(connection) = Connection::resume(socket, journal)? else {
            return Err(ResumeError::InDoubt);
        };
        let fetch = |serial: Serial| fds.get(&serial)?.try_clone().ok();
        let mut regions = Vec::with_capacity(kept.regions.len());
        for (spec, serial) in &kept.regions {
            regions.push(match mapped.get(serial).filter(|region| region.spec() == spec) {
                Some(region) => region.clone(),
                None => {
                    let fd = fds.get(serial).ok_or(ResumeError::Missing)?;
                    MappedRegion::map(*spec, fd.as_fd(), backing)?
                }
            });
        }
        let memory = GuestMemory::new(regions)?;
        let record = match kept.record {
            KeptRecord { serial: 0, .. } => None,
            KeptRecord { serial, queues, queue_size, offset } => {
                let fd = fetch(serial).ok_or(ResumeError::Missing)?;
                Some(InflightRecord::map(fd, offset, queues, queue_size)?)
            }
        };
        let channel = fetch(kept.channel);
        let mut hypervisor = Hypervisor::new(id, connection, device, kept, memory, record, channel);
        let mut fronts = Vec::with_capacity(rings.into());
        for ring in 0..u32::from(rings) {
            let base = ring * QUEUE_SIZE_MAX;
            let mut front = VirtFront::new(disk.clone(), volume.clone(), ledger.clone(), base);
            let start = hypervisor.start_of(ring, &fetch)?;
            let reissue = start.map_or_else(Vec::new, |start| front.start(start));
            fronts.push((Front::Virt(Box::new(front)), reissue));
        }
        Ok((hypervisor, fronts))
    }
}

/// What the store has of the descriptors that came over a session's connection.
pub(super) fn kept_names(
    store: &dyn FdStore,
    id: SessionId,
) -> impl Iterator<Item = (Serial, String)> {
    let prefix = Session::store_name(id, "v");
    let serial_at = prefix.len() - 1;
    store
        .names(&prefix)
        .into_iter()
        .filter_map(move |name| Some((Kept::serial_of(&name[serial_at..])?, name)))
}

/// A volume as a guest's disk.
pub(crate) fn disk_of(volume: &OpenVolume, is_read_only: bool, queues: u32) -> Disk {
    let capabilities = &volume.capabilities;
    let can_discard = capabilities.discard && capabilities.write_zeroes;
    Disk {
        size: volume.size(),
        block_size: volume.block_size,
        physical_block_size: PHYSICAL_BLOCK_SIZE.max(volume.block_size),
        optimal_io_size: 0,
        read_only: is_read_only,
        queues: queues as u16,
        segments_max: SEGMENTS_MAX,
        segment_bytes_max: SEGMENT_BYTES_MAX,
        discard_bytes_max: if can_discard { DISCARD_BYTES_MAX } else { 0 },
        discard_ranges_max: 1,
        serial: serial_of(volume.name.as_str()),
    }
}

/// What the guest sees in `/dev/disk/by-id`: the volume's name, or if that is too long its end behind a
/// checksum of the whole.
fn serial_of(name: &str) -> [u8; SERIAL_BYTES] {
    let text = match name.len() {
        0..=SERIAL_BYTES => name.to_owned(),
        length => {
            let kept = name.get(length - (SERIAL_BYTES - 9)..).unwrap_or_default();
            format!("{:08x}-{kept}", crc32c::crc32c(name.as_bytes()))
        }
    };
    let mut serial = [0; SERIAL_BYTES];
    serial.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    serial
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_tell_volumes_apart() {
        assert_eq!(&serial_of("file:disk1")[..11], b"file:disk1\0");
        let (a, b) = ("file:a-name-that-is-long-1", "file:b-name-that-is-long-1");
        assert_ne!(serial_of(a), serial_of(b));
        assert!(serial_of(a).ends_with(b"-is-long-1"));
    }
}
