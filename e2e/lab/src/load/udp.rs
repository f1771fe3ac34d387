//! UDP at a fixed rate or at the maximum rate. The receiver checks the content of every datagram.
//!
//! A datagram of 8 bytes or more starts with its number (u64, big endian). The rest is the
//! [`Pattern`] whose seed is that number.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use super::pattern::Pattern;
use super::progress::FlowProgress;
use super::retry_bind;
use crate::{Netns, Task};

/// Interval between two bursts of a sender with a fixed rate.
const BURST_INTERVAL: Duration = Duration::from_micros(100);

/// Size, rate and duration of UDP traffic.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Payload of a datagram, bytes.
    pub payload: usize,
    /// Rate, datagrams per second; `None` for the maximum.
    pub rate: Option<u64>,
    /// Duration of the transmission.
    pub duration: Duration,
}

/// Counters of a sender and its receiver.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Datagrams that the kernel accepted from the sender.
    pub sent: u64,
    /// Datagrams that the receiver received.
    pub received: u64,
    /// Received datagrams that arrived after one with a higher number.
    pub reordered: u64,
    /// Received datagrams with a wrong length or content.
    pub corrupt: u64,
    /// Received datagrams whose number had been received before.
    pub doubled: u64,
    /// Duration of the transmission, seconds.
    pub seconds: f64,
}

/// Sends from the namespace `from` to the address `to` of the namespace `at`, and counts both
/// sides.
///
/// # Errors
/// If a socket cannot be bound, or if sending or receiving fails. Lost datagrams are not an error.
pub fn run(from: &Netns, at: &Netns, to: SocketAddr, load: Load) -> Result<Outcome> {
    let receiver = Receiver::start(at, to, load.payload)?;
    let source = from.run(move || bind_for(to))??;
    let sent = from.run(|| send(&source, to, load))?;
    let mut outcome = receiver.stop()?;
    (outcome.sent, outcome.seconds) = sent?;
    Ok(outcome)
}

/// Returns the source address that a receiver in `at` sees of datagrams from `from` to the address
/// `to`.
///
/// # Errors
/// If none of 20 datagrams arrives.
pub fn source_seen(from: &Netns, at: &Netns, to: IpAddr) -> Result<IpAddr> {
    let receiver = at.run(move || UdpSocket::bind((to, 0)))?.context("binding a UDP socket")?;
    receiver.set_read_timeout(Some(Duration::from_millis(200)))?;
    let address = receiver.local_addr()?;
    let sender = from.run(move || bind_for(address))??;
    // The first datagram may wait for a handshake or for neighbour discovery.
    for _ in 0..20 {
        sender.send_to(b"who am I", address)?;
        if let Ok((_, source)) = receiver.recv_from(&mut [0; 16]) {
            return Ok(source.ip());
        }
    }
    bail!("no datagram arrives at {to}")
}

/// Returns whether one of five datagrams from the namespace `from` to the address `to` arrives in
/// the namespace `at`, whatever its address there.
///
/// # Errors
/// If a socket cannot be bound, or if a datagram cannot be sent.
pub fn arrives(from: &Netns, at: &Netns, to: SocketAddr) -> Result<bool> {
    let any = unspecified(to);
    let receiver =
        at.run(move || retry_bind(|| UdpSocket::bind((any, to.port()))))?.context("binding")?;
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

/// Binds a socket for sending to an address of the same family.
///
/// # Errors
/// If the socket cannot be bound.
pub fn bind_for(to: SocketAddr) -> Result<UdpSocket> {
    UdpSocket::bind((unspecified(to), 0)).context("binding a UDP socket")
}

fn unspecified(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() }
}

/// A receiver of datagrams on its own thread.
pub struct Receiver {
    stop: Arc<AtomicBool>,
    task: Task<Outcome>,
}

impl Receiver {
    /// Binds `at` in a namespace and starts to receive datagrams of `payload` bytes.
    ///
    /// # Errors
    /// If the address cannot be bound, or if the process has no CAP_NET_ADMIN.
    pub fn start(netns: &Netns, at: SocketAddr, payload: usize) -> Result<Self> {
        Self::start_with_progress(netns, at, payload, &Arc::default())
    }

    /// Starts a receiver as [`Receiver::start`] does and adds received bytes to `progress`.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn start_with_progress(
        netns: &Netns,
        at: SocketAddr,
        payload: usize,
        progress: &Arc<FlowProgress>,
    ) -> Result<Self> {
        let socket = netns
            .run(|| retry_bind(|| UdpSocket::bind(at)))?
            .with_context(|| format!("bind {at}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        // The receive buffer must not be the cause of losses.
        set_socket_recv_buffer_size_force(&socket, 8 << 20).context("SO_RCVBUFFORCE")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, progress) = (stop.clone(), progress.clone());
        let task = netns.spawn(move || receive(&socket, payload, &flag, &progress));
        Ok(Self { stop, task })
    }

    /// Receives for at least another 100 ms, stops, and returns the counters of the receiver.
    ///
    /// # Errors
    /// If reading from the socket failed.
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

/// Bitmap of received numbers.
#[derive(Default)]
struct Seen(Vec<u64>);

impl Seen {
    /// Adds a number and returns whether the bitmap contained it.
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

/// Sends datagrams and returns their number and the duration in seconds.
///
/// # Errors
/// If the kernel refuses a datagram for another reason than a full queue or a missing route.
pub fn send(socket: &UdpSocket, to: SocketAddr, load: Load) -> Result<(u64, f64)> {
    send_from(socket, to, load, &mut 0)
}

/// Sends datagrams as [`send`] does. Their numbers start with `first`, which is set to the number
/// after the last.
///
/// # Errors
/// Those of [`send`].
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
        // Datagrams that are due by now; 64 at once without a rate.
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
                // The test counts these datagrams as lost.
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error).with_context(|| format!("sending to {to}")),
            }
        }
        if load.rate.is_some() {
            std::thread::sleep(BURST_INTERVAL);
        }
    }
}

/// Returns whether an error is temporary: a full queue, no route, or no receiver.
fn is_transient(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::NOBUFS, Errno::AGAIN, Errno::NETUNREACH, Errno::HOSTUNREACH];
    let transient = codes.iter().any(|code| error.raw_os_error() == Some(code.raw_os_error()));
    transient || error.kind() == ErrorKind::ConnectionRefused
}
