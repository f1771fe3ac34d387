//! Open connections under policies that change, with real packets between two pods of one node.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::json;

use super::enforcement::{open, run};
use super::generate::{address, read};
use super::hosts::{Host, forward};
use crate::compile::Families;
use crate::enforce::{Enforcer, Event};
use crate::engine::Engine;
use crate::model::{PodId, PolicyId};

/// Bound of waits for an event, far above the time that the event needs.
const EVENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between looks at a socket or counter.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Port of the servers.
const PORT: u16 = 80;

/// Two pods, the engine that knows them, and the enforcer.
struct Node {
    client: Host,
    server: Host,
    engine: Engine,
    enforcer: Enforcer,
}

impl Node {
    /// Creates the pods `client` and `server` of the namespace `shop`, without policies.
    async fn new() -> Self {
        forward();
        let mut engine = Engine::new(Families::BOTH);
        engine.upsert_namespace(&read(json!({ "metadata": { "name": "shop" } })));
        let mut host = |name: &str, number: u8| {
            let ips = [format!("10.1.0.{number}"), format!("fd00:1::{number}")];
            engine.upsert_pod(&read(json!({
                "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } },
                "status": { "phase": "Running", "podIPs": [{ "ip": ips[0] }, { "ip": ips[1] }] },
            })));
            let id = PodId { namespace: "shop".to_owned(), name: name.to_owned() };
            let interface = format!("skp{number}");
            engine.attach(&interface, id);
            Host::new(interface, ips.iter().map(|ip| address(ip)).collect())
        };
        let (client, server) = (host("client", 1), host("server", 2));
        let mut enforcer = open();
        enforcer.install(engine.program()).await.unwrap();
        engine.take_difference();
        Self { client, server, engine, enforcer }
    }

    /// Isolates the server, and sweeps as often as the enforcer asks for at once.
    async fn isolate(&mut self) {
        self.engine.upsert_network_policy(&read(json!({
            "metadata": { "name": "deny", "namespace": "shop" },
            "spec": { "podSelector": { "matchLabels": { "app": "server" } } },
        })));
        self.commit().await;
    }

    /// Removes the isolation of the server.
    async fn release(&mut self) {
        let (namespace, name) = ("shop".to_owned(), "deny".to_owned());
        self.engine.remove_policy(&PolicyId::NetworkPolicy { namespace, name });
        self.commit().await;
    }

    /// Applies the changes, and sweeps twice.
    async fn commit(&mut self) {
        self.enforcer.apply(&self.engine.take_difference()).await.unwrap();
        for _ in 0..2 {
            let event = tokio::time::timeout(EVENT_TIMEOUT, self.enforcer.next_event()).await;
            assert_eq!(event, Ok(Event::SweepDue), "a change of policies needs a sweep");
            self.enforcer.sweep(&self.engine).await.unwrap();
        }
    }

    /// Runs `send` until the counter has grown.
    async fn send_until_counted(&mut self, counter: &str, mut send: impl FnMut()) {
        let before = self.count(counter).await;
        let start = Instant::now();
        while self.count(counter).await == before {
            assert!(start.elapsed() < EVENT_TIMEOUT, "no packet was counted by {counter}");
            send();
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn count(&mut self, counter: &str) -> u64 {
        self.enforcer.counters().await.unwrap()[counter].packets
    }
}

/// Runs `receive` until it returns true.
async fn eventually(what: &str, mut receive: impl FnMut() -> bool) {
    let start = Instant::now();
    while !receive() {
        assert!(start.elapsed() < EVENT_TIMEOUT, "{what} did not happen");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Returns a connection from the client to the server: both ends, which do not block.
fn connect(node: &Node, family: usize) -> (TcpStream, TcpStream) {
    let address = SocketAddr::from((node.server.addresses[family], PORT));
    let listener = node.server.within(|| TcpListener::bind(address).unwrap());
    let client = node.client.within(|| TcpStream::connect(address).unwrap());
    let (server, _) = listener.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    server.set_nonblocking(true).unwrap();
    (client, server)
}

#[test]
fn open_connection_stops_in_both_directions_until_it_is_allowed_again() {
    run(|| async {
        let mut node = Node::new().await;
        for family in [0, 1] {
            let (mut client, mut server) = connect(&node, family);
            let mut byte = [0];
            server.write_all(b"a").unwrap();
            eventually("the first transfer", || client.read(&mut byte).is_ok()).await;

            node.isolate().await;
            node.send_until_counted("cut", || server.write_all(b"b").unwrap()).await;
            assert!(
                client.read(&mut byte).is_err(),
                "the client received data of a cut connection"
            );
            node.send_until_counted("cut", || client.write_all(b"c").unwrap()).await;
            assert!(
                server.read(&mut byte).is_err(),
                "the server received data of a cut connection"
            );

            node.release().await;
            eventually("a transfer to the client", || client.read(&mut byte).is_ok()).await;
            assert_eq!(&byte, b"b");
            eventually("a transfer to the server", || server.read(&mut byte).is_ok()).await;
            assert_eq!(&byte, b"c");
        }
    });
}

#[test]
fn datagrams_in_one_direction_stop() {
    run(|| async {
        let mut node = Node::new().await;
        for family in [0, 1] {
            let bind = |host: &Host, port| {
                let address = (host.addresses[family], port);
                let socket = host.within(|| UdpSocket::bind(address).unwrap());
                socket.set_nonblocking(true).unwrap();
                socket
            };
            let (client, server) = (bind(&node.client, 4000), bind(&node.server, PORT));
            let from = |socket: &UdpSocket| socket.local_addr().unwrap();
            client.connect(from(&server)).unwrap();
            server.connect(from(&client)).unwrap();
            let mut byte = [0];
            client.send(b"a").unwrap();
            eventually("the first datagram", || server.recv(&mut byte).is_ok()).await;
            server.send(b"b").unwrap();
            eventually("the answer", || client.recv(&mut byte).is_ok()).await;

            node.isolate().await;
            // The entry of connection tracking lives on with datagrams of the server only.
            node.send_until_counted("cut", || _ = server.send(b"c").unwrap()).await;
            assert!(client.recv(&mut byte).is_err(), "the client received a refused datagram");
            node.send_until_counted("cut", || _ = client.send(b"d").unwrap()).await;
            assert!(server.recv(&mut byte).is_err(), "the server received a refused datagram");
            node.release().await;
        }
    });
}

#[test]
fn connection_that_the_changed_policy_allows_is_not_cut() {
    run(|| async {
        let mut node = Node::new().await;
        let (mut client, mut server) = connect(&node, 0);
        let peer: IpAddr = node.client.addresses[0];
        node.engine.upsert_network_policy(&read(json!({
            "metadata": { "name": "deny", "namespace": "shop" },
            "spec": {
                "podSelector": { "matchLabels": { "app": "server" } },
                "ingress": [{
                    "from": [{ "ipBlock": { "cidr": format!("{peer}/32") } }],
                    "ports": [{ "port": PORT }],
                }],
            },
        })));
        node.commit().await;
        let mut byte = [0];
        server.write_all(b"a").unwrap();
        eventually("a transfer to the client", || client.read(&mut byte).is_ok()).await;
        client.write_all(b"b").unwrap();
        eventually("a transfer to the server", || server.read(&mut byte).is_ok()).await;
        assert_eq!(node.count("cut").await, 0, "a packet of an allowed connection was dropped");
    });
}
