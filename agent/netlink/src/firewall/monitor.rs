//! nftables notifications: transactions of any program that touch one table.

use std::io;
use std::mem;
use std::pin::pin;

use rtnetlink::packet_core::{NetlinkBuffer, NlaBuffer, NlasIterator};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, Socket, SocketAddr, TokioSocket, protocols};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

/// Multicast group of nftables (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;
/// Subsystem of nftables in the upper byte of a message's type (linux/netfilter/nfnetlink.h).
const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Last message of a transaction (linux/netfilter/nf_tables.h).
const NFT_MSG_NEWGEN: u8 = 15;
/// Request for the number of the last transaction (linux/netfilter/nf_tables.h).
const NFT_MSG_GETGEN: u8 = 16;
/// Attribute of NFT_MSG_NEWGEN with the number, big-endian (linux/netfilter/nf_tables.h).
const NFTA_GEN_ID: u16 = 1;
/// Flag of a request (linux/netlink.h).
const NLM_F_REQUEST: u8 = 1;
/// Bytes of an NFT_MSG_GETGEN request: struct nlmsghdr and struct nfgenmsg.
const GETGEN_LENGTH: u8 = 20;
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
/// Receive buffer in bytes. The kernel sends a notification for every element of a set, and the
/// socket also receives large transactions of other programs.
pub(super) const RECEIVE_BUFFER: usize = 32 << 20;

/// Subscription to nftables notifications in the network namespace of the thread that created it.
pub(super) struct Monitor {
    socket: TokioSocket,
    /// Socket for requests, apart from the notifications.
    requests: Socket,
    buffer: Vec<u8>,
    /// True if the transaction that is being read has touched the table.
    touched: bool,
}

/// Notifications that a [`Monitor`] received.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Received {
    /// Transactions that touched the table.
    pub(super) transactions: usize,
    /// True if notifications were lost (ENOBUFS), so that `transactions` can be too small.
    pub(super) lost: bool,
}

impl Received {
    fn add(&mut self, other: Self) {
        self.transactions += other.transactions;
        self.lost |= other.lost;
    }
}

impl Monitor {
    /// Subscribes to nftables notifications, with a receive buffer of `receive_buffer` bytes.
    ///
    /// # Errors
    /// An I/O error if the kernel has no nfnetlink, or if CAP_NET_ADMIN is missing.
    pub(super) fn start(receive_buffer: usize) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocols::NETLINK_NETFILTER)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        socket.socket_mut().add_membership(NFNLGRP_NFTABLES)?;
        // net.core.rmem_max limits the second request. A smaller buffer works as well, because the
        // kernel reports lost notifications as ENOBUFS.
        if set_socket_recv_buffer_size_force(socket.socket_ref(), receive_buffer).is_err() {
            let _ = socket
                .socket_ref()
                .set_rx_buf_sz(i32::try_from(receive_buffer).unwrap_or(i32::MAX));
        }
        let mut requests = Socket::new(protocols::NETLINK_NETFILTER)?;
        requests.bind_auto()?;
        requests.connect(&SocketAddr::new(0, 0))?;
        let buffer = Vec::with_capacity(MAX_MESSAGE);
        Ok(Self { socket, requests, buffer, touched: false })
    }

    /// Waits for a transaction that touches `table`, or for lost notifications (ENOBUFS).
    pub(super) async fn changed(&mut self, table: &str) {
        while self.receive(table).await == Received::default() {}
    }

    /// Runs `work` and receives the notifications meanwhile, so that they do not fill the buffer.
    /// Returns the result of `work` and the notifications between its start and its end.
    pub(super) async fn observe<F: Future>(
        &mut self,
        table: &str,
        work: F,
    ) -> (F::Output, Received) {
        self.drain(table);
        self.touched = false;
        let mut received = Received::default();
        let mut work = pin!(work);
        let output = loop {
            tokio::select! {
                output = &mut work => break output,
                more = self.receive(table) => received.add(more),
            }
        };
        received.add(self.drain(table));
        (output, received)
    }

    /// Discards the notifications that have arrived and returns their summary.
    pub(super) fn drain(&mut self, table: &str) -> Received {
        let mut received = Received::default();
        loop {
            self.buffer.clear();
            // The asynchronous `recv` can report an empty socket too early, because the runtime
            // limits the reads of a task and learns of new datagrams later.
            let result =
                self.socket.socket_ref().recv(&mut self.buffer, libc::MSG_DONTWAIT).map(drop);
            if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return received;
            }
            received.add(self.evaluate(&result, table));
        }
    }

    /// Returns the number of the last transaction of nftables in the network namespace, by any
    /// program and about any table. Transactions are numbered consecutively.
    ///
    /// # Errors
    /// An I/O error if the kernel does not answer with a number.
    pub(super) fn generation(&self) -> io::Result<u32> {
        let mut request = [0; GETGEN_LENGTH as usize];
        request[..4].copy_from_slice(&u32::from(GETGEN_LENGTH).to_ne_bytes());
        let kind = u16::from_le_bytes([NFT_MSG_GETGEN, NFNL_SUBSYS_NFTABLES]);
        request[4..6].copy_from_slice(&kind.to_ne_bytes());
        request[6..8].copy_from_slice(&u16::from(NLM_F_REQUEST).to_ne_bytes());
        self.requests.send(&request, 0)?;
        let mut answer = Vec::with_capacity(MAX_MESSAGE);
        // The kernel answers within `send`.
        self.requests.recv(&mut answer, libc::MSG_DONTWAIT)?;
        generation(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    async fn receive(&mut self, table: &str) -> Received {
        self.buffer.clear();
        let result = self.socket.recv(&mut self.buffer).await;
        self.evaluate(&result, table)
    }

    fn evaluate(&mut self, result: &io::Result<()>, table: &str) -> Received {
        match result {
            Ok(()) => Received {
                transactions: transactions(&self.buffer, table, &mut self.touched),
                lost: false,
            },
            Err(_) => {
                self.touched = false;
                Received { transactions: 0, lost: true }
            }
        }
    }
}

/// Fuzzing entry point: parses `data` as a datagram of nftables. Each transaction needs a message.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_notifications(data: &[u8]) {
    let _ = generation(data);
    assert!(transactions(data, "skein", &mut true) <= data.len() / 16);
}

/// Returns the number in an NFT_MSG_NEWGEN message; `None` if `answer` is another message.
fn generation(answer: &[u8]) -> Option<u32> {
    let message = NetlinkBuffer::new_checked(answer).ok()?;
    if message.message_type().to_le_bytes() != [NFT_MSG_NEWGEN, NFNL_SUBSYS_NFTABLES] {
        return None;
    }
    let attributes = message.payload().get(NFGENMSG_LENGTH..)?;
    let mut attributes = NlasIterator::new(attributes).flatten();
    let number = attributes.find(|attribute| attribute.kind() == NFTA_GEN_ID)?;
    number.value().try_into().ok().map(u32::from_be_bytes)
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

    /// Returns a message of nftables with one attribute.
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

    fn newgen() -> Vec<u8> {
        message(NFT_MSG_NEWGEN, 0, 1, &[0, 0, 0, 7])
    }

    #[test]
    fn generation_is_read_from_newgen_messages_only() {
        assert_eq!(generation(&newgen()), Some(7));
        assert_eq!(
            generation(&message(2, 0, 1, &[0, 0, 0, 7])),
            None,
            "The message has another type."
        );
        assert_eq!(
            generation(&message(NFT_MSG_NEWGEN, 0, 2, &[0, 0, 0, 7])),
            None,
            "The message has no number."
        );
        assert_eq!(
            generation(&message(NFT_MSG_NEWGEN, 0, 1, &[0, 7])),
            None,
            "The number has two bytes."
        );
        for length in 0..newgen().len() {
            assert_eq!(generation(&newgen()[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn transactions_of_the_table_are_counted() {
        let (ours, other) = (message(2, NFPROTO_INET, 1, b"skein\0"), message(6, 2, 1, b"skein\0"));
        let longer = message(2, NFPROTO_INET, 1, b"skein_1\0");
        let elsewhere = message(2, NFPROTO_INET, 3, b"skein\0");
        let count = |messages: &[&[u8]]| transactions(&messages.concat(), "skein", &mut false);
        let end = &*newgen();
        assert_eq!(count(&[&ours, &ours, end]), 1, "The two objects belong to one transaction.");
        assert_eq!(count(&[&ours, end, &other, end, &ours, end]), 2);
        assert_eq!(count(&[&other, &longer, &elsewhere, end]), 0);
        assert_eq!(count(&[&ours]), 0, "the transaction has not ended");
    }

    #[test]
    fn transaction_that_spans_datagrams_is_counted_once() {
        let mut touched = false;
        let ours = message(2, NFPROTO_INET, 1, b"skein\0");
        assert_eq!(transactions(&ours, "skein", &mut touched), 0);
        assert_eq!(transactions(&newgen(), "skein", &mut touched), 1);
        assert!(!touched, "the next transaction has touched nothing yet");
    }

    #[test]
    fn truncated_datagrams_end_no_transaction() {
        let whole = [message(2, NFPROTO_INET, 1, b"skein\0"), newgen()].concat();
        for length in 0..whole.len() {
            let cut = transactions(&whole[..length], "skein", &mut false);
            assert_eq!(cut, 0, "{length} of {} bytes", whole.len());
        }
    }
}
