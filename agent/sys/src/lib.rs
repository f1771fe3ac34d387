//! Kernel interfaces of Skein: TUN devices, UDP sockets, epoll, descriptors, and the confinement of
//! a process. The crate contains the only unsafe code of the agent and depends on no async runtime.
//!
//! The public interface consists of byte slices, descriptors, [`std::net::SocketAddr`] and typed
//! errors, without structures of libc. The crate has no state of sessions, peers or routes. From
//! `skein-core` it uses four facts: the ECN field, the drop reasons, [`send::GsoBatch`], and the
//! offset of the lane byte, by which the kernel distributes datagrams to the lanes' sockets
//! ([`udp::bind_lanes`]).

#![warn(clippy::missing_errors_doc)]

pub mod confine;
pub mod descriptors;
pub mod fallback;
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
