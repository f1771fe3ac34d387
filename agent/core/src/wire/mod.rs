//! What is on the wire: the outer header, inner headers, checksums.

pub mod checksum;
pub mod ecn;
pub mod header;
pub mod ip;
pub mod tcp;
