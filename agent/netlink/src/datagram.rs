//! Netlink messages in a datagram.

use rtnetlink::packet_core::NetlinkBuffer;

/// Alignment of messages in a datagram, bytes (NLMSG_ALIGNTO of linux/netlink.h).
pub(crate) const ALIGNMENT: usize = 4;

/// Returns the messages in a datagram, up to the first malformed one.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(rest).ok()?;
        let length = (message.length() as usize).next_multiple_of(ALIGNMENT);
        rest = rest.get(length..).unwrap_or_default();
        Some(message)
    })
}
