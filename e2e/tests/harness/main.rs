//! The laboratory and the commands of `cargo e2e`. The runner runs this binary alone, because its
//! tests start laboratories in other processes.

mod commands;
mod laboratory;
