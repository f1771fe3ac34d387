//! nftables notifications: transactions of any program, by the table that they touch.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use rtnetlink::packet_core::NetlinkBuffer;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, Socket, SocketAddr, TokioSocket, protocols};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use tokio::sync::{mpsc, oneshot, watch};

use super::attribute::{attribute, number, text};
use super::message::{
    MAX_DATAGRAM, NFGENMSG_LENGTH, NFNL_SUBSYS_NFTABLES, NFTA_TABLE, NLM_F_REQUEST,
};
use crate::datagram::messages;

/// Multicast group of nftables (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;
/// Last message of a transaction (linux/netfilter/nf_tables.h).
const NFT_MSG_NEWGEN: u8 = 15;
/// Request for the number of the last transaction (linux/netfilter/nf_tables.h).
const NFT_MSG_GETGEN: u8 = 16;
/// Attribute of NFT_MSG_NEWGEN with the number, big-endian (linux/netfilter/nf_tables.h).
const NFTA_GEN_ID: u16 = 1;
/// Bytes of an NFT_MSG_GETGEN request: struct nlmsghdr and struct nfgenmsg.
const GETGEN_LENGTH: u8 = 20;
/// Address family of tables for IPv4 and IPv6 (linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
/// Receive buffer in bytes. The kernel sends a notification for every element of a set, and the
/// socket also receives large transactions of other programs.
pub(crate) const RECEIVE_BUFFER: usize = 32 << 20;

/// Listener for nftables notifications in the network namespace of the thread that created it.
/// Clones share one socket, which a task reads until the last clone and the last subscription are
/// dropped. [`Monitor::subscribe`] returns the notifications about one table.
#[derive(Debug, Clone)]
pub struct Monitor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Socket for requests, apart from the notifications.
    requests: Mutex<Socket>,
    counts: watch::Sender<Counts>,
    /// Requests to read all notifications that have arrived.
    drains: mpsc::UnboundedSender<oneshot::Sender<()>>,
}

/// Notifications since the start of the monitor.
#[derive(Debug, Clone, Default)]
struct Counts {
    /// Number of transactions that touched each subscribed table.
    transactions: BTreeMap<String, usize>,
    /// Number of reports that notifications were lost.
    losses: usize,
}

/// Notifications about one table since the last call.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Transactions that touched the table.
    pub transactions: usize,
    /// True if notifications were lost (ENOBUFS), so that `transactions` can be too small.
    pub lost: bool,
}

impl Monitor {
    /// Starts to listen. Requires a tokio runtime.
    ///
    /// # Errors
    /// An I/O error if the kernel has no nfnetlink, or if CAP_NET_ADMIN is missing.
    pub fn start() -> io::Result<Self> {
        Self::with_receive_buffer(RECEIVE_BUFFER)
    }

    /// Starts to listen with a receive buffer of `receive_buffer` bytes.
    ///
    /// # Errors
    /// Those of [`Monitor::start`].
    pub(crate) fn with_receive_buffer(receive_buffer: usize) -> io::Result<Self> {
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
        let (drains, drain_requests) = mpsc::unbounded_channel();
        let counts = watch::Sender::default();
        let reader = Reader {
            socket,
            buffer: Vec::with_capacity(MAX_DATAGRAM),
            touched: BTreeSet::new(),
            counts: counts.clone(),
        };
        tokio::spawn(reader.run(drain_requests));
        Ok(Self(Arc::new(Shared { requests: Mutex::new(requests), counts, drains })))
    }

    /// Subscribes to the notifications about a table of the family inet.
    pub fn subscribe(&self, table: &str) -> Subscription {
        self.0.counts.send_if_modified(|counts| {
            counts.transactions.entry(table.to_owned()).or_default();
            false
        });
        let mut counts = self.0.counts.subscribe();
        let seen = counts.borrow_and_update().clone();
        let mut subscription = Subscription {
            monitor: self.clone(),
            table: table.to_owned(),
            transactions: 0,
            losses: seen.losses,
            counts,
        };
        subscription.take();
        subscription
    }

    /// Returns the number of the last transaction of nftables in the network namespace, by any
    /// program and about any table. Transactions are numbered consecutively.
    ///
    /// # Errors
    /// An I/O error if the kernel does not answer with a number.
    pub fn generation(&self) -> io::Result<u32> {
        let mut request = [0; GETGEN_LENGTH as usize];
        request[..4].copy_from_slice(&u32::from(GETGEN_LENGTH).to_ne_bytes());
        let kind = u16::from_le_bytes([NFT_MSG_GETGEN, NFNL_SUBSYS_NFTABLES]);
        request[4..6].copy_from_slice(&kind.to_ne_bytes());
        request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        let requests = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.send(&request, 0)?;
        let mut answer = Vec::with_capacity(MAX_DATAGRAM);
        // The kernel answers within `send`.
        requests.recv(&mut answer, libc::MSG_DONTWAIT)?;
        generation(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Waits until the notifications that have arrived are counted.
    async fn drain(&self) {
        let (done, is_done) = oneshot::channel();
        if self.0.drains.send(done).is_ok() {
            // An error means that the runtime shuts down.
            let _ = is_done.await;
        }
    }
}

/// Task that reads and counts notifications.
struct Reader {
    socket: TokioSocket,
    buffer: Vec<u8>,
    /// Subscribed tables that the transaction that is being read has touched.
    touched: BTreeSet<String>,
    counts: watch::Sender<Counts>,
}

impl Reader {
    async fn run(mut self, mut drains: mpsc::UnboundedReceiver<oneshot::Sender<()>>) {
        loop {
            self.buffer.clear();
            tokio::select! {
                result = self.socket.recv(&mut self.buffer) => {
                    self.evaluate(&result);
                    self.drain();
                }
                drain = drains.recv() => match drain {
                    Some(done) => {
                        self.drain();
                        let _ = done.send(());
                    }
                    None => return,
                }
            }
        }
    }

    /// Reads the notifications that have arrived.
    fn drain(&mut self) {
        loop {
            self.buffer.clear();
            // The asynchronous `recv` can report an empty socket too early, because the runtime
            // limits the reads of a task and learns of new datagrams later.
            let result =
                self.socket.socket_ref().recv(&mut self.buffer, libc::MSG_DONTWAIT).map(drop);
            if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return;
            }
            self.evaluate(&result);
        }
    }

    fn evaluate(&mut self, result: &io::Result<()>) {
        self.counts.send_if_modified(|counts| match result {
            Ok(()) => read(&self.buffer, &mut self.touched, &mut counts.transactions),
            Err(_) => {
                self.touched.clear();
                counts.losses += 1;
                true
            }
        });
    }
}

/// Notifications about one table.
#[derive(Debug)]
pub struct Subscription {
    monitor: Monitor,
    table: String,
    /// Values of [`Counts`] at the last call.
    transactions: usize,
    losses: usize,
    counts: watch::Receiver<Counts>,
}

impl Subscription {
    /// Returns the monitor.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Waits for a transaction that touches the table, or for lost notifications (ENOBUFS).
    /// Cancel-safe.
    pub async fn changed(&mut self) {
        while self.take() == Received::default() {
            // The sender exists as long as the monitor of this subscription.
            let _ = self.counts.changed().await;
        }
    }

    /// Runs `work`. Returns its result and the notifications between its start and its end.
    pub async fn observe<F: Future>(&mut self, work: F) -> (F::Output, Received) {
        self.drain().await;
        let output = work.await;
        (output, self.drain().await)
    }

    /// Waits until the notifications that have arrived are counted, and returns those since the
    /// last call.
    pub async fn drain(&mut self) -> Received {
        self.monitor.drain().await;
        self.take()
    }

    /// Returns the notifications since the last call.
    fn take(&mut self) -> Received {
        let counts = self.counts.borrow_and_update();
        let transactions = counts.transactions.get(&self.table).copied().unwrap_or(0);
        let received = Received {
            transactions: transactions - self.transactions,
            lost: counts.losses != self.losses,
        };
        (self.transactions, self.losses) = (transactions, counts.losses);
        received
    }
}

/// Fuzzing entry point: parses `data` as a datagram of nftables. Each transaction needs a message.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_notifications(data: &[u8]) {
    let _ = generation(data);
    let mut counts = BTreeMap::from([("skein".to_owned(), 0)]);
    read(data, &mut BTreeSet::from(["skein".to_owned()]), &mut counts);
    assert!(counts.values().all(|transactions| *transactions <= data.len() / 16));
}

/// Returns the number in an NFT_MSG_NEWGEN message; `None` if `answer` is another message.
fn generation(answer: &[u8]) -> Option<u32> {
    let message = NetlinkBuffer::new_checked(answer).ok()?;
    if message.message_type().to_le_bytes() != [NFT_MSG_NEWGEN, NFNL_SUBSYS_NFTABLES] {
        return None;
    }
    attribute(message.payload().get(NFGENMSG_LENGTH..)?, NFTA_GEN_ID).and_then(number)
}

/// Counts the transactions that end in `datagram` and have touched a table of `counts`, and returns
/// whether there are any. `touched` carries over to the next datagram.
fn read(
    datagram: &[u8],
    touched: &mut BTreeSet<String>,
    counts: &mut BTreeMap<String, usize>,
) -> bool {
    let mut any = false;
    for message in messages(datagram) {
        let [kind, subsystem] = message.message_type().to_le_bytes();
        match (subsystem, kind) {
            (NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN) => {
                any |= !touched.is_empty();
                for table in mem::take(touched) {
                    *counts.entry(table).or_default() += 1;
                }
            }
            (NFNL_SUBSYS_NFTABLES, _) => {
                if let Some(table) = table_of(message.payload())
                    && counts.contains_key(table)
                    && !touched.contains(table)
                {
                    touched.insert(table.to_owned());
                }
            }
            _ => {}
        }
    }
    any
}

/// Returns the table of the family inet that a message concerns.
fn table_of(payload: &[u8]) -> Option<&str> {
    let (header, attributes) = payload.split_at_checked(NFGENMSG_LENGTH)?;
    text(attribute(attributes, NFTA_TABLE)?).filter(|_| header[0] == NFPROTO_INET)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datagram::ALIGNMENT;

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
        let count = |messages: &[&[u8]]| count(&messages.concat(), &mut BTreeSet::new());
        let end = &*newgen();
        assert_eq!(count(&[&ours, &ours, end]), 1, "The two objects belong to one transaction.");
        assert_eq!(count(&[&ours, end, &other, end, &ours, end]), 2);
        assert_eq!(count(&[&other, &longer, &elsewhere, end]), 0);
        assert_eq!(count(&[&ours]), 0, "the transaction has not ended");
    }

    /// Returns the number of transactions of the table `skein`.
    fn count(datagram: &[u8], touched: &mut BTreeSet<String>) -> usize {
        let mut counts = BTreeMap::from([("skein".to_owned(), 0)]);
        let any = read(datagram, touched, &mut counts);
        assert_eq!(any, counts["skein"] > 0, "only transactions of the table are reported");
        counts["skein"]
    }

    #[test]
    fn transaction_that_spans_datagrams_is_counted_once() {
        let mut touched = BTreeSet::new();
        let ours = message(2, NFPROTO_INET, 1, b"skein\0");
        assert_eq!(count(&ours, &mut touched), 0);
        assert_eq!(count(&newgen(), &mut touched), 1);
        assert!(touched.is_empty(), "the next transaction has touched nothing yet");
    }

    #[test]
    fn truncated_datagrams_end_no_transaction() {
        let whole = [message(2, NFPROTO_INET, 1, b"skein\0"), newgen()].concat();
        for length in 0..whole.len() {
            let cut = count(&whole[..length], &mut BTreeSet::new());
            assert_eq!(cut, 0, "{length} of {} bytes", whole.len());
        }
    }
}
