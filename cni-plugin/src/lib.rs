//! Skein's CNI plugin as a library: the documents of the CNI specification, and what the plugin does
//! with them and with the protocol between plugin and agent ([`skein_cni_protocol`]).
//!
//! The plugin decides nothing: it checks what the runtime says, hands it to the agent of its node,
//! and says the answer in the version that was asked for. A DEL that finds no agent is kept in a
//! spool for the next one, so that a pod can always be deleted.

#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod environment;
pub mod plugin;
pub mod result;
pub mod types;
