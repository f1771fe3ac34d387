//! A stranger who sends whatever it likes, from whatever address, as fast as one core can.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::io::{Errno, IoSlice};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};
use socket2::{Domain, Protocol, Socket, Type};

use crate::Netns;

/// Datagrams a system call.
const BATCH: usize = 64;
/// IPv4 and UDP.
const HEADERS: usize = 28;
const UDP: u8 = 17;

/// Sends UDP over IPv4 to one address, with any source.
pub struct FloodSender {
    socket: Socket,
    to: SocketAddrV4,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct FloodStats {
    /// Datagrams that the kernel took.
    pub datagrams: u64,
    /// Their bytes, with the headers of IP and UDP.
    pub bytes: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
}

impl FloodStats {
    /// Adds what was sent after it.
    pub fn add(&mut self, more: Self) {
        self.datagrams += more.datagrams;
        self.bytes += more.bytes;
        self.seconds += more.seconds;
    }

    /// Datagrams a second.
    pub fn rate(&self) -> f64 {
        self.datagrams as f64 / self.seconds.max(1e-9)
    }
}

impl FloodSender {
    /// Opens its socket in a namespace.
    pub fn new(netns: &Netns, to: SocketAddrV4) -> Result<Self> {
        // The protocol's number for "with headers of my own".
        let raw = Protocol::from(255);
        let socket = netns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)))?;
        let socket = socket.context("opening a raw socket (this needs root)")?;
        socket.connect(&SocketAddrV4::new(*to.ip(), 0).into())?;
        Ok(Self { socket, to })
    }

    /// Sends these payloads in turn, again and again, until `count` are sent or `limit` has passed. `source`
    /// is asked for each, by its number.
    pub fn send(
        &self,
        payloads: &[Vec<u8>],
        count: u64,
        limit: Duration,
        source: impl Fn(u64) -> SocketAddrV4,
    ) -> Result<FloodStats> {
        let start = Instant::now();
        let mut stats = FloodStats::default();
        let mut packets = vec![Vec::new(); BATCH];
        let mut next = payloads.iter().cycle();
        while stats.datagrams < count && start.elapsed() < limit {
            let batch = (count - stats.datagrams).min(BATCH as u64) as usize;
            for (packet, number) in packets[..batch].iter_mut().zip(stats.datagrams..) {
                let payload = next.next().context("nothing to send")?;
                fill(packet, source(number), self.to, payload);
            }
            let mut sent = 0;
            while sent < batch {
                let n = self.send_batch(&packets[sent..batch])?;
                stats.bytes += packets[sent..sent + n].iter().map(|p| p.len() as u64).sum::<u64>();
                sent += n;
            }
            stats.datagrams += batch as u64;
        }
        stats.seconds = start.elapsed().as_secs_f64();
        Ok(stats)
    }

    /// How many of them the kernel took.
    fn send_batch(&self, packets: &[Vec<u8>]) -> Result<usize> {
        let slices: Vec<_> = packets.iter().map(|packet| [IoSlice::new(packet)]).collect();
        let mut control: Vec<_> = packets.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let messages = slices.iter().zip(&mut control);
        let mut messages: Vec<_> = messages.map(|(slice, c)| MMsgHdr::new(slice, c)).collect();
        match sendmmsg(&self.socket, &mut messages, SendFlags::empty()) {
            Ok(sent) => Ok(sent),
            // Its own queue is full.
            Err(Errno::NOBUFS | Errno::INTR) => Ok(0),
            Err(error) => Err(error).context("sending"),
        }
    }
}

/// Makes a packet of it. The kernel fills in length, identification and checksum; UDP's may be absent.
fn fill(packet: &mut Vec<u8>, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) {
    let length = |from: usize| ((HEADERS - from + payload.len()) as u16).to_be_bytes();
    packet.clear();
    packet.extend([0x45, 0]);
    packet.extend(length(0));
    packet.extend([0, 0, 0, 0, 64, UDP, 0, 0]);
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(length(20));
    packet.extend([0, 0]);
    packet.extend(payload);
}

/// The address of this number in a network of 65536, each time from another port.
pub fn spoofed_source([a, b]: [u8; 2], number: u64) -> SocketAddrV4 {
    let [c, d] = (number as u16).to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), 1024 + (number / 7 % 60_000) as u16)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::load::capture::Frame;

    #[test]
    fn a_packet_is_what_a_capture_reads() {
        let to = "192.0.2.2:51900".parse().unwrap();
        let mut packet = vec![1, 2, 3];
        fill(&mut packet, spoofed_source([198, 18], 0x1_0203), to, &[7, 8]);
        let ethernet = [&[0; 12][..], &[0x08, 0x00]].concat();
        let frame = Frame { bytes: [ethernet, packet].concat() };
        assert_eq!(frame.udp().unwrap(), (51900, &[7, 8][..]));
        assert!(frame.contains(&[198, 18, 2, 3]));
    }
}
