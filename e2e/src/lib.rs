//! Commands of `cargo e2e` on the laboratory (`skein-lab`): demonstration, test suite, soak,
//! cluster.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod demo;
pub mod soak;
pub mod suite;
pub mod versions;
