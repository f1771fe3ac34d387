//! Sender of UDP datagrams with any payload and spoofed source addresses, as fast as one core can.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::io::{Errno, IoSlice};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};
use socket2::{Domain, Protocol, Socket, Type};

use crate::Netns;

/// Datagrams per system call.
const BATCH: usize = 64;
/// Length of an IPv4 header and a UDP header, bytes.
const HEADERS: usize = 28;
/// Number of UDP in the IPv4 header.
const UDP: u8 = 17;

/// A raw socket that sends UDP over IPv4 to one address, with any source address.
pub struct FloodSender {
    socket: Socket,
    to: SocketAddrV4,
}

/// Number of datagrams that were sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct FloodStats {
    /// Datagrams that the kernel accepted.
    pub datagrams: u64,
    /// Bytes of these datagrams, with the IP and UDP headers.
    pub bytes: u64,
    /// Duration, seconds.
    pub seconds: f64,
}

impl FloodStats {
    /// Adds the numbers of a later transmission.
    pub fn add(&mut self, more: Self) {
        self.datagrams += more.datagrams;
        self.bytes += more.bytes;
        self.seconds += more.seconds;
    }

    /// Returns the rate, datagrams per second.
    pub fn rate(&self) -> f64 {
        self.datagrams as f64 / self.seconds.max(1e-9)
    }
}

impl FloodSender {
    /// Opens the raw socket in a namespace.
    ///
    /// # Errors
    /// If the process has no CAP_NET_RAW, or if the namespace has no route to `to`.
    pub fn new(netns: &Netns, to: SocketAddrV4) -> Result<Self> {
        // IPPROTO_RAW: the packets contain their IP headers (raw(7)).
        let raw = Protocol::from(255);
        let socket = netns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)))?;
        let socket = socket.context("cannot open a raw socket. Run this as root.")?;
        socket.connect(&SocketAddrV4::new(*to.ip(), 0).into())?;
        Ok(Self { socket, to })
    }

    /// Sends the payloads in turn until `count` datagrams are sent or `limit` has passed. `source`
    /// returns the source address of a datagram by its number, from 0.
    ///
    /// # Errors
    /// If `payloads` is empty, or if the kernel refuses a datagram for another reason than a full
    /// queue.
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

    /// Sends packets in one system call and returns the number that the kernel accepted.
    fn send_batch(&self, packets: &[Vec<u8>]) -> Result<usize> {
        let slices: Vec<_> = packets.iter().map(|packet| [IoSlice::new(packet)]).collect();
        let mut control: Vec<_> = packets.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let messages = slices.iter().zip(&mut control);
        let mut messages: Vec<_> = messages.map(|(slice, c)| MMsgHdr::new(slice, c)).collect();
        match sendmmsg(&self.socket, &mut messages, SendFlags::empty()) {
            Ok(sent) => Ok(sent),
            // The queue of the interface is full, or a signal came first: the caller tries again.
            Err(Errno::NOBUFS | Errno::INTR) => Ok(0),
            Err(error) => Err(error).context("sending"),
        }
    }
}

/// Writes an IPv4 packet with a UDP datagram to `packet`. The kernel fills in the identification
/// and the IP checksum. The UDP checksum is 0, that is, absent.
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

/// Returns the source address with this number: one of the 65536 addresses of the /16 network, and
/// a port from 1024 to 61023 that changes with the number.
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
    fn packet_is_read_by_capture() {
        let to = "192.0.2.2:51900".parse().unwrap();
        let mut packet = vec![1, 2, 3];
        fill(&mut packet, spoofed_source([198, 18], 0x1_0203), to, &[7, 8]);
        let ethernet = [&[0; 12][..], &[0x08, 0x00]].concat();
        let frame = Frame { bytes: [ethernet, packet].concat() };
        assert_eq!(frame.udp().unwrap(), (51900, &[7, 8][..]));
        assert!(frame.contains(&[198, 18, 2, 3]));
    }
}
