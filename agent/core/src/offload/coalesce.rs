//! Merging packets of one flow into superpackets for the TUN: the inverse of `split`.
//!
//! Packets are taken in the order of transmission. One is appended to its flow's superpacket only
//! if splitting the result would give back exactly what came in, checksums aside; everything else
//! goes as it is, in its place. Payloads are never copied: a superpacket is a header and slices of
//! the receive arena.

use std::ops::Range;

use super::vnet::{self, VnetHeader};
use super::{Checksum, MAX_SEGMENTS};
use crate::wire::checksum;
use crate::wire::ip::{IpHeader, TCP, UDP};
use crate::wire::tcp::{ACK, ECE, PSH};

/// Superpackets that may grow at the same time; the oldest makes room.
const OPEN: usize = 16;
const NONE: u32 = u32::MAX;

/// A piece of the receive arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// First byte.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

/// What may be written to the TUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoalesceConfig {
    /// TCP superpackets.
    pub tcp: bool,
    /// UDP superpackets (UDP_L4, Linux 6.2).
    pub udp: bool,
    /// NEEDS_CSUM. Without it nothing is merged, and partial checksums are completed here.
    pub partial_checksum: bool,
}

/// One write to the TUN: header, then slices.
#[derive(Debug)]
pub struct TunPacket<'a> {
    /// The virtio_net_hdr.
    pub vnet: [u8; VnetHeader::LEN],
    /// Headers of a superpacket; empty where the slices hold the whole packet.
    pub header: &'a [u8],
    /// The rest, in order.
    pub payload: &'a [Slice],
    /// Packets that it stands for.
    pub segments: usize,
    /// IP length in bytes.
    pub len: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Coalescer {
    config: CoalesceConfig,
    items: Vec<Item>,
    /// Items that may grow, the most recently touched last.
    open: Vec<u32>,
    /// (slice, next slice of the same item)
    slices: Vec<(Slice, u32)>,
    header: Vec<u8>,
    gathered: Vec<Slice>,
}

#[derive(Debug)]
struct Item {
    /// The first packet, whole.
    first: Slice,
    kind: Kind,
    checksum: Checksum,
    /// Whether the first packet's full checksum was found right.
    verified: bool,
    headers: usize,
    gso_size: usize,
    payload: usize,
    segments: usize,
    psh: bool,
    next_sequence: u32,
    next_id: u16,
    first_slice: u32,
    last_slice: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Verbatim,
    Tcp,
    Udp,
}

/// What a packet is for its flow.
enum Class {
    /// May start or extend a superpacket.
    Candidate { kind: Kind, headers: usize, sequence: u32, psh: bool },
    /// Goes as it is and concerns no superpacket.
    Pure,
    /// Goes as it is; nothing later of its flow may join what came before it.
    Seals,
}

impl Coalescer {
    /// An empty one.
    pub fn new(config: CoalesceConfig) -> Self {
        Self {
            config,
            items: Vec::with_capacity(256),
            open: Vec::with_capacity(OPEN),
            slices: Vec::with_capacity(1024),
            header: Vec::with_capacity(128),
            gathered: Vec::with_capacity(MAX_SEGMENTS),
        }
    }

    /// Changes what may be written; what was pushed already keeps its form.
    pub fn set_config(&mut self, config: CoalesceConfig) {
        self.config = config;
    }

    /// Whether nothing was pushed since the last flush.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes the whole inner packet at `at`, whose header is `ip`.
    pub fn push(&mut self, arena: &mut [u8], at: Range<usize>, ip: &IpHeader, checksum: Checksum) {
        let first = Slice { offset: at.start, len: at.len() };
        let partial = checksum == Checksum::Partial && partial_field(ip).is_some();
        let checksum = if partial { Checksum::Partial } else { Checksum::Full };
        if !self.config.partial_checksum {
            if partial {
                complete(&mut arena[at], ip);
            }
            return self.verbatim(first, Checksum::Full, ip);
        }
        let packet = &arena[at.clone()];
        match self.classify(packet, ip, checksum) {
            Class::Candidate { kind, headers, sequence, psh } => {
                if let Some(position) = self.find_open(arena, packet, ip, kind) {
                    let index = self.open[position];
                    if self.extends(arena, index, packet, ip, headers, sequence, checksum) {
                        return self.extend(position, first, headers, psh);
                    }
                    self.open.remove(position);
                }
                self.start(packet, first, ip, kind, checksum, headers, sequence, psh);
            }
            Class::Pure => self.verbatim(first, checksum, ip),
            Class::Seals => {
                self.seal(arena, packet, ip);
                self.verbatim(first, checksum, ip);
            }
        }
    }

    /// Hands out everything, each flow in its order, and starts anew.
    pub fn flush(&mut self, arena: &[u8], mut sink: impl FnMut(TunPacket<'_>)) {
        for item in &self.items {
            if item.segments == 1 {
                sink(TunPacket {
                    vnet: single_vnet(item, arena).to_bytes(),
                    header: &[],
                    payload: &[item.first],
                    segments: 1,
                    len: item.first.len,
                });
                continue;
            }
            self.gathered.clear();
            let mut next = item.first_slice;
            while let Some(&(slice, following)) = self.slices.get(next as usize) {
                self.gathered.push(slice);
                next = following;
            }
            self.header.clear();
            self.header
                .extend_from_slice(&arena[item.first.offset..item.first.offset + item.headers]);
            let vnet = merge_header(&mut self.header, item);
            sink(TunPacket {
                vnet: vnet.to_bytes(),
                header: &self.header,
                payload: &self.gathered,
                segments: item.segments,
                len: item.headers + item.payload,
            });
        }
        self.items.clear();
        self.open.clear();
        self.slices.clear();
    }

    fn classify(&self, packet: &[u8], ip: &IpHeader, checksum: Checksum) -> Class {
        let plain = !ip.fragment && ip.header_len == if ip.is_v6() { 40 } else { 20 };
        let transport = &packet[ip.header_len..];
        if !plain {
            return Class::Seals;
        }
        match (ip.protocol, transport) {
            (TCP, [_, _, _, _, s0, s1, s2, s3, _, _, _, _, offset, flags, ..])
                if transport.len() >= 20 =>
            {
                let length = usize::from(offset >> 4) * 4;
                if length < 20 || length > transport.len() || flags & !(PSH | ECE) != ACK {
                    return Class::Seals;
                }
                if length == transport.len() {
                    return Class::Pure;
                }
                match self.config.tcp {
                    true => Class::Candidate {
                        kind: Kind::Tcp,
                        headers: ip.header_len + length,
                        sequence: u32::from_be_bytes([*s0, *s1, *s2, *s3]),
                        psh: flags & PSH != 0,
                    },
                    false => Class::Pure,
                }
            }
            (UDP, [_, _, _, _, l0, l1, c0, c1, ..]) => {
                let length = usize::from(u16::from_be_bytes([*l0, *l1]));
                let unchecked = checksum == Checksum::Full && [*c0, *c1] == [0, 0];
                if length != transport.len() || length == 8 || unchecked {
                    return Class::Seals;
                }
                match self.config.udp {
                    true => Class::Candidate {
                        kind: Kind::Udp,
                        headers: ip.header_len + 8,
                        sequence: 0,
                        psh: false,
                    },
                    false => Class::Pure,
                }
            }
            (TCP | UDP, _) => Class::Seals,
            // No superpacket is of another protocol.
            _ => Class::Pure,
        }
    }

    /// Position in `open` of the superpacket of this packet's flow, the latest first.
    fn find_open(&self, arena: &[u8], packet: &[u8], ip: &IpHeader, kind: Kind) -> Option<usize> {
        self.open.iter().rposition(|&index| {
            let item = &self.items[index as usize];
            let first = &arena[item.first.offset..item.first.offset + item.first.len];
            item.kind == kind && same_flow(first, packet, ip)
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn extends(
        &mut self,
        arena: &[u8],
        index: u32,
        packet: &[u8],
        ip: &IpHeader,
        headers: usize,
        sequence: u32,
        checksum: Checksum,
    ) -> bool {
        let item = &mut self.items[index as usize];
        let first = &arena[item.first.offset..item.first.offset + item.first.len];
        let payload = packet.len() - headers;
        let fits = item.checksum == checksum
            && item.headers == headers
            && payload <= item.gso_size
            && item.segments < MAX_SEGMENTS
            && item.headers + item.payload + payload <= usize::from(u16::MAX)
            && (item.kind != Kind::Tcp || item.next_sequence == sequence)
            && same_headers(first, packet, ip, item);
        if !fits {
            return false;
        }
        if checksum == Checksum::Full {
            // Merging writes a fresh checksum: it must not hide a wrong one.
            item.verified = item.verified || transport_sum(first, ip) == 0xffff;
            return item.verified && transport_sum(packet, ip) == 0xffff;
        }
        true
    }

    fn extend(&mut self, position: usize, packet: Slice, headers: usize, psh: bool) {
        let index = self.open[position];
        let item = &mut self.items[index as usize];
        let payload = Slice { offset: packet.offset + headers, len: packet.len - headers };
        let slice = self.slices.len() as u32;
        self.slices.push((payload, NONE));
        self.slices[item.last_slice as usize].1 = slice;
        item.last_slice = slice;
        item.payload += payload.len;
        item.segments += 1;
        item.next_sequence = item.next_sequence.wrapping_add(payload.len as u32);
        item.next_id = item.next_id.wrapping_add(1);
        item.psh = psh;
        if psh || payload.len < item.gso_size {
            self.open.remove(position);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn start(
        &mut self,
        packet: &[u8],
        first: Slice,
        ip: &IpHeader,
        kind: Kind,
        checksum: Checksum,
        headers: usize,
        sequence: u32,
        psh: bool,
    ) {
        let payload = Slice { offset: first.offset + headers, len: first.len - headers };
        let slice = self.slices.len() as u32;
        self.slices.push((payload, NONE));
        let id = if ip.is_v6() { 0 } else { u16::from_be_bytes([packet[4], packet[5]]) };
        let index = self.items.len() as u32;
        self.items.push(Item {
            first,
            kind,
            checksum,
            verified: false,
            headers,
            gso_size: payload.len,
            payload: payload.len,
            segments: 1,
            psh,
            next_sequence: sequence.wrapping_add(payload.len as u32),
            next_id: id.wrapping_add(1),
            first_slice: slice,
            last_slice: slice,
        });
        if !psh {
            if self.open.len() == OPEN {
                self.open.remove(0);
            }
            self.open.push(index);
        }
    }

    fn verbatim(&mut self, first: Slice, checksum: Checksum, ip: &IpHeader) {
        self.items.push(Item {
            first,
            kind: match (checksum, ip.protocol) {
                (Checksum::Partial, TCP) => Kind::Tcp,
                (Checksum::Partial, UDP) => Kind::Udp,
                _ => Kind::Verbatim,
            },
            checksum,
            verified: false,
            headers: ip.header_len,
            gso_size: 0,
            payload: 0,
            segments: 1,
            psh: false,
            next_sequence: 0,
            next_id: 0,
            first_slice: NONE,
            last_slice: NONE,
        });
    }

    fn seal(&mut self, arena: &[u8], packet: &[u8], ip: &IpHeader) {
        let items = &self.items;
        self.open.retain(|&index| {
            let item = &items[index as usize];
            let first = &arena[item.first.offset..item.first.offset + item.first.len];
            // A fragment has no ports to go by, options move them: the addresses decide.
            !same_addresses(first, packet, ip)
        });
    }
}

fn same_addresses(first: &[u8], packet: &[u8], ip: &IpHeader) -> bool {
    let range = if ip.is_v6() { 8..40 } else { 12..20 };
    first[0] >> 4 == packet[0] >> 4 && first[range.clone()] == packet[range]
}

/// Both are candidates, so that neither has options or extension headers.
fn same_flow(first: &[u8], packet: &[u8], ip: &IpHeader) -> bool {
    let ports = ip.header_len..ip.header_len + 4;
    same_addresses(first, packet, ip) && first[ports.clone()] == packet[ports]
}

/// Whether `packet` has the headers that splitting would give the next segment of `item`.
fn same_headers(first: &[u8], packet: &[u8], ip: &IpHeader, item: &Item) -> bool {
    let network = if ip.is_v6() {
        // traffic class and flow label, hop limit
        first[..4] == packet[..4] && first[7] == packet[7]
    } else {
        let dont_fragment = packet[6] & 0x40 != 0;
        let id = u16::from_be_bytes([packet[4], packet[5]]);
        first[1] == packet[1]
            && first[6..9] == packet[6..9]
            && (dont_fragment || id == item.next_id)
    };
    if item.kind == Kind::Udp || !network {
        return network;
    }
    let (a, b) = (&first[ip.header_len..item.headers], &packet[ip.header_len..item.headers]);
    // acknowledgement and data offset; flags but PSH; window; urgent pointer and options
    a[8..13] == b[8..13]
        && (a[13] ^ b[13]) & !PSH == 0
        && a[14..16] == b[14..16]
        && a[18..] == b[18..]
}

/// Sum over the pseudo-header and the transport: 0xffff where the checksum is right.
fn transport_sum(packet: &[u8], ip: &IpHeader) -> u16 {
    let transport = &packet[ip.header_len..];
    let seed = checksum::pseudo_header(ip.source, ip.destination, ip.protocol, transport.len());
    checksum::sum(transport, seed)
}

/// Where the checksum field of a packet lies whose checksum may be partial.
fn partial_field(ip: &IpHeader) -> Option<usize> {
    let (offset, least) = match ip.protocol {
        TCP => (16, 20),
        UDP => (6, 8),
        _ => return None,
    };
    (!ip.fragment && ip.total_len >= ip.header_len + least).then_some(ip.header_len + offset)
}

fn complete(packet: &mut [u8], ip: &IpHeader) {
    let Some(field) = partial_field(ip) else { return };
    // The field holds the pseudo-header's sum already.
    let sum = !checksum::sum(&packet[ip.header_len..ip.total_len], 0);
    let sum = if sum == 0 && ip.protocol == UDP { 0xffff } else { sum };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

fn csum_offset(kind: Kind) -> u16 {
    if kind == Kind::Udp { 6 } else { 16 }
}

fn single_vnet(item: &Item, arena: &[u8]) -> VnetHeader {
    if item.checksum == Checksum::Full || item.kind == Kind::Verbatim {
        return VnetHeader::default();
    }
    let first = arena[item.first.offset];
    let start = if first >> 4 == 6 { 40 } else { u16::from(first & 0xf) * 4 };
    VnetHeader {
        flags: vnet::NEEDS_CSUM,
        csum_start: start,
        csum_offset: csum_offset(item.kind),
        ..VnetHeader::default()
    }
}

fn merge_header(header: &mut [u8], item: &Item) -> VnetHeader {
    let v6 = header[0] >> 4 == 6;
    let start = if v6 { 40 } else { 20 };
    let length = item.headers + item.payload;
    let transport = length - start;
    if v6 {
        header[4..6].copy_from_slice(&(transport as u16).to_be_bytes());
    } else {
        header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        header[10..12].fill(0);
        let sum = !checksum::sum(&header[..20], 0);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    if item.kind == Kind::Udp {
        header[start + 4..start + 6].copy_from_slice(&(transport as u16).to_be_bytes());
    } else if item.psh {
        header[start + 13] |= PSH;
    }
    let addresses = if v6 { 8..40 } else { 12..20 };
    let protocol = if item.kind == Kind::Udp { UDP } else { TCP };
    let seed = checksum::fold(u64::from(protocol) + transport as u64);
    let seed = checksum::sum(&header[addresses], seed);
    let field = start + usize::from(csum_offset(item.kind));
    header[field..field + 2].copy_from_slice(&seed.to_be_bytes());
    VnetHeader {
        flags: vnet::NEEDS_CSUM,
        gso_type: match (item.kind, v6) {
            (Kind::Udp, _) => vnet::GSO_UDP_L4,
            (_, false) => vnet::GSO_TCPV4,
            (_, true) => vnet::GSO_TCPV6,
        },
        hdr_len: item.headers as u16,
        gso_size: item.gso_size as u16,
        csum_start: start as u16,
        csum_offset: csum_offset(item.kind),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "coalesce_tests.rs"]
mod tests;
