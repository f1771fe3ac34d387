//! Headers of packets for the TUN.

use super::Item;
use super::candidate::Layout;
use crate::offload::vnet::{self, VnetHeader};
use crate::wire::checksum;
use crate::wire::tcp::PSH;

/// Returns the virtio_net_hdr of a packet that is written verbatim.
pub(super) fn single(item: &Item) -> VnetHeader {
    match item.checksum_at {
        None => VnetHeader::default(),
        Some((start, offset)) => VnetHeader {
            flags: vnet::NEEDS_CSUM,
            csum_start: start,
            csum_offset: offset,
            ..VnetHeader::default()
        },
    }
}

/// Returns the virtio_net_hdr of a superpacket. `header` holds the headers of its first packet and
/// becomes the headers of the superpacket.
pub(super) fn merged(header: &mut [u8], item: &Item, layout: Layout) -> VnetHeader {
    let start = layout.network_len();
    let length = header.len() + item.payload as usize;
    let transport = length - start;
    if layout.is_v6() {
        header[4..6].copy_from_slice(&(transport as u16).to_be_bytes());
    } else {
        header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        header[10..12].fill(0);
        let sum = !checksum::sum(&header[..20], 0);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    if !layout.is_tcp() {
        header[start + 4..start + 6].copy_from_slice(&(transport as u16).to_be_bytes());
    } else if item.psh {
        header[start + 13] |= PSH;
    }
    let seed = checksum::fold(u64::from(layout.pseudo_header(header)) + transport as u64);
    let field = start + layout.checksum_offset();
    header[field..field + 2].copy_from_slice(&seed.to_be_bytes());
    VnetHeader {
        flags: vnet::NEEDS_CSUM,
        gso_type: match layout {
            Layout::Tcp4 => vnet::GSO_TCPV4,
            Layout::Tcp6 => vnet::GSO_TCPV6,
            Layout::Udp4 | Layout::Udp6 => vnet::GSO_UDP_L4,
        },
        hdr_len: header.len() as u16,
        gso_size: item.gso_size,
        csum_start: start as u16,
        csum_offset: layout.checksum_offset() as u16,
    }
}
