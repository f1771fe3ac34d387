//! Two engines exchange packets over real UDP sockets on the loopback interface, each in its own
//! thread. Run it with `cargo run --release -p skein-core --example two_engines`.

use std::error::Error;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use skein_core::wire::header::{Flags, Header, MessageType, OVERHEAD};
use skein_core::{
    Ciphers, DropReason, Engine, EngineConfig, PeerConfig, PeerId, PrivateKey, PublicKey,
    ReplayWindow, Time,
};

/// Number of packets that each node sends.
const PACKETS: u32 = 5;
/// Interval between two packets of a node.
const SEND_INTERVAL: Duration = Duration::from_millis(200);

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A node: an engine, and the socket for its handshakes and its data.
struct Node {
    name: &'static str,
    engine: Engine,
    socket: UdpSocket,
    peer: PeerId,
    started: Instant,
    window: Option<(u32, ReplayWindow)>,
    received: u32,
}

fn main() -> Result<()> {
    let sockets = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
    let addresses = [sockets[0].local_addr()?, sockets[1].local_addr()?];
    let private_keys = [random_key()?, random_key()?];
    let public_keys = [private_keys[0].public_key()?, private_keys[1].public_key()?];
    let peers = [(public_keys[1], addresses[1]), (public_keys[0], addresses[0])];

    let mut threads = Vec::new();
    let nodes = ["alpha", "beta"].into_iter().zip(sockets).zip(private_keys).zip(peers);
    for (((name, socket), private_key), (peer_key, peer_address)) in nodes {
        let node = Node::new(name, socket, private_key, peer_key, peer_address)?;
        threads.push(std::thread::spawn(move || node.run()));
    }
    for thread in threads {
        thread.join().map_err(|_| "a node has panicked")??;
    }
    Ok(())
}

fn random_key() -> Result<PrivateKey> {
    let mut bytes = zeroize::Zeroizing::new([0; 32]);
    aws_lc_rs::rand::fill(bytes.as_mut())?;
    Ok(PrivateKey::new(&bytes))
}

impl Node {
    fn new(
        name: &'static str,
        socket: UdpSocket,
        private_key: PrivateKey,
        peer_key: PublicKey,
        peer_address: SocketAddr,
    ) -> Result<Self> {
        let config = EngineConfig {
            private_key,
            cluster_id: "example".to_owned(),
            listen_port: socket.local_addr()?.port(),
            lanes: 1,
            ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: false },
            mtu: 1440,
            ecn: false,
        };
        let random =
            |out: &mut [u8]| aws_lc_rs::rand::fill(out).expect("the system has a generator");
        let mut engine = Engine::new(config, Box::new(random))?;
        let started = Instant::now();
        let endpoints = vec![peer_address];
        let config = PeerConfig { public_key: peer_key, second_key: None, endpoints };
        let peer = engine.upsert_peer(now(started)?, config);
        Ok(Self { name, engine, socket, peer, started, window: None, received: 0 })
    }

    /// Sends a packet every [`SEND_INTERVAL`] until both nodes have received all packets.
    fn run(mut self) -> Result<()> {
        let (mut sent, mut next_send) = (0, Duration::ZERO);
        let mut buffer = [0; 65_536];
        while sent < PACKETS || self.received < PACKETS {
            let time = now(self.started)?;
            if sent < PACKETS && time.mono >= next_send {
                let packet = format!("packet {sent} from {}", self.name);
                sent += u32::from(self.send(time, packet.as_bytes())?);
                next_send = time.mono + SEND_INTERVAL;
            }
            self.engine.handle_timeout(time);
            self.flush()?;

            let due = self.engine.poll_timeout().map_or(next_send, |due| due.mono.min(next_send));
            let wait = due.saturating_sub(time.mono).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(wait.min(SEND_INTERVAL)))?;
            let Ok((length, source)) = self.socket.recv_from(&mut buffer) else { continue };
            if let Err(reason) = self.receive(now(self.started)?, source, &mut buffer[..length]) {
                println!("{} dropped a datagram: {reason}", self.name);
            }
            self.flush()?;
        }
        Ok(())
    }

    /// Seals and sends a packet. Requests a session and returns false if there is none.
    fn send(&mut self, now: Time, packet: &[u8]) -> Result<bool> {
        let view = self.engine.peer(self.peer).ok_or("the peer is known")?;
        let (Some(session), Some(destination)) = (view.current.clone(), view.endpoint) else {
            self.engine.request_session(now, self.peer);
            return Ok(false);
        };
        let mut datagram = vec![0; packet.len() + OVERHEAD];
        let sender = session.sender(0).ok_or("lane 0 exists")?;
        sender.seal(Flags::default(), packet, &mut datagram)?;
        session.traffic().add_sent(1, packet.len() as u64);
        self.socket.send_to(&datagram, destination)?;
        Ok(true)
    }

    /// Opens a data datagram. The engine handles datagrams of every other type.
    fn receive(
        &mut self,
        now: Time,
        source: SocketAddr,
        datagram: &mut [u8],
    ) -> std::result::Result<(), DropReason> {
        let header = match Header::parse(datagram) {
            Ok(header) if header.kind == MessageType::Data => header,
            _ => {
                self.engine.handle_datagram(now, source, datagram);
                return Ok(());
            }
        };
        let view = self.engine.peer(self.peer);
        let mut sessions = view.into_iter().flat_map(|view| &view.receive);
        let session = sessions.find(|session| session.local_index == header.receiver).cloned();
        let Some(session) = session else {
            self.engine.on_unknown_session(now, source.ip());
            return Err(DropReason::UnknownSession);
        };
        let receiver = session.receiver(header.lane).ok_or(DropReason::WrongLane)?;
        let (header, plaintext) = receiver.open(datagram)?;
        // The example needs one replay window, because the peer has one lane.
        let window = match &mut self.window {
            Some((index, window)) if *index == session.local_index => window,
            window => &mut window.insert((session.local_index, ReplayWindow::new())).1,
        };
        window.check_and_set(header.counter)?;
        session.confirm();
        session.traffic().add_received(1, plaintext.len() as u64);
        self.received += 1;
        println!("{} received {:?}", self.name, String::from_utf8_lossy(plaintext));
        Ok(())
    }

    /// Sends the datagrams of the engine.
    fn flush(&mut self) -> Result<()> {
        while let Some(transmit) = self.engine.poll_transmit() {
            self.socket.send_to(&transmit.payload, transmit.destination)?;
        }
        Ok(())
    }
}

/// Reads both clocks.
fn now(started: Instant) -> Result<Time> {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(Time { mono: started.elapsed(), wall })
}
