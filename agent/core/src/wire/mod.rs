//! Formats of the outer header and of inner packets: headers, ECN field, checksums.

pub mod checksum;
pub mod ecn;
pub mod header;
pub mod ip;
pub mod tcp;
