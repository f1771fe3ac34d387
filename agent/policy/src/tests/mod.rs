//! Properties of the compiler on random clusters.

#![allow(clippy::unwrap_used)]

mod agreement;
mod connections;
mod demand;
mod enforcement;
mod examples;
mod generate;
mod hosts;
mod incremental;
mod kernel;
mod mutations;
mod packets;
