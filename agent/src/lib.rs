//! The Skein node agent: control process, data process, and commands for operators.

#![forbid(unsafe_code)]
// Without the feature, the type of the Kubernetes connection has no value, so code with it is
// unreachable.
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
pub mod policy;
pub mod status;
pub mod watch;
mod watched_value;
