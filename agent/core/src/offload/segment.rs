//! Splitting a superpacket from the TUN into the packets that it stands for.
//!
//! Done in place: before each segment's payload its headers are stamped over the consumed tail of
//! the segment before, so that every segment is one contiguous slice that can be sealed from where
//! it lies, and no payload is copied.

use super::vnet::{self, VnetHeader};
use super::{Checksum, MAX_SUPERPACKET_SEGMENTS};
use crate::drop::DropReason;
use crate::wire::checksum;
use crate::wire::ip::{IpHeader, TCP, UDP};
use crate::wire::tcp::{CWR, FIN, PSH};

/// Room for IPv4 60 + TCP 60, and for as much of IPv6 with extension headers.
const MAX_HEADERS: usize = 128;
/// Most segments of a TCP superpacket. Linux sends no segment below 8 bytes (TCP_MIN_SND_MSS less
/// all options); smaller ones are those that a receiver merged, and of those there are few.
const MAX_TCP_SEGMENTS: usize = 65_536 / 8;

const TCP_CSUM: usize = 16;
const UDP_CSUM: usize = 6;

/// The packets of one read, one after the other.
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a mut [u8],
    ip: IpHeader,
    checksum: Checksum,
    /// What to stamp; without it the packet is its one segment.
    template: Option<Template>,
    count: usize,
    next: usize,
}

/// Looks at one packet that was read with `vnet` before it.
///
/// # Errors
/// [`DropReason::EgressMalformed`] where it is no IP packet of this length, and
/// [`DropReason::VnetHeader`] where the header and the packet contradict each other.
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
    /// The superpacket's IP header.
    pub fn ip(&self) -> &IpHeader {
        &self.ip
    }

    /// State of the transport checksum in every segment.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// Number of segments, at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// IP length of the longest segment in bytes.
    pub fn max_segment_len(&self) -> usize {
        match &self.template {
            Some(template) => (template.headers + template.gso_size).min(self.packet.len()),
            None => self.packet.len(),
        }
    }

    /// The next packet, whole.
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
        // Behind extension headers or in a tunnel's payload: the receiver could not find it.
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
        let sound = found == protocol
            && vnet.flags & vnet::NEEDS_CSUM != 0
            && usize::from(vnet.csum_start) == at
            && usize::from(vnet.csum_offset) == offset
            && vnet.gso_size > 0;
        if !sound {
            return Err(DropReason::VnetHeader);
        }
        // The header length that the kernel gives is wrong on the forwarding path: look.
        let (transport, least, most) = match protocol {
            TCP => {
                let offset = self.packet.get(at + 12).ok_or(DropReason::EgressMalformed)? >> 4;
                (usize::from(offset) * 4, 20, MAX_TCP_SEGMENTS)
            }
            _ => (8, 8, MAX_SUPERPACKET_SEGMENTS),
        };
        let headers = at + transport;
        if transport < least || headers > MAX_HEADERS || headers >= self.packet.len() {
            return Err(DropReason::EgressMalformed);
        }
        self.count = (self.packet.len() - headers).div_ceil(usize::from(vnet.gso_size));
        if self.count > most {
            return Err(DropReason::VnetHeader);
        }
        let template = Template::new(self.packet, &self.ip, (at, headers), protocol, vnet.gso_size);
        // Behind extension headers the receiver could not find a partial checksum.
        self.checksum = if template.full { Checksum::Full } else { Checksum::Partial };
        self.template = Some(template);
        Ok(())
    }
}

/// What every segment's headers are made from, taken before the first stamp overwrites them.
#[derive(Debug)]
struct Template {
    bytes: [u8; MAX_HEADERS],
    /// Length of all headers in bytes.
    headers: usize,
    /// Where the transport header begins.
    at: usize,
    gso_size: usize,
    v6: bool,
    tcp: bool,
    /// Whether checksums must be computed, since no receiver would find them.
    full: bool,
    /// IPv4: the header's sum without length, identification and checksum.
    network_sum: u16,
    id: u16,
    /// The pseudo-header's sum without the length.
    seed: u16,
    sequence: u32,
}

impl Template {
    /// Of a superpacket whose lengths were checked.
    fn new(
        packet: &[u8],
        ip: &IpHeader,
        (at, headers): (usize, usize),
        protocol: u8,
        gso_size: u16,
    ) -> Self {
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
                let mut still = bytes;
                still[2..6].fill(0);
                still[10..12].fill(0);
                (checksum::sum(&still[..at], 0), word(4))
            }
        };
        let seed = match full {
            // A routing header puts another destination into the pseudo-header: take what the
            // kernel summed, less the length.
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

    /// Writes the headers of the segment of this number over the start of its slice.
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
#[path = "segment_tests.rs"]
mod tests;
