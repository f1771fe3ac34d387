//! Commands of `cargo e2e` that use the laboratory (`skein-lab`).

#![forbid(unsafe_code)]

pub mod cluster;
pub mod demo;
pub mod soak;
pub mod suite;
pub mod versions;
