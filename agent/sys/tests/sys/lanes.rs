//! Tests of the lanes' sockets: distribution by lane byte, conflicts of ports, buffers.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use skein_sys::fallback::Feature;
use skein_sys::recv::RecvBatch;
use skein_sys::udp::{LaneSockets, UdpError, UdpOptions, bind_lanes, bind_manager};
use socket2::{Domain, Socket, Type};

use crate::{OPTIONS, address, eventually, in_namespace, wait_readable};

fn bind(address: SocketAddr, lanes: usize) -> (Vec<LaneSockets>, SocketAddr) {
    let (sockets, fallbacks) = bind_lanes(address, lanes, &OPTIONS).unwrap();
    assert_eq!(fallbacks, []);
    let bound = sockets[0].receive.local_addr().unwrap();
    (sockets, bound)
}

#[test]
fn lane_byte_selects_the_receive_socket() {
    in_namespace(|| {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let (lanes, port) = bind(address(host), 3);
            let mut messages = RecvBatch::new(4);
            for value in (0..=10u8).chain([0x3f, 0xff]) {
                // Each datagram has another source port, so that the kernel's hash differs.
                let sender = UdpSocket::bind(address(host)).unwrap();
                sender.send_to(&[4, 0, value, 0], port).unwrap();
                let expected = usize::from(value) % lanes.len();
                wait_readable(&lanes[expected].receive);
                assert_eq!(messages.recv(lanes[expected].receive.as_fd()).unwrap(), 1);
                let message = messages.message(0);
                assert_eq!(messages.arena()[message.range], [4, 0, value, 0]);
                assert_eq!(message.source, sender.local_addr().unwrap());
            }
            // Datagrams without a lane byte go to the first socket.
            for short in [&[4, 0][..], &[]] {
                lanes[1].send.send_to(short, port).unwrap();
                wait_readable(&lanes[0].receive);
                assert_eq!(messages.recv(lanes[0].receive.as_fd()).unwrap(), 1);
                let message = messages.message(0);
                assert_eq!(message.range.len(), short.len());
                assert_eq!(message.segments().count(), usize::from(!short.is_empty()));
            }
            for lane in &lanes {
                let error = messages.recv(lane.receive.as_fd()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
            }
        }
    });
}

#[test]
fn port_in_use_is_an_error_that_names_the_port() {
    in_namespace(|| {
        let (lanes, port) = bind(address("127.0.0.1:0"), 2);
        let wildcard = SocketAddr::new([0, 0, 0, 0].into(), port.port());
        for (taken, count) in [(port, 1), (port, 2), (wildcard, 1), (wildcard, 2)] {
            let error = bind_lanes(taken, count, &OPTIONS).unwrap_err();
            assert!(matches!(error, UdpError::AddrInUse { address } if address == taken));
            assert!(error.to_string().contains(&port.port().to_string()), "{error}");
        }
        drop(lanes);

        // A socket of another program conflicts, even with SO_REUSEPORT.
        let sharing = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        sharing.set_reuse_port(true).unwrap();
        // A child process of another test has a copy of the socket between fork and exec.
        eventually("the release of the port", || sharing.bind(&port.into()).ok());
        let error = bind_lanes(port, 2, &OPTIONS).unwrap_err();
        assert!(matches!(error, UdpError::AddrInUse { .. }), "{error}");
        drop(sharing);

        eventually("the release of the port", || bind_lanes(port, 2, &OPTIONS).ok());
    });
}

#[test]
fn both_address_families_bind_the_same_port() {
    in_namespace(|| {
        let (_v4, port) = bind(address("0.0.0.0:0"), 2);
        bind(SocketAddr::new("::".parse().unwrap(), port.port()), 2);
    });
}

#[test]
fn address_of_another_host_is_an_error_that_names_it() {
    in_namespace(|| {
        let error = bind_lanes(address("192.0.2.77:51900"), 2, &OPTIONS).unwrap_err();
        assert!(matches!(error, UdpError::AddrNotAvailable { .. }));
        assert!(error.to_string().contains("192.0.2.77"), "{error}");
        let error = bind_manager(address("192.0.2.77:51900"), &OPTIONS).unwrap_err();
        assert!(matches!(error, UdpError::AddrNotAvailable { .. }));
    });
}

#[test]
fn send_sockets_have_own_ports_and_receive_nothing() {
    in_namespace(|| {
        let (lanes, port) = bind(address("127.0.0.1:0"), 2);
        let manager = bind_manager(port, &OPTIONS).unwrap();
        let mut ports = vec![port.port(), manager.local_addr().unwrap().port()];
        for lane in &lanes {
            let own = lane.send.local_addr().unwrap();
            ports.push(own.port());
            manager.send_to(b"unexpected", own).unwrap();
            lane.send.set_nonblocking(true).unwrap();
            let error = lane.send.recv_from(&mut [0; 100]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        }
        ports.sort();
        ports.dedup();
        assert_eq!(ports.len(), 4);
    });
}

#[test]
fn receive_buffer_overflow_is_counted() {
    in_namespace(|| {
        let options = UdpOptions { receive_buffer: 64 << 10, ..OPTIONS };
        let (lanes, _) = bind_lanes(address("127.0.0.1:0"), 1, &options).unwrap();
        let port = lanes[0].receive.local_addr().unwrap();
        for _ in 0..1_000 {
            lanes[0].send.send_to(&[0; 1_400], port).unwrap();
        }
        let mut messages = RecvBatch::new(16);
        let mut received = 0;
        while let Ok(count) = messages.recv(lanes[0].receive.as_fd()) {
            received += count;
        }
        assert!((1..1_000).contains(&received));
        assert_eq!(messages.overflow(), 0, "a failed call must report 0");
        lanes[0].send.send_to(&[0; 1_400], port).unwrap();
        eventually("a datagram", || messages.recv(lanes[0].receive.as_fd()).ok());
        assert_eq!(messages.overflow() as usize, 1_000 - received);
    });
}

#[test]
fn disabled_gro_and_small_buffers_are_fallbacks() {
    in_namespace(|| {
        let options = UdpOptions { gro: false, ..OPTIONS };
        let (lanes, fallbacks) = bind_lanes(address("127.0.0.1:0"), 2, &options).unwrap();
        assert!(lanes.iter().all(|lane| !lane.gro));
        let [fallback] = &fallbacks[..] else { panic!("{fallbacks:?}") };
        assert_eq!(fallback.feature, Feature::UdpGro);
        assert_eq!(fallback.reason, "off in the configuration");

        // Without CAP_NET_ADMIN, the limits of the sysctls apply.
        let all = rustix::thread::capabilities(None).unwrap();
        let mut fewer = all;
        fewer.effective -= rustix::thread::CapabilitySet::NET_ADMIN;
        rustix::thread::set_capabilities(None, fewer).unwrap();
        let options = UdpOptions { receive_buffer: 1 << 30, send_buffer: 1 << 30, ..OPTIONS };
        let (_, fallbacks) = bind_lanes(address("127.0.0.1:0"), 2, &options).unwrap();
        rustix::thread::set_capabilities(None, all).unwrap();
        let features: Vec<_> = fallbacks.iter().map(|fallback| fallback.feature).collect();
        assert_eq!(features, [Feature::ReceiveBuffer, Feature::SendBuffer]);
        assert!(fallbacks[0].reason.contains("net.core.rmem_max"), "{}", fallbacks[0].reason);
    });
}
