//! The tunnel: how two nodes come to share keys, and what they do with them.

pub mod replay;
pub mod session;
