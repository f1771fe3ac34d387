//! The outer header: the 16 bytes at the start of every Skein datagram.

use crate::drop::DropReason;

/// Length of the outer header in bytes.
pub const HEADER_LEN: usize = 16;
/// Length of an AEAD tag in bytes.
pub const TAG_LEN: usize = 16;
/// Length of a data datagram beyond its plaintext in bytes: header and tag.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;
/// Lane byte of all messages except data.
pub const CONTROL_LANE: u8 = 0xff;
/// Offset of the lane byte in the header, bytes.
pub const LANE_OFFSET: usize = 2;
/// Maximum number of lanes of a node.
pub const MAX_LANES: usize = 64;

/// Type of a message, byte 0 of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MessageType {
    /// First handshake message, sent by the initiator.
    Initiation = 1,
    /// Second handshake message, sent by the responder.
    Response = 2,
    /// Cookie for an initiator whose responder is under load.
    CookieReply = 3,
    /// Encrypted inner IP packets.
    Data = 4,
    /// Encrypted message between two engines (ping or pong).
    Control = 5,
}

/// Flags of a data message, byte 1 of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Flags(u8);

impl Flags {
    /// The inner TCP and UDP checksum fields hold the sum of the pseudo-header only.
    pub const PARTIAL_CHECKSUM: Flags = Flags(1);

    /// Returns true if all flags of `other` are set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A valid outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type of the message.
    pub kind: MessageType,
    /// Flags; empty unless the message is data.
    pub flags: Flags,
    /// Lane of the sender, 0 to 63 for data; [`CONTROL_LANE`] for other messages.
    pub lane: u8,
    /// Index of the session or handshake at the receiver; 0 in initiations.
    pub receiver: u32,
    /// Nonce counter of data and control messages; 0 in handshake messages.
    pub counter: u64,
}

impl Header {
    /// Parses the header of a datagram.
    ///
    /// # Errors
    /// [`DropReason::OuterHeader`] if the datagram is shorter than [`HEADER_LEN`], if the type is
    /// unknown, if reserved bits are set, or if the lane does not fit the type.
    #[inline]
    pub fn parse(datagram: &[u8]) -> Result<Header, DropReason> {
        let Some((head, _)) = datagram.split_first_chunk::<HEADER_LEN>() else {
            return Err(DropReason::OuterHeader);
        };
        let [kind, flags, lane, reserved, r0, r1, r2, r3, counter @ ..] = *head;
        let kind = match kind {
            1 => MessageType::Initiation,
            2 => MessageType::Response,
            3 => MessageType::CookieReply,
            4 => MessageType::Data,
            5 => MessageType::Control,
            _ => return Err(DropReason::OuterHeader),
        };
        let data = kind == MessageType::Data;
        let lane_fits = if data { usize::from(lane) < MAX_LANES } else { lane == CONTROL_LANE };
        if reserved != 0 || flags & !u8::from(data) != 0 || !lane_fits {
            return Err(DropReason::OuterHeader);
        }
        Ok(Header {
            kind,
            flags: Flags(flags),
            lane,
            receiver: u32::from_be_bytes([r0, r1, r2, r3]),
            counter: u64::from_be_bytes(counter),
        })
    }

    /// Encodes the header.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = self.kind as u8;
        out[1] = self.flags.0;
        out[LANE_OFFSET] = self.lane;
        out[4..8].copy_from_slice(&self.receiver.to_be_bytes());
        out[8..].copy_from_slice(&self.counter.to_be_bytes());
        out
    }
}
