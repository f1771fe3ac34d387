//! The interface with its addresses, routes and settings: asked for and set by rtnetlink and /proc/sys.
//!
//! Everything here is idempotent: it looks first and changes only what differs. What belongs to
//! Skein is told by marks that the kernel keeps: the alias of the interface, the protocol number of
//! the routes.

#![forbid(unsafe_code)]

pub mod address;
pub mod advertisement;
mod connection;
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
#[doc(hidden)]
pub use self::next_hop::fuzz_next_hops;
