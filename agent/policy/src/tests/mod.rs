//! Properties of the compiler on random clusters.

#![allow(clippy::unwrap_used)]

mod agreement;
mod examples;
mod generate;
mod incremental;
mod kernel;
mod mutations;
