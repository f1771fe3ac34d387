//! The Skein node agent: a control process, a data process, and the commands around them.

#![forbid(unsafe_code)]

// A short name for the crate's former place.
use skein_sys as sys;

mod address;
pub mod app;
pub mod cni;
mod commands;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod failure;
pub mod firewall;
#[doc(hidden)]
pub mod fuzzing;
pub mod http;
pub mod instance;
pub mod ipc;
pub mod keys;
pub mod lifecycle;
pub mod logging;
pub mod metrics;
pub mod netlink;
pub mod status;
