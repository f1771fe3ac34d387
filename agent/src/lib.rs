//! The Skein node agent: a control process, a data process, and the commands around them.

#![deny(unsafe_code)]

pub mod dataplane;
pub mod ipc;
pub mod keys;
// The one place that talks to the kernel by raw structures.
#[allow(unsafe_code)]
pub mod sys;
