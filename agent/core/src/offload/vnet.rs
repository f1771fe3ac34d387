//! `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h), as a TUN device with IFF_VNET_HDR
//! puts it before each packet: 10 bytes, native endian.

/// The checksum field holds the pseudo-header's sum, and the rest is to be added.
pub const NEEDS_CSUM: u8 = 1;
/// Not a superpacket.
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// UDP fragmentation offload: gone from Linux.
pub const GSO_UDP: u8 = 3;
/// TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// UDP segmentation, either family.
pub const GSO_UDP_L4: u8 = 5;
/// Bit of `gso_type`: the TCP superpacket has CWR set.
pub const GSO_ECN: u8 = 0x80;

/// The header's fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`] or 0; others mean nothing here.
    pub flags: u8,
    /// One of the `GSO_` constants, [`GSO_ECN`] beside it.
    pub gso_type: u8,
    /// Length of all headers in bytes. What the kernel says here is wrong for forwarded packets.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the checksum begins, in bytes from the packet's start.
    pub csum_start: u16,
    /// Where the checksum is stored, in bytes from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Length in bytes.
    pub const LEN: usize = 10;

    /// Reads the header at the start of `bytes`.
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

    /// The header as the kernel reads it.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        let fields = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (at, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            at.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}
