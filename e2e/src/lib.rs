//! Skein's laboratory on one Linux host: machines and pods as network namespaces, real agents, real
//! packets. Behind `cargo e2e` and the tests of this crate. Needs root.

pub mod bench;
pub mod cargo;
pub mod chart;
pub mod checks;
pub mod cluster;
pub mod console;
pub mod demo;
pub mod image;
pub mod lab;
pub mod load;
pub mod newer;
pub mod packages;
pub mod programs;
pub mod soak;
pub mod suite;
pub mod versions;
