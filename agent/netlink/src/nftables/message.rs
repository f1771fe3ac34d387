//! Netlink messages of nftables: constants of their form, and the messages of a datagram.

use rtnetlink::packet_core::NetlinkBuffer;

/// Subsystem of nftables in the upper byte of a message's type (linux/netfilter/nfnetlink.h).
pub(super) const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Flag of a request (linux/netlink.h).
pub(super) const NLM_F_REQUEST: u16 = 1;
/// Attribute with the table's name: the first one in messages about tables, chains, rules, sets,
/// elements and objects (linux/netfilter/nf_tables.h).
pub(super) const NFTA_TABLE: u16 = 1;
/// Bytes of the header before the attributes (struct nfgenmsg: family, version, resource).
pub(super) const NFGENMSG_LENGTH: usize = 4;
/// Alignment of messages in a datagram, bytes (NLMSG_ALIGNTO).
pub(super) const ALIGNMENT: usize = 4;
/// Bytes of the largest datagram that the kernel sends: NLMSG_GOODSIZE is a page or 8 KiB.
pub(super) const MAX_DATAGRAM: usize = 64 << 10;

/// Returns the messages in a datagram, up to the first malformed one.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(rest).ok()?;
        let length = (message.length() as usize).next_multiple_of(ALIGNMENT);
        rest = rest.get(length..).unwrap_or_default();
        Some(message)
    })
}
