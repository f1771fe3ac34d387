//! Tests of the TUN device: creation, ownership, queues, offloads.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use skein_core::wire::ecn::Ecn;
use skein_sys::fallback::Feature;
use skein_sys::link;
use skein_sys::poll::{Poller, Waker};
use skein_sys::recv::RecvBatch;
use skein_sys::send::{GsoBatch, GsoState};
use skein_sys::tun::{
    OpenQueues, TunError, TunOffload, TunQueue, VNET_HEADER_LEN, create_persistent, open_queues,
};
use skein_sys::udp::bind_lanes;

use crate::segments::{pattern, send_all};
use crate::{OPTIONS, address, eventually, in_namespace, ip, wait_readable};

const NAME: &str = "skeintest0";
// linux/virtio_net.h
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;

/// Creates the device with the address 10.9.0.1/24 and returns its queues.
fn device(queues: usize, allowed: TunOffload) -> Vec<TunQueue> {
    create_persistent(NAME).unwrap();
    let open = open_queues(NAME, queues, allowed).unwrap();
    assert_eq!(open.offload, allowed, "{:?}", open.fallbacks);
    ip(&format!("address add 10.9.0.1/24 dev {NAME}"));
    // IPv6 neighbour discovery would send packets that the tests do not expect.
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6"), "1").unwrap();
    ip(&format!("link set {NAME} mtu 1440 up"));
    open.queues
}

/// Returns the number of attached queues.
fn attached() -> u32 {
    link::find(NAME).unwrap().unwrap().tun.unwrap().queues
}

/// Swaps the IPv4 addresses of a packet with a vnet header, so that a written packet returns to its
/// sender. The checksums do not change.
fn swap_addresses(packet: &mut [u8]) {
    let (source, destination) = packet[VNET_HEADER_LEN + 12..][..8].split_at_mut(4);
    source.swap_with_slice(destination);
}

#[test]
fn udp_superpacket_passes_the_device_in_both_directions() {
    in_namespace(|| {
        let queues = device(1, TunOffload::ALL);
        let (lanes, _) = bind_lanes(address("10.9.0.1:0"), 1, &OPTIONS).unwrap();
        // The receive socket sends the batch, so that the reflected superpacket returns to it.
        let socket = &lanes[0].receive;
        let port = socket.local_addr().unwrap().port();
        let destination = std::net::SocketAddr::from(([10, 9, 0, 2], port));
        let sent = pattern(20 * 1_300);
        let parts = [(0, sent.len())];
        let batch = GsoBatch {
            destination,
            ecn: Ecn::NotEct,
            segment_size: 1_300,
            segments: 20,
            parts: &parts,
        };
        let outcome = send_all(socket, &sent, &[batch], &mut GsoState::new(), Instant::now());
        assert_eq!(outcome.gso_messages, 1);

        let mut packet = vec![0; 70_000];
        wait_readable(&queues[0]);
        let len = queues[0].read(&mut packet).unwrap();
        let packet = &mut packet[..len];
        assert_eq!(len, VNET_HEADER_LEN + 20 + 8 + sent.len());
        assert_eq!(packet[..2], [NEEDS_CSUM, GSO_UDP_L4]);
        let field = |at: usize| u16::from_ne_bytes([packet[at], packet[at + 1]]);
        assert_eq!((field(4), field(6), field(8)), (1_300, 20, 6));
        assert_eq!(queues[0].read(&mut [0; 100]).unwrap_err().kind(), ErrorKind::WouldBlock);

        swap_addresses(packet);
        let parts: Vec<_> = packet.chunks(1_000).map(IoSlice::new).collect();
        assert_eq!(queues[0].writev(&parts).unwrap(), len);
        wait_readable(socket);
        let mut messages = RecvBatch::new(16);
        assert_eq!(messages.recv(socket.as_fd()).unwrap(), 1);
        let message = messages.message(0);
        assert_eq!(message.segment_size, 1_300);
        assert_eq!(message.source, destination);
        assert!(messages.arena()[message.range] == sent);
    });
}

/// Packets of a TCP transfer that the reflector has processed.
#[derive(Debug, Default)]
struct Reflected {
    /// Length of the longest packet in bytes, without vnet header.
    longest: usize,
    /// Number of TCP superpackets.
    segmented: usize,
    /// Number of packets with a partial checksum.
    partial: usize,
}

/// Sends 4 MiB over TCP to 10.9.0.2. A thread returns every packet of the device with swapped
/// addresses, so that the stream arrives at a listener of this test.
fn reflect_tcp(queue: &TunQueue) -> Reflected {
    let done = Waker::new().unwrap();
    let sent = pattern(4 << 20);
    thread::scope(|scope| {
        let reflector = scope.spawn(|| {
            let mut poller = Poller::new().unwrap();
            poller.add(queue.as_fd(), 0).unwrap();
            poller.add(done.as_fd(), 1).unwrap();
            let mut reflected = Reflected::default();
            let mut packet = vec![0; 70_000];
            loop {
                if poller.wait(None).unwrap().contains(&1) {
                    return reflected;
                }
                while let Ok(len) = queue.read(&mut packet) {
                    let packet = &mut packet[..len];
                    reflected.longest = reflected.longest.max(len - VNET_HEADER_LEN);
                    reflected.partial += usize::from(packet[0] & NEEDS_CSUM != 0);
                    reflected.segmented += usize::from(packet[1] == GSO_TCPV4);
                    swap_addresses(packet);
                    queue.writev(&[IoSlice::new(packet)]).unwrap();
                }
            }
        });
        let listener = TcpListener::bind(address("10.9.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        // New threads inherit the network namespace of this thread.
        let mut client = TcpStream::connect(("10.9.0.2", port)).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_string(), "10.9.0.2");
        let bytes = &sent;
        let writer = scope.spawn(move || client.write_all(bytes).unwrap());
        let mut received = vec![0; sent.len()];
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        server.read_exact(&mut received).unwrap();
        assert!(received == sent);
        writer.join().unwrap();
        done.wake();
        reflector.join().unwrap()
    })
}

#[test]
fn each_offload_changes_the_packets_of_tcp() {
    let offloads = [
        (TunOffload::ALL, true, true),
        (TunOffload { uso: false, ..TunOffload::ALL }, true, true),
        (TunOffload { tso: false, uso: false, ..TunOffload::ALL }, false, true),
        (TunOffload::NONE, false, false),
    ];
    for (allowed, superpackets, partial) in offloads {
        in_namespace(move || {
            let queues = device(1, allowed);
            let reflected = reflect_tcp(&queues[0]);
            assert_eq!(reflected.segmented > 0, superpackets, "{allowed:?}: {reflected:?}");
            assert_eq!(reflected.longest > 1_440, superpackets, "{allowed:?}: {reflected:?}");
            assert_eq!(reflected.partial > 0, partial, "{allowed:?}: {reflected:?}");
        });
    }
}

#[test]
fn offloads_can_be_changed_on_an_open_device() {
    in_namespace(|| {
        let queues = device(1, TunOffload::ALL);
        queues[0].set_offload(TunOffload::NONE).unwrap();
        assert_eq!(reflect_tcp(&queues[0]).partial, 0);
        queues[0].set_offload(TunOffload::ALL).unwrap();
        assert!(reflect_tcp(&queues[0]).segmented > 0);
    });
}

#[test]
fn disabled_offloads_are_fallbacks() {
    in_namespace(|| {
        create_persistent(NAME).unwrap();
        for (allowed, effective, expected) in [
            (TunOffload::ALL, TunOffload::ALL, &[][..]),
            (
                TunOffload { tso: false, ..TunOffload::ALL },
                TunOffload { tso: false, ..TunOffload::ALL },
                &[Feature::TunTso],
            ),
            (
                TunOffload { checksum: false, ..TunOffload::ALL },
                TunOffload::NONE,
                &[Feature::TunChecksum, Feature::TunTso, Feature::TunUso],
            ),
        ] {
            let open = open_queues(NAME, 1, allowed).unwrap();
            assert_eq!(open.offload, effective);
            let features: Vec<_> = open.fallbacks.iter().map(|fallback| fallback.feature).collect();
            assert_eq!(features, expected);
        }
    });
}

#[test]
fn reply_arrives_at_the_queue_that_wrote_the_flow() {
    in_namespace(|| {
        let queues = device(4, TunOffload::ALL);
        assert_eq!(attached(), 4);
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let port = socket.local_addr().unwrap().port();
        for round in 0..3u16 {
            for (i, queue) in queues.iter().enumerate() {
                // The reply to a datagram from 10.9.0.2 must arrive at the queue that wrote it.
                let source = 20_000 + round * 100 + i as u16;
                let mut packet = vec![0; VNET_HEADER_LEN];
                packet.extend([0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0]);
                packet.extend([10, 9, 0, 2, 10, 9, 0, 1]);
                let sum = ipv4_checksum(&packet[VNET_HEADER_LEN..]);
                packet[VNET_HEADER_LEN + 10..][..2].copy_from_slice(&sum.to_be_bytes());
                packet.extend(source.to_be_bytes());
                packet.extend(port.to_be_bytes());
                packet.extend([0, 12, 0, 0]);
                packet.extend(b"ping");
                queue.writev(&[IoSlice::new(&packet)]).unwrap();
                let mut buffer = [0; 100];
                let (len, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..len], b"ping");
                socket.send_to(b"pong", from).unwrap();
                wait_readable(queue);
                let len = queue.read(&mut buffer).unwrap();
                assert_eq!(&buffer[len - 4..len], b"pong");
            }
        }
    });
}

fn ipv4_checksum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[test]
fn device_outlives_its_queues_and_refuses_a_second_process() {
    in_namespace(|| {
        create_persistent(NAME).unwrap();
        let index = link::find(NAME).unwrap().unwrap().index;
        // A child process of another test has a copy of the descriptor between fork and exec.
        eventually("the release of the device", || (attached() == 0).then_some(()));
        let OpenQueues { queues, .. } = open_queues(NAME, 2, TunOffload::ALL).unwrap();
        let error = open_queues(NAME, 2, TunOffload::ALL).unwrap_err();
        assert!(matches!(error, TunError::Busy { queues: 2, .. }), "{error}");
        assert_eq!(attached(), 2);
        drop(queues);
        eventually("the release of the queues", || (attached() == 0).then_some(()));
        assert_eq!(link::find(NAME).unwrap().unwrap().index, index);
        open_queues(NAME, 3, TunOffload::ALL).unwrap();
        let error = create_persistent(NAME).unwrap_err();
        assert!(matches!(error, TunError::Exists { .. }), "{error}");
    });
}

#[test]
fn opening_a_missing_device_does_not_create_it() {
    in_namespace(|| {
        let error = open_queues(NAME, 1, TunOffload::ALL).unwrap_err();
        assert!(matches!(error, TunError::NoDevice { .. }), "{error}");
        assert_eq!(link::find(NAME).unwrap(), None);
    });
}

#[test]
fn interfaces_of_other_programs_are_refused_unchanged() {
    in_namespace(|| {
        ip("link add veth0 type veth peer name veth1");
        for name in ["veth0", "lo"] {
            let error = create_persistent(name).unwrap_err();
            assert!(matches!(error, TunError::NotATun { .. }), "{error}");
            let error = open_queues(name, 1, TunOffload::ALL).unwrap_err();
            assert!(matches!(error, TunError::NotATun { .. }), "{error}");
        }
        for (name, flags, difference) in [
            ("tun0", "mode tun", "vnet header"),
            ("tun1", "mode tun multi_queue", "vnet header"),
            ("tun2", "mode tun vnet_hdr", "single queue"),
            ("tun3", "mode tun multi_queue vnet_hdr pi", "packet information"),
            ("tap0", "mode tap multi_queue vnet_hdr", "TAP"),
        ] {
            ip(&format!("tuntap add name {name} {flags}"));
            let before = link::find(name).unwrap();
            let error = open_queues(name, 1, TunOffload::ALL).unwrap_err();
            assert!(matches!(error, TunError::Flags { .. }), "{error}");
            assert!(error.to_string().contains(difference), "{error}");
            assert_eq!(link::find(name).unwrap(), before);
            let error = create_persistent(name).unwrap_err();
            assert!(matches!(error, TunError::Exists { .. }), "{error}");
        }
    });
}

#[test]
fn invalid_names_and_numbers_of_queues_are_refused() {
    in_namespace(|| {
        for name in ["", "sixteen-letters-", "a/b", "tun%d", "a b", "..", "ü", "a:1"] {
            let error = create_persistent(name).unwrap_err();
            assert!(matches!(error, TunError::Name { .. }), "{error}");
            let error = open_queues(name, 1, TunOffload::ALL).unwrap_err();
            assert!(matches!(error, TunError::Name { .. }), "{error}");
        }
        create_persistent("fifteen-letters").unwrap();
        for queues in [0, 257] {
            let error = open_queues("fifteen-letters", queues, TunOffload::ALL).unwrap_err();
            assert!(matches!(error, TunError::Io { .. }), "{error}");
        }
    });
}

#[test]
fn error_names_the_missing_capability() {
    in_namespace(|| {
        create_persistent(NAME).unwrap();
        let mut fewer = rustix::thread::capabilities(None).unwrap();
        fewer.effective -= rustix::thread::CapabilitySet::NET_ADMIN;
        rustix::thread::set_capabilities(None, fewer).unwrap();
        let error = create_persistent("other0").unwrap_err();
        assert!(matches!(error, TunError::Permission { .. }), "{error}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    });
}

#[test]
fn another_user_cannot_attach_to_the_device() {
    in_namespace(|| {
        create_persistent(NAME).unwrap();
        // The change affects this thread only, which ends with the test. It also drops the
        // capabilities of the thread.
        let nobody = rustix::process::Uid::from_raw(65_534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let error = open_queues(NAME, 1, TunOffload::ALL).unwrap_err();
        assert!(matches!(error, TunError::Permission { .. }), "{error}");
        assert_eq!(attached(), 0);
    });
}

#[test]
fn probes_succeed_and_leave_no_interface() {
    let before = std::fs::read_to_string("/proc/net/dev").unwrap();
    let probes = skein_sys::probe::probe_all();
    for probe in &probes {
        // The processor of a test machine may lack AES instructions.
        assert!(probe.ok || probe.name == "aes_hardware", "{probe:?}");
    }
    let names: Vec<_> = probes.iter().map(|probe| probe.name).collect();
    for name in ["kernel", "udp_segment", "seccomp", "landlock", "tun", "tun_uso", "udp"] {
        assert!(names.contains(&name), "{name}");
    }
    let interfaces = |text: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.into()).collect()
    };
    let after = std::fs::read_to_string("/proc/net/dev").unwrap();
    assert_eq!(interfaces(&after), interfaces(&before));
}
