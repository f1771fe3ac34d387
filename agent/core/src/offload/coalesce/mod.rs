//! Merging packets of one flow into superpackets for the TUN: the inverse of `split`.
//!
//! Packets are taken in the order of transmission. One is appended to its flow's superpacket only
//! if splitting the result would give back exactly what came in (checksums aside, and the
//! identification of IPv4 packets that may not be fragmented, which means nothing: RFC 6864);
//! everything else goes as it is, in its place. Payloads are never copied: a superpacket is a
//! header and slices of the receive arena.

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
    open: OpenFlows,
    /// Payloads of superpackets of at least two packets.
    slices: Vec<Slice>,
    /// For each slice the next one of its superpacket.
    following: Vec<u32>,
    header: Vec<u8>,
    gathered: Vec<Slice>,
}

/// One write in the making.
#[derive(Debug)]
struct Item {
    /// The first packet, whole.
    first: Slice,
    /// Of a packet that began as a candidate.
    layout: Option<Layout>,
    /// csum_start and csum_offset of the first packet where its checksum is partial.
    checksum_at: Option<(u16, u16)>,
    /// Whether the first packet's checksums were found right.
    verified: bool,
    psh: bool,
    headers: u16,
    gso_size: u16,
    segments: u16,
    next_id: u16,
    next_sequence: u32,
    /// Bytes of all payloads.
    payload: u32,
    first_slice: u32,
    last_slice: u32,
}

impl Slice {
    /// Its bytes.
    pub fn of<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.offset..self.offset + self.len]
    }
}

impl Coalescer {
    /// An empty one.
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

    /// Changes what may be written; what was pushed already keeps its form and grows no more.
    pub fn set_config(&mut self, config: CoalesceConfig) {
        if self.config != config {
            self.config = config;
            self.open.clear();
        }
    }

    /// Writes that a flush would make now.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing was pushed since the last flush.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes the whole inner packet at `at`, whose header is `ip`.
    pub fn push(&mut self, arena: &mut [u8], at: Range<usize>, ip: &IpHeader, checksum: Checksum) {
        let slice = Slice { offset: at.start, len: at.len() };
        if slice.len != ip.total_len {
            // Not what it says it is, so neither is it known what it would have to follow.
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

    /// Hands out everything, each flow in its order, and starts anew.
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
                // Other flows came between.
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

    /// The slot of this packet's flow, and whether the headers there are this packet's.
    fn find(&self, arena: &[u8], packet: &[u8], layout: Layout) -> Option<(usize, bool)> {
        self.open.with_hash(layout.hash(packet)).find_map(|slot| {
            let item = &self.items[self.open.item(slot)];
            let same_layout = item.layout == Some(layout);
            let difference = same_layout.then(|| layout.compare(item.first.of(arena), packet))?;
            difference.same_flow.then_some((slot, difference.same_headers))
        })
    }

    /// Appends a packet to the superpacket that grew last, if it is the next of it: segments come
    /// in runs. Headers equal to those of a candidate are a candidate's, so that nothing else has
    /// to be found out about them.
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

    /// Whether `packet` is what splitting would give as the next segment of an item of the same
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
        let most = match layout {
            Layout::Tcp4 | Layout::Tcp6 => MAX_SUPERPACKET_SEGMENTS,
            Layout::Udp4 | Layout::Udp6 => MAX_MERGED_DATAGRAMS,
        };
        let fits = usize::from(item.headers) == headers
            && item.checksum_at.is_some() == (checksum == Checksum::Partial)
            && payload <= usize::from(item.gso_size)
            && usize::from(item.segments) < most
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
        // Merging writes fresh checksums: they must not hide wrong ones.
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

/// Whether an IPv4 packet has the identification `id`, or one that does not matter (RFC 6864).
fn id_follows(packet: &[u8], id: u16) -> bool {
    let dont_fragment = packet[6] & 0x40 != 0;
    dont_fragment || u16::from_be_bytes([packet[4], packet[5]]) == id
}

/// Computes a checksum whose field holds the pseudo-header's sum.
fn complete(packet: &mut [u8], ip: &IpHeader, field: usize) {
    let sum = checksum::sum(&packet[ip.header_len..], 0);
    packet[field..field + 2].copy_from_slice(&checksum::finish(sum, ip.protocol));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
