//! The Skein node agent: a control process, a data process, and the commands around them.

#![forbid(unsafe_code)]
// Without Kubernetes its connection has no value: code that would use one is unreachable.
#![cfg_attr(not(feature = "kubernetes"), allow(unreachable_code, unused_mut, unused_variables))]

pub mod app;
pub mod cni;
mod commands;
pub mod config;
mod connection;
pub mod control;
pub mod failure;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod http;
pub mod lifecycle;
pub mod listener;
pub mod logging;
pub mod metrics;
pub mod status;
