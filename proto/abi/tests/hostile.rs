//! Random bytes where the other side should have written sense: refused or ignored, never a panic,
//! and never more than was asked for.

#![cfg(not(loom))]

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nebd_abi::control::{DecodeError, MESSAGE_BYTES_MAX, Message};
use nebd_abi::host::{DeathCause, HostPage};
use nebd_abi::layout::{Geometry, LayoutVersion, REGION_MAGIC, RegionParams, SessionId};
use nebd_abi::region::{QueueMemory, Region};
use nebd_abi::ring::{ClientReap, ClientSubmit, ServerQueue, Submission};
use nebd_abi::{Epoch, Generation, Op, OpFlags};
use proptest::prelude::*;

fn region(queue_depth: u32) -> Arc<Region> {
    let geometry = Geometry { queue_count: 1, queue_depth, iovecs_per_slot: 2, arena_size: 4096 };
    let params = RegionParams {
        version: LayoutVersion::CURRENT,
        session: SessionId([1; 16]),
        geometry,
        volume: "null:hostile".parse().unwrap(),
        client_pid: 1,
        client_version: "hostile".into(),
    };
    Arc::new(Region::create(params).unwrap())
}

/// A word that is likelier than chance to mean something.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![0..8u64, any::<u64>(), any::<u8>().prop_map(|byte| u64::from(byte) << 32)]
}

/// Stores words all over the header, the rings, the slots and the tables of a queue.
fn scribble(memory: &QueueMemory, words: &[(usize, u64)]) {
    let header = memory.header();
    let indices =
        [&header.sq_tail, &header.sq_need_wakeup, &header.cq_tail, &header.cq_head].into_iter();
    let halves: Vec<_> = indices.flat_map(|line| [&line.word, &line.flag]).collect();
    let sq = memory.sq().iter().flat_map(|entry| [&entry.seq, &entry.slot]);
    let cq = memory.cq().iter().flat_map(|entry| [&entry.seq, &entry.slot_result, &entry.epoch]);
    let slots = memory.slots().iter().flat_map(|slot| {
        let iovec = [&slot.iovec.memory_length, &slot.iovec.offset];
        [&slot.seq, &slot.op, &slot.offset, &slot.length].into_iter().chain(iovec)
    });
    let tables = (0..memory.slots().len())
        .flat_map(|slot| memory.iovecs(slot))
        .flat_map(|iovec| [&iovec.memory_length, &iovec.offset]);
    let all: Vec<_> = sq.chain(cq).chain(slots).chain(tables).collect();
    for (at, value) in words {
        let at = at % (halves.len() + all.len());
        match halves.get(at) {
            Some(half) => half.store(*value as u32, Relaxed),
            None => all[at - halves.len()].store(*value, Relaxed),
        }
    }
}

type Scribbles = Vec<Vec<(usize, u64)>>;

fn scribbles() -> impl Strategy<Value = Scribbles> {
    let scribble = prop::collection::vec((any::<usize>(), word()), 0..40);
    prop::collection::vec(scribble, 1..20)
}

proptest! {
    /// A server takes over and serves a region that its client scribbles over all the while.
    #[test]
    fn a_server_survives_its_client(log in 0..4u32, rounds in scribbles()) {
        let memory = region(1 << log).queue(0).unwrap();
        let depth = memory.slots().len() as u32;
        scribble(&memory, &rounds[0]);
        let epoch = Epoch { major: 1, minor: 1 };
        let (mut server, in_flight) = ServerQueue::adopt(memory.clone(), epoch);
        prop_assert!(in_flight.len() <= depth as usize);
        prop_assert!(in_flight.iter().all(|request| request.slot < depth && request.seq != 0));
        for round in &rounds {
            scribble(&memory, round);
            // A violation detaches the session; here the server is made to carry on.
            for _ in 0..4 * depth {
                match server.pop() {
                    Ok(None) => break,
                    Ok(Some(request)) => {
                        prop_assert!(request.slot < depth);
                        prop_assert!(request.buffers.as_slice().len() <= 2);
                        server.publish(request.slot, request.seq, Ok(()));
                    }
                    Err(_) => {}
                }
            }
            let _ = (server.call_needed(), server.sleep(), server.is_ready());
            server.wake();
        }
    }

    /// A client reaps from a server that scribbles: no completion but of its own requests.
    #[test]
    fn a_client_survives_its_server(rounds in scribbles()) {
        let memory = region(4).queue(0).unwrap();
        let (mut submit, mut reap) =
            (ClientSubmit::new(memory.clone()), ClientReap::new(memory.clone()));
        let flush =
            Submission { op: Op::Flush, flags: OpFlags::NONE, offset: 0, length: 0, buffers: &[] };
        for round in &rounds {
            for slot in 0..4 {
                submit.submit(slot, &flush);
            }
            scribble(&memory, round);
            // However far ahead the tail claims to be, each entry gets one look.
            for _ in 0..4 {
                let Some(completion) = reap.reap() else { break };
                prop_assert!(completion.slot < 4 && completion.seq != 0);
            }
        }
    }

    #[test]
    fn random_bytes_are_no_message(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Message::decode(&bytes);
    }

    /// The header is right, so that the bodies are reached; what decodes survives its encoding.
    #[test]
    fn random_bodies_decode_or_are_refused(
        kind in 0..16u16,
        request in any::<u64>(),
        body in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..300),
    ) {
        let mut packet = Message::Done.encode(request);
        packet[6..8].copy_from_slice(&kind.to_le_bytes());
        packet.extend(body);
        match Message::decode(&packet) {
            Ok((answered, message)) => {
                prop_assert_eq!(answered, request);
                let again = message.encode(request);
                prop_assert!(again.len() <= MESSAGE_BYTES_MAX);
                prop_assert_eq!(Message::decode(&again), Ok((request, message)));
            }
            Err(DecodeError::Kind { kind: unknown, request: asked }) => {
                prop_assert_eq!((unknown, asked), (kind, request));
                prop_assert!(!(1..=13).contains(&kind));
            }
            Err(DecodeError::Short | DecodeError::Field(_)) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// Random words in the header of a region: whatever is accepted fits into the memfd.
    #[test]
    fn a_header_is_refused_or_fits(
        words in prop::collection::vec((0..90usize, word()), 0..6),
        size in prop_oneof![Just(None), word().prop_map(Some)],
    ) {
        let region = region(4);
        let header = region.header();
        // SAFETY: a region starts with a page, which both sides access as atomics alone.
        let page = unsafe { region.memory().atomics::<[std::sync::atomic::AtomicU64; 512]>(0) };
        for (at, value) in &words {
            page.unwrap()[*at].store(*value, Relaxed);
        }
        let size = size.unwrap_or(region.memory().size());
        if let Ok(params) = header.params(size) {
            let geometry = params.geometry;
            prop_assert_eq!(geometry.region_size(), size);
            prop_assert_eq!(header.magic.load(Relaxed), REGION_MAGIC);
            prop_assert!(geometry.validate().is_ok());
            let last = geometry.queues_offset()
                + u64::from(geometry.queue_count) * geometry.queue_stride();
            prop_assert!(last <= geometry.arena_offset());
            prop_assert!(params.client_version.chars().all(|c| c.is_ascii_graphic()));
        }
    }

    /// Any geometry that validates lays its parts out in order, without an overflow.
    #[test]
    fn a_valid_geometry_has_its_parts_in_order(
        queue_count in any::<u32>().prop_map(|n| n % 80),
        queue_depth in prop_oneof![any::<u32>(), (0..14u32).prop_map(|log| 1 << log)],
        iovecs_per_slot in 0..1200u32,
        arena_size in prop_oneof![any::<u64>(), (0..1u64 << 30).prop_map(|pages| pages * 4096)],
    ) {
        let geometry = Geometry { queue_count, queue_depth, iovecs_per_slot, arena_size };
        if let Ok(g) = geometry.validate() {
            let parts =
                [0, g.sq_offset(), g.cq_offset(), g.slots_offset(), g.iovecs_offset(), g.queue_stride()];
            prop_assert!(parts.is_sorted() && parts.iter().all(|offset| offset % 16 == 0));
            prop_assert!(g.arena_offset() <= g.region_size());
        }
    }

    /// Whatever the page holds, probes and deaths are bounded; only the present generation is won.
    #[test]
    fn a_host_page_of_random_words_is_bounded(
        words in prop::collection::vec((0..600usize, word()), 0..200),
        probe in any::<usize>(),
    ) {
        let page = HostPage::create().unwrap();
        let raw = nebd_abi::region::SharedMemory::map(page.fd().try_clone_to_owned().unwrap(), 4096);
        let raw = raw.unwrap();
        // SAFETY: the page consists of atomics alone.
        let all = unsafe { raw.atomics::<[std::sync::atomic::AtomicU64; 512]>(0) }.unwrap();
        for (at, value) in &words {
            all[2 + at % 510].store(*value, Relaxed);
        }
        let seen = page.generation();
        page.pong(probe);
        let ping = page.ping();
        prop_assert!(page.silent_probes(ping).is_none_or(|silent| silent <= 128));
        let _ = page.death_of(seen);
        let claimed = page.claim(seen);
        prop_assert_eq!(claimed, seen.0.checked_add(1).map(Generation));
        if claimed.is_some() {
            prop_assert_eq!(page.claim(seen), None);
            page.record_death(DeathCause::Crash);
            prop_assert_eq!(page.death_of(page.generation()), DeathCause::Crash);
        }
    }
}
