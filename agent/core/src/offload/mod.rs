//! Offloads: segmentation of superpackets from the TUN, egress batches, and coalescing of packets
//! for the TUN.

pub mod batch;
pub mod coalesce;
mod gso_batch;
pub mod segment;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod testing;
pub mod vnet;

/// Maximum number of segments of a superpacket at the TUN: UDP_MAX_SEGMENTS of Linux
/// (include/linux/udp.h). A 64 KiB TCP superpacket reaches it only with very small segments.
pub const MAX_SUPERPACKET_SEGMENTS: usize = 128;

/// Maximum number of datagrams that are merged into one UDP superpacket: the limit of kernels
/// before 6.9.
pub const MAX_MERGED_DATAGRAMS: usize = 64;

/// State of an inner packet's TCP or UDP checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// The checksum is complete. It may be wrong, and stays so.
    Full,
    /// The field holds the sum of the pseudo-header only (CHECKSUM_PARTIAL of Linux).
    Partial,
}
