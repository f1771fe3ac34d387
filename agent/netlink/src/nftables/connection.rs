//! Requests to nftables by netlink: transactions that change elements, and dumps.

use std::io;

use netlink_packet_netfilter::nftables::{NfTablesMessage, SetElementList, SetElementMessage};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::{Socket, SocketAddr, protocols};
use thiserror::Error;

use super::element::Change;
use super::message::{MAX_DATAGRAM, NFGENMSG_LENGTH, NFNL_SUBSYS_NFTABLES, NLM_F_REQUEST};
use crate::datagram::{ALIGNMENT, messages};

// Flags and types of messages (linux/netlink.h).
const NLM_F_ACK: u16 = 0x004;
const NLM_F_DUMP_INTR: u16 = 0x010;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Maximum number of elements of one message: the length of an attribute is below 64 KiB.
const MAX_ELEMENTS: usize = 256;
/// Maximum number of repetitions of a dump that changes interrupt.
const MAX_DUMPS: usize = 10;

/// Errors of requests to nftables.
#[derive(Debug, Error)]
pub enum NftablesError {
    /// The socket failed, or the kernel has no nftables.
    #[error("cannot access nftables by netlink: {0}")]
    Io(#[from] io::Error),
    /// The set, its table, or an element to remove does not exist (ENOENT).
    #[error("nftables has no set {set}, or no such element in it")]
    Absent {
        /// Name of the set or map.
        set: String,
    },
    /// The element exists with another verdict, or overlaps an interval (EEXIST, EBUSY).
    #[error("an element to add to the nftables set {set} is already there in another form")]
    Conflict {
        /// Name of the set or map.
        set: String,
    },
    /// The kernel refused the change of a set for another reason.
    #[error("nftables refused a change of the set {set}: {source}")]
    Refused {
        /// Name of the set or map.
        set: String,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The answer of the kernel has an unknown form.
    #[error("cannot parse an answer of nftables")]
    Unreadable,
    /// Changes by other programs interrupted every attempt to read the table.
    #[error("other programs change nftables while the table is read")]
    Contended,
}

/// Connection to nftables in the network namespace of the thread that created it. Calls block the
/// thread: a transaction waits for transactions of other programs, which can take seconds.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// Opens the connection.
    ///
    /// # Errors
    /// `Io` if the kernel has no nfnetlink.
    pub fn open() -> Result<Self, NftablesError> {
        let mut socket = Socket::new(protocols::NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors contain only the header of the request, not the whole request.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Applies changes of elements in their order, in one transaction: completely or not at all.
    /// The socket's send buffer (`net.core.wmem_default`) limits a transaction to about 2,000
    /// changes.
    ///
    /// # Errors
    /// `Absent` and `Conflict` if the content of the table differs from what the caller assumes;
    /// `Refused` if the kernel refuses a change for another reason; `Io` if the transaction is too
    /// large, or if CAP_NET_ADMIN is missing.
    pub fn commit(&mut self, table: &str, changes: &[Change]) -> Result<(), NftablesError> {
        self.drain();
        if changes.is_empty() {
            return Ok(());
        }
        let mut batch = Vec::new();
        let begin = self.add(&mut batch, &control(ControlMessage::BatchBegin), NLM_F_REQUEST);
        let groups: Vec<_> = changes
            .chunk_by(|a, b| a.set == b.set && a.added == b.added)
            .flat_map(|group| group.chunks(MAX_ELEMENTS))
            .collect();
        let mut sets = Vec::with_capacity(groups.len());
        for (at, group) in groups.iter().enumerate() {
            let mut flags = NLM_F_REQUEST | NLM_F_CREATE;
            if at + 1 == groups.len() {
                // The kernel reports errors of all messages. The acknowledgement of the last
                // message shows that the transaction has succeeded.
                flags |= NLM_F_ACK;
            }
            let sequence = self.add(&mut batch, &elements(table, group), flags);
            sets.push((sequence, &group[0].set));
        }
        self.add(&mut batch, &control(ControlMessage::BatchEnd), NLM_F_REQUEST);
        self.socket.send(&batch, 0)?;
        // The kernel executes the transaction within `send`.
        let mut acknowledged = false;
        let mut failure: Option<(u32, i32)> = None;
        self.receive(|sequence, kind, _, payload| {
            let code = error_code(payload).filter(|_| kind == NLMSG_ERROR);
            match code {
                Some(0) => acknowledged = true,
                // Later errors can be consequences of the first.
                Some(code) => failure = failure.or(Some((sequence, -code))),
                None => {}
            }
            Ok(false)
        })?;
        let Some((sequence, errno)) = failure else {
            return if acknowledged { Ok(()) } else { Err(NftablesError::Unreadable) };
        };
        let source = io::Error::from_raw_os_error(errno);
        let set = sets.iter().find(|(of, _)| *of == sequence).map(|(_, set)| (*set).clone());
        let Some(set) = set.filter(|_| sequence != begin) else { return Err(source.into()) };
        Err(match errno {
            libc::ENOENT => NftablesError::Absent { set },
            libc::EEXIST | libc::EBUSY => NftablesError::Conflict { set },
            _ => NftablesError::Refused { set, source },
        })
    }

    /// Requests a dump and passes the family and the attributes of each object to `object`. Calls
    /// `start` before the first object of each attempt: a change by another program interrupts a
    /// dump, which is then repeated. Returns false if the kernel reports that the table or set does
    /// not exist.
    pub(crate) fn dump<T>(
        &mut self,
        request: &NetfilterMessage,
        found: &mut Vec<T>,
        mut object: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<bool, NftablesError> {
        for _ in 0..MAX_DUMPS {
            self.drain();
            found.clear();
            let mut message = Vec::new();
            self.add(&mut message, request, NLM_F_REQUEST | NLM_F_DUMP);
            self.socket.send(&message, 0)?;
            let (mut interrupted, mut exists, mut done) = (false, true, false);
            self.receive(|_, kind, flags, payload| {
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
                match kind {
                    // A dump that fails after its first objects ends with an error (netlink(7)).
                    NLMSG_DONE => match error_code(payload) {
                        Some(code) if code < 0 => {
                            return Err(io::Error::from_raw_os_error(-code).into());
                        }
                        _ => done = true,
                    },
                    NLMSG_ERROR => match error_code(payload) {
                        Some(code) if -code == libc::ENOENT => (exists, done) = (false, true),
                        Some(code) if -code == libc::EINTR => (interrupted, done) = (true, true),
                        Some(code) => return Err(io::Error::from_raw_os_error(-code).into()),
                        None => return Err(NftablesError::Unreadable),
                    },
                    _ => found.extend(payload.get(NFGENMSG_LENGTH..).and_then(&mut object)),
                }
                Ok(done)
            })?;
            match (done, interrupted) {
                (false, _) => return Err(NftablesError::Unreadable),
                (true, false) => return Ok(exists),
                (true, true) => {}
            }
        }
        Err(NftablesError::Contended)
    }

    /// Appends a message to a datagram and returns the message's sequence number.
    fn add(&mut self, datagram: &mut Vec<u8>, message: &NetfilterMessage, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (flags, self.sequence);
        let payload = NetlinkPayload::InnerMessage(message.clone());
        let mut message = NetlinkMessage::new(header, payload);
        message.finalize();
        let start = datagram.len();
        datagram.resize(start + message.buffer_len().next_multiple_of(ALIGNMENT), 0);
        message.serialize(&mut datagram[start..]);
        self.sequence
    }

    /// Passes sequence number, type, flags and payload of each answer to `handle`, until `handle`
    /// returns true or no answer is left. The kernel has answered when `send` returns, and
    /// continues a dump within `recv`.
    fn receive(
        &self,
        mut handle: impl FnMut(u32, u16, u16, &[u8]) -> Result<bool, NftablesError>,
    ) -> Result<(), NftablesError> {
        let mut datagram = Vec::with_capacity(MAX_DATAGRAM);
        loop {
            datagram.clear();
            match self.socket.recv(&mut datagram, libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            };
            for message in messages(&datagram) {
                let (sequence, kind) = (message.sequence_number(), message.message_type());
                if handle(sequence, kind, message.flags(), message.payload())? {
                    return Ok(());
                }
            }
        }
    }

    /// Discards answers to earlier requests.
    fn drain(&self) {
        let mut datagram = Vec::with_capacity(MAX_DATAGRAM);
        while self.socket.recv(&mut datagram, libc::MSG_DONTWAIT).is_ok() {
            datagram.clear();
        }
    }
}

/// Returns the code of an NLMSG_ERROR message: zero, or a negative error number.
fn error_code(payload: &[u8]) -> Option<i32> {
    payload.first_chunk().map(|code| i32::from_ne_bytes(*code))
}

fn control(message: ControlMessage) -> NetfilterMessage {
    let resource = u16::from(NFNL_SUBSYS_NFTABLES);
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, resource), message)
}

/// Returns a message about objects of tables of the family inet.
pub(super) fn inet(message: impl Into<NetfilterMessageInner>) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), message)
}

/// Returns a message of nftables of a type that has no type of its own.
pub(super) fn raw(
    message_type: u8,
    attributes: Vec<rtnetlink::packet_core::DefaultNla>,
) -> NetfilterMessage {
    inet(NetfilterMessageInner::NfTables(NfTablesMessage::Other { message_type, attributes }))
}

/// Returns the message that adds or removes the elements of a group.
fn elements(table: &str, group: &[Change]) -> NetfilterMessage {
    let attributes = vec![
        SetElementList::Table(table.to_owned()),
        SetElementList::Set(group[0].set.clone()),
        SetElementList::Elements(group.iter().map(Change::encode).collect()),
    ];
    let message = SetElementMessage { attributes };
    let message = match group[0].added {
        true => NfTablesMessage::NewSetElement(message),
        false => NfTablesMessage::DeleteSetElement(message),
    };
    inet(NetfilterMessageInner::NfTables(message))
}
