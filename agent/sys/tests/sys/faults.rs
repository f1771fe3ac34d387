//! Tests of the sender with errors of the kernel.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use skein_core::drop::{DropCounts, DropReason};
use skein_core::wire::ecn::Ecn;
use skein_sys::poll::Poller;
use skein_sys::send::{GsoBatch, GsoState, SendRequest, Sender, TooLong};
use skein_sys::tun::{TunOffload, create_persistent, open_queues};
use skein_sys::udp::{LaneSockets, LongestPayload, UdpOptions, bind_lanes, longest_payload};
use socket2::{Domain, Protocol, Socket, Type};

use crate::segments::{all, pattern, receive, send_all};
use crate::{OPTIONS, address, in_namespace, ip, run};

fn lane(host: &str) -> LaneSockets {
    let (mut lanes, _) = bind_lanes(address(host), 1, &OPTIONS).unwrap();
    lanes.remove(0)
}

fn port(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().unwrap()
}

/// The kernel refuses UDP_SEGMENT for UDP-Lite as for IPsec (`udp_send_skb`: `is_udplite ||
/// dst_xfrm(dst)` returns EIO), and accepts single datagrams. The test uses a UDP-Lite socket for
/// the failing destination, because not every kernel supports IPsec.
#[test]
fn eio_pauses_gso_for_one_destination_without_loss() {
    const IPPROTO_UDPLITE: i32 = 136;
    in_namespace(|| {
        let (near, far) = (lane("127.0.0.1:0"), lane("127.0.0.1:0"));
        let udp_lite = |host: &str| {
            let protocol = Some(Protocol::from(IPPROTO_UDPLITE));
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, protocol).expect("UDP-Lite");
            socket.bind(&address(host).into()).unwrap();
            UdpSocket::from(socket)
        };
        let broken = udp_lite("127.0.0.1:0");
        // The receiver has the same port number for UDP and UDP-Lite.
        let far_lite = udp_lite(&port(&far.receive).to_string());
        let arena = pattern(40 * 1_000);
        let parts = [(0, arena.len())];
        let batch = |destination| GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_000,
            segments: 40,
            parts: &parts,
        };
        let to_far = [batch(port(&far.receive))];
        let to_near = [batch(port(&near.receive))];
        let arrived = |socket: &UdpSocket| {
            let (datagrams, sizes) = receive(socket, 40);
            assert!(datagrams.iter().map(|(_, bytes)| &bytes[..]).eq(arena.chunks(1_000)));
            sizes
        };

        let (mut gso, start) = (GsoState::new(), Instant::now());
        let outcome = send_all(&broken, &arena, &to_far, &mut gso, start);
        assert_eq!((outcome.datagrams, outcome.fallbacks, outcome.gso_messages), (40, 1, 0));
        arrived(&far_lite);
        let off: Vec<_> = gso.off(start).collect();
        assert_eq!(off.len(), 1);
        assert_eq!((off[0].destination, off[0].errno), (port(&far.receive), libc::EIO));

        // Other destinations keep UDP_SEGMENT. This destination does not use it during the pause.
        let outcome = send_all(&near.send, &arena, &to_near, &mut gso, start);
        assert_eq!((outcome.fallbacks, outcome.gso_messages), (0, 1));
        arrived(&near.receive);
        let soon = start + Duration::from_millis(4_900);
        let outcome = send_all(&broken, &arena, &to_far, &mut gso, soon);
        assert_eq!((outcome.datagrams, outcome.fallbacks), (40, 0));
        arrived(&far_lite);

        // The next attempt fails and doubles the pause.
        let later = start + Duration::from_secs(5);
        let outcome = send_all(&broken, &arena, &to_far, &mut gso, later);
        assert_eq!((outcome.datagrams, outcome.fallbacks), (40, 1));
        arrived(&far_lite);
        assert!(!gso.allowed(port(&far.receive), later + Duration::from_millis(9_900)));

        // The route works again after the second pause.
        let repaired = later + Duration::from_secs(10);
        let outcome = send_all(&far.send, &arena, &to_far, &mut gso, repaired);
        assert_eq!((outcome.fallbacks, outcome.gso_messages), (0, 1));
        assert!(arrived(&far.receive).iter().any(|&segments| segments > 1));
        assert_eq!(gso.off(repaired).count(), 0);
    });
}

#[test]
fn too_long_datagrams_are_dropped_and_others_are_sent() {
    in_namespace(|| {
        create_persistent("narrow0").unwrap();
        let _queues = open_queues("narrow0", 1, TunOffload::ALL).unwrap();
        ip("address add 10.1.0.1/24 dev narrow0");
        ip("link set narrow0 mtu 1300 up");
        let (lane, far) = (lane("0.0.0.0:0"), lane("127.0.0.1:0"));
        let (narrow, good) = (address("10.1.0.2:51900"), port(&far.receive));
        let arena = pattern(10 * 1_400);
        let parts = [(0, arena.len())];
        let batch = |destination, segment_size: usize| {
            let segments = arena.len().div_ceil(segment_size);
            GsoBatch { destination, ecn: Ecn::NotEct, segment_size, segments, parts: &parts }
        };
        let batches =
            [batch(good, 1_400), batch(narrow, 1_400), batch(narrow, 1_000), batch(good, 700)];
        let mut gso = GsoState::new();
        let mut sender = Sender::new();
        for _ in 0..5 {
            let mut drops = DropCounts::default();
            let socket = lane.send.as_fd();
            let outcome =
                sender.send(socket, &all(&arena, &batches), &mut gso, &mut drops, Instant::now());
            assert_eq!(drops.get(DropReason::SendTooBig), 10);
            let too_long = TooLong { destination: narrow, len: 1_400 };
            assert_eq!(outcome.too_long, Some(too_long));
            assert_eq!((outcome.dropped, outcome.datagrams), (10, 10 + 14 + 20));
            assert_eq!((outcome.fallbacks, outcome.gso_messages), (1, 3));
            assert_eq!(sender.segments_per_message(), [10, 14, 20]);
            receive(&far.receive, 30);
            assert!(gso.allowed(narrow, Instant::now()));
        }
    });
}

#[test]
fn route_reports_the_longest_payload_that_it_carries() {
    in_namespace(|| {
        create_persistent("narrow1").unwrap();
        let _queues = open_queues("narrow1", 1, TunOffload::ALL).unwrap();
        ip("address add 10.6.0.1/24 dev narrow1");
        ip("address add fd00:6::1/64 dev narrow1 nodad");
        ip("link set narrow1 mtu 1300 up");
        for (from, to, headers) in [("0.0.0.0", "10.6.0.2:9", 28), ("::", "[fd00:6::2]:9", 48)] {
            let (from, to) = (from.parse().unwrap(), address(to));
            let found = longest_payload(from, to, 1_400).unwrap();
            assert_eq!(found, LongestPayload::Limit(1_300 - headers), "{to}");
            let found = longest_payload(from, to, 1_000).unwrap();
            assert_eq!(found, LongestPayload::Carries, "{to} carries it");
        }
        let nowhere = longest_payload("0.0.0.0".parse().unwrap(), address("198.51.100.1:9"), 1_400);
        assert!(nowhere.is_err(), "a destination without a route is an error");
    });
}

#[test]
fn errors_of_one_destination_do_not_affect_others() {
    in_namespace(|| {
        ip("route add unreachable 10.2.0.0/24");
        ip("route add prohibit 10.3.0.0/24");
        ip("route add blackhole 10.4.0.0/24");
        let (lane, far) = (lane("0.0.0.0:0"), lane("127.0.0.1:0"));
        let good = port(&far.receive);
        let arena = pattern(5_000);
        let parts = [(0, arena.len())];
        let batch = |destination| GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_000,
            segments: 5,
            parts: &parts,
        };
        let one = |destination| GsoBatch { segments: 1, ..batch(destination) };
        let bad = [
            (address("10.2.0.1:1"), DropReason::SendUnreachable),
            (address("198.51.100.1:1"), DropReason::SendUnreachable),
            (address("10.3.0.1:1"), DropReason::SendDenied),
            (address("10.4.0.1:1"), DropReason::SendError),
            (address("255.255.255.255:1"), DropReason::SendUnreachable),
            (address("[2001:db8::1]:1"), DropReason::SendError),
        ];
        let mut sender = Sender::new();
        for (destination, reason) in bad {
            let batches =
                [batch(good), batch(destination), batch(good), one(destination), batch(good)];
            let mut drops = DropCounts::default();
            let (mut gso, now) = (GsoState::new(), Instant::now());
            let request = all(&arena, &batches);
            let outcome = sender.send(lane.send.as_fd(), &request, &mut gso, &mut drops, now);
            assert_eq!(outcome.datagrams, 15, "{destination}");
            let dropped: Vec<_> = drops.drain().collect();
            assert_eq!(dropped, [(reason, 6)], "{destination}");
            let (datagrams, _) = receive(&far.receive, 15);
            let mut bytes = datagrams.iter().map(|(_, bytes)| &bytes[..]);
            assert!((0..3).all(|_| bytes.by_ref().take(5).eq(arena.chunks(1_000))));
        }
    });
}

#[test]
fn drop_by_the_firewall_has_its_own_reason() {
    in_namespace(|| {
        run("nft", "add table inet test");
        run("nft", "add chain inet test out { type filter hook output priority 0 ; }");
        run("nft", "add rule inet test out ip daddr 127.0.0.9 drop");
        let (lane, far) = (lane("0.0.0.0:0"), lane("127.0.0.1:0"));
        let arena = pattern(3_000);
        let parts = [(0, arena.len())];
        let batch = |destination| GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_000,
            segments: 3,
            parts: &parts,
        };
        let batches = [batch(address("127.0.0.9:9")), batch(port(&far.receive))];
        let mut drops = DropCounts::default();
        let (mut gso, now) = (GsoState::new(), Instant::now());
        let request = all(&arena, &batches);
        let outcome = Sender::new().send(lane.send.as_fd(), &request, &mut gso, &mut drops, now);
        assert_eq!(drops.drain().collect::<Vec<_>>(), [(DropReason::SendDenied, 3)]);
        assert_eq!((outcome.datagrams, outcome.fallbacks), (3, 0));
    });
}

#[test]
fn full_send_buffer_stops_the_sender_without_loss() {
    in_namespace(|| {
        create_persistent("slow0").unwrap();
        let _queues = open_queues("slow0", 1, TunOffload::ALL).unwrap();
        ip("address add 10.5.0.1/24 dev slow0");
        ip("link set slow0 up");
        run("tc", "qdisc replace dev slow0 root tbf rate 2mbit burst 3000 limit 10000000");
        let options = UdpOptions { send_buffer: 64 << 10, ..OPTIONS };
        let (lanes, _) = bind_lanes(address("0.0.0.0:0"), 1, &options).unwrap();
        let arena = pattern(1_400);
        let parts = [(0, arena.len())];
        let destination = address("10.5.0.2:9");
        let batches = [GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_400,
            segments: 1,
            parts: &parts,
        }; 300];
        let socket = lanes[0].send.as_fd();
        let mut poller = Poller::new().unwrap();
        poller.add_writable(socket, 7).unwrap();
        let (mut sender, mut gso, mut drops) =
            (Sender::new(), GsoState::new(), DropCounts::default());
        let (mut request, mut sent, mut waits) = (all(&arena, &batches), 0, 0);
        loop {
            // A send that blocks would send all datagrams, and would never report `blocked`.
            let outcome = sender.send(socket, &request, &mut gso, &mut drops, Instant::now());
            assert_eq!(outcome.dropped, 0);
            sent += outcome.datagrams;
            let Some(from) = outcome.blocked else { break };
            assert_eq!(from.batch as u64, sent);
            request = SendRequest { from, ..request };
            waits += 1;
            let ready = poller.wait(Some(Duration::from_secs(30))).unwrap();
            assert_eq!(ready, [7], "the socket must become writable");
        }
        assert_eq!(sent, 300);
        assert!(waits > 2, "{waits}");
    });
}
