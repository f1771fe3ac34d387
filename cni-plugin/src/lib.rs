//! CNI plugin of Skein (CNI specification 1.1.0), as a library for the binary, tests and fuzz
//! targets.
//!
//! The plugin checks the environment and the network configuration, sends one request to the agent
//! of its node ([`skein_cni_protocol`]), and prints the result in the requested version of the
//! specification. All decisions are the agent's. If the agent does not answer a DEL, the plugin
//! stores the request in the spool and reports success, so that a pod can always be deleted.

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod client;
pub mod config;
pub mod environment;
pub mod plugin;
pub mod result;
pub mod types;
