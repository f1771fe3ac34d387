//! To be written.

pub mod header;
