//! Listening on the switch, as somebody between the nodes can.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Netns, Task};

/// Frames kept at most, and bytes kept of each.
const MAX_FRAMES: usize = 200_000;
const SNAP: usize = 2048;

const ETH_P_ALL: u16 = 0x0003;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const UDP: u8 = 17;

/// A capture of every frame that passes a namespace's interfaces.
pub struct Capture {
    stop: Arc<AtomicBool>,
    task: Task<Vec<Frame>>,
}

/// The start of a frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl Capture {
    /// Starts to listen.
    pub fn start(netns: &Netns) -> Result<Self> {
        let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
        let socket = netns.run(|| Socket::new(Domain::PACKET, Type::RAW, Some(protocol)))?;
        let socket = socket.context("opening a packet socket (this needs root)")?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        // Best effort; a test asserts on what was captured, not on all of it.
        let _ = socket.set_recv_buffer_size(8 << 20);
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        Ok(Self { stop, task: netns.spawn(move || listen(socket, &flag)) })
    }

    /// Stops and returns what passed.
    pub fn stop(self) -> Result<Vec<Frame>> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.join()
    }
}

fn listen(mut socket: Socket, stop: &AtomicBool) -> Result<Vec<Frame>> {
    use std::io::Read as _;
    let mut frames = vec![];
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        match socket.read(&mut buffer) {
            Ok(n) if frames.len() < MAX_FRAMES => {
                frames.push(Frame { bytes: buffer[..n.min(SNAP)].to_vec() });
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(frames)
}

impl Frame {
    /// Destination port and payload, if this is UDP over IPv4 or IPv6 and was captured whole.
    pub fn udp(&self) -> Option<(u16, &[u8])> {
        let (ethernet, packet) = self.bytes.split_at_checked(14)?;
        let (protocol, segment) = match u16::from_be_bytes([ethernet[12], ethernet[13]]) {
            ETH_P_IP => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                (*packet.get(9)?, packet.get(header..)?)
            }
            ETH_P_IPV6 => (*packet.get(6)?, packet.get(40..)?),
            _ => return None,
        };
        let header = segment.get(..8).filter(|_| protocol == UDP)?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        Some((u16::from_be_bytes([header[2], header[3]]), segment.get(8..length)?))
    }

    /// Source address and port, if this is UDP over IPv4 without IP options.
    pub fn source(&self) -> Option<SocketAddrV4> {
        self.udp()?;
        let (ip, port) = (self.bytes.get(26..30)?, self.bytes.get(34..36)?);
        let is_v4 = self.bytes[12..15] == [0x08, 0x00, 0x45];
        let octets: [u8; 4] = ip.try_into().ok().filter(|_| is_v4)?;
        Some(SocketAddrV4::new(octets.into(), u16::from_be_bytes(port.try_into().ok()?)))
    }

    /// Where it goes, if this is IPv4.
    pub fn destination(&self) -> Option<Ipv4Addr> {
        let (ethernet, packet) = self.bytes.split_at_checked(14)?;
        let ip = u16::from_be_bytes([ethernet[12], ethernet[13]]) == ETH_P_IP;
        let octets: [u8; 4] = packet.get(16..20).filter(|_| ip)?.try_into().ok()?;
        Some(octets.into())
    }

    /// Whether these bytes are anywhere in it.
    pub fn contains(&self, wanted: &[u8]) -> bool {
        self.bytes.windows(wanted.len()).any(|window| window == wanted)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn udp_payloads_are_found_and_rubbish_is_not() {
        let mut bytes = vec![0; 12];
        bytes.extend([0x08, 0x00, 0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0]);
        bytes.extend([192, 0, 2, 1, 192, 0, 2, 2, 0, 9, 0xca, 0xbc, 0, 10, 0, 0, 7, 8]);
        let frame = Frame { bytes };
        assert_eq!(frame.udp().unwrap(), (51900, &[7, 8][..]));
        assert_eq!(frame.source().unwrap(), "192.0.2.1:9".parse().unwrap());
        assert_eq!(frame.destination().unwrap(), Ipv4Addr::new(192, 0, 2, 2));
        assert!(frame.contains(&[7, 8]) && !frame.contains(&[8, 7]));
        for n in 0..frame.bytes.len() {
            assert!(Frame { bytes: frame.bytes[..n].to_vec() }.udp().is_none());
        }
    }
}
