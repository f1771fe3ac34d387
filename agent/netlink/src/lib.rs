//! Network configuration of the host: links, addresses, routes, neighbours, sysctls and nftables,
//! by rtnetlink, /proc/sys and the program `nft`.
//!
//! Operations are idempotent. They compare the kernel's state with the wanted state and change only
//! what differs. Objects of Skein are identified by marks that the kernel stores: the alias of an
//! interface, the protocol number of a route.

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod address;
pub mod advertisement;
mod connection;
pub mod conntrack;
mod datagram;
mod error;
pub mod firewall;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod interface;
pub mod link;
pub mod lookup;
pub mod monitor;
mod netconf;
mod next_hop;
pub mod nftables;
pub mod pod;
pub mod route;
pub mod staged;
pub mod sysctl;
#[cfg(test)]
mod testing;
pub mod underlay;
pub mod unreachable;

pub use self::connection::{Netlink, NetlinkError};
pub use self::error::InterfaceError;
