//! Tests of GSO batches (UDP_SEGMENT) and merged datagrams (UDP_GRO).

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use skein_core::drop::DropCounts;
use skein_core::wire::ecn::Ecn;
use skein_sys::fallback::Feature;
use skein_sys::recv::RecvBatch;
use skein_sys::send::{GsoBatch, GsoState, Position, SendOutcome, SendRequest, Sender};
use skein_sys::udp::{bind_lanes, probe_gro, probe_gso, report_ecn};

use crate::{OPTIONS, address, in_namespace, wait_readable};

/// Returns `len` bytes without a short period.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

/// Receives `count` datagrams. Returns source and payload of each datagram, and the number of
/// datagrams of each message.
pub(crate) fn receive(
    socket: &UdpSocket,
    count: usize,
) -> (Vec<(SocketAddr, Vec<u8>)>, Vec<usize>) {
    let mut messages = RecvBatch::new(16);
    let (mut datagrams, mut sizes) = (Vec::new(), Vec::new());
    while datagrams.len() < count {
        wait_readable(socket);
        for i in 0..messages.recv(socket.as_fd()).unwrap() {
            let message = messages.message(i);
            assert!(!message.truncated);
            sizes.push(message.segments().count());
            datagrams.extend(
                message.segments().map(|range| (message.source, messages.arena()[range].to_vec())),
            );
        }
    }
    (datagrams, sizes)
}

/// Returns a request for all datagrams of the batches.
pub(crate) fn all<'a>(arena: &'a [u8], batches: &'a [GsoBatch<'a>]) -> SendRequest<'a> {
    SendRequest { arena, batches, from: Position::default() }
}

/// Sends the batches with a new sender, and checks that no datagram is dropped.
pub(crate) fn send_all(
    socket: &UdpSocket,
    arena: &[u8],
    batches: &[GsoBatch<'_>],
    gso: &mut GsoState,
    now: Instant,
) -> SendOutcome {
    let mut drops = DropCounts::default();
    let request = all(arena, batches);
    let outcome = Sender::new().send(socket.as_fd(), &request, gso, &mut drops, now);
    assert_eq!(drops.drain().collect::<Vec<_>>(), []);
    outcome
}

#[test]
fn kernel_supports_udp_segment_and_udp_gro() {
    probe_gso().unwrap();
    probe_gro().unwrap();
}

#[test]
fn batches_arrive_unchanged_with_and_without_gso() {
    in_namespace(|| {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let (lanes, _) = bind_lanes(address(host), 1, &OPTIONS).unwrap();
            let destination = lanes[0].receive.local_addr().unwrap();
            let source = lanes[0].send.local_addr().unwrap();
            let arena = pattern(400_000);
            // Adjacent parts with a short last datagram; unordered parts that end inside a
            // datagram.
            let short_tail = [(0, 20 * 1_400), (20 * 1_400, 700)];
            let scattered = [(300_000, 333), (200_000, 900), (100_000, 1), (333_333, 1_166)];
            let long = [(0, 130 * 900)];
            let batch = |segment_size, segments, parts| GsoBatch {
                destination,
                ecn: Ecn::NotEct,
                segment_size,
                segments,
                parts,
            };
            let batches = [
                batch(1_400, 21, &short_tail[..]),
                batch(600, 4, &scattered),
                batch(0, 1, &[(7, 1_200)]),
                batch(900, 130, &long),
                batch(33_000, 2, &[(1_000, 66_000)]),
            ];
            let mut expected: Vec<Vec<u8>> = Vec::new();
            for batch in &batches {
                let bytes: Vec<u8> = batch
                    .parts
                    .iter()
                    .flat_map(|&(offset, len)| &arena[offset..offset + len])
                    .copied()
                    .collect();
                let size = if batch.segments == 1 { bytes.len() } else { batch.segment_size };
                expected.extend(bytes.chunks(size).map(<[u8]>::to_vec));
            }

            let mut gso = GsoState::new();
            let outcome = send_all(&lanes[0].send, &arena, &batches, &mut gso, Instant::now());
            assert_eq!(outcome.datagrams as usize, expected.len());
            assert_eq!((outcome.calls, outcome.gso_messages, outcome.fallbacks), (1, 5, 0));
            let (datagrams, received) = receive(&lanes[0].receive, expected.len());
            assert!(received.iter().any(|&segments| segments > 1), "{received:?}");
            assert!(datagrams.iter().all(|(from, _)| *from == source));
            let datagrams: Vec<_> = datagrams.into_iter().map(|(_, bytes)| bytes).collect();
            assert!(datagrams == expected);

            // The same batches without UDP_SEGMENT.
            let mut gso = GsoState::disabled();
            let outcome = send_all(&lanes[0].send, &arena, &batches, &mut gso, Instant::now());
            assert_eq!((outcome.calls, outcome.gso_messages), (3, 0));
            let (datagrams, _) = receive(&lanes[0].receive, expected.len());
            assert!(datagrams.into_iter().map(|(_, bytes)| bytes).eq(expected));
        }
    });
}

#[test]
fn ecn_field_of_batches_and_single_datagrams_arrives() {
    in_namespace(|| {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let (lanes, fallbacks) = bind_lanes(address(host), 1, &OPTIONS).unwrap();
            assert_eq!(fallbacks, []);
            let destination = lanes[0].receive.local_addr().unwrap();
            let fields = [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce];
            let arena: Vec<u8> = fields.iter().flat_map(|&ecn| vec![ecn as u8; 2_500]).collect();
            let parts: Vec<_> = (0..4).map(|i| [(i * 2_500, 2_500)]).collect();
            let batch = |ecn, parts, segments| GsoBatch {
                destination,
                ecn,
                segment_size: 2_500 / segments,
                segments,
                parts,
            };
            let batches: Vec<_> = fields
                .iter()
                .zip(&parts)
                .flat_map(|(&ecn, parts)| [batch(ecn, &parts[..], 5), batch(ecn, &parts[..], 1)])
                .collect();
            for mut gso in [GsoState::new(), GsoState::disabled()] {
                let outcome = send_all(&lanes[0].send, &arena, &batches, &mut gso, Instant::now());
                assert_eq!((outcome.datagrams, outcome.fallbacks), (24, 0));
                let (mut messages, mut seen) = (RecvBatch::new(16), 0);
                while seen < 24 {
                    wait_readable(&lanes[0].receive);
                    for i in 0..messages.recv(lanes[0].receive.as_fd()).unwrap() {
                        let message = messages.message(i);
                        assert!(!message.truncated);
                        for range in message.segments() {
                            let sent = messages.arena()[range.start];
                            assert_eq!(
                                message.ecn as u8, sent,
                                "{host}: the ECN field must be that of the datagram"
                            );
                            seen += 1;
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn ecn_field_is_reported_only_if_enabled() {
    in_namespace(|| {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let options = skein_sys::udp::UdpOptions { ecn: false, ..OPTIONS };
            let (lanes, fallbacks) = bind_lanes(address(host), 1, &options).unwrap();
            let [fallback] = &fallbacks[..] else { panic!("{fallbacks:?}") };
            assert_eq!(fallback.feature, Feature::UdpEcn);
            assert_eq!(fallback.reason, "off in the configuration");
            let destination = lanes[0].receive.local_addr().unwrap();
            let arena = pattern(1_000);
            let parts = [(0, 1_000)];
            let marked = GsoBatch {
                destination,
                ecn: Ecn::Ce,
                segment_size: 1_000,
                segments: 1,
                parts: &parts,
            };
            for expected in [Ecn::NotEct, Ecn::Ce] {
                let (batches, mut gso) = ([marked], GsoState::new());
                send_all(&lanes[0].send, &arena, &batches, &mut gso, Instant::now());
                // The field of queued datagrams is reported as well, because a take-over enables
                // the reports under traffic.
                if expected == Ecn::Ce {
                    report_ecn(lanes[0].receive.as_fd(), destination.is_ipv4(), true).unwrap();
                }
                let mut messages = RecvBatch::new(1);
                wait_readable(&lanes[0].receive);
                assert_eq!(messages.recv(lanes[0].receive.as_fd()).unwrap(), 1);
                assert_eq!(messages.message(0).ecn, expected, "{host}");
            }
        }
    });
}

/// Loopback and veth deliver a UDP_SEGMENT message unsplit, and Linux 6.9 and later send up to 128
/// datagrams in one.
#[test]
fn message_of_128_datagrams_is_received_whole() {
    in_namespace(|| {
        let (lanes, _) = bind_lanes(address("127.0.0.1:0"), 1, &OPTIONS).unwrap();
        let sender = UdpSocket::bind(address("127.0.0.1:0")).unwrap();
        let size: libc::c_int = 500;
        // SAFETY: the option takes an int, which is borrowed for the call.
        let result = unsafe {
            libc::setsockopt(
                sender.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const size).cast(),
                size_of_val(&size) as libc::socklen_t,
            )
        };
        assert_eq!(result, 0);
        let sent = pattern(128 * 500);
        sender.send_to(&sent, lanes[0].receive.local_addr().unwrap()).unwrap();
        let (datagrams, sizes) = receive(&lanes[0].receive, 128);
        assert_eq!(sizes, [128]);
        assert!(datagrams.iter().map(|(_, bytes)| &bytes[..]).eq(sent.chunks(500)));
    });
}

#[test]
fn socket_without_gro_receives_single_datagrams() {
    in_namespace(|| {
        let options = skein_sys::udp::UdpOptions { gro: false, ..OPTIONS };
        let (lanes, _) = bind_lanes(address("127.0.0.1:0"), 1, &options).unwrap();
        let destination = lanes[0].receive.local_addr().unwrap();
        let arena = pattern(30 * 1_000);
        let parts = [(0, arena.len())];
        let batch = GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_000,
            segments: 30,
            parts: &parts,
        };
        send_all(&lanes[0].send, &arena, &[batch], &mut GsoState::new(), Instant::now());
        let (datagrams, sizes) = receive(&lanes[0].receive, 30);
        assert_eq!(sizes, [1; 30]);
        assert!(datagrams.iter().map(|(_, bytes)| &bytes[..]).eq(arena.chunks(1_000)));
    });
}
