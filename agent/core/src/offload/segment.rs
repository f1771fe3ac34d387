//! Software GSO: segmentation of a superpacket from the TUN into the packets that it stands for.
//!
//! The segmentation is in place. The headers of each segment are written over the consumed end of
//! the segment before it, directly before the payload. Every segment is therefore one contiguous
//! slice that is sealed from its place, and no payload is copied.

use super::vnet::{self, VnetHeader};
use super::{Checksum, MAX_SUPERPACKET_SEGMENTS};
use crate::drop::DropReason;
use crate::wire::checksum;
use crate::wire::ip::{IpHeader, TCP, UDP};
use crate::wire::tcp::{CWR, FIN, PSH};

/// Maximum length of all headers in bytes: IPv4 (60) and TCP (60), or as much of IPv6 with
/// extension headers.
const MAX_HEADERS: usize = 128;
/// Maximum number of segments of a TCP superpacket. Linux sends no TCP segment with less than 8
/// bytes of payload (TCP_MIN_SND_MSS without the space for options). Smaller segments occur only in
/// superpackets that a receiver has merged (GRO), which have few segments.
const MAX_TCP_SEGMENTS: usize = 65_536 / 8;

const TCP_CSUM: usize = 16;
const UDP_CSUM: usize = 6;

/// Packets of one read from the TUN, in order.
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a mut [u8],
    ip: IpHeader,
    checksum: Checksum,
    /// Headers of the segments; `None` if the packet is a single one.
    template: Option<Template>,
    count: usize,
    next: usize,
}

/// Parses a packet that was read with the header `vnet` before it, and prepares its segments.
///
/// # Errors
/// [`DropReason::EgressMalformed`] if `packet` is not an IP packet of this length.
/// [`DropReason::VnetHeader`] if the header is invalid or contradicts the packet.
pub fn segment(vnet: VnetHeader, packet: &mut [u8]) -> Result<Segments<'_>, DropReason> {
    let ip = IpHeader::parse(packet).ok_or(DropReason::EgressMalformed)?;
    if ip.total_len != packet.len() {
        return Err(DropReason::EgressMalformed);
    }
    let mut segments =
        Segments { packet, ip, checksum: Checksum::Full, template: None, count: 1, next: 0 };
    match vnet.gso_type & !vnet::GSO_ECN {
        vnet::GSO_NONE => segments.single(vnet)?,
        vnet::GSO_TCPV4 if !ip.is_v6() => segments.superpacket(vnet, TCP)?,
        vnet::GSO_TCPV6 if ip.is_v6() => segments.superpacket(vnet, TCP)?,
        vnet::GSO_UDP_L4 if vnet.gso_type & vnet::GSO_ECN == 0 => {
            segments.superpacket(vnet, UDP)?
        }
        _ => return Err(DropReason::VnetHeader),
    }
    Ok(segments)
}

impl Segments<'_> {
    /// Returns the IP header of the superpacket.
    pub fn ip(&self) -> &IpHeader {
        &self.ip
    }

    /// Returns the state of the transport checksum in every segment.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// Returns the number of segments, at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the IP length of the longest segment in bytes.
    pub fn max_segment_len(&self) -> usize {
        match &self.template {
            Some(template) => (template.headers + template.gso_size).min(self.packet.len()),
            None => self.packet.len(),
        }
    }

    /// Returns the next segment, a whole IP packet; `None` after the last.
    pub fn next_segment(&mut self) -> Option<&[u8]> {
        let index = self.next;
        if index >= self.count {
            return None;
        }
        self.next += 1;
        let Some(template) = &self.template else { return Some(self.packet) };
        let start = index * template.gso_size;
        let end = (template.headers + start + template.gso_size).min(self.packet.len());
        let segment = &mut self.packet[start..end];
        template.stamp(segment, index, index + 1 == self.count);
        Some(segment)
    }

    fn single(&mut self, vnet: VnetHeader) -> Result<(), DropReason> {
        if vnet.flags & vnet::NEEDS_CSUM == 0 {
            return Ok(());
        }
        let (start, offset) = (usize::from(vnet.csum_start), usize::from(vnet.csum_offset));
        let at = start + offset;
        if start < self.ip.header_len || at + 2 > self.packet.len() {
            return Err(DropReason::VnetHeader);
        }
        if start == self.ip.header_len && self.ip.checksum_field() == Some(at) {
            self.checksum = Checksum::Partial;
            return Ok(());
        }
        // The checksum lies after extension headers or in the payload of a tunnel, where the
        // receiver could not find it. It is completed here.
        let sum = checksum::sum(&self.packet[start..], 0);
        let field = checksum::finish(sum, self.ip.transport(self.packet).map_or(UDP, |t| t.0));
        self.packet[at..at + 2].copy_from_slice(&field);
        Ok(())
    }

    fn superpacket(&mut self, vnet: VnetHeader, protocol: u8) -> Result<(), DropReason> {
        let offset = if protocol == TCP { TCP_CSUM } else { UDP_CSUM };
        let Some((found, at)) = self.ip.transport(self.packet) else {
            return Err(DropReason::VnetHeader);
        };
        let is_valid = found == protocol
            && vnet.flags & vnet::NEEDS_CSUM != 0
            && usize::from(vnet.csum_start) == at
            && usize::from(vnet.csum_offset) == offset
            && vnet.gso_size > 0;
        if !is_valid {
            return Err(DropReason::VnetHeader);
        }
        // The kernel's header length is wrong on the forwarding path, so it is read from the
        // packet.
        let (transport, min_transport, max_segments) = match protocol {
            TCP => {
                let offset = self.packet.get(at + 12).ok_or(DropReason::EgressMalformed)? >> 4;
                (usize::from(offset) * 4, 20, MAX_TCP_SEGMENTS)
            }
            _ => (8, 8, MAX_SUPERPACKET_SEGMENTS),
        };
        let headers = at + transport;
        if transport < min_transport || headers > MAX_HEADERS || headers >= self.packet.len() {
            return Err(DropReason::EgressMalformed);
        }
        self.count = (self.packet.len() - headers).div_ceil(usize::from(vnet.gso_size));
        if self.count > max_segments {
            return Err(DropReason::VnetHeader);
        }
        let layout = SegmentLayout { at, headers, protocol, gso_size: vnet.gso_size };
        let template = Template::new(self.packet, &self.ip, layout);
        // A receiver could not find a partial checksum after extension headers.
        self.checksum = if template.full { Checksum::Full } else { Checksum::Partial };
        self.template = Some(template);
        Ok(())
    }
}

/// Header template of all segments, copied before the first segment overwrites the headers.
#[derive(Debug)]
struct Template {
    bytes: [u8; MAX_HEADERS],
    /// Length of all headers in bytes.
    headers: usize,
    /// Offset of the transport header in bytes.
    at: usize,
    gso_size: usize,
    v6: bool,
    tcp: bool,
    /// True if complete checksums must be computed, because no receiver would find partial ones.
    full: bool,
    /// IPv4: the sum of the header without length, identification and checksum.
    network_sum: u16,
    id: u16,
    /// Sum of the pseudo-header without the length.
    seed: u16,
    sequence: u32,
}

/// Layout of the segments of a superpacket.
#[derive(Debug, Clone, Copy)]
struct SegmentLayout {
    /// Offset of the transport header in bytes.
    at: usize,
    /// Length of all headers in bytes.
    headers: usize,
    /// Transport protocol, TCP or UDP.
    protocol: u8,
    /// Payload of every segment but the last, bytes.
    gso_size: u16,
}

impl Template {
    /// Creates the template of a superpacket whose lengths have been checked.
    fn new(packet: &[u8], ip: &IpHeader, layout: SegmentLayout) -> Self {
        let SegmentLayout { at, headers, protocol, gso_size } = layout;
        let mut bytes = [0; MAX_HEADERS];
        bytes[..headers].copy_from_slice(&packet[..headers]);
        let v6 = ip.is_v6();
        let tcp = protocol == TCP;
        let full = at != ip.header_len;
        let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let field = at + if tcp { TCP_CSUM } else { UDP_CSUM };
        let (network_sum, id) = match v6 {
            true => (0, 0),
            false => {
                let mut constant = bytes;
                constant[2..6].fill(0);
                constant[10..12].fill(0);
                (checksum::sum(&constant[..at], 0), word(4))
            }
        };
        let seed = match full {
            // A routing header changes the destination in the pseudo-header, so the kernel's sum
            // less the length is used.
            true => {
                checksum::fold(u64::from(word(field)) + u64::from(!((packet.len() - at) as u16)))
            }
            false => checksum::pseudo_header(ip.source, ip.destination, protocol, 0),
        };
        let sequence = match tcp {
            true => u32::from(word(at + 4)) << 16 | u32::from(word(at + 6)),
            false => 0,
        };
        Self {
            bytes,
            headers,
            at,
            gso_size: usize::from(gso_size),
            v6,
            tcp,
            full,
            network_sum,
            id,
            seed,
            sequence,
        }
    }

    /// Writes the headers of the segment with this index to the start of its slice.
    #[inline]
    fn stamp(&self, segment: &mut [u8], index: usize, last: bool) {
        let length = segment.len();
        let (headers, payload) = segment.split_at_mut(self.headers);
        headers.copy_from_slice(&self.bytes[..self.headers]);
        let (network, transport) = headers.split_at_mut(self.at);
        if self.v6 {
            network[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
        } else {
            let id = self.id.wrapping_add(index as u16);
            let sum = u64::from(self.network_sum) + length as u64 + u64::from(id);
            network[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            network[4..6].copy_from_slice(&id.to_be_bytes());
            network[10..12].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
        }
        let transport_len = length - self.at;
        let seed = checksum::fold(u64::from(self.seed) + transport_len as u64);
        if self.tcp {
            let sequence = self.sequence.wrapping_add((index * self.gso_size) as u32);
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            if !last {
                transport[13] &= !(FIN | PSH);
            }
            if index > 0 {
                transport[13] &= !CWR;
            }
            transport[TCP_CSUM..TCP_CSUM + 2].copy_from_slice(&seed.to_be_bytes());
        } else {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
            transport[UDP_CSUM..UDP_CSUM + 2].copy_from_slice(&seed.to_be_bytes());
        }
        if self.full {
            let (field, protocol) = if self.tcp { (TCP_CSUM, TCP) } else { (UDP_CSUM, UDP) };
            let sum = checksum::sum(payload, checksum::sum(transport, 0));
            transport[field..field + 2].copy_from_slice(&checksum::finish(sum, protocol));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
