//! Batches: splitting superpackets, sealing them into runs, and merging packets again.

pub mod batch;
pub mod coalesce;
mod gso_batch;
pub mod segment;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod testing;
pub mod vnet;

/// Segments that one superpacket may stand for: the kernel's UDP_MAX_SEGMENTS, which a 64 KiB TCP
/// superpacket reaches only with tiny segments.
pub const MAX_SUPERPACKET_SEGMENTS: usize = 128;

/// Datagrams that are merged into one UDP superpacket: what kernels before 6.9 take.
pub const MAX_MERGED_DATAGRAMS: usize = 64;

/// State of an inner packet's TCP or UDP checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// As on a wire; it may be wrong, and stays so.
    Full,
    /// The field holds the sum of the pseudo-header only (Linux: CHECKSUM_PARTIAL).
    Partial,
}
