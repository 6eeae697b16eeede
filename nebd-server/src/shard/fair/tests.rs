use super::*;

const BATCH: u32 = 64;
const MIB: u64 = 1 << 20;

fn fair() -> Fair {
    Fair::new(0, beacons(1))
}

fn share(id: u8) -> Rc<Share> {
    Share::new(SessionId([id; 16]))
}

/// One turn of a queue that has as many requests of one size as it may take, answered at once.
fn turn(fair: &mut Fair, share: &Rc<Share>, bytes: u64, waiting: u64) -> u64 {
    let mut turn = fair.turn(share, BATCH);
    let mut taken = 0;
    while taken < waiting && turn.pace(share) == Pace::Take {
        turn.took(bytes);
        taken += 1;
    }
    fair.end(&turn, share, taken > 0);
    taken
}

#[test]
fn alone_a_turn_is_a_batch_or_four_mib() {
    let (mut fair, one) = (fair(), share(1));
    for _ in 0..3 {
        fair.begin_round();
        assert_eq!(turn(&mut fair, &one, 4096, u64::MAX), u64::from(BATCH));
        assert_eq!(turn(&mut fair, &one, MIB, u64::MAX), 4);
    }
}

#[test]
fn sessions_share_the_cost_whatever_the_sizes_of_their_requests() {
    let (mut fair, small, large) = (fair(), share(1), share(2));
    let (mut small_cost, mut large_cost) = (0, 0);
    for _ in 0..1000 {
        fair.begin_round();
        small_cost += turn(&mut fair, &small, 4096, u64::MAX) * (4096 + 8192);
        large_cost += turn(&mut fair, &large, MIB, u64::MAX) * (MIB + 8192);
    }
    let ratio = large_cost as f64 / small_cost as f64;
    assert!((0.95..1.05).contains(&ratio), "{ratio}");
}

#[test]
fn a_modest_session_is_served_in_each_round() {
    let (mut fair, modest, greedy) = (fair(), share(1), share(2));
    fair.begin_round();
    turn(&mut fair, &modest, 4096, 1);
    let mut largest = 0;
    for round in 0..1000 {
        fair.begin_round();
        let taken = turn(&mut fair, &greedy, MIB, u64::MAX);
        largest = largest.max(if round > 0 { taken } else { 0 });
        assert_eq!(turn(&mut fair, &modest, 4096, 1), 1);
    }
    assert_eq!(largest, 1, "what the modest one waits for");
}

#[test]
fn a_debt_is_bounded_and_forgotten_once_alone() {
    let (mut fair, greedy, other) = (fair(), share(1), share(2));
    turn(&mut fair, &other, 4096, 1);
    turn(&mut fair, &greedy, 4096, 1);
    fair.begin_round();
    assert_eq!(turn(&mut fair, &greedy, u64::MAX, 1), 1);
    let rounds = (1..).find(|_| {
        fair.begin_round();
        turn(&mut fair, &greedy, 4096, 1) == 1
    });
    assert!(rounds.unwrap() <= TURN_BYTES_MAX / QUANTUM + 1);
    assert_eq!(turn(&mut fair, &greedy, u64::MAX, 1), 1);
    fair.look(1);
    // The other asked for nothing meanwhile.
    greedy.was_served.set(true);
    fair.look(1 + LINGER.as_nanos() as u64);
    assert!(!fair.is_shared());
    fair.begin_round();
    assert_eq!(turn(&mut fair, &greedy, 4096, u64::MAX), u64::from(BATCH));
}

#[test]
fn more_queues_are_no_way_to_more_turns() {
    let (mut fair, one, many) = (fair(), share(1), share(2));
    let (mut of_one, mut of_many) = (0, [0; 8]);
    for round in 0..800 {
        fair.begin_round();
        of_one += turn(&mut fair, &one, 4096, u64::MAX);
        // The shard rotates its queues.
        for queue in 0..8 {
            let queue = (queue + round) % 8;
            of_many[queue] += turn(&mut fair, &many, 4096, u64::MAX);
        }
    }
    let ratio = of_many.iter().sum::<u64>() as f64 / of_one as f64;
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
    assert!(of_many.iter().all(|taken| *taken > of_one / 16), "{of_many:?}");
}

#[test]
fn what_is_at_the_storage_is_bounded_only_beside_others() {
    let (mut fair, greedy, other) = (fair(), share(1), share(2));
    turn(&mut fair, &greedy, 4096, 1);
    (0..100).for_each(|_| greedy.submitted(4096));
    assert!(!fair.is_full(&greedy), "alone");
    turn(&mut fair, &other, 4096, 1);
    assert!(fair.is_full(&greedy) && !fair.is_full(&other));
    assert_eq!(fair.turn(&greedy, BATCH).pace(&greedy), Pace::Full);
    (0..69).for_each(|_| greedy.answered(4096));
    assert_eq!(fair.turn(&greedy, BATCH).pace(&greedy), Pace::Take);
    // One request is always possible, and beyond the bytes no second.
    other.submitted(64 * MIB);
    assert!(fair.is_full(&other));
    other.answered(64 * MIB);
    assert!(!fair.is_full(&other));
}

#[test]
fn a_session_with_a_request_unanswered_stays_present() {
    let (mut fair, slow, other) = (fair(), share(1), share(2));
    turn(&mut fair, &slow, 4096, 1);
    slow.submitted(4096);
    let mut now_ns = 0;
    for _ in 0..10 {
        turn(&mut fair, &other, 4096, 1);
        now_ns += LINGER.as_nanos() as u64;
        fair.look(now_ns);
        assert!(fair.is_shared());
    }
    slow.answered(4096);
    fair.look(now_ns + LINGER.as_nanos() as u64);
    assert!(!fair.is_shared() && !fair.is_held());
}

#[test]
fn shards_tell_each_other_who_is_present() {
    let both = beacons(2);
    let (mut here, mut there) = (Fair::new(0, both.clone()), Fair::new(1, both));
    let (mine, sibling, other) = (share(1), share(1), share(2));
    turn(&mut here, &mine, 4096, 1);
    turn(&mut there, &sibling, 4096, 1);
    let ms = |ms: u64| ms * 1_000_000;
    for now in [1, 3] {
        here.look(ms(now));
        there.look(ms(now));
    }
    assert!(!here.is_held() && !there.is_held(), "one session with queues on both");
    turn(&mut there, &other, 4096, 1);
    there.look(ms(5));
    here.look(ms(5));
    assert!(here.is_held() && !here.is_shared(), "held at the storage, not in its turns");
    mine.was_served.set(true);
    here.look(ms(5) + BEACON.as_nanos() as u64);
    assert!(!here.is_held(), "a shard that sleeps says nothing for long");
}
