//! Why a packet was dropped. Every drop in the data plane is one of these and is counted.

use std::fmt;

/// Which way a dropped packet was going.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the TUN to the underlay.
    Egress,
    /// From the underlay to the TUN.
    Ingress,
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])* $variant:ident => $direction:ident, $label:literal;)*) => {
        /// The reason of a drop; [`DropReason::label`] is the metric's label and never changes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])* $variant,)* }

        impl DropReason {
            /// Every reason, in the order of their discriminants.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];

            /// The value of the `reason` label.
            pub const fn label(self) -> &'static str {
                match self { $(DropReason::$variant => $label,)* }
            }

            /// The way that packets dropped for this reason were going.
            pub const fn direction(self) -> Direction {
                match self { $(DropReason::$variant => Direction::$direction,)* }
            }

            /// What it means, in a sentence for people.
            pub const fn meaning(self) -> &'static str {
                match self { $(DropReason::$variant => concat!($($doc),*).trim_ascii(),)* }
            }
        }
    };
}

impl DropReason {
    /// The reason behind two labels.
    pub fn named(direction: &str, label: &str) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|known| known.direction().label() == direction && known.label() == label)
    }

    /// Whether anybody on the underlay can bring this about, without a key: packets of pods cannot be told from
    /// strangers' noise there. The alert SkeinPacketsDropped counts none of these.
    pub const fn by_strangers(self) -> bool {
        // Those are found behind the tag and the replay window.
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
    /// The virtio_net_hdr or what it says of the packet is impossible (bad offsets, gso_size 0,
    /// legacy UFO, UDP with the ECN bit, an unknown type).
    VnetHeader => Egress, "vnet_header";
    /// The TUN could not hand the packet out.
    TunRead => Egress, "tun_read";
    /// Not an IP packet, or its lengths contradict the buffer.
    EgressMalformed => Egress, "malformed";
    /// No node owns the destination.
    NoRoute => Egress, "no_route";
    /// No session with the owning node, and the queue of packets that wait for one is full or too old.
    NoSession => Egress, "no_session";
    /// Longer than the tunnel to that node carries.
    TooBig => Egress, "too_big";
    /// The session's counter is spent; nothing is sent until the rekey.
    CounterExhausted => Egress, "counter_exhausted";
    /// The AEAD refused (never seen; counted so that it would be).
    SealFailed => Egress, "seal_failed";
    /// EMSGSIZE: larger than the underlay's route allows.
    SendTooBig => Egress, "send_too_big";
    /// ENETUNREACH, EHOSTUNREACH, EADDRNOTAVAIL: the underlay has no route.
    SendUnreachable => Egress, "send_unreachable";
    /// EPERM, EACCES: the host's firewall refused.
    SendDenied => Egress, "send_denied";
    /// ENOBUFS, ENOMEM, EAGAIN: the host's queue was full.
    SendNoBuffer => Egress, "send_no_buffer";
    /// Any other error of the send.
    SendError => Egress, "send_error";
    /// Shorter than a header, an unknown type, or reserved bits set.
    OuterHeader => Ingress, "outer_header";
    /// The kernel cut the datagram (MSG_TRUNC).
    Truncated => Ingress, "truncated";
    /// No session has this receiver index.
    UnknownSession => Ingress, "unknown_session";
    /// The lane is not one that the session has, or not one that this worker owns.
    WrongLane => Ingress, "wrong_lane";
    /// The AEAD tag is wrong.
    AuthFailed => Ingress, "auth_failed";
    /// The counter was seen already.
    Replayed => Ingress, "replayed";
    /// The counter lies before the replay window.
    ReplayWindow => Ingress, "replay_window";
    /// The session is past its end.
    SessionExpired => Ingress, "session_expired";
    /// The plaintext is not a run of whole IP packets.
    InnerMalformed => Ingress, "inner_malformed";
    /// The inner source is not the sending node's.
    InnerSource => Ingress, "inner_source";
    /// The inner destination is not this node's.
    InnerDestination => Ingress, "inner_destination";
    /// The underlay marked congestion on a packet that is not ECN-capable (RFC 6040).
    InnerNotEct => Ingress, "inner_not_ect";
    /// The TUN refused the packet.
    TunWrite => Ingress, "tun_write";
    /// The queue to the session manager was full.
    ManagerQueue => Ingress, "manager_queue";
    /// A handshake message with a wrong first check, or one that does not decrypt.
    HandshakeInvalid => Ingress, "handshake_invalid";
    /// A handshake by a key that no node record holds.
    HandshakeUnknownPeer => Ingress, "handshake_unknown_peer";
    /// A handshake initiation that is not newer than the last.
    HandshakeReplayed => Ingress, "handshake_replayed";
    /// Too many handshakes from one source, or too many responses to one handshake.
    HandshakeRateLimited => Ingress, "handshake_rate_limited";
    /// Under load, a handshake without a valid cookie; one was sent.
    HandshakeCookieRequired => Ingress, "handshake_cookie_required";
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl Direction {
    /// The value of the `direction` label.
    pub const fn label(self) -> &'static str {
        match self {
            Direction::Egress => "egress",
            Direction::Ingress => "ingress",
        }
    }
}

/// Drops by reason, counted in plain memory: a worker adds these to its shared counters once a batch.
#[derive(Debug, Clone)]
pub struct DropCounts([u64; DropReason::ALL.len()]);

impl Default for DropCounts {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl DropCounts {
    /// Counts one packet.
    pub fn add(&mut self, reason: DropReason) {
        self.add_many(reason, 1);
    }

    /// Counts `packets` packets.
    pub fn add_many(&mut self, reason: DropReason, packets: u64) {
        self.0[reason as usize] += packets;
    }

    /// How many were counted for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every count that is not zero.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&r| (r, self.get(r))).filter(|(_, n)| *n > 0)
    }

    /// Hands over every count that is not zero and starts again at zero.
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
            assert_eq!(DropReason::named(a.direction().label(), a.label()), Some(*a));
        }
    }

    #[test]
    fn drained_counts_start_again() {
        let mut counts = DropCounts::default();
        counts.add(DropReason::Replayed);
        counts.add_many(DropReason::NoRoute, 2);
        assert_eq!(counts.iter().count(), 2);
        let drained: Vec<_> = counts.drain().collect();
        assert_eq!(drained, [(DropReason::NoRoute, 2), (DropReason::Replayed, 1)]);
        assert_eq!(counts.drain().count(), 0);
    }
}
