use std::sync::Arc;

use super::*;
use crate::layout::{Geometry, LayoutVersion, RegionParams, SessionId};
use crate::region::Region;

fn region(depth: u32) -> Arc<Region> {
    let geometry =
        Geometry { queue_count: 1, queue_depth: depth, iovecs_per_slot: 4, arena_size: 4096 };
    let params = RegionParams {
        version: LayoutVersion::CURRENT,
        session: SessionId([7; 16]),
        geometry,
        volume: "null:test".parse().unwrap(),
        client_pid: 1,
        client_version: "test".into(),
    };
    Arc::new(Region::create(params).unwrap())
}

const EPOCH: Epoch = Epoch { major: 1, minor: 1 };

fn write(offset: u64, buffers: &[Buffer]) -> Submission<'_> {
    let length = buffers.iter().map(|buffer| u64::from(buffer.length)).sum();
    Submission { op: Op::Write, flags: OpFlags::FUA, offset, length, buffers }
}

#[test]
fn a_request_goes_round() {
    let memory = region(4).queue(0).unwrap();
    let (mut submit, mut reap) =
        (ClientSubmit::new(memory.clone()), ClientReap::new(memory.clone()));
    let (mut server, in_flight) = ServerQueue::adopt(memory, EPOCH);
    assert!(in_flight.is_empty());

    let buffers = [
        Buffer { memory: 0, length: 512, offset: 0 },
        Buffer { memory: 3, length: 1024, offset: 9 },
    ];
    let seq = submit.submit(2, &write(4096, &buffers));
    let request = server.pop().unwrap().unwrap();
    assert_eq!((request.slot, request.seq, request.offset, request.length), (2, seq, 4096, 1536));
    assert_eq!((request.op, request.flags), (Ok(Op::Write), Ok(OpFlags::FUA)));
    assert_eq!(request.buffers.as_slice(), buffers);
    assert_eq!(server.pop(), Ok(None));

    server.publish(2, seq, Err(Errno::NOSPC));
    let expected = Completion { slot: 2, seq, result: Err(Errno::NOSPC), epoch: EPOCH };
    assert_eq!(reap.reap(), Some(expected));
    assert_eq!(reap.reap(), None);
}

#[test]
fn a_successor_takes_up_exactly_what_no_completion_answered() {
    let memory = region(4).queue(0).unwrap();
    let (mut submit, mut reap) =
        (ClientSubmit::new(memory.clone()), ClientReap::new(memory.clone()));
    let (mut first, _) = ServerQueue::adopt(memory.clone(), EPOCH);
    let seqs: Vec<u64> = (0..4).map(|slot| submit.submit(slot, &write(0, &[]))).collect();
    // Slot 0: answered and reaped; 1: answered; 2: popped; 3: still in the submission ring.
    for _ in 0..3 {
        first.pop().unwrap().unwrap();
    }
    first.publish(0, seqs[0], Ok(()));
    assert_eq!(reap.reap().unwrap().slot, 0);
    first.publish(1, seqs[1], Ok(()));
    drop(first);

    let (mut second, in_flight) = ServerQueue::adopt(memory, Epoch { major: 1, minor: 2 });
    let slots: Vec<u32> = in_flight.iter().map(|request| request.slot).collect();
    assert_eq!(slots, [2, 3]);
    assert_eq!(second.pop(), Ok(None), "slot 3 must not be dispatched twice");
    assert_eq!(reap.reap().unwrap().slot, 1);
    // The reaped slot is used again under the second server.
    submit.submit(1, &write(0, &[]));
    assert_eq!(second.pop().unwrap().unwrap().slot, 1);
}

#[test]
fn an_entry_that_a_dying_server_had_not_published_answers_nothing() {
    let memory = region(2).queue(0).unwrap();
    let mut submit = ClientSubmit::new(memory.clone());
    let (mut first, _) = ServerQueue::adopt(memory.clone(), EPOCH);
    let seq = submit.submit(0, &write(0, &[]));
    first.publish(0, seq, Ok(()));
    // Undo the last step of `publish`: the server died before it.
    memory.header().cq_tail.word.store(0, Release);
    let (_, in_flight) = ServerQueue::adopt(memory, EPOCH);
    assert_eq!(in_flight.len(), 1);
}

#[test]
fn a_second_answer_is_passed_over() {
    let memory = region(2).queue(0).unwrap();
    let (mut submit, mut reap) =
        (ClientSubmit::new(memory.clone()), ClientReap::new(memory.clone()));
    let (mut server, _) = ServerQueue::adopt(memory, EPOCH);
    let old = submit.submit(0, &write(0, &[]));
    server.pop().unwrap().unwrap();
    server.publish(0, old, Ok(()));
    reap.reap().unwrap();
    let new = submit.submit(0, &write(0, &[]));
    server.publish(0, old, Ok(()));
    assert_eq!(reap.reap(), None);
    server.publish(0, new, Ok(()));
    assert_eq!(reap.reap().unwrap().seq, new);
}

#[test]
fn nonsense_from_the_client_is_named_or_ignored() {
    let memory = region(2).queue(0).unwrap();
    let (mut server, _) = ServerQueue::adopt(memory.clone(), EPOCH);
    memory.header().sq_tail.word.store(5, Release);
    assert_eq!(server.pop(), Err(RingViolation::Tail { tail: 5, ahead: 5 }));
    memory.header().sq_tail.word.store(1, Release);
    memory.sq()[0].slot.store(2, Relaxed);
    assert_eq!(server.pop(), Err(RingViolation::Slot(2)));
    memory.header().sq_tail.word.store(2, Release);
    memory.sq()[1].seq.store(77, Relaxed);
    assert_eq!(server.pop(), Ok(None), "a seq that its slot does not hold is stale");
}

#[test]
fn indices_wrap() {
    let memory = region(2).queue(0).unwrap();
    for line in [&memory.header().sq_tail, &memory.header().cq_tail, &memory.header().cq_head] {
        line.word.store(u32::MAX - 3, Release);
    }
    let mut submit = ClientSubmit { memory: memory.clone(), tail: u32::MAX - 3, seq_next: 1 };
    let mut reap = ClientReap { memory: memory.clone(), head: u32::MAX - 3 };
    let (mut server, _) = ServerQueue::adopt(memory, EPOCH);
    for round in 0..20 {
        let seq = submit.submit(round % 2, &write(0, &[]));
        assert_eq!(server.pop().unwrap().unwrap().seq, seq);
        server.publish(round % 2, seq, Ok(()));
        assert_eq!(reap.reap().unwrap().seq, seq);
    }
}
