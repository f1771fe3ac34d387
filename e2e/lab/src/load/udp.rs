//! UDP at a fixed rate or as fast as it goes, with every datagram's content checked.
//!
//! A datagram of 8 bytes or more starts with its number (u64, big endian); the rest is the pattern
//! of that number.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use super::pattern::Pattern;
use super::progress::FlowProgress;
use crate::{Netns, Task};

/// Time between two bursts of a paced sender.
const TICK: Duration = Duration::from_micros(100);

/// What to send.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Bytes a datagram.
    pub payload: usize,
    /// Datagrams a second; `None` for as fast as it goes.
    pub rate: Option<u64>,
    /// How long.
    pub duration: Duration,
}

/// What was sent and what arrived.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Datagrams that the kernel took from the sender.
    pub sent: u64,
    /// Datagrams that arrived.
    pub received: u64,
    /// Of these: after one with a higher number.
    pub reordered: u64,
    /// Of these: content or length differ from what was sent.
    pub corrupt: u64,
    /// Of these: had come before.
    pub doubled: u64,
    /// How long the sender sent, in seconds.
    pub seconds: f64,
}

/// Sends from one namespace to `to` in another.
pub fn run(from: &Netns, at: &Netns, to: SocketAddr, load: Load) -> Result<Outcome> {
    let receiver = Receiver::start(at, to, load.payload)?;
    let source = from.run(move || bind_for(to))??;
    let sent = from.run(|| send(&source, to, load))?;
    let mut outcome = receiver.stop()?;
    (outcome.sent, outcome.seconds) = sent?;
    Ok(outcome)
}

/// The source address that `at` sees of a datagram from `from` to its address `to`.
pub fn source_seen(from: &Netns, at: &Netns, to: IpAddr) -> Result<IpAddr> {
    let receiver = at.run(move || UdpSocket::bind((to, 0)))?.context("binding a UDP socket")?;
    receiver.set_read_timeout(Some(Duration::from_millis(200)))?;
    let address = receiver.local_addr()?;
    let sender = from.run(move || bind_for(address))??;
    // The first may wait for a handshake or a neighbour.
    for _ in 0..20 {
        sender.send_to(b"who am I", address)?;
        if let Ok((_, source)) = receiver.recv_from(&mut [0; 16]) {
            return Ok(source.ip());
        }
    }
    bail!("nothing arrives at {to}")
}

/// Whether datagrams from one namespace to that address arrive in another, at any of its addresses.
pub fn arrives(from: &Netns, at: &Netns, to: SocketAddr) -> Result<bool> {
    let any = unspecified(to);
    let receiver = at.run(move || UdpSocket::bind((any, to.port())))?.context("binding")?;
    receiver.set_read_timeout(Some(Duration::from_millis(200)))?;
    let sender = from.run(move || bind_for(to))??;
    for _ in 0..5 {
        sender.send_to(b"hello", to)?;
        if receiver.recv(&mut [0; 16]).is_ok() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A socket to send from to that address.
pub fn bind_for(to: SocketAddr) -> Result<UdpSocket> {
    UdpSocket::bind((unspecified(to), 0)).context("binding a UDP socket")
}

fn unspecified(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() }
}

/// A receiver on a thread of its own.
pub struct Receiver {
    stop: Arc<AtomicBool>,
    task: Task<Outcome>,
}

impl Receiver {
    /// Binds `at` inside a namespace and starts to receive datagrams of `payload` bytes.
    pub fn start(netns: &Netns, at: SocketAddr, payload: usize) -> Result<Self> {
        Self::start_with_progress(netns, at, payload, &Arc::default())
    }

    /// The same, told to `progress` as it goes on.
    pub fn start_with_progress(
        netns: &Netns,
        at: SocketAddr,
        payload: usize,
        progress: &Arc<FlowProgress>,
    ) -> Result<Self> {
        let socket = netns.run(|| UdpSocket::bind(at))?.with_context(|| format!("bind {at}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        // Losses are to be the network's, not this receiver's.
        set_socket_recv_buffer_size_force(&socket, 8 << 20).context("SO_RCVBUFFORCE")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, progress) = (stop.clone(), progress.clone());
        let task = netns.spawn(move || receive(&socket, payload, &flag, &progress));
        Ok(Self { stop, task })
    }

    /// Takes what is still under way, then ends.
    pub fn stop(self) -> Result<Outcome> {
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        self.task.join()
    }
}

fn receive(
    socket: &UdpSocket,
    payload: usize,
    stop: &AtomicBool,
    progress: &FlowProgress,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut seen = Seen::default();
    let mut buffer = vec![0; 65536];
    let mut next = 0;
    loop {
        match socket.recv(&mut buffer) {
            Ok(n) => {
                outcome.received += 1;
                progress.add_received(n as u64);
                if n != payload {
                    outcome.corrupt += 1;
                } else if let Some((number, rest)) = buffer[..n].split_first_chunk() {
                    let number = u64::from_be_bytes(*number);
                    let wrong = Pattern::new(number).mismatch(rest).is_some();
                    outcome.corrupt += u64::from(wrong);
                    outcome.doubled += u64::from(!wrong && seen.insert(number));
                    outcome.reordered += u64::from(number < next);
                    next = next.max(number + 1);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(outcome);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The numbers that have come, a bit each.
#[derive(Default)]
struct Seen(Vec<u64>);

impl Seen {
    /// Whether it was there before.
    fn insert(&mut self, number: u64) -> bool {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let before = self.0[word] & bit != 0;
        self.0[word] |= bit;
        before
    }
}

/// Sends; returns how many datagrams and seconds.
pub fn send(socket: &UdpSocket, to: SocketAddr, load: Load) -> Result<(u64, f64)> {
    send_from(socket, to, load, &mut 0)
}

/// The same, with datagrams that are numbered from `first` on, which is left behind the last.
pub fn send_from(
    socket: &UdpSocket,
    to: SocketAddr,
    load: Load,
    first: &mut u64,
) -> Result<(u64, f64)> {
    let mut datagram = vec![0; load.payload];
    let start = Instant::now();
    let (mut number, mut sent) = (0_u64, 0);
    loop {
        let elapsed = start.elapsed();
        if elapsed >= load.duration {
            *first += number;
            return Ok((sent, elapsed.as_secs_f64()));
        }
        // Never more than what is due by now, never more than a tick's worth of flood.
        let due = match load.rate {
            Some(rate) => (elapsed.as_secs_f64() * rate as f64) as u64 + 1,
            None => number + 64,
        };
        while number < due {
            if let Some((head, rest)) = datagram.split_first_chunk_mut() {
                let number = *first + number;
                *head = number.to_be_bytes();
                Pattern::new(number).fill(rest);
            }
            number += 1;
            match socket.send_to(&datagram, to) {
                Ok(_) => sent += 1,
                // A full queue is a loss like any other; a cut link is the test's business.
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error).with_context(|| format!("sending to {to}")),
            }
        }
        if load.rate.is_some() {
            std::thread::sleep(TICK);
        }
    }
}

fn is_passing(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::NOBUFS, Errno::AGAIN, Errno::NETUNREACH, Errno::HOSTUNREACH];
    let passing = codes.iter().any(|code| error.raw_os_error() == Some(code.raw_os_error()));
    passing || error.kind() == ErrorKind::ConnectionRefused
}
