//! Skein's CNI types and the protocol between the plugin and the agent.
//!
//! The types are those of the CNI specification 1.1.0, as JSON on the plugin's standard input and
//! output. The plugin itself is not part of this release.

#![forbid(unsafe_code)]

pub mod protocol;
pub mod types;
