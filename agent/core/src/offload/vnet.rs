//! `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h): the 10 bytes, native endian, that
//! precede each packet of a TUN device with IFF_VNET_HDR.

/// Bit of `flags`: the checksum field holds the sum of the pseudo-header, and the rest must be
/// added.
pub const NEEDS_CSUM: u8 = 1;
/// `gso_type` of a single packet.
pub const GSO_NONE: u8 = 0;
/// `gso_type` of a TCP superpacket over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type` of UDP fragmentation offload, which Linux has removed.
pub const GSO_UDP: u8 = 3;
/// `gso_type` of a TCP superpacket over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type` of a UDP superpacket over IPv4 or IPv6.
pub const GSO_UDP_L4: u8 = 5;
/// Bit of `gso_type`: the TCP superpacket has CWR set.
pub const GSO_ECN: u8 = 0x80;

/// Fields of a virtio_net_hdr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`] or 0; other bits have no meaning here.
    pub flags: u8,
    /// Value of a `GSO_` constant, with or without [`GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers in bytes. The kernel's value is wrong for forwarded packets.
    pub hdr_len: u16,
    /// Payload of each segment in bytes.
    pub gso_size: u16,
    /// Start of the bytes that the checksum covers, bytes from the start of the packet.
    pub csum_start: u16,
    /// Place of the checksum field, bytes from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Length of the header in bytes.
    pub const LEN: usize = 10;

    /// Parses the header at the start of `bytes`; `None` if there are fewer than 10 bytes.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let b: &[u8; Self::LEN] = bytes.first_chunk()?;
        Some(Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: u16::from_ne_bytes([b[2], b[3]]),
            gso_size: u16::from_ne_bytes([b[4], b[5]]),
            csum_start: u16::from_ne_bytes([b[6], b[7]]),
            csum_offset: u16::from_ne_bytes([b[8], b[9]]),
        })
    }

    /// Encodes the header in native endian.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        let fields = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (at, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            at.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}
