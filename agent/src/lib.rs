//! The Skein node agent: a control process, a data process, and the commands around them.

pub mod ipc;
pub mod keys;
