//! The 16 bytes in front of every message.

use crate::drop::DropReason;

/// Length of a header in bytes.
pub const HEADER_LEN: usize = 16;
/// Length of an AEAD tag in bytes.
pub const TAG_LEN: usize = 16;
/// What a datagram is longer than its plaintext, in bytes.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;
/// The lane byte of everything but data.
pub const CONTROL_LANE: u8 = 0xff;
/// Most lanes a node may have.
pub const MAX_LANES: usize = 64;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MessageType {
    /// First handshake message.
    Initiation = 1,
    /// Second handshake message.
    Response = 2,
    /// Come again with this cookie.
    CookieReply = 3,
    /// Inner packets.
    Data = 4,
    /// The engine's own messages within a session.
    Control = 5,
}

/// Flags of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Flags(u8);

impl Flags {
    /// Inner TCP and UDP checksums hold the pseudo-header's sum only.
    pub const PARTIAL_CHECKSUM: Flags = Flags(1);

    /// Whether all of `other` are set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A message's header, valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: MessageType,
    /// How to read it.
    pub flags: Flags,
    /// The sender's lane.
    pub lane: u8,
    /// Index of the session or handshake at the receiver.
    pub receiver: u32,
    /// Number of the message.
    pub counter: u64,
}

impl Header {
    /// Reads the header of a datagram.
    ///
    /// # Errors
    /// [`DropReason::OuterHeader`].
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

    /// The header's bytes.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = self.kind as u8;
        out[1] = self.flags.0;
        out[2] = self.lane;
        out[4..8].copy_from_slice(&self.receiver.to_be_bytes());
        out[8..].copy_from_slice(&self.counter.to_be_bytes());
        out
    }
}
