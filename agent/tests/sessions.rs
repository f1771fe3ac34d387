//! Agent process with 100 and with 1,000 live sessions. The peers are engines of the test process
//! with real sockets, in the same new network namespace. The tests need root.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use rustix::process::{Resource, Signal};
use skein_agent::status::Document;
use skein_core::wire::checksum;
use skein_core::wire::header::{Flags, Header, MessageType, OVERHEAD};
use skein_core::{Ciphers, Engine, EngineConfig, PeerConfig, PrivateKey, PublicKey, Time};
use skein_ipc::PeerState;
use skein_sys::in_new_network_namespace;
use support::{PROCESS_TIMEOUT, Process, finish};

const AGENT: &str = env!("CARGO_BIN_EXE_skein-agent");
const PORT: u16 = 51900;
/// Number of requests that each peer sends.
const REQUESTS_PER_PEER: usize = 10;

/// Overlay address of the agent, and the UDP port on which the test answers requests.
const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 244, 1, 1), 7000);

/// Peer of the agent: an engine, its socket, and one overlay address.
struct Peer {
    engine: Engine,
    socket: UdpSocket,
    inner: Ipv4Addr,
    /// Time of the last request (monotonic clock); `None` if no answer is outstanding.
    sent: Option<Duration>,
    answers: usize,
}

impl Peer {
    fn new(number: u16, agent_key: PublicKey, now: Time) -> Self {
        let [high, low] = [(number / 250) as u8, (number % 250) as u8 + 1];
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 1 + high, low), PORT)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let inner = Ipv4Addr::new(10, 245 + high, low, 1);
        let engine = Self::engine(inner, agent_key, now);
        Self { engine, socket, inner, sent: None, answers: 0 }
    }

    /// Returns an engine that has requested a session.
    fn engine(inner: Ipv4Addr, agent_key: PublicKey, now: Time) -> Engine {
        let random = |out: &mut [u8]| aws_lc_rs::rand::fill(out).unwrap();
        let mut private_key = [1; 32];
        private_key[1..5].copy_from_slice(&inner.octets());
        let config = EngineConfig {
            private_key: PrivateKey::new(&private_key),
            cluster_id: "default".to_owned(),
            listen_port: PORT,
            lanes: 1,
            ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true },
            mtu: 1440,
            ecn: false,
        };
        let mut engine = Engine::new(config, Box::new(random)).unwrap();
        let endpoints = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))];
        let id = engine
            .upsert_peer(now, PeerConfig { public_key: agent_key, second_key: None, endpoints });
        engine.request_session(now, id);
        engine
    }

    /// Replaces the engine by a new one without sessions, as after a restart of the node.
    fn restart(&mut self, agent_key: PublicKey, now: Time) {
        self.engine = Self::engine(self.inner, agent_key, now);
        (self.sent, self.answers) = (None, 0);
    }

    /// Processes received datagrams and timeouts, and sends the next request.
    fn step(&mut self, now: Time) {
        let mut buffer = [0; 2048];
        loop {
            match self.socket.recv_from(&mut buffer) {
                Ok((length, source)) => self.receive(now, source, &mut buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.engine.handle_timeout(now);
        while let Some(transmit) = self.engine.poll_transmit() {
            self.socket.send_to(&transmit.payload, transmit.destination).unwrap();
        }
        // One request at a time. A lost request (the service's receive buffer is small) is
        // repeated.
        let due = self.sent.is_none_or(|sent| now.mono > sent + Duration::from_millis(200));
        if due && self.answers < REQUESTS_PER_PEER {
            self.send(now);
        }
    }

    fn receive(&mut self, now: Time, source: SocketAddr, datagram: &mut [u8]) {
        let header = Header::parse(datagram).unwrap();
        if header.kind != MessageType::Data {
            return self.engine.handle_datagram(now, source, datagram);
        }
        let mut sessions = self.engine.tables().flat_map(|(_, view)| &view.receive);
        let found = sessions.find(|session| session.local_index == header.receiver);
        // Datagrams of a session before the restart are ignored.
        let Some(session) = found else { return };
        let opened = session.receiver(header.lane).unwrap().open(datagram);
        let (_, packet) = opened.unwrap();
        assert_eq!(packet[16..20], self.inner.octets(), "The packet must be for this peer.");
        session.traffic().add_received(1, packet.len() as u64);
        self.answers += 1;
        self.sent = None;
    }

    fn send(&mut self, now: Time) {
        let (_, view) = self.engine.tables().next().unwrap();
        let (Some(session), Some(endpoint)) = (&view.current, view.endpoint) else { return };
        let packet = packet(self.inner);
        let mut sealed = vec![0; packet.len() + OVERHEAD];
        session.sender(0).unwrap().seal(Flags::default(), &packet, &mut sealed).unwrap();
        session.traffic().add_sent(1, packet.len() as u64);
        self.socket.send_to(&sealed, endpoint).unwrap();
        self.sent = Some(now.mono);
    }
}

/// Returns a UDP packet from `from` to [`SERVICE`] without a UDP checksum, which IPv4 allows.
fn packet(from: Ipv4Addr) -> Vec<u8> {
    let payload = [7; 100];
    let udp = 8 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + udp).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend(from.octets());
    packet.extend(SERVICE.0.octets());
    let sum = !checksum::sum(&packet, 0);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    for field in [9, SERVICE.1, udp, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

fn now(start: Instant) -> Time {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Time { mono: start.elapsed(), wall }
}

/// Writes the agent's key, records and configuration.
fn configure(directory: &Path, peers: &[Peer]) {
    let shown = directory.display();
    let record = |peer: &Peer| {
        let key =
            base64::engine::general_purpose::STANDARD.encode(peer.engine.public_key().as_bytes());
        let endpoint = peer.socket.local_addr().unwrap().ip();
        let [_, net, name, _] = peer.inner.octets();
        format!(
            "[[node]]\nname = 'peer-{net}-{name}'\npublic_key = '{key}'\nendpoints = ['{endpoint}']\n\
             pod_cidrs = ['{}/24']\n",
            Ipv4Addr::new(10, net, name, 0)
        )
    };
    let records: String = peers.iter().map(record).collect();
    std::fs::write(directory.join("nodes.toml"), records).unwrap();
    let text = format!(
        "name = 'node-a'\nstate_dir = '{shown}/state'\nnodes = '{shown}/nodes.toml'\n\
         private_key_file = '{shown}/key'\npod_cidrs = ['10.244.1.0/24']\n\
         control = {{ socket = '{shown}/control.sock' }}\nmetrics = {{ listen = 'off' }}\n\
         interface = {{ mtu = 1440 }}\nunderlay = {{ addresses = ['127.0.0.1'] }}\n\
         [dataplane]\nsocket = '{shown}/dataplane.sock'\nlanes = 4\n"
    );
    std::fs::write(directory.join("agent.toml"), text).unwrap();
}

/// Returns a command of the agent with the configuration in `directory`.
fn agent(directory: &Path, command: &str) -> Command {
    let mut agent = Command::new(AGENT);
    agent.args(command.split(' ')).arg("--config").arg(directory.join("agent.toml"));
    agent
}

/// Running agent. Drop ends it and its data process.
struct Running<'a>(&'a Path, Process);

impl<'a> Running<'a> {
    fn start(directory: &'a Path) -> Self {
        let log = std::fs::File::create(directory.join("log")).unwrap();
        let mut run = agent(directory, "run");
        Self(directory, Process::start(run.stdout(Stdio::null()).stderr(log)).unwrap())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // The agent ends its data process. If the agent fails, cleanup ends it.
        let _ = self.1.signal(Signal::TERM).and_then(|()| self.1.wait());
        let _ = finish(&mut agent(self.0, "cleanup"));
    }
}

fn status(directory: &Path) -> Option<Document> {
    let output = finish(&mut agent(directory, "status -o json")).unwrap();
    serde_json::from_slice(&output.stdout).ok()
}

fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn hundred_sessions_use_limited_memory() {
    live_sessions(100, 64 << 20);
}

#[test]
fn thousand_sessions_are_established_and_renewed() {
    live_sessions(1_000, 128 << 20);
}

/// Exchanges requests between `count` peers and the agent, restarts all peers at once, and
/// exchanges requests again. The resident memory of the data process must stay below `max_memory`
/// bytes.
fn live_sessions(count: u16, max_memory: u64) {
    // Each peer needs a socket.
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    in_new_network_namespace(|| {
        let up = finish(Command::new("ip").args(["link", "set", "lo", "up"]));
        assert!(up.unwrap().status.success());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let made = finish(Command::new(AGENT).args(["keygen", "--out"]).arg(path.join("key")));
        let key = String::from_utf8(made.unwrap().stdout).unwrap();
        let key = key.trim().parse::<skein_ipc::keys::PublicKey>().unwrap();
        let start = Instant::now();
        let mut peers: Vec<_> =
            (0..count).map(|n| Peer::new(n, key.0.into(), now(start))).collect();
        configure(path, &peers);
        let _running = Running::start(path);
        for round in 0..2 {
            let began = Instant::now();
            let document = exchange(path, &mut peers, start);
            println!("{count} sessions, {round} restarts: {:?}", began.elapsed());
            let states = document.report.unwrap().peers;
            let live = states.iter().filter(|peer| peer.state == PeerState::Established).count();
            assert_eq!(live, usize::from(count), "Not all peers are established: {states:?}");
            let memory = resident_bytes(document.dataplane.pid.unwrap());
            println!("{} MiB resident", memory >> 20);
            assert!(memory < max_memory, "The data process uses {} MiB.", memory >> 20);
            for peer in &mut peers {
                peer.restart(key.0.into(), now(start));
            }
        }
    })
    .expect("this test needs root: CAP_SYS_ADMIN for a network namespace");
}

/// Runs all peers until each has its answers, and returns the agent's status.
fn exchange(path: &Path, peers: &mut [Peer], start: Instant) -> Document {
    let log = || std::fs::read_to_string(path.join("log")).unwrap();
    while !status(path).is_some_and(|document| document.ready) {
        assert!(start.elapsed() < PROCESS_TIMEOUT, "The agent is not ready:\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let service = UdpSocket::bind(SERVICE).unwrap();
    service.set_nonblocking(true).unwrap();
    let mut request = [0; 2048];
    while peers.iter().any(|peer| peer.answers < REQUESTS_PER_PEER) {
        assert!(start.elapsed() < PROCESS_TIMEOUT, "Not all requests were answered:\n{}", log());
        for peer in &mut *peers {
            peer.step(now(start));
        }
        while let Ok((length, from)) = service.recv_from(&mut request) {
            service.send_to(&request[..length], from).unwrap();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    status(path).unwrap()
}
