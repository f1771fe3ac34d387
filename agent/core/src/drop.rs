//! Reasons of packet drops, and their counters. Every drop in the data plane has a reason and is
//! counted.

use std::fmt;

/// Direction of a dropped packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Direction from the TUN to the underlay.
    Egress,
    /// Direction from the underlay to the TUN.
    Ingress,
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])* $variant:ident => $direction:ident, $label:literal;)*) => {
        /// The reason of a packet drop. [`DropReason::label`] is a metric label and never changes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])* $variant,)* }

        impl DropReason {
            /// All reasons in the order of their discriminants.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];

            /// Returns the value of the metric label `reason`.
            pub const fn label(self) -> &'static str {
                match self { $(DropReason::$variant => $label,)* }
            }

            /// Returns the direction of packets that are dropped for this reason.
            pub const fn direction(self) -> Direction {
                match self { $(DropReason::$variant => Direction::$direction,)* }
            }

            /// Returns the meaning as one sentence for users.
            pub const fn meaning(self) -> &'static str {
                match self { $(DropReason::$variant => concat!($($doc),*).trim_ascii(),)* }
            }
        }
    };
}

impl DropReason {
    /// Returns the reason with these values of the metric labels `direction` and `reason`.
    pub fn from_labels(direction: &str, label: &str) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|known| known.direction().label() == direction && known.label() == label)
    }

    /// Returns whether a sender without a session key can cause this drop. The alert
    /// SkeinPacketsDropped excludes these reasons.
    pub const fn is_possible_without_key(self) -> bool {
        // These drops happen after the AEAD tag and the replay window have been checked.
        let authentic = matches!(
            self,
            Self::InnerMalformed
                | Self::InnerSource
                | Self::InnerDestination
                | Self::InnerNotEct
                | Self::TunWrite
        );
        matches!(self.direction(), Direction::Ingress) && !authentic
    }
}

drop_reasons! {
    /// The virtio_net_hdr of the packet is invalid or contradicts the packet (bad offsets, gso_size
    /// 0, legacy UFO, UDP with the ECN bit, an unknown type).
    VnetHeader => Egress, "vnet_header";
    /// Reading a packet from the TUN failed.
    TunRead => Egress, "tun_read";
    /// The packet is not an IP packet, or its length fields contradict its length.
    EgressMalformed => Egress, "malformed";
    /// No node owns the destination address.
    NoRoute => Egress, "no_route";
    /// There is no session with the destination node, and the queue of waiting packets is full or
    /// the packet waited too long.
    NoSession => Egress, "no_session";
    /// The packet is longer than the MTU of the tunnel to its destination node.
    TooBig => Egress, "too_big";
    /// The lane has used its 2^32 nonces; packets are dropped until a new session is established.
    CounterExhausted => Egress, "counter_exhausted";
    /// The AEAD failed to encrypt the packet; this is not expected to happen.
    SealFailed => Egress, "seal_failed";
    /// The datagram is longer than the underlay's route allows (EMSGSIZE).
    SendTooBig => Egress, "send_too_big";
    /// The underlay has no route to the peer (ENETUNREACH, EHOSTUNREACH, EADDRNOTAVAIL).
    SendUnreachable => Egress, "send_unreachable";
    /// The host's firewall refused the datagram (EPERM, EACCES).
    SendDenied => Egress, "send_denied";
    /// The host's send queue was full (ENOBUFS, ENOMEM, EAGAIN).
    SendNoBuffer => Egress, "send_no_buffer";
    /// Sending the datagram failed with another error.
    SendError => Egress, "send_error";
    /// The datagram is shorter than a header, has an unknown type, or has reserved bits set.
    OuterHeader => Ingress, "outer_header";
    /// The kernel truncated the datagram (MSG_TRUNC).
    Truncated => Ingress, "truncated";
    /// No session has the receiver index of the datagram.
    UnknownSession => Ingress, "unknown_session";
    /// The session lacks the datagram's lane, or the datagram arrived at another lane's thread.
    WrongLane => Ingress, "wrong_lane";
    /// The AEAD tag of the datagram is wrong.
    AuthFailed => Ingress, "auth_failed";
    /// A datagram with the same counter has been received before.
    Replayed => Ingress, "replayed";
    /// The counter is older than the replay window.
    ReplayWindow => Ingress, "replay_window";
    /// The session has expired.
    SessionExpired => Ingress, "session_expired";
    /// The plaintext is not a sequence of whole IP packets.
    InnerMalformed => Ingress, "inner_malformed";
    /// The inner source address does not belong to the sending node.
    InnerSource => Ingress, "inner_source";
    /// The inner destination address does not belong to this node.
    InnerDestination => Ingress, "inner_destination";
    /// The underlay marked congestion on a packet that is not ECN-capable (RFC 6040).
    InnerNotEct => Ingress, "inner_not_ect";
    /// Writing the packet to the TUN failed.
    TunWrite => Ingress, "tun_write";
    /// The queue to the session manager was full, or one session sent too many control messages.
    ManagerQueue => Ingress, "manager_queue";
    /// The control message is longer than 9216 bytes.
    ControlTooLong => Ingress, "control_too_long";
    /// The handshake message is malformed, has a wrong mac1 or an unknown handshake index, cannot
    /// be decrypted, or has no cipher in common with this node.
    HandshakeInvalid => Ingress, "handshake_invalid";
    /// No node record has the public key of the handshake's sender.
    HandshakeUnknownPeer => Ingress, "handshake_unknown_peer";
    /// The handshake initiation is not newer than the last accepted one.
    HandshakeReplayed => Ingress, "handshake_replayed";
    /// One source or peer sent too many handshake initiations, or one initiation got too many
    /// responses.
    HandshakeRateLimited => Ingress, "handshake_rate_limited";
    /// The node is under load and answered an initiation without a valid cookie with a cookie.
    HandshakeCookieRequired => Ingress, "handshake_cookie_required";
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl std::error::Error for DropReason {}

impl Direction {
    /// Returns the value of the metric label `direction`.
    pub const fn label(self) -> &'static str {
        match self {
            Direction::Egress => "egress",
            Direction::Ingress => "ingress",
        }
    }
}

/// Drop counters by reason, without atomics. A lane adds them to its shared counters once per
/// batch.
#[derive(Debug, Clone)]
pub struct DropCounts([u64; DropReason::ALL.len()]);

impl Default for DropCounts {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl DropCounts {
    /// Counts one dropped packet.
    pub fn add(&mut self, reason: DropReason) {
        self.add_many(reason, 1);
    }

    /// Counts `packets` dropped packets.
    pub fn add_many(&mut self, reason: DropReason, packets: u64) {
        self.0[reason as usize] += packets;
    }

    /// Returns the number of packets dropped for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Returns the reasons with a count above zero.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&r| (r, self.get(r))).filter(|(_, n)| *n > 0)
    }

    /// Returns the reasons with a count above zero and resets the counts.
    pub fn drain(&mut self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().filter_map(|&r| {
            let n = std::mem::take(&mut self.0[r as usize]);
            (n > 0).then_some((r, n))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_unique_within_a_direction() {
        for (i, a) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*a as usize, i);
            for b in &DropReason::ALL[i + 1..] {
                assert!(a.label() != b.label() || a.direction() != b.direction(), "{a} twice");
            }
            assert_eq!(DropReason::from_labels(a.direction().label(), a.label()), Some(*a));
        }
    }

    #[test]
    fn drained_counts_restart_at_zero() {
        let mut counts = DropCounts::default();
        counts.add(DropReason::Replayed);
        counts.add_many(DropReason::NoRoute, 2);
        assert_eq!(counts.iter().count(), 2);
        let drained: Vec<_> = counts.drain().collect();
        assert_eq!(drained, [(DropReason::NoRoute, 2), (DropReason::Replayed, 1)]);
        assert_eq!(counts.drain().count(), 0);
    }
}
