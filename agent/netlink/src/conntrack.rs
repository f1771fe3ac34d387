//! Entries of connection tracking (nf_conntrack), read by netlink.

use std::net::IpAddr;

use netlink_packet_netfilter::conntrack::ConntrackMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};

use crate::nftables::{Connection, NftablesError, attribute};

// Attributes (linux/netfilter/nfnetlink_conntrack.h).
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
/// Source and destination, IPv4 and IPv6.
const CTA_IP: [(u16, u16); 2] = [(1, 2), (3, 4)];
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// Addresses and ports of the packets in one direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Source address of the packets.
    pub source: IpAddr,
    /// Destination address of the packets.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

/// A connection with the addresses on both sides of network address translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// Packets in the direction of the first packet, before address translation.
    pub original: Tuple,
    /// Packets of the other direction, before the translation is undone.
    pub reply: Tuple,
}

impl Connection {
    /// Returns all entries with ports in the network namespace, of both address families.
    ///
    /// # Errors
    /// [`NftablesError`] if the kernel has no connection tracking by netlink, or if the dump is
    /// interrupted 10 times.
    pub fn conntrack_entries(&mut self) -> Result<Vec<Entry>, NftablesError> {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let request = NetfilterMessage::new(header, ConntrackMessage::Get(Vec::new()));
        let mut entries = Vec::new();
        self.dump(&request, &mut entries, parse)?;
        Ok(entries)
    }
}

/// Fuzzing entry point: parses `data` as the attributes of an entry, in which each tuple has
/// addresses of one family.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_entry(data: &[u8]) {
    if let Some(Entry { original, reply }) = parse(data) {
        for tuple in [original, reply] {
            assert_eq!(tuple.source.is_ipv4(), tuple.destination.is_ipv4());
        }
    }
}

/// Parses an entry; `None` for a protocol without ports.
fn parse(attributes: &[u8]) -> Option<Entry> {
    let original = tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?;
    let reply = tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?;
    Some(Entry { original, reply })
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let ip = attribute(bytes, CTA_TUPLE_IP)?;
    let pairs = CTA_IP.iter().filter_map(|(source, destination)| {
        Some((address(attribute(ip, *source)?)?, address(attribute(ip, *destination)?)?))
    });
    let mut pairs = pairs.filter(|(source, destination): &(IpAddr, IpAddr)| {
        source.is_ipv4() == destination.is_ipv4()
    });
    let (source, destination) = pairs.next()?;
    let transport = attribute(bytes, CTA_TUPLE_PROTO)?;
    let port = |kind| attribute(transport, kind)?.try_into().ok().map(u16::from_be_bytes);
    Some(Tuple {
        source,
        destination,
        protocol: *attribute(transport, CTA_PROTO_NUM)?.first()?,
        source_port: port(CTA_PROTO_SRC_PORT)?,
        destination_port: port(CTA_PROTO_DST_PORT)?,
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
