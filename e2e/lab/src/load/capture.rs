//! Packet capture on the switch: the view of an attacker on the underlay.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Netns, Task};

/// Maximum number of frames in a capture; later ones are dropped.
const MAX_FRAMES: usize = 200_000;
/// Bytes of a frame that a capture keeps.
const SNAPLEN: usize = 2048;

const ETH_P_ALL: u16 = 0x0003;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const UDP: u8 = 17;

/// A running capture of all frames on all interfaces of a namespace.
pub struct Capture {
    stop: Arc<AtomicBool>,
    task: Task<Vec<Frame>>,
}

/// The first bytes of a captured frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// First 2048 bytes at most, from the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl Capture {
    /// Opens a packet socket in the namespace and starts to capture.
    ///
    /// # Errors
    /// If the process has no CAP_NET_RAW.
    pub fn start(netns: &Netns) -> Result<Self> {
        let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
        let socket = netns.run(|| Socket::new(Domain::PACKET, Type::RAW, Some(protocol)))?;
        let socket = socket.context("cannot open a packet socket. Run this as root.")?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        // Best effort: tests check the captured frames, not their number.
        let _ = socket.set_recv_buffer_size(8 << 20);
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        Ok(Self { stop, task: netns.spawn(move || listen(socket, &flag)) })
    }

    /// Stops the capture and returns its frames.
    ///
    /// # Errors
    /// If reading from the socket failed.
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
                frames.push(Frame { bytes: buffer[..n.min(SNAPLEN)].to_vec() });
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(frames)
}

impl Frame {
    /// Returns the destination port and the payload, if the frame is a complete UDP datagram over
    /// IPv4 or over IPv6 without extension headers.
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

    /// Returns the source address and port, if the frame is UDP over IPv4 without IP options.
    pub fn source(&self) -> Option<SocketAddrV4> {
        self.udp()?;
        let (ip, port) = (self.bytes.get(26..30)?, self.bytes.get(34..36)?);
        let is_v4 = self.bytes[12..15] == [0x08, 0x00, 0x45];
        let octets: [u8; 4] = ip.try_into().ok().filter(|_| is_v4)?;
        Some(SocketAddrV4::new(octets.into(), u16::from_be_bytes(port.try_into().ok()?)))
    }

    /// Returns the destination address, if the frame is IPv4.
    pub fn destination(&self) -> Option<Ipv4Addr> {
        let (ethernet, packet) = self.bytes.split_at_checked(14)?;
        let ip = u16::from_be_bytes([ethernet[12], ethernet[13]]) == ETH_P_IP;
        let octets: [u8; 4] = packet.get(16..20).filter(|_| ip)?.try_into().ok()?;
        Some(octets.into())
    }

    /// Returns whether the frame contains `wanted`.
    ///
    /// # Panics
    /// If `wanted` is empty.
    pub fn contains(&self, wanted: &[u8]) -> bool {
        self.bytes.windows(wanted.len()).any(|window| window == wanted)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn udp_payload_is_found_only_in_complete_frames() {
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
