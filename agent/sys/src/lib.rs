//! The edge to the kernel: plain descriptors, no runtime, and the agent's only unsafe code.
//!
//! Nothing in here knows of tunnels, sessions or routes. What goes out and comes in are byte
//! slices, [`std::net::SocketAddr`] and typed errors; no libc structure leaves the module.

pub mod confine;
pub mod descriptors;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod landlock;
pub mod link;
pub mod lock;
pub mod memory;
pub mod netns;
pub mod poll;
pub mod probe;
pub mod recv;
pub mod seccomp;
pub mod send;
pub mod socket;
mod sockopt;
pub mod tun;
pub mod udp;

pub use netns::in_new_network_namespace;
