//! Skein's CNI plugin as a library: the documents of the CNI specification, the protocol between plugin
//! and agent, and what the plugin does with both.
//!
//! The plugin decides nothing: it checks what the runtime says, hands it to the agent of its node,
//! and says the answer in the version that was asked for. A DEL that finds no agent is kept in a
//! spool for the next one, so that a pod can always be deleted.

#![forbid(unsafe_code)]

mod address;
pub mod client;
pub mod config;
pub mod environment;
pub mod frame;
pub mod plugin;
pub mod protocol;
pub mod result;
pub mod spool;
pub mod types;
