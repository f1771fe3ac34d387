use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::send::gso::GsoOff;

fn destination(i: u8) -> SocketAddr {
    SocketAddr::new([192, 0, 2, i].into(), 51_900)
}

/// Description of a batch: host number of the destination, ECN field, segment size in bytes, number
/// of datagrams, and length of the last one in bytes.
#[derive(Debug, Clone)]
struct Wanted {
    destination: u8,
    ecn: Ecn,
    segment_size: usize,
    segments: usize,
    last: usize,
}

impl Wanted {
    fn new(destination: u8, segment_size: usize, segments: usize) -> Self {
        Self { destination, ecn: Ecn::NotEct, segment_size, segments, last: segment_size }
    }

    fn len_of(&self, segment: usize) -> usize {
        if segment + 1 == self.segments { self.last } else { self.segment_size }
    }

    fn len(&self) -> usize {
        (self.segments - 1) * self.segment_size + self.last
    }
}

/// Datagrams that a simulated kernel accepted, and the outcome of the plan.
struct Result {
    sent: Vec<(usize, usize)>,
    outcome: SendOutcome,
    drops: DropCounts,
    calls: Vec<Vec<Message>>,
}

/// Sends `wanted` to a simulated kernel, and checks the invariants that hold for every kernel.
fn execute(
    plan: &mut Plan,
    gso: &mut GsoState,
    now: Instant,
    wanted: &[Wanted],
    mut kernel: impl FnMut(&[Message], &[Wanted]) -> std::result::Result<usize, i32>,
) -> Result {
    let parts: Vec<_> = wanted.iter().map(|batch| [(0, batch.len())]).collect();
    let batches: Vec<_> = wanted
        .iter()
        .zip(&parts)
        .map(|(batch, parts)| GsoBatch {
            destination: destination(batch.destination),
            ecn: batch.ecn,
            segment_size: batch.segment_size,
            segments: batch.segments,
            parts,
        })
        .collect();
    let arena_len = wanted.iter().map(Wanted::len).max().unwrap_or(0);
    let mut drops = DropCounts::default();
    let (mut sent, mut calls) = (Vec::new(), Vec::new());
    let arena = vec![0; arena_len];
    let mut request = SendRequest { arena: &arena, batches: &batches, from: Position::default() };
    let mut outcome = SendOutcome::default();
    let (mut per_call, mut per_message) = (Vec::new(), Vec::new());
    loop {
        let part = plan.execute(&request, gso, &mut drops, now, |messages| {
            assert!((1..=MAX_MESSAGES).contains(&messages.len()));
            for message in messages {
                check(message, &wanted[message.batch]);
            }
            let result = kernel(messages, wanted);
            if let Ok(taken) = result {
                for message in messages.iter().take(taken) {
                    sent.extend((0..message.segments).map(|i| (message.batch, message.first + i)));
                }
            }
            calls.push(messages.to_vec());
            result
        });
        per_call.extend_from_slice(plan.datagrams_per_call());
        per_message.extend_from_slice(plan.segments_per_message());
        outcome.datagrams += part.datagrams;
        outcome.bytes += part.bytes;
        outcome.calls += part.calls;
        outcome.gso_messages += part.gso_messages;
        outcome.fallbacks += part.fallbacks;
        outcome.dropped += part.dropped;
        let Some(from) = part.blocked else { break };
        assert!(from >= request.from);
        outcome.blocked = Some(from);
        request.from = from;
    }

    // Strictly ascending: in order, and no datagram twice.
    assert!(sent.is_sorted_by(|a, b| a < b), "{sent:?}");
    let all = wanted.iter().map(|batch| batch.segments as u64).sum::<u64>();
    assert_eq!(outcome.datagrams, sent.len() as u64);
    assert_eq!(outcome.datagrams + outcome.dropped, all);
    assert_eq!(drops.clone().drain().map(|(_, n)| n).sum::<u64>(), outcome.dropped);
    let bytes: usize = sent.iter().map(|&(batch, segment)| wanted[batch].len_of(segment)).sum();
    assert_eq!(outcome.bytes, bytes as u64);
    assert_eq!(outcome.calls, calls.len() as u64);
    let sum = |counts: &[u32]| counts.iter().copied().map(u64::from).sum::<u64>();
    assert_eq!(sum(&per_call), outcome.datagrams);
    assert_eq!(sum(&per_message), outcome.datagrams);
    let gso_messages = per_message.iter().filter(|&&n| n > 1).count();
    assert_eq!(outcome.gso_messages, gso_messages as u64);
    Result { sent, outcome, drops, calls }
}

/// Checks that a message covers exactly the bytes of its datagrams, within the kernel's limits.
fn check(message: &Message, batch: &Wanted) {
    assert!(message.segments >= 1 && message.first + message.segments <= batch.segments);
    assert_eq!(message.start, message.first * batch.segment_size);
    let covered = message.first..message.first + message.segments;
    assert_eq!(message.len, covered.map(|i| batch.len_of(i)).sum::<usize>());
    match message.gso {
        Some(size) => {
            assert_eq!(usize::from(size), batch.segment_size);
            assert!((2..=MAX_DATAGRAMS_PER_MESSAGE).contains(&message.segments));
            assert!(message.len <= MAX_MESSAGE_LEN);
        }
        None => assert_eq!(message.segments, 1),
    }
}

fn run_once(
    gso: &mut GsoState,
    wanted: &[Wanted],
    kernel: impl FnMut(&[Message], &[Wanted]) -> std::result::Result<usize, i32>,
) -> Result {
    execute(&mut Plan::default(), gso, Instant::now(), wanted, kernel)
}

/// Returns a simulated kernel that accepts messages up to the first one for which `judge` returns
/// an errno, as Linux does.
fn by_message(
    mut judge: impl FnMut(&Message, &Wanted) -> Option<i32>,
) -> impl FnMut(&[Message], &[Wanted]) -> std::result::Result<usize, i32> {
    move |messages, wanted| {
        let errors = messages.iter().map(|message| judge(message, &wanted[message.batch]));
        match errors.enumerate().find_map(|(i, error)| error.map(|error| (i, error))) {
            Some((0, error)) => Err(error),
            Some((taken, _)) => Ok(taken),
            None => Ok(messages.len()),
        }
    }
}

#[test]
fn batches_are_sent_in_one_call_as_one_message_each() {
    let wanted: Vec<_> = (0..10).map(|i| Wanted::new(i, 1_000, 40)).collect();
    let result = run_once(&mut GsoState::new(), &wanted, |messages, _| Ok(messages.len()));
    assert_eq!(result.outcome.calls, 1);
    assert_eq!(result.outcome.gso_messages, 10);
}

#[test]
fn refused_ecn_control_message_is_omitted() {
    let marked = |segments| Wanted { ecn: Ecn::Ect0, ..Wanted::new(1, 1_000, segments) };
    let wanted = [Wanted::new(2, 1_000, 3), marked(1), marked(4), Wanted::new(2, 900, 2)];
    let mut plan = Plan::default();
    let refusing = || by_message(|m, _| (m.ecn != Ecn::NotEct).then_some(libc::EINVAL));
    let (mut gso, now) = (GsoState::new(), Instant::now());
    let first = execute(&mut plan, &mut gso, now, &wanted, refusing());
    assert_eq!((first.outcome.datagrams, first.outcome.dropped), (10, 0));
    assert!(plan.ecn_refused());
    let second = execute(&mut plan, &mut gso, now, &wanted, refusing());
    assert_eq!(
        (second.outcome.calls, second.outcome.gso_messages),
        (1, 3),
        "The second call must omit the ECN control message."
    );
}

#[test]
fn invalid_destination_does_not_disable_ecn() {
    let marked = |host| Wanted { ecn: Ecn::Ce, ..Wanted::new(host, 1_000, 1) };
    let mut plan = Plan::default();
    let wanted = [marked(1), marked(2), marked(3)];
    let judge = by_message(|_, batch| (batch.destination == 2).then_some(libc::EINVAL));
    let result = execute(&mut plan, &mut GsoState::new(), Instant::now(), &wanted, judge);
    assert_eq!((result.outcome.datagrams, result.outcome.dropped), (2, 1));
    assert!(!plan.ecn_refused());
    let last = result.calls.last().and_then(|call| call.last());
    assert_eq!(last.map(|message| message.ecn), Some(Ecn::Ce));
}

#[test]
fn long_batches_are_cut_at_64_datagrams_and_65000_bytes() {
    let wanted = [Wanted::new(1, 100, 130), Wanted::new(1, 1_400, 100), Wanted::new(1, 40_000, 2)];
    let result = run_once(&mut GsoState::new(), &wanted, |messages, _| Ok(messages.len()));
    let segments: Vec<_> = result.calls[0].iter().map(|message| message.segments).collect();
    assert_eq!(segments, [64, 64, 2, 46, 46, 8, 1, 1]);
}

#[test]
fn disabled_gso_sends_single_datagrams_in_full_calls() {
    let mut gso = GsoState::disabled();
    let result =
        run_once(&mut gso, &[Wanted::new(1, 1_000, 130)], |messages, _| Ok(messages.len()));
    let sizes: Vec<_> = result.calls.iter().map(Vec::len).collect();
    assert_eq!(sizes, [64, 64, 2]);
}

#[test]
fn eio_disables_gso_for_one_destination() {
    let mut gso = GsoState::new();
    let wanted = [Wanted::new(1, 1_000, 20), Wanted::new(2, 1_000, 30), Wanted::new(1, 1_000, 10)];
    let kernel = by_message(|message, batch| {
        (batch.destination == 2 && message.gso.is_some()).then_some(libc::EIO)
    });
    let result = run_once(&mut gso, &wanted, kernel);
    assert_eq!(result.outcome.datagrams, 60);
    assert_eq!(result.outcome.fallbacks, 1);
    // One call for the first batch, one that the kernel refuses, and one for the rest.
    assert_eq!(result.outcome.calls, 3);
    assert_eq!(result.outcome.gso_messages, 2);
    let off: Vec<_> =
        gso.off(Instant::now()).map(|GsoOff { destination, .. }| destination).collect();
    assert_eq!(off, [destination(2)]);
}

#[test]
fn gso_is_tried_again_after_the_pause() {
    let (mut gso, mut plan, start) = (GsoState::new(), Plan::default(), Instant::now());
    let wanted = [Wanted::new(1, 1_000, 20)];
    let mut broken = by_message(|message, _| message.gso.is_some().then_some(libc::EIO));
    for (seconds, tried) in [(0, 1), (4, 0), (5, 1), (14, 0), (15, 1)] {
        let now = start + Duration::from_secs(seconds);
        let result = execute(&mut plan, &mut gso, now, &wanted, &mut broken);
        assert_eq!((seconds, result.outcome.fallbacks), (seconds, tried));
        assert_eq!(result.outcome.datagrams, 20);
    }
    let later = start + Duration::from_secs(15 + 20);
    let result = execute(&mut plan, &mut gso, later, &wanted, |messages, _| Ok(messages.len()));
    assert_eq!(result.outcome.gso_messages, 1);
    assert_eq!(gso.off(later).count(), 0);
}

#[test]
fn third_einval_in_a_row_disables_gso_for_the_destination() {
    let mut gso = GsoState::new();
    let wanted = [Wanted::new(1, 1_000, 10)];
    let mut kernel = by_message(|message, _| message.gso.is_some().then_some(libc::EINVAL));
    for _ in 0..3 {
        assert!(gso.allowed(destination(1), Instant::now()));
        let result = run_once(&mut gso, &wanted, &mut kernel);
        assert_eq!((result.outcome.datagrams, result.outcome.fallbacks), (10, 1));
    }
    assert!(!gso.allowed(destination(1), Instant::now()));
    assert!(gso.allowed(destination(2), Instant::now()));
}

#[test]
fn too_long_datagrams_are_dropped_and_do_not_disable_gso() {
    let mut gso = GsoState::new();
    for _ in 0..5 {
        let wanted = [Wanted { last: 300, ..Wanted::new(1, 1_400, 10) }, Wanted::new(2, 1_400, 2)];
        let kernel = by_message(|message, batch| {
            let longest = message.gso.map_or(message.len, usize::from);
            (batch.destination == 1 && longest > 1_300).then_some(libc::EMSGSIZE)
        });
        let result = run_once(&mut gso, &wanted, kernel);
        assert_eq!(result.drops.get(DropReason::SendTooBig), 9);
        assert_eq!(result.sent, [(0, 9), (1, 0), (1, 1)]);
        assert!(gso.allowed(destination(1), Instant::now()));
    }
}

#[test]
fn error_of_one_destination_does_not_affect_others() {
    for (errno, expected) in [
        (libc::ENETUNREACH, DropReason::SendUnreachable),
        (libc::EHOSTUNREACH, DropReason::SendUnreachable),
        (libc::EPERM, DropReason::SendDenied),
        (libc::ENOBUFS, DropReason::SendNoBuffer),
        (libc::ECONNREFUSED, DropReason::SendError),
    ] {
        let wanted = [Wanted::new(1, 900, 3), Wanted::new(2, 900, 3), Wanted::new(3, 900, 3)];
        let kernel = by_message(|_, batch| (batch.destination == 2).then_some(errno));
        let result = run_once(&mut GsoState::new(), &wanted, kernel);
        assert_eq!(result.drops.get(expected), 3);
        assert_eq!(result.outcome.datagrams, 6);
    }
}

#[test]
fn eintr_repeats_the_call() {
    let mut calls = 0;
    let result = run_once(&mut GsoState::new(), &[Wanted::new(1, 900, 3)], |messages, _| {
        calls += 1;
        if calls < 4 { Err(libc::EINTR) } else { Ok(messages.len()) }
    });
    assert_eq!(result.outcome.datagrams, 3);
}

#[test]
fn full_socket_stops_and_next_call_continues() {
    let wanted = [Wanted::new(1, 1_000, 50), Wanted::new(2, 1_000, 50), Wanted::new(1, 900, 1)];
    let mut calls = 0;
    let result = run_once(&mut GsoState::new(), &wanted, |_, _| {
        calls += 1;
        // The kernel accepts one message in every fourth call.
        if calls % 4 == 1 { Ok(1) } else { Err(libc::EAGAIN) }
    });
    assert_eq!((result.outcome.datagrams, result.outcome.dropped), (101, 0));
    assert_eq!(result.outcome.gso_messages, 2);
    assert_eq!(result.outcome.blocked, Some(Position { batch: 2, segment: 0 }));
}

#[test]
fn call_without_progress_drops_the_message() {
    let result = run_once(&mut GsoState::new(), &[Wanted::new(1, 900, 3)], |_, _| Ok(0));
    assert_eq!(result.drops.get(DropReason::SendError), 3);
}

#[test]
fn inconsistent_batches_are_dropped_and_counted() {
    let batch = |segment_size, segments, parts| GsoBatch {
        destination: destination(1),
        ecn: Ecn::NotEct,
        segment_size,
        segments,
        parts,
    };
    let bad = [
        batch(100, 3, &[(0, 200)][..]), // no bytes for the last datagram
        batch(100, 2, &[(0, 201)]),     // last datagram longer than the others
        batch(0, 2, &[(0, 100)]),       // segment size 0
        batch(100, 1, &[]),             // empty datagram
        batch(100, 1, &[(950, 100)]),   // part outside of the arena
        batch(100, 2, &[(usize::MAX, 100), (0, 100)]), // overflow of the offset
        batch(usize::MAX, 3, &[(0, 100)]), // overflow of the length
    ];
    let good = batch(100, 2, &[(0, 150)][..]);
    let batches: Vec<_> = bad.iter().flat_map(|bad| [good, *bad, batch(1, 0, &[])]).collect();
    let mut drops = DropCounts::default();
    let mut plan = Plan::default();
    let mut sent = Vec::new();
    let request = SendRequest { arena: &[0; 1_000], batches: &batches, from: Position::default() };
    let outcome =
        plan.execute(&request, &mut GsoState::new(), &mut drops, Instant::now(), |messages| {
            sent.extend(messages.iter().map(|message| message.batch));
            Ok(messages.len())
        });
    assert_eq!(sent, (0..bad.len()).map(|i| i * 3).collect::<Vec<_>>());
    assert_eq!(outcome.datagrams, 2 * bad.len() as u64);
    assert_eq!(drops.get(DropReason::SendError), 3 + 2 + 2 + 1 + 1 + 2 + 3);
}

fn wanted() -> impl Strategy<Value = Vec<Wanted>> {
    let batch = (1u8..5, 1usize..3_000, 1usize..150, any::<prop::sample::Index>(), any::<bool>());
    let batch = batch.prop_map(|(destination, segment_size, segments, last, marked)| Wanted {
        ecn: if marked { Ecn::Ect0 } else { Ecn::NotEct },
        last: 1 + last.index(segment_size),
        ..Wanted::new(destination, segment_size, segments)
    });
    prop::collection::vec(batch, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// `execute` checks that each datagram is sent once or counted as dropped once.
    #[test]
    fn arbitrary_results_lose_or_repeat_no_datagram(
        wanted in wanted(),
        answers in prop::collection::vec(
            prop_oneof![
                3 => (0usize..70).prop_map(Ok),
                1 => Just(Err(libc::EIO)),
                1 => Just(Err(libc::EINVAL)),
                1 => Just(Err(libc::EMSGSIZE)),
                1 => Just(Err(libc::EINTR)),
                1 => Just(Err(libc::EPERM)),
                1 => Just(Err(libc::ENETUNREACH)),
                1 => (1i32..134).prop_map(Err),
            ],
            0..60,
        ),
    ) {
        let mut answers = answers.into_iter();
        execute(
            &mut Plan::default(),
            &mut GsoState::new(),
            Instant::now(),
            &wanted,
            |messages, _| match answers.next() {
                Some(Ok(taken)) => Ok(taken.min(messages.len())),
                Some(Err(errno)) => Err(errno),
                None => Ok(messages.len()),
            },
        );
    }

    /// `execute` must send every datagram that the simulated kernel accepts in a message of its
    /// own, and drop all other datagrams.
    #[test]
    fn only_datagrams_that_fail_singly_are_dropped(
        wanted in wanted(),
        no_gso in prop::collection::hash_set(1u8..5, 0..3),
        refuses in prop::collection::hash_set(1u8..5, 0..3),
        unreachable in prop::collection::hash_set(1u8..5, 0..2),
        mtu in 500usize..4_000,
        per_call in 1usize..70,
        rounds in 1usize..5,
    ) {
        let alone = |unreachable: &HashSet<u8>, destination, len| {
            if unreachable.contains(&destination) {
                Some(libc::ENETUNREACH)
            } else {
                (len > mtu).then_some(libc::EMSGSIZE)
            }
        };
        let mut gso = GsoState::new();
        let mut plan = Plan::default();
        for _ in 0..rounds {
            let mut judge = by_message(|message, batch| {
                let error = alone(
                    &unreachable,
                    batch.destination,
                    message.gso.map_or(message.len, usize::from),
                );
                match message.gso {
                    Some(_) if no_gso.contains(&batch.destination) => Some(libc::EIO),
                    Some(_) if refuses.contains(&batch.destination) => Some(libc::EINVAL),
                    _ => error,
                }
            });
            let result = execute(&mut plan, &mut gso, Instant::now(), &wanted, |messages, batches| {
                judge(messages, batches).map(|taken| taken.min(per_call))
            });
            let mut expected = Vec::new();
            for (i, batch) in wanted.iter().enumerate() {
                // A batch to an unreachable destination is dropped completely.
                for segment in 0..batch.segments {
                    if alone(&unreachable, batch.destination, batch.len_of(segment)).is_none() {
                        expected.push((i, segment));
                    }
                }
            }
            prop_assert_eq!(result.sent, expected);
            for off in gso.off(Instant::now()) {
                let host = (1..5).find(|&i| destination(i) == off.destination);
                prop_assert!(host.is_some_and(|i| no_gso.contains(&i) || refuses.contains(&i)));
            }
        }
    }
}
