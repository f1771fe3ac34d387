//! Tests on a real Kubernetes. Only `cargo e2e cluster test` runs them.

mod current;
mod laboratory;
mod operators;
mod rotation;
mod skein;
mod upgrade;
