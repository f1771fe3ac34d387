//! Real packets between pods of one node, compared with the oracle. A scratch network namespace
//! routes between the namespaces of the pods and of a host outside of the cluster. SCTP packets are
//! sent and received by raw sockets, because the kernel may have no SCTP.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::enforcement::{open, run};
use super::generate::{Cluster, OUTSIDE, SMALL, address, cluster, interface};
use super::hosts::{Host, forward};
use super::kernel::samples;
use crate::api::{Pod, PodIp, Protocol};
use crate::compile::{Families, compile};
use crate::enforce::Enforcer;
use crate::oracle::Connection;

/// Ports of probes.
const PORTS: [u16; 2] = [80, 81];
/// IP protocol number of SCTP.
const SCTP: i32 = 132;
/// Interface of the router to the host outside of the cluster.
const OUTSIDE_INTERFACE: &str = "outside";
/// Bound of the wait for packets, far above the time that they need.
const PACKET_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between looks at the sockets.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A pod, or the host outside of the cluster, with sockets that receive probes.
struct Peer<'a> {
    pod: Option<&'a Pod>,
    host: Host,
    /// The kernel accepts connections to these sockets.
    _tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
    sctp: Vec<Socket>,
}

/// A connection to try.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Probe {
    from: usize,
    to: usize,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    port: u16,
}

/// Gives each pod of the pod network addresses of its own, in the families that it has.
fn separate(cluster: &mut Cluster) {
    for (index, pod) in cluster.pods.iter_mut().enumerate() {
        if pod.is_on_pod_network() {
            let host = index * 2 + 1;
            let separate = |old: IpAddr| match old {
                IpAddr::V4(_) => PodIp { ip: format!("10.1.0.{host}") },
                IpAddr::V6(_) => PodIp { ip: format!("fd00:1::{host}") },
            };
            pod.status.pod_ips = pod.addresses().map(separate).collect();
        }
    }
}

/// Creates a host for each pod of the pod network, and one outside of the cluster.
fn peers(cluster: &Cluster) -> Vec<Peer<'_>> {
    forward();
    let pods = cluster.pods.iter().enumerate().filter(|(_, pod)| pod.is_on_pod_network());
    let pods = pods
        .map(|(index, pod)| (Some(pod), Host::new(interface(index), pod.addresses().collect())));
    let outside = Host::new(OUTSIDE_INTERFACE.to_owned(), OUTSIDE.map(address).to_vec());
    pods.chain([(None, outside)]).map(|(pod, host)| peer(pod, host)).collect()
}

/// Opens the sockets of a host.
fn peer(pod: Option<&Pod>, host: Host) -> Peer<'_> {
    let (tcp, udp, sctp) = host.within(|| {
        let tcp = PORTS.map(|port| TcpListener::bind(("::", port)).unwrap());
        let udp = PORTS.map(|port| UdpSocket::bind(("::", port)).unwrap());
        let raw = |domain| Socket::new(domain, Type::RAW, Some(SCTP.into())).unwrap();
        (Vec::from(tcp), Vec::from(udp), vec![raw(Domain::IPV4), raw(Domain::IPV6)])
    });
    udp.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
    sctp.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
    Peer { pod, host, _tcp: tcp, udp, sctp }
}

/// Returns the probes between all pairs of hosts, except between a host and itself.
fn probes(peers: &[Peer<'_>]) -> Vec<Probe> {
    let mut probes = Vec::new();
    for (from, sender) in peers.iter().enumerate() {
        for (to, receiver) in peers.iter().enumerate().filter(|(to, _)| *to != from) {
            for source in &sender.host.addresses {
                let of_family = |one: &&IpAddr| one.is_ipv4() == source.is_ipv4();
                for destination in receiver.host.addresses.iter().filter(of_family) {
                    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                        probes.extend(PORTS.map(|port| Probe {
                            from,
                            to,
                            source: *source,
                            destination: *destination,
                            protocol,
                            port,
                        }));
                    }
                }
            }
        }
    }
    probes
}

fn is_allowed(cluster: &Cluster, peers: &[Peer<'_>], probe: &Probe) -> bool {
    let connection = Connection {
        from: peers[probe.from].pod,
        to: peers[probe.to].pod,
        source: probe.source,
        destination: probe.destination,
        transport: Some((probe.protocol, probe.port)),
        to_own_node: false,
    };
    let world = cluster.world();
    world.egress(&connection).allowed && world.ingress(&connection).allowed
}

/// Sends the packet of a probe; the payload is the number of the probe. Returns the socket of a TCP
/// connection, which must stay open.
fn send(number: usize, probe: &Probe) -> Option<Socket> {
    let (source, port) = (probe.source, probe.port);
    let destination = SocketAddr::from((probe.destination, port));
    let payload = u32::try_from(number).unwrap().to_be_bytes();
    match probe.protocol {
        Protocol::Tcp => {
            let domain = Domain::for_address(destination);
            let socket = Socket::new(domain, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
            // The connection is in progress.
            let _ = socket.connect(&destination.into());
            return Some(socket);
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind((source, 0)).unwrap();
            socket.send_to(&payload, destination).unwrap();
        }
        Protocol::Sctp => {
            let domain = Domain::for_address(destination);
            let socket = Socket::new(domain, Type::RAW, Some(SCTP.into())).unwrap();
            socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
            // Common header of SCTP (RFC 9260, section 3.1): ports, verification tag, checksum.
            let ports = [1024 + port, port].map(u16::to_be_bytes).concat();
            let packet = [&ports[..], &[0; 8], &payload].concat();
            let address = SocketAddr::from((probe.destination, 0));
            socket.send_to(&packet, &address.into()).unwrap();
        }
    }
    None
}

/// Returns the numbers of the probes whose packets the hosts have received.
fn received(peers: &[Peer<'_>]) -> Vec<usize> {
    let mut numbers = Vec::new();
    let mut take = |packet: &[u8]| {
        let payload = packet.last_chunk().expect("a probe has a payload");
        numbers.push(u32::from_be_bytes(*payload) as usize);
    };
    for peer in peers {
        let mut buffer = [0; 256];
        for socket in &peer.udp {
            while let Ok((length, _)) = socket.recv_from(&mut buffer) {
                take(&buffer[..length]);
            }
        }
        for mut socket in &peer.sctp {
            while let Ok(length) = socket.read(&mut buffer) {
                take(&buffer[..length]);
            }
        }
    }
    numbers
}

#[test]
fn packets_pass_as_the_oracle_says() {
    run(|| async {
        for (round, mut cluster) in samples(&cluster(SMALL), 6).into_iter().enumerate() {
            separate(&mut cluster);
            compare(round, &cluster, &peers(&cluster)).await;
        }
    });
}

/// Sends all probes at once and compares the arrivals with the oracle.
async fn compare(round: usize, cluster: &Cluster, peers: &[Peer<'_>]) {
    let mut enforcer = open();
    let program = compile(&cluster.inventory(), Families::BOTH);
    enforcer.install(&program).await.unwrap();
    let probes = probes(peers);
    let allowed: BTreeSet<usize> =
        (0..probes.len()).filter(|number| is_allowed(cluster, peers, &probes[*number])).collect();
    let before = refused(&mut enforcer).await;
    let mut connections = Vec::new();
    for (index, peer) in peers.iter().enumerate() {
        let of_peer = probes.iter().enumerate().filter(|(_, probe)| probe.from == index);
        let connect = |(number, probe)| Some((number, send(number, probe)?));
        connections.extend(peer.host.within(|| of_peer.filter_map(connect).collect::<Vec<_>>()));
    }
    let denied = u64::try_from(probes.len() - allowed.len()).unwrap();
    let (start, mut arrived, mut dropped) = (Instant::now(), BTreeSet::new(), 0);
    while start.elapsed() < PACKET_TIMEOUT && (arrived != allowed || dropped < denied) {
        arrived.extend(received(peers));
        let established = connections.iter().filter(|(_, socket)| socket.peer_addr().is_ok());
        arrived.extend(established.map(|(number, _)| *number));
        dropped = refused(&mut enforcer).await - before;
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let wrong: Vec<_> =
        arrived.symmetric_difference(&allowed).map(|number| &probes[*number]).collect();
    assert!(wrong.is_empty(), "round {round}: oracle and packets differ: {wrong:#?}\n{cluster:#?}");
    assert!(
        dropped >= denied,
        "round {round}: {denied} probes are refused, {dropped} were counted"
    );
}

/// Returns the number of packets that the table has refused.
async fn refused(enforcer: &mut Enforcer) -> u64 {
    enforcer.counters().await.unwrap()["refused"].packets
}
