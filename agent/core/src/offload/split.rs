//! Splitting a superpacket from the TUN into the packets that it stands for.
//!
//! Done in place: before each segment's payload its headers are stamped over the consumed tail of
//! the segment before, so that every segment is one contiguous slice that can be sealed from where
//! it lies, and no payload is copied.

use super::vnet::{self, VnetHeader};
use super::{Checksum, MAX_SEGMENTS};
use crate::drop::DropReason;
use crate::wire::checksum;
use crate::wire::ip::{IpHeader, TCP, UDP};
use crate::wire::tcp::{CWR, FIN, PSH};

/// IPv4 60 + TCP 60; IPv6 with extension headers is not split.
const MAX_HEADERS: usize = 128;

const TCP_CSUM: usize = 16;
const UDP_CSUM: usize = 6;

/// The packets of one read, one after the other.
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a mut [u8],
    ip: IpHeader,
    checksum: Checksum,
    /// Whether there is anything to stamp; else the packet is its one segment.
    gso: bool,
    /// Both headers as they were before the first stamp.
    template: [u8; MAX_HEADERS],
    headers: usize,
    gso_size: usize,
    count: usize,
    next: usize,
}

/// Looks at one packet that was read with `vnet` before it.
///
/// # Errors
/// [`DropReason::EgressMalformed`] where it is no IP packet of this length, and
/// [`DropReason::VnetHeader`] where the header and the packet contradict each other.
pub fn split(vnet: VnetHeader, packet: &mut [u8]) -> Result<Segments<'_>, DropReason> {
    let ip = IpHeader::parse(packet).ok_or(DropReason::EgressMalformed)?;
    if ip.total_len != packet.len() {
        return Err(DropReason::EgressMalformed);
    }
    let mut segments = Segments {
        ip,
        checksum: Checksum::Full,
        gso: false,
        template: [0; MAX_HEADERS],
        headers: 0,
        gso_size: 0,
        count: 1,
        next: 0,
        packet,
    };
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
        match self.gso {
            true => (self.headers + self.gso_size).min(self.packet.len()),
            false => self.packet.len(),
        }
    }

    /// The next packet, whole.
    pub fn next_segment(&mut self) -> Option<&[u8]> {
        let index = self.next;
        if index >= self.count {
            return None;
        }
        self.next += 1;
        if !self.gso {
            return Some(self.packet);
        }
        let start = index * self.gso_size;
        let end = (self.headers + start + self.gso_size).min(self.packet.len());
        let segment = &mut self.packet[start..end];
        segment[..self.headers].copy_from_slice(&self.template[..self.headers]);
        stamp(segment, &self.ip, index, index + 1 == self.count, self.gso_size);
        Some(segment)
    }

    fn single(&mut self, vnet: VnetHeader) -> Result<(), DropReason> {
        if vnet.flags & vnet::NEEDS_CSUM == 0 {
            return Ok(());
        }
        let (start, offset) = (usize::from(vnet.csum_start), usize::from(vnet.csum_offset));
        let at = start + offset;
        if at + 2 > self.packet.len() {
            return Err(DropReason::VnetHeader);
        }
        let usual = match self.ip.protocol {
            TCP => Some(TCP_CSUM),
            UDP => Some(UDP_CSUM),
            _ => None,
        };
        if start == self.ip.header_len && usual == Some(offset) && !self.ip.fragment {
            self.checksum = Checksum::Partial;
            return Ok(());
        }
        // Somewhere else (SCTP-less tunnels, extension headers): the receiver could not find it.
        let sum = !checksum::sum(&self.packet[start..], 0);
        let sum = if sum == 0 { 0xffff } else { sum };
        self.packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        Ok(())
    }

    fn superpacket(&mut self, vnet: VnetHeader, protocol: u8) -> Result<(), DropReason> {
        let at = self.ip.header_len;
        let offset = if protocol == TCP { TCP_CSUM } else { UDP_CSUM };
        let sound = self.ip.protocol == protocol
            && !self.ip.fragment
            && vnet.flags & vnet::NEEDS_CSUM != 0
            && usize::from(vnet.csum_start) == at
            && usize::from(vnet.csum_offset) == offset
            && vnet.gso_size > 0;
        if !sound {
            return Err(DropReason::VnetHeader);
        }
        // The header length that the kernel gives is wrong on the forwarding path: look.
        let transport = match protocol {
            TCP => {
                usize::from(self.packet.get(at + 12).ok_or(DropReason::EgressMalformed)? >> 4) * 4
            }
            _ => 8,
        };
        let least = if protocol == TCP { 20 } else { 8 };
        let headers = at + transport;
        if transport < least || headers > MAX_HEADERS || headers >= self.packet.len() {
            return Err(DropReason::EgressMalformed);
        }
        self.gso_size = usize::from(vnet.gso_size);
        self.count = (self.packet.len() - headers).div_ceil(self.gso_size);
        if protocol == UDP && self.count > MAX_SEGMENTS {
            return Err(DropReason::VnetHeader);
        }
        self.template[..headers].copy_from_slice(&self.packet[..headers]);
        self.headers = headers;
        self.gso = true;
        self.checksum = Checksum::Partial;
        Ok(())
    }
}

/// Makes the headers, which are the superpacket's, those of one segment.
fn stamp(segment: &mut [u8], ip: &IpHeader, index: usize, last: bool, gso_size: usize) {
    let length = segment.len();
    let at = ip.header_len;
    if ip.is_v6() {
        segment[4..6].copy_from_slice(&((length - at) as u16).to_be_bytes());
    } else {
        let id = u16::from_be_bytes([segment[4], segment[5]]).wrapping_add(index as u16);
        segment[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        segment[4..6].copy_from_slice(&id.to_be_bytes());
        segment[10..12].fill(0);
        let sum = !checksum::sum(&segment[..at], 0);
        segment[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let seed = checksum::pseudo_header(ip.source, ip.destination, ip.protocol, length - at);
    let transport = &mut segment[at..];
    if ip.protocol == TCP {
        let first = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
        let sequence = first.wrapping_add((index * gso_size) as u32);
        transport[4..8].copy_from_slice(&sequence.to_be_bytes());
        if !last {
            transport[13] &= !(FIN | PSH);
        }
        if index > 0 {
            transport[13] &= !CWR;
        }
        transport[TCP_CSUM..TCP_CSUM + 2].copy_from_slice(&seed.to_be_bytes());
    } else {
        transport[4..6].copy_from_slice(&((length - at) as u16).to_be_bytes());
        transport[UDP_CSUM..UDP_CSUM + 2].copy_from_slice(&seed.to_be_bytes());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "split_tests.rs"]
mod tests;
