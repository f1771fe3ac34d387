//! Packets for the tests of segmentation and coalescing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Checksum;
use super::coalesce::{CoalesceConfig, Coalescer};
use super::vnet::{self, VnetHeader};
use crate::wire::checksum;
use crate::wire::ip::{IpHeader, TCP, UDP};

use crate::wire::tcp::ACK;

/// Builder of a packet. The default values are those of an ordinary flow.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    pub(crate) v6: bool,
    pub(crate) udp: bool,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) dont_fragment: bool,
    pub(crate) more_fragments: bool,
    pub(crate) id: u16,
    pub(crate) ip_options: Vec<u8>,
    pub(crate) source_port: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    pub(crate) checksum: Checksum,
}

impl Packet {
    pub(crate) fn tcp(sequence: u32, length: usize) -> Self {
        Self {
            v6: false,
            udp: false,
            tos: 0,
            ttl: 64,
            dont_fragment: true,
            more_fragments: false,
            id: 7,
            ip_options: Vec::new(),
            source_port: 1000,
            sequence,
            acknowledgement: 99,
            flags: ACK,
            window: 500,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload: (0..length).map(|i| (i as u32).wrapping_add(sequence) as u8).collect(),
            checksum: Checksum::Partial,
        }
    }

    pub(crate) fn udp(length: usize) -> Self {
        Self { udp: true, ..Self::tcp(0, length) }
    }

    pub(crate) fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Returns the length of IP and transport header in bytes.
    pub(crate) fn headers(&self) -> usize {
        let ip = if self.v6 { 40 } else { 20 } + self.ip_options.len();
        ip + if self.udp { 8 } else { 20 + self.options.len() }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let transport_len = self.headers() - if self.v6 { 40 } else { 20 } - self.ip_options.len()
            + self.payload.len();
        let protocol = if self.udp { UDP } else { TCP };
        let (source, destination): (IpAddr, IpAddr) = if self.v6 {
            (
                Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 5).into(),
                Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 6).into(),
            )
        } else {
            (Ipv4Addr::new(10, 244, 1, 5).into(), Ipv4Addr::new(10, 244, 2, 6).into())
        };
        let mut bytes = Vec::new();
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = 20 + self.ip_options.len();
                bytes.extend([0x40 | (header / 4) as u8, self.tos]);
                bytes.extend(((header + transport_len) as u16).to_be_bytes());
                bytes.extend(self.id.to_be_bytes());
                let fragment =
                    u8::from(self.dont_fragment) << 6 | u8::from(self.more_fragments) << 5;
                bytes.extend([fragment, 0, self.ttl, protocol, 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(&self.ip_options);
                let sum = !checksum::sum(&bytes, 0);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend([0x60 | self.tos >> 4, self.tos << 4, 0, 1]);
                bytes.extend((transport_len as u16).to_be_bytes());
                bytes.extend([protocol, self.ttl]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            _ => unreachable!("both are of one family"),
        }
        let at = bytes.len();
        bytes.extend(self.source_port.to_be_bytes());
        bytes.extend(80u16.to_be_bytes());
        if self.udp {
            bytes.extend((transport_len as u16).to_be_bytes());
            bytes.extend([0, 0]);
        } else {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend(self.acknowledgement.to_be_bytes());
            bytes.extend([(((20 + self.options.len()) / 4) << 4) as u8, self.flags]);
            bytes.extend(self.window.to_be_bytes());
            bytes.extend([0, 0, 0, 0]);
            bytes.extend(&self.options);
        }
        bytes.extend(&self.payload);
        let seed = checksum::pseudo_header(source, destination, protocol, transport_len);
        let value = match self.checksum {
            Checksum::Partial => seed,
            Checksum::Full => match !checksum::sum(&bytes[at..], seed) {
                0 if self.udp => 0xffff,
                sum => sum,
            },
        };
        let field = at + if self.udp { 6 } else { 16 };
        bytes[field..field + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    /// Returns the vnet header of this packet as a superpacket from the kernel.
    pub(crate) fn vnet(&self, gso_size: u16) -> VnetHeader {
        let start = if self.v6 { 40 } else { 20 } + self.ip_options.len() as u16;
        VnetHeader {
            flags: vnet::NEEDS_CSUM,
            gso_type: match (self.udp, self.v6) {
                (true, _) => vnet::GSO_UDP_L4,
                (_, true) => vnet::GSO_TCPV6,
                (_, false) => vnet::GSO_TCPV4,
            },
            // The kernel's value is wrong on the forwarding path, so no code may use it.
            hdr_len: 3,
            gso_size,
            csum_start: start,
            csum_offset: if self.udp { 6 } else { 16 },
        }
    }
}

pub(crate) const ALL: CoalesceConfig =
    CoalesceConfig { tcp: true, udp: true, partial_checksum: true };

/// A write to the TUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) vnet: VnetHeader,
    pub(crate) bytes: Vec<u8>,
    pub(crate) segments: usize,
}

/// Pushes packets from one arena, flushes, and returns the writes.
pub(crate) fn coalesce_with(
    config: CoalesceConfig,
    packets: &[(Vec<u8>, Checksum)],
) -> Vec<Written> {
    let mut coalescer = Coalescer::new(config);
    let mut arena: Vec<u8> = packets.iter().flat_map(|(bytes, _)| bytes).copied().collect();
    let mut at = 0;
    for (bytes, checksum) in packets {
        let range = at..at + bytes.len();
        at = range.end;
        if let Some(ip) = IpHeader::parse(bytes) {
            assert_eq!(ip.total_len, bytes.len());
            coalescer.push(&mut arena, range, &ip, *checksum);
        }
    }
    let mut written = Vec::new();
    coalescer.flush(&arena, |packet| {
        let mut bytes = packet.header.to_vec();
        for slice in packet.payload {
            bytes.extend(&arena[slice.offset..slice.offset + slice.len]);
        }
        assert_eq!(bytes.len(), packet.len);
        let vnet = VnetHeader::parse(&packet.vnet).expect("ten bytes");
        written.push(Written { vnet, bytes, segments: packet.segments });
    });
    assert!(coalescer.is_empty());
    written
}

/// Coalesces packets with all offloads enabled.
pub(crate) fn coalesce(packets: &[Packet]) -> Vec<Written> {
    let packets: Vec<_> = packets.iter().map(|p| (p.bytes(), p.checksum)).collect();
    coalesce_with(ALL, &packets)
}

/// Returns the number of segments of each write.
pub(crate) fn shape(packets: &[Packet]) -> Vec<usize> {
    coalesce(packets).iter().map(|written| written.segments).collect()
}
