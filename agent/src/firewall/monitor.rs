//! nftables notifications: transactions of any program that touch one table.

use std::io;
use std::mem;

use futures_util::FutureExt;
use rtnetlink::packet_core::{NetlinkBuffer, NlaBuffer, NlasIterator};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols};

/// Multicast group of nftables (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;
/// Subsystem of nftables in the upper byte of a message's type (linux/netfilter/nfnetlink.h).
const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Last message of a transaction (linux/netfilter/nf_tables.h).
const NFT_MSG_NEWGEN: u8 = 15;
/// Address family of tables for IPv4 and IPv6 (linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
/// Attribute with the table's name: the first one in messages about tables, chains, rules, sets,
/// elements and objects (linux/netfilter/nf_tables.h).
const NFTA_TABLE: u16 = 1;
/// Bytes of the header before the attributes (struct nfgenmsg: family, version, resource).
const NFGENMSG_LENGTH: usize = 4;
/// Alignment of messages in a datagram, bytes (NLMSG_ALIGNTO).
const ALIGNMENT: usize = 4;
/// Bytes of the largest message that the kernel sends: NLMSG_GOODSIZE is a page or 8 KiB.
const MAX_MESSAGE: usize = 64 << 10;
/// Receive buffer in bytes: the socket also receives large transactions of other programs.
const RECEIVE_BUFFER: usize = 1 << 20;

/// A subscription to nftables notifications in the network namespace of the thread that made it.
pub(super) struct Monitor {
    socket: TokioSocket,
    buffer: Vec<u8>,
    /// True if the transaction that is being read has touched the table.
    touched: bool,
}

impl Monitor {
    /// Subscribes to nftables notifications.
    ///
    /// # Errors
    /// An I/O error if the kernel has no nfnetlink, or if CAP_NET_ADMIN is missing.
    pub(super) fn start() -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocols::NETLINK_NETFILTER)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        socket.socket_mut().add_membership(NFNLGRP_NFTABLES)?;
        // The default size works as well: the kernel reports lost notifications as ENOBUFS.
        let _ = socket.socket_mut().set_rx_buf_sz(RECEIVE_BUFFER);
        Ok(Self { socket, buffer: Vec::with_capacity(MAX_MESSAGE), touched: false })
    }

    /// Waits for a transaction that touches `table`, or for lost notifications (ENOBUFS).
    pub(super) async fn changed(&mut self, table: &str) {
        while self.receive(table).await == 0 {}
    }

    /// Discards the notifications that have arrived. Returns the number of transactions that
    /// touched `table`; lost notifications count as two, because their number is unknown.
    pub(super) fn drain(&mut self, table: &str) -> usize {
        let mut transactions = 0;
        while let Some(count) = self.receive(table).now_or_never() {
            transactions += count;
        }
        transactions
    }

    async fn receive(&mut self, table: &str) -> usize {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            Ok(()) => transactions(&self.buffer, table, &mut self.touched),
            Err(_) => {
                self.touched = false;
                2
            }
        }
    }
}

/// Returns the number of transactions that end in `datagram` and have touched `table`. `touched`
/// carries over to the next datagram.
fn transactions(datagram: &[u8], table: &str, touched: &mut bool) -> usize {
    let (mut rest, mut ended) = (datagram, 0);
    while let Ok(message) = NetlinkBuffer::new_checked(rest) {
        let length = (message.length() as usize).next_multiple_of(ALIGNMENT);
        let [kind, subsystem] = message.message_type().to_le_bytes();
        match (subsystem, kind) {
            (NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN) => ended += usize::from(mem::take(touched)),
            (NFNL_SUBSYS_NFTABLES, _) => *touched |= concerns(message.payload(), table),
            _ => {}
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    ended
}

/// Returns whether a message about a table or its content concerns `table`.
fn concerns(payload: &[u8], table: &str) -> bool {
    let Some((header, attributes)) = payload.split_at_checked(NFGENMSG_LENGTH) else {
        return false;
    };
    let named = |attribute: NlaBuffer<&[u8]>| {
        attribute.kind() == NFTA_TABLE
            && attribute.value().strip_suffix(&[0]) == Some(table.as_bytes())
    };
    header[0] == NFPROTO_INET && NlasIterator::new(attributes).flatten().any(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of nftables with one attribute.
    fn message(kind: u8, family: u8, attribute: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        bytes.extend([kind, NFNL_SUBSYS_NFTABLES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([family, 0, 0, 0]);
        bytes.extend(u16::try_from(value.len() + 4).unwrap_or_default().to_ne_bytes());
        bytes.extend(attribute.to_ne_bytes());
        bytes.extend(value);
        let length = u32::try_from(bytes.len()).unwrap_or_default();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }

    fn generation() -> Vec<u8> {
        message(NFT_MSG_NEWGEN, 0, 1, &[0, 0, 0, 7])
    }

    #[test]
    fn transactions_of_the_table_are_counted_and_no_others() {
        let (ours, other) = (message(2, NFPROTO_INET, 1, b"skein\0"), message(6, 2, 1, b"skein\0"));
        let longer = message(2, NFPROTO_INET, 1, b"skein_1\0");
        let elsewhere = message(2, NFPROTO_INET, 3, b"skein\0");
        let count = |messages: &[&[u8]]| transactions(&messages.concat(), "skein", &mut false);
        let end = &*generation();
        assert_eq!(count(&[&ours, &ours, end]), 1, "two objects of one transaction");
        assert_eq!(count(&[&ours, end, &other, end, &ours, end]), 2);
        assert_eq!(count(&[&other, &longer, &elsewhere, end]), 0);
        assert_eq!(count(&[&ours]), 0, "the transaction has not ended");
    }

    #[test]
    fn transaction_that_spans_datagrams_is_counted_once() {
        let mut touched = false;
        let ours = message(2, NFPROTO_INET, 1, b"skein\0");
        assert_eq!(transactions(&ours, "skein", &mut touched), 0);
        assert_eq!(transactions(&generation(), "skein", &mut touched), 1);
        assert!(!touched, "the next transaction has touched nothing yet");
    }

    #[test]
    fn truncated_datagrams_end_no_transaction() {
        let whole = [message(2, NFPROTO_INET, 1, b"skein\0"), generation()].concat();
        for length in 0..whole.len() {
            let cut = transactions(&whole[..length], "skein", &mut false);
            assert_eq!(cut, 0, "{length} of {} bytes", whole.len());
        }
    }
}
