//! Coalescing of packets into superpackets for the TUN: the inverse of
//! [`segment`](crate::offload::segment).
//!
//! Packets are taken in the order of transmission. A packet is appended to the superpacket of its
//! flow only if segmentation would restore the packets exactly, except for checksums and for the
//! identification of IPv4 packets that may not be fragmented (which has no meaning, RFC 6864). All
//! other packets are written verbatim, in their place. Payloads are never copied: a superpacket
//! consists of a header and of slices of the receive arena.

mod candidate;
mod flows;
mod header;

use std::ops::Range;

use self::candidate::{Candidate, Class, Layout};
use self::flows::OpenFlows;
use super::vnet::VnetHeader;
use super::{Checksum, MAX_MERGED_DATAGRAMS, MAX_SUPERPACKET_SEGMENTS};
use crate::wire::checksum;
use crate::wire::ip::IpHeader;

/// Index that stands for "no slice".
const NONE: u32 = u32::MAX;

/// A range of the receive arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Offset of the first byte.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

/// Offloads of the TUN that the coalescer may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoalesceConfig {
    /// True if TCP superpackets may be written.
    pub tcp: bool,
    /// True if UDP superpackets may be written (UDP_L4, Linux 6.2).
    pub udp: bool,
    /// True if partial checksums may be written (NEEDS_CSUM). If false, no packets are merged, and
    /// partial checksums are completed here.
    pub partial_checksum: bool,
}

/// A write to the TUN: the vnet header, `header`, and then the slices of `payload`.
#[derive(Debug)]
pub struct TunPacket<'a> {
    /// Encoded virtio_net_hdr.
    pub vnet: [u8; VnetHeader::LEN],
    /// Headers of a superpacket; empty if the slices hold the whole packet.
    pub header: &'a [u8],
    /// Remaining bytes, in order.
    pub payload: &'a [Slice],
    /// Number of packets that the write stands for.
    pub segments: usize,
    /// IP length in bytes.
    pub len: usize,
}

/// Merges packets of the same flow.
///
/// The caller calls [`Self::push`] for each packet in the order of transmission, with one arena
/// that stays unchanged between the calls, and then [`Self::flush`] with the same arena. Packets of
/// one flow leave in the order in which they were pushed.
#[derive(Debug)]
pub struct Coalescer {
    config: CoalesceConfig,
    items: Vec<Item>,
    open: OpenFlows,
    /// Payloads of superpackets with at least two packets.
    slices: Vec<Slice>,
    /// Index of the next slice of the same superpacket, for each slice.
    following: Vec<u32>,
    /// Headers of the superpacket that is being flushed.
    header: Vec<u8>,
    /// Slices of the superpacket that is being flushed, if they are not contiguous in `slices`.
    gathered: Vec<Slice>,
}

/// A write that is being assembled.
#[derive(Debug)]
struct Item {
    /// First packet, whole.
    first: Slice,
    /// Layout of a packet that may grow; `None` for a packet that is written verbatim.
    layout: Option<Layout>,
    /// csum_start and csum_offset of the first packet if its checksum is partial.
    checksum_at: Option<(u16, u16)>,
    /// True if the checksums of the first packet have been verified.
    verified: bool,
    psh: bool,
    headers: u16,
    gso_size: u16,
    segments: u16,
    next_id: u16,
    next_sequence: u32,
    /// Sum of the payloads in bytes.
    payload: u32,
    first_slice: u32,
    last_slice: u32,
}

impl Slice {
    /// Returns the bytes of the slice.
    pub fn of<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.offset..self.offset + self.len]
    }
}

impl Coalescer {
    /// Creates an empty coalescer.
    pub fn new(config: CoalesceConfig) -> Self {
        Self {
            config,
            items: Vec::with_capacity(256),
            open: OpenFlows::new(),
            slices: Vec::with_capacity(1024),
            following: Vec::with_capacity(1024),
            header: Vec::with_capacity(128),
            gathered: Vec::with_capacity(MAX_SUPERPACKET_SEGMENTS),
        }
    }

    /// Changes the offloads. Packets that were pushed before keep their form and are not extended.
    pub fn set_config(&mut self, config: CoalesceConfig) {
        if self.config != config {
            self.config = config;
            self.open.clear();
        }
    }

    /// Returns the number of writes that a flush would make.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Returns true if no packet has been pushed since the last flush.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds the whole inner packet at `at` of the arena, with the parsed header `ip`.
    pub fn push(&mut self, arena: &mut [u8], at: Range<usize>, ip: &IpHeader, checksum: Checksum) {
        let slice = Slice { offset: at.start, len: at.len() };
        if slice.len != ip.total_len {
            // The header does not describe the packet, so its flow is unknown.
            self.open.clear();
            return self.verbatim(slice, None);
        }
        let field = match checksum {
            Checksum::Partial => ip.checksum_field(),
            Checksum::Full => None,
        };
        if !self.config.partial_checksum {
            if let Some(field) = field {
                complete(&mut arena[at], ip, field);
            }
            return self.verbatim(slice, None);
        }
        let checksum_at = field.map(|field| (ip.header_len as u16, (field - ip.header_len) as u16));
        let packet = &arena[at];
        let checksum = if field.is_some() { Checksum::Partial } else { Checksum::Full };
        if self.extends_last(arena, packet, slice, checksum) {
            return;
        }
        match candidate::classify(packet, ip, checksum) {
            Class::Candidate(candidate) if self.may_merge(candidate.layout) => {
                if let Some((slot, same_headers)) = self.find(arena, packet, candidate.layout) {
                    let item = self.open.item(slot);
                    if same_headers && self.extends(arena, item, packet, &candidate, checksum) {
                        return self.extend(slot, slice, &candidate);
                    }
                    self.open.remove(slot);
                }
                self.start(packet, slice, &candidate, checksum_at);
            }
            Class::Candidate(_) | Class::OtherProtocol => self.verbatim(slice, checksum_at),
            Class::FlushesFlow(layout) => {
                if let Some((slot, _)) = self.find(arena, packet, layout) {
                    self.open.remove(slot);
                }
                self.verbatim(slice, checksum_at);
            }
            Class::FlushesAddresses => {
                self.flush_addresses(arena, packet);
                self.verbatim(slice, checksum_at);
            }
        }
    }

    /// Passes all writes to `sink`, those of each flow in order, and empties the coalescer.
    pub fn flush(&mut self, arena: &[u8], mut sink: impl FnMut(TunPacket<'_>)) {
        for item in &self.items {
            let (Some(layout), 2..) = (item.layout, item.segments) else {
                sink(TunPacket {
                    vnet: header::single(item).to_bytes(),
                    header: &[],
                    payload: &[item.first],
                    segments: 1,
                    len: item.first.len,
                });
                continue;
            };
            let segments = usize::from(item.segments);
            let (first, last) = (item.first_slice as usize, item.last_slice as usize);
            let payload = if last - first + 1 == segments {
                &self.slices[first..=last]
            } else {
                // Packets of other flows were pushed in between.
                self.gathered.clear();
                let mut next = item.first_slice;
                while let Some(slice) = self.slices.get(next as usize) {
                    self.gathered.push(*slice);
                    next = self.following[next as usize];
                }
                &self.gathered
            };
            self.header.clear();
            self.header.extend_from_slice(&item.first.of(arena)[..usize::from(item.headers)]);
            let vnet = header::merged(&mut self.header, item, layout);
            sink(TunPacket {
                vnet: vnet.to_bytes(),
                header: &self.header,
                payload,
                segments,
                len: self.header.len() + item.payload as usize,
            });
        }
        self.items.clear();
        self.open.clear();
        self.slices.clear();
        self.following.clear();
    }

    fn may_merge(&self, layout: Layout) -> bool {
        if layout.is_tcp() { self.config.tcp } else { self.config.udp }
    }

    /// Returns the slot of the packet's flow, and whether the packet's headers equal those of the
    /// flow's superpacket.
    fn find(&self, arena: &[u8], packet: &[u8], layout: Layout) -> Option<(usize, bool)> {
        self.open.with_hash(layout.hash(packet)).find_map(|slot| {
            let item = &self.items[self.open.item(slot)];
            let same_layout = item.layout == Some(layout);
            let difference = same_layout.then(|| layout.compare(item.first.of(arena), packet))?;
            difference.same_flow.then_some((slot, difference.same_headers))
        })
    }

    /// Appends a packet to the superpacket that grew last if the packet is its next segment,
    /// because segments come in sequences. Headers equal to those of a candidate make the packet a
    /// candidate, so that no classification is needed.
    #[inline]
    fn extends_last(
        &mut self,
        arena: &[u8],
        packet: &[u8],
        slice: Slice,
        checksum: Checksum,
    ) -> bool {
        let Some(slot) = self.open.last() else { return false };
        let index = self.open.item(slot);
        let item = &self.items[index];
        let Some(layout) = item.layout else { return false };
        let difference = layout.compare(item.first.of(arena), packet);
        if !(difference.same_flow && difference.same_headers) {
            return false;
        }
        let headers = usize::from(item.headers);
        match Candidate::alike(layout, headers, packet, checksum) {
            Some(candidate) if self.extends(arena, index, packet, &candidate, checksum) => {
                self.extend(slot, slice, &candidate);
                true
            }
            _ => false,
        }
    }

    /// Returns true if segmentation would make `packet` the next segment of an item with the same
    /// flow and headers.
    #[inline(always)]
    fn extends(
        &mut self,
        arena: &[u8],
        item: usize,
        packet: &[u8],
        candidate: &Candidate,
        checksum: Checksum,
    ) -> bool {
        let item = &mut self.items[item];
        let headers = candidate.headers;
        let payload = packet.len() - headers;
        let layout = candidate.layout;
        let max_segments = match layout {
            Layout::Tcp4 | Layout::Tcp6 => MAX_SUPERPACKET_SEGMENTS,
            Layout::Udp4 | Layout::Udp6 => MAX_MERGED_DATAGRAMS,
        };
        let fits = usize::from(item.headers) == headers
            && item.checksum_at.is_some() == (checksum == Checksum::Partial)
            && payload <= usize::from(item.gso_size)
            && usize::from(item.segments) < max_segments
            && headers + item.payload as usize + payload <= usize::from(u16::MAX);
        if !fits {
            return false;
        }
        let first = item.first.of(arena);
        let follows = (!layout.is_tcp() || item.next_sequence == candidate.sequence)
            && (layout.is_v6() || id_follows(packet, item.next_id))
            && layout.same_options(first, packet, headers);
        if !follows {
            return false;
        }
        // Merging writes new checksums, which must not hide wrong ones.
        item.verified = item.verified || layout.verify(first, checksum);
        item.verified && layout.verify(packet, checksum)
    }

    #[inline(always)]
    fn extend(&mut self, slot: usize, packet: Slice, candidate: &Candidate) {
        let item = &mut self.items[self.open.item(slot)];
        let headers = candidate.headers;
        let behind =
            |packet: Slice| Slice { offset: packet.offset + headers, len: packet.len - headers };
        if item.segments == 1 {
            item.first_slice = self.slices.len() as u32;
            item.last_slice = item.first_slice;
            self.slices.push(behind(item.first));
            self.following.push(NONE);
        }
        let payload = behind(packet);
        let slice = self.slices.len() as u32;
        self.slices.push(payload);
        self.following.push(NONE);
        self.following[item.last_slice as usize] = slice;
        item.last_slice = slice;
        item.payload += payload.len as u32;
        item.segments += 1;
        item.next_sequence = item.next_sequence.wrapping_add(payload.len as u32);
        item.next_id = item.next_id.wrapping_add(1);
        item.psh = candidate.psh;
        if candidate.psh || payload.len < usize::from(item.gso_size) {
            self.open.remove(slot);
        } else {
            self.open.touch(slot);
        }
    }

    fn start(
        &mut self,
        packet: &[u8],
        first: Slice,
        candidate: &Candidate,
        checksum_at: Option<(u16, u16)>,
    ) {
        let payload = first.len - candidate.headers;
        let id = u16::from_be_bytes([packet[4], packet[5]]);
        let index = self.items.len();
        self.items.push(Item {
            layout: Some(candidate.layout),
            psh: candidate.psh,
            headers: candidate.headers as u16,
            gso_size: payload as u16,
            payload: payload as u32,
            next_id: id.wrapping_add(1),
            next_sequence: candidate.sequence.wrapping_add(payload as u32),
            ..Item::verbatim(first, checksum_at)
        });
        if !candidate.psh {
            self.open.insert(candidate.layout.hash(packet), index);
        }
    }

    fn verbatim(&mut self, packet: Slice, checksum_at: Option<(u16, u16)>) {
        self.items.push(Item::verbatim(packet, checksum_at));
    }

    fn flush_addresses(&mut self, arena: &[u8], packet: &[u8]) {
        for slot in self.open.all() {
            let first = self.items[self.open.item(slot)].first.of(arena);
            if candidate::same_addresses(first, packet) {
                self.open.remove(slot);
            }
        }
    }
}

impl Item {
    fn verbatim(packet: Slice, checksum_at: Option<(u16, u16)>) -> Self {
        Self {
            first: packet,
            layout: None,
            checksum_at,
            verified: false,
            psh: false,
            headers: 0,
            gso_size: 0,
            segments: 1,
            next_id: 0,
            next_sequence: 0,
            payload: 0,
            first_slice: NONE,
            last_slice: NONE,
        }
    }
}

/// Returns true if an IPv4 packet has the identification `id`, or an identification without meaning
/// (RFC 6864).
fn id_follows(packet: &[u8], id: u16) -> bool {
    let dont_fragment = packet[6] & 0x40 != 0;
    dont_fragment || u16::from_be_bytes([packet[4], packet[5]]) == id
}

/// Completes a checksum whose field holds the sum of the pseudo-header.
fn complete(packet: &mut [u8], ip: &IpHeader, field: usize) {
    let sum = checksum::sum(&packet[ip.header_len..], 0);
    packet[field..field + 2].copy_from_slice(&checksum::finish(sum, ip.protocol));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
