//! Notifications of changed interface settings (RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF), such
//! as forwarding. The rtnetlink crate has no type for these messages.

use std::io;

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use skein_sys::link;

use super::connection::NetlinkError;
use super::datagram::messages;

/// Multicast groups and message type of linux/rtnetlink.h.
const RTNLGRP_IPV4_NETCONF: u32 = 24;
const RTNLGRP_IPV6_NETCONF: u32 = 25;
const RTM_NEWNETCONF: u16 = 80;
/// Attribute with the interface index, and its value for the settings of all interfaces
/// (linux/netconf.h).
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_IFINDEX_ALL: i32 = -1;
/// Length of a `struct netconfmsg` with its padding, bytes.
const NETCONF_MESSAGE: usize = 4;

/// Subscription to changed settings.
pub(super) struct Subscription {
    socket: TokioSocket,
    buffer: Vec<u8>,
}

impl Subscription {
    /// Subscribes in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] if the kernel refuses the socket or its multicast groups.
    pub(super) fn new() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
            socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
            for group in [RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF] {
                socket.socket_mut().add_membership(group)?;
            }
            Ok(socket)
        };
        let socket = open().map_err(|source| NetlinkError {
            what: "subscribe to changed interface settings".to_owned(),
            source,
        })?;
        Ok(Self { socket, buffer: Vec::with_capacity(1 << 15) })
    }

    /// Waits for notifications. Returns whether a notification concerns all interfaces or the
    /// interface with `index`. The result is also true if notifications were lost.
    ///
    /// # Errors
    ///
    /// An I/O error of the socket, except for lost notifications (ENOBUFS).
    pub(super) async fn concerns(&mut self, index: impl Fn() -> u32) -> io::Result<bool> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            Ok(()) => Ok(concerns(&self.buffer, index())),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// Returns whether one of the messages concerns all interfaces or the interface with `index`.
fn concerns(datagram: &[u8], index: u32) -> bool {
    messages(datagram).any(|message| {
        let attributes = message.payload().get(NETCONF_MESSAGE..).unwrap_or_default();
        let is_about =
            |about: i32| about == NETCONFA_IFINDEX_ALL || u32::try_from(about) == Ok(index);
        message.message_type() == RTM_NEWNETCONF && interface(attributes).is_some_and(is_about)
    })
}

/// Returns the interface index among the attributes.
fn interface(attributes: &[u8]) -> Option<i32> {
    let (_, value) = link::attributes(attributes).find(|(kind, _)| *kind == NETCONFA_IFINDEX)?;
    Some(i32::from_ne_bytes(value.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RTM_NEWNETCONF with a forwarding attribute before the interface index.
    fn message(kind: u16, index: i32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(36_u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([libc::AF_INET as u8, 0, 0, 0]);
        for (attribute, value) in [(2_u16, 1), (NETCONFA_IFINDEX, index)] {
            bytes.extend(8_u16.to_ne_bytes());
            bytes.extend(attribute.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn settings_of_all_and_of_own_interface_are_reported() {
        assert!(concerns(&message(RTM_NEWNETCONF, NETCONFA_IFINDEX_ALL), 7));
        assert!(concerns(&message(RTM_NEWNETCONF, 7), 7));
        assert!(!concerns(&message(RTM_NEWNETCONF, 8), 7), "The interface is another one.");
        assert!(!concerns(&message(16, 7), 7), "The message is of another type.");
        let two = [message(RTM_NEWNETCONF, -2), message(RTM_NEWNETCONF, 7)].concat();
        assert!(concerns(&two, 7), "The second message counts as well.");
    }

    #[test]
    fn malformed_messages_are_ignored() {
        let whole = message(RTM_NEWNETCONF, 7);
        for end in 0..whole.len() {
            assert!(!concerns(&whole[..end], 7), "{end} bytes");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 3, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                // The parser terminates for every input.
                let _ = concerns(&bytes, 9);
            }
        }
    }
}
