//! Kernel features that the data plane runs without.

use std::io;

/// Kernel feature that the data plane can run without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// UDP superpackets on the TUN device (TUN_F_USO4, TUN_F_USO6).
    TunUso,
    /// TCP superpackets on the TUN device (TUN_F_TSO4, TUN_F_TSO6).
    TunTso,
    /// Partial checksums on the TUN device (TUN_F_CSUM).
    TunChecksum,
    /// GSO batches on send (UDP_SEGMENT).
    UdpGso,
    /// Merged datagrams on receive (UDP_GRO).
    UdpGro,
    /// Reports of the ECN field of received datagrams (IP_RECVTOS, IPV6_RECVTCLASS).
    UdpEcn,
    /// Distribution of datagrams to the lanes' sockets (SO_ATTACH_REUSEPORT_CBPF).
    ReuseportSteering,
    /// Receive buffer of the requested size (SO_RCVBUF).
    ReceiveBuffer,
    /// Send buffer of the requested size (SO_SNDBUF).
    SendBuffer,
}

impl Feature {
    /// Features of a TUN device, in the order in which
    /// [`open_queues`](crate::tun::open_queues) disables them if the kernel refuses them.
    pub const TUN: [Self; 3] = [Self::TunUso, Self::TunTso, Self::TunChecksum];

    /// Returns the name of the feature in the output of `skein-agent check` and in the messages
    /// between keeper and data process.
    pub const fn label(self) -> &'static str {
        match self {
            Self::TunUso => "tun_uso",
            Self::TunTso => "tun_tso",
            Self::TunChecksum => "tun_checksum",
            Self::UdpGso => "udp_gso",
            Self::UdpGro => "udp_gro",
            Self::UdpEcn => "udp_ecn",
            Self::ReuseportSteering => "reuseport_steering",
            Self::ReceiveBuffer => "receive_buffer",
            Self::SendBuffer => "send_buffer",
        }
    }
}

/// A feature that is not in use, or a socket buffer that is smaller than requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// Missing feature.
    pub feature: Feature,
    /// Reason, for users.
    pub reason: String,
}

impl Fallback {
    /// Returns the fallback of a feature that the configuration disables.
    pub(crate) fn disabled(feature: Feature) -> Self {
        Self { feature, reason: "off in the configuration".to_owned() }
    }

    /// Returns the fallback of a feature that the kernel refused.
    pub fn refused(feature: Feature, error: &io::Error) -> Self {
        Self { feature, reason: format!("the kernel refused it: {error}") }
    }
}
